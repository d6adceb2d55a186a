r"""Seconds and memory of an iteration of lmppo, and of trl's two PPO trainers on the same workloads.

    python benchmarks/speed.py --markdown docs/speed.md
    python benchmarks/speed.py --workloads W2 --systems lmppo --settings micro_batch_size=16
    python benchmarks/speed.py --device cuda --bf16

Every system is a process of its own, and they take turns iteration by iteration (A B C A B C), so that a machine whose speed
changes slows all of them alike; ratios are those of iterations side by side. On a GPU, whose memory has no room for all, they
take turns run by run. Beside each figure is the rate of a matrix product between the iterations.
The first use makes a virtual environment for each version of trl.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from environments import python_of
from measuring import RESULTS, default_threads, origin, run_in_turns, run_job, spread, table, write
from workloads import GPU_WORKLOADS, WORKLOADS, Workload

NAMES = {
    "lmppo": "lmppo",
    "trl_classic": "trl 0.11.4, `PPOTrainer`",
    "trl_experimental": "trl 1.12.0, `experimental.ppo`",
}
SMOKE = {"layers": 2, "width": 16, "heads": 2, "vocab": 64, "batch": 4, "length": 4}
ALL = WORKLOADS | GPU_WORKLOADS
PHASES = ("generate", "reference", "update")
Runs = dict[str, list[dict[str, Any]]]


def measure(work: Workload, systems: Sequence[str], args: argparse.Namespace) -> Runs:
    """Results of each system, one for each round; an error stands in the place of its result."""
    runs: Runs = {system: [] for system in systems}
    together = [list(systems)] if args.device == "cpu" else [[system] for system in systems]
    for number in range(args.rounds):
        for some in together:
            print(f"round {number + 1} of {args.rounds}: {', '.join(some)}", file=sys.stderr, flush=True)
            for system, result in run(work, some, args).items():
                runs[system].append(result)
    return runs


def run(work: Workload, systems: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The results of some systems that take turns; an error stands in the place of a result."""
    job = {"work": dataclasses.asdict(work), "iterations": args.iterations, "device": args.device, "bf16": args.bf16}
    jobs = {system: dict(job) for system in systems}
    if "lmppo" in jobs:
        jobs["lmppo"] |= {"settings": args.settings, "mkl": args.mkl}
    if args.smoke:
        return {system: run_job(system, jobs[system], threads=args.threads, inline=True) for system in systems}
    failed, pythons = {}, {}
    for system in systems:
        try:
            pythons[system] = python_of(system, args.venvs)
        except Exception as error:  # an environment that cannot be made
            failed[system] = {"error": str(error)}
    return failed | run_in_turns({s: jobs[s] for s in pythons}, threads=args.threads, pythons=pythons)


def ratios_of(results: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> list[float]:
    """How many times the seconds of lmppo's iterations those beside them took, in all rounds that both have."""
    rounds = [(theirs, our) for theirs, our in zip(results, ours, strict=False) if "rows" in theirs and "rows" in our]
    pairs = [pair for theirs, our in rounds for pair in zip(theirs["rows"], our["rows"], strict=False)]
    return [theirs["seconds"] / our["seconds"] for theirs, our in pairs]


def rows_of(name: str, runs: Runs) -> list[list[str]]:
    """The rows of the table for one workload."""
    rows = []
    for system, results in runs.items():
        good = [r for r in results if "error" not in r]
        errors = [f"{len(results) - len(good)} of {len(results)} failed: {r['error']}" for r in results if "error" in r]
        if not good:
            rows.append([name, NAMES[system], errors[0], *[""] * 4])
            continue
        iterations = [row for result in good for row in result["rows"]]
        ratios = ratios_of(results, runs.get("lmppo", [])) if system != "lmppo" else []
        cells = [
            "; ".join([spread(row["seconds"] for row in iterations), *errors[:1]]),
            f"{median(row['tokens'] / row['seconds'] for row in iterations):.0f}",
            spread(ratios) if ratios else "",
            f"{median(r['peak_gb'] for r in good):.2f} ({median(r['loaded_gb'] for r in good):.2f})",
            spread(row["probe"] for row in iterations),
        ]
        rows.append([name, NAMES[system], *cells])
    return rows


def phases_of(name: str, runs: Runs) -> list[list[str]]:
    """The row of lmppo's phases for one workload."""
    rows = [row for result in runs.get("lmppo", []) for row in result.get("rows", [])]
    if not rows:
        return []
    rest = [row["seconds"] - sum(row[phase] for phase in PHASES) for row in rows]
    return [[name, *(spread(row[phase] for row in rows) for phase in PHASES), spread(rest, 1)]]


def markdown(results: dict[str, Runs], args: argparse.Namespace) -> str:
    """Both tables, and where they come from."""
    header = ["workload", "system", "seconds per iteration", "tokens/s", "times lmppo's seconds"]
    header += ["peak memory in GB (after loading)", "matrix product, GFLOP/s"]
    parts = [table(header, [row for name, runs in results.items() for row in rows_of(name, runs)])]
    phases = [row for name, runs in results.items() for row in phases_of(name, runs)]
    if phases:
        parts.append(table(["lmppo", *(f"{phase}, seconds" for phase in PHASES), "rest"], phases))
    parts.append(f"Medians (least..most); rounds: {args.rounds}, iterations of each: {args.iterations}.")
    return "\n\n".join([*parts, origin(args.threads, args.device)])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=ALL, help="default: all (on a CPU, all but W5)")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=2, help="runs of each system on each workload")
    parser.add_argument("--iterations", type=int, default=5, help="iterations of a run, after one to warm up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16, in every system")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument(
        "--mkl", action="store_true", help="lmppo leaves all products to MKL, also where oneDNN is faster"
    )
    parser.add_argument("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of lmppo")
    parser.add_argument(
        "--venvs", type=Path, default=RESULTS / "venvs", help="where trl's environments are or are made"
    )
    parser.add_argument("--markdown", type=Path, help="the page whose tables are replaced")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models and lmppo alone, in this process: tries the script"
    )
    args = parser.parse_args(argv)
    args.settings = {name: yaml.safe_load(value) for name, value in (s.split("=", 1) for s in args.settings)}
    args.workloads = args.workloads or list(ALL if args.device == "cuda" else WORKLOADS)
    if args.smoke:
        args.systems = ["lmppo"]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    results = {}
    for name in args.workloads:
        work = ALL[name]
        if args.smoke:
            work = dataclasses.replace(work, **SMOKE, unfrozen=work.unfrozen and 1)
        # The trainer of trl 0.11.4 has no critic of its own.
        systems = [s for s in args.systems if not (work.critic and s == "trl_classic")]
        print(name, file=sys.stderr, flush=True)
        results[name] = measure(work, systems, args)
    write("speed", results, markdown(results, args), args.markdown)


if __name__ == "__main__":
    main()
