r"""The main job over several seeds, beside best-of-n sampling from its reference, for docs/results.md.

    python benchmarks/main_job.py --seeds 0 1 2 --markdown docs/results.md

Each seed is one run of the recipe, in a process of its own; for rewards at smaller KLs the first seed runs with higher prices
of a nat as well. All policies complete the held-out prompts of the recipe's evaluation, and one function judges them. Runs,
and draws of best-of-n, that are there already (in runs/benchmarks) are not repeated. Seconds are those of start-up, rollouts
and updates, as the run has logged them.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from best_of_n import COLUMNS, CONFIG, REFERENCE, ROOT, job, judge, measure, prompts_of
from learn import at
from measuring import RESULTS, default_threads, origin, spread, table, write
from transformers import AutoModelForCausalLM

from lmppo.metrics import distinct_n
from lmppo.models import ActorCritic, Reference, load_weights, score_tokens
from lmppo.plots import read_metrics
from lmppo.prompts import load_tokenizer, pad_left
from lmppo.sampling import EVALUATION, SamplingParams, sample, uniform_noise
from lmppo.texts import decode_completions, decode_whole

Row = dict[str, float]
NATS = (2.0, 4.0, 6.0, 8.0)


def train(seed: int, output_dir: Path, threads: int, flags: list[str]) -> None:
    """Run the recipe, unless it has been run; its output is in a file beside the run."""
    if (output_dir / "final").exists():
        return
    command = [sys.executable, "recipes/ppo_sentiment.py", "--config", str(CONFIG), "--seed", str(seed)]
    command += ["--output_dir", str(output_dir), "--cpu_threads", str(threads), "--disable_tqdm", "true", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with output_dir.with_name(f"{output_dir.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment, cwd=ROOT)


@torch.no_grad()
def judged(policy: Path, prompts: list[list[int]], draws: int) -> Row:
    """What a policy's completions are worth: means over some draws for each prompt, the first draw that of best-of-n."""
    tokenizer, settings = load_tokenizer(str(REFERENCE)), job()
    reference = Reference(load_weights(AutoModelForCausalLM, str(REFERENCE)))
    model = ActorCritic(load_weights(AutoModelForCausalLM, str(policy)))
    length = settings["max_completion_length"]
    params = SamplingParams(length, eos_token_ids=(tokenizer.eos_token_id,))
    padded = pad_left(prompts, max(map(len, prompts)))
    kl, texts, distinct = [], [], 0.0
    for draw in range(draws):
        noise = uniform_noise(0, draw, range(len(prompts)), length, purpose=EVALUATION)
        samples = sample(model, *padded, noise, params, values=False)
        kl.append((samples.logprobs - score_tokens(reference, samples, 1.0, 64)).sum(dim=1).mean().item())
        texts += decode_completions(tokenizer, prompts, samples.tokens.counted_ids())
        distinct = distinct or distinct_n(samples.tokens.completion_ids, samples.completion_mask, 2)
    numbers = judge(decode_whole(tokenizer, prompts) * draws, texts)
    row = {name: sum(values) / len(values) for name, values in numbers.items()} | {"distinct_2": distinct}
    row["kl"] = sum(kl) / draws
    return row | {"objective": row["reward"] - settings["kl_coef"] * row["kl"]}


def best_of(sizes: Sequence[int], prompts: list[list[int]], kept: Path) -> dict[int, Row]:
    """The rows of best-of-n, from a file if they are there."""
    if not kept.exists():
        settings = job()
        rows = measure(sizes, prompts, settings["max_completion_length"], settings["kl_coef"], seed=0)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(rows) + "\n")
    return {int(n): row for n, row in json.loads(kept.read_text()).items()}


def curve(run: Path) -> dict[str, list[float]]:
    """Of each iteration: completions so far, seconds so far, and the objective as a mean over five iterations."""
    rows, seconds, found = read_metrics(run), 0.0, {"samples": [], "seconds": [], "objective": []}
    for i, row in enumerate(rows):
        seconds += row["time/rollout"] + row["time/update"] + row.get("time/startup", 0.0)
        recent = [r["rlhf_reward"] for r in rows[max(0, i - 4) : i + 1]]
        found["samples"].append((i + 1) * job()["rollout_batch_size"])
        found["seconds"].append(seconds)
        found["objective"].append(sum(recent) / len(recent))
    return found


def draw(curves: dict[int, dict[str, list[float]]], best: dict[int, Row], picture: Path) -> None:
    """The objective over samples and over seconds, while training, beside best-of-n."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("samples", "seconds"), strict=True):
        for seed, points in curves.items():
            axis.plot(points[name], points["objective"], label=f"PPO, seed {seed}", alpha=0.8)
        for n, row in best.items():
            axis.axhline(row["objective"], color="k", linestyle=":", linewidth=0.8)
            axis.annotate(f"best of {n}", (0, row["objective"]), fontsize="small", va="bottom")
        axis.set(xlabel=name, ylabel="reward - kl_coef * KL", ylim=(-0.5, None))
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def frontier(best: dict[int, Row], rows: dict[int, Row], dearer: dict[float, Row]) -> str:
    """The reward at some KLs: of PPO from runs at several prices, and of best-of-n."""
    mean = {name: sum(row[name] for row in rows.values()) / len(rows) for name in ("kl", "reward")}
    curves = {"PPO": [best[min(best)], mean, *dearer.values()], "best of n": [*best.values()]}
    cells = [[name, *(at(nats, points) for nats in NATS)] for name, points in curves.items()]
    runs = [[f"{price:g}", *(f"{row[name]:.3g}" for name in ("kl", "reward"))] for price, row in dearer.items()]
    tables = [table(["kl_coef", "kl", "reward"], runs)] if runs else []
    return "\n\n".join([*tables, table(["reward at a KL of", *(f"{nats:g} nats" for nats in NATS)], cells)])


def report(best: dict[int, Row], rows: dict[int, Row], dearer: dict[float, Row], args: argparse.Namespace) -> str:
    """The tables: best-of-n, each seed, all seeds together; rewards at some KLs; and where they come from."""
    names = [*COLUMNS, "seconds"]
    cells = [[f"best of {n}", *(f"{row[name]:.3g}" for name in COLUMNS), ""] for n, row in best.items()]
    cells += [[f"PPO, seed {seed}", *(f"{row[name]:.3g}" for name in names)] for seed, row in rows.items()]
    cells.append([f"PPO, {len(rows)} seeds", *(spread([row[name] for row in rows.values()]) for name in names)])
    steps = {len(read_metrics(run_dir(args, seed))) for seed in rows}
    text = f"{args.prompts} held-out prompts, {args.draws} completions of each from every policy; "
    text += f"{'/'.join(map(str, steps))} steps; runs at a time: {args.jobs}. {origin(args.threads)}"
    return f"{table(['policy', *names], cells)}\n\n{frontier(best, rows, dearer)}\n\n{text}"


def run_dir(args: argparse.Namespace, name: int | str) -> Path:
    """Where a run is."""
    return (RESULTS / f"{args.name}-{name}").absolute()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--prices", type=float, nargs="*", default=[0.2, 0.35, 0.6], help="each kl_coef of a further run"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="each n of best-of-n")
    parser.add_argument("--name", default="main-job", help="of the runs and the table")
    parser.add_argument("--flags", default="", help="further flags for the recipe")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=default_threads(), help="CPU threads of each run")
    parser.add_argument("--draws", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--picture", type=Path, help="default: among the docs with --markdown, else beside the results")
    parser.add_argument("--markdown", type=Path, help="the page whose table is replaced")
    parser.add_argument("--smoke", action="store_true", help="one step, four prompts, n of 1 and 4: tries the script")
    args = parser.parse_args(argv)
    args.prompts = job()["eval_completions"]
    args.picture = args.picture or (Path("docs/images") if args.markdown else RESULTS) / f"{args.name}-seeds.png"
    if args.smoke:
        args.sizes, args.prompts, args.draws, args.seeds, args.prices = [1, 4], 4, 1, [0], [0.2]
        args.flags = "--max_steps 1 --rollout_batch_size 4 --minibatch_size 4 --eval_completions 4"
        args.picture = RESULTS / "main-job-smoke.png"
    if any(n < 1 or max(args.sizes) % n for n in args.sizes):
        parser.error(f"--sizes {args.sizes}: each must be 1 or more and divide the largest.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the seeds, judge, print, draw, write."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    runs: dict[int, Path] = {seed: run_dir(args, seed) for seed in args.seeds}
    priced = {price: run_dir(args, f"price-{price:g}") for price in args.prices}
    jobs = [(seed, run, []) for seed, run in runs.items()]
    jobs += [(args.seeds[0], run, ["--kl_coef", str(price)]) for price, run in priced.items()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(*job[:2], args.threads, [*shlex.split(args.flags), *job[2]]), jobs))
    prompts = prompts_of("evaluation", args.prompts)
    best = best_of(args.sizes, prompts, RESULTS / f"best-of-{'-'.join(map(str, args.sizes))}.json")
    curves = {seed: curve(run) for seed, run in runs.items()}
    rows: dict[int, Any] = {seed: judged(run / "final", prompts, args.draws) for seed, run in runs.items()}
    rows = {seed: row | {"seconds": curves[seed]["seconds"][-1]} for seed, row in rows.items()}
    dearer = {price: judged(run / "final", prompts, args.draws) for price, run in priced.items()}
    draw(curves, best, args.picture)
    result = {"best of n": best, "seeds": rows, "prices": dearer, "curves": curves}
    write(args.name, result, report(best, rows, dearer, args), args.markdown)


if __name__ == "__main__":
    main()
