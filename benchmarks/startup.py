r"""How long it takes to start: imports, and the main job from its command to the row of its first step.

    python benchmarks/startup.py --markdown docs/speed.md

Each import and each job is a process of its own, and they take turns, after one round that is not counted: it brings the
files into the disk cache. An import's memory is what is resident after it; a job's is the peak of its largest process.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import GB, HERE, default_threads, origin, spread, table, write

IMPORTS = (
    "import torch",
    "from transformers import GPT2LMHeadModel",
    "from transformers import GPT2LMHeadModel, TrainerState",
    "from lmppo import PPOTrainer",
)
MEASURE = """
import sys, time
started = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - started
sys.path.insert(0, sys.argv[2])
from measuring import memory_now
print(seconds, memory_now("cpu"))
"""
RECIPE = ("recipes/ppo_sentiment.py", "--config", "recipes/configs/tiny_reviews.yaml", "--max_steps", "1")
JOBS = {
    "accelerate launch": ("-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", *RECIPE),
    "python": RECIPE,
}
SMOKE = ("--rollout_batch_size", "4", "--minibatch_size", "4", "--micro_batch_size", "4", "--eval_completions", "4")


def environment(threads: int) -> dict[str, str]:
    """The environment of all processes."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}


def import_once(statement: str, threads: int) -> dict[str, float]:
    """Seconds of a statement in a new process, and the memory that is resident after it."""
    command = [sys.executable, "-c", MEASURE, statement, str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(threads))
    seconds, resident = done.stdout.split()[-2:]
    return {"seconds": float(seconds), "gb": int(resident) / GB}


def run_once(command: Sequence[str], threads: int) -> dict[str, float]:
    """Seconds of a job from its command to the row of its first step, and what that row says of them.

    Raises:
        CalledProcessError: The job failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--output_dir", f"{scratch}/run", "--cpu_threads", str(threads)]
        arguments, log = [sys.executable, *command, *flags], Path(scratch) / "log"
        started = time.time()
        with log.open("w") as out:
            job = subprocess.Popen(arguments, stdout=out, stderr=out, cwd=HERE.parent, env=environment(threads))
            _, status, usage = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
        if job.returncode:
            print(log.read_text(), file=sys.stderr)
            raise subprocess.CalledProcessError(job.returncode, arguments)
        metrics = Path(scratch) / "run" / "metrics.jsonl"
        row = json.loads(metrics.read_text())  # one row, written when the step was done
        seconds = metrics.stat().st_mtime - started
    step = row["time/rollout"] + row["time/update"]
    return {"seconds": seconds, "startup": row["time/startup"], "step": step, "gb": usage.ru_maxrss * 1024 / GB}


def markdown(results: dict[str, dict[str, list[dict[str, float]]]], args: argparse.Namespace) -> str:
    """Both tables, and where they come from."""

    def cells(rows: list[dict[str, float]], *names: str) -> list[str]:
        return [spread(row[name] for row in rows) for name in names]

    imports = [[f"`{name}`", *cells(rows, "seconds", "gb")] for name, rows in results["imports"].items()]
    jobs = [[f"`{name}`", *cells(rows, "seconds", "startup", "step", "gb")] for name, rows in results["jobs"].items()]
    parts = [table(["import", "seconds", "resident GB"], imports)]
    parts.append(table(["main job by", "to the first row, seconds", "`time/startup`", "the step", "peak GB"], jobs))
    parts.append(f"Medians (least..most) of {args.rounds}; the job: `{shlex.join(RECIPE)}`.")
    return "\n\n".join([*parts, origin(args.threads)])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes for each number, after one to warm up")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--markdown", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--smoke", action="store_true", help="one small job and the first import: tries the script")
    args = parser.parse_args(argv)
    imports, jobs, warmup = IMPORTS, JOBS, 1
    if args.smoke:
        imports, jobs, warmup, args.rounds = IMPORTS[:1], {"python": (*RECIPE, *SMOKE)}, 0, 1
    results: dict[str, Any] = {"imports": {name: [] for name in imports}, "jobs": {name: [] for name in jobs}}
    for turn in range(warmup + args.rounds):
        print(f"round {turn}", file=sys.stderr, flush=True)
        for name in imports:
            results["imports"][name].append(import_once(name, args.threads))
        for name, command in jobs.items():
            results["jobs"][name].append(run_once(command, args.threads))
    results = {kind: {name: rows[warmup:] for name, rows in found.items()} for kind, found in results.items()}
    write("startup", results, markdown(results, args), args.markdown)


if __name__ == "__main__":
    main()
