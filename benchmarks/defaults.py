r"""Why the defaults are as they are: one setting at a time is changed, on three tasks, with a value head that starts at zero.

    python benchmarks/defaults.py --seeds 0 1 2 --markdown docs/results.md
    python benchmarks/defaults.py --task lexicon --variants "the defaults" "a constant rate"

``chain`` is the task of learn.py at its middle price and rate; ``long chain`` is the same with completions of 96 tokens in
place of 24. ``lexicon`` is the main job's policy with VADER's score as the reward. Every run is a process of its own; runs
that are there already (in runs/benchmarks/defaults) are not repeated, except those whose settings were others; where code has
changed, delete its files.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from best_of_n import REFERENCE, job, kl_bound, prompts_of
from best_of_n import measure as best_of_n
from chain_task import Chain
from learn import SMOKE, measure, prepare, settings_of_lmppo
from measuring import HERE, RESULTS, origin, run_job, spread, table, write

PRICE, RATE = 0.5, 3e-4  # of the chains
NO_CRITIC = {"estimator": "rewards_to_go"}
RATE_OF_BEFORE, CLIP_OF_BEFORE = {"critic_learning_rate": RATE}, {"value_clip_range": 0.2}
UNLIMITED = {"target_kl": 0.0}
BEFORE = RATE_OF_BEFORE | CLIP_OF_BEFORE | UNLIMITED | {"lr_scheduler_type": "constant", "lam": 0.95}
OWN_CRITIC = "own_critic"  # is no setting: a critic that starts from the policy, with a head of zeros
VARIANTS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "the defaults of before": BEFORE,
    "the policy's rate for the value head": RATE_OF_BEFORE,
    "values clipped at 0.2": CLIP_OF_BEFORE,
    "a constant rate": {"lr_scheduler_type": "constant"},
    "a cosine": {"lr_scheduler_type": "cosine"},
    "lam 0.95": {"lam": 0.95},
    "kl_form k1_reward": {"kl_form": "k1_reward"},
    "lam 0.95, kl_form k1_end": {"lam": 0.95, "kl_form": "k1_end"},
    "lam 0.98, kl_form k1_end": {"lam": 0.98, "kl_form": "k1_end"},
    "kl_form exact_both": {"kl_form": "exact_both"},
    "kl_form k3_both": {"kl_form": "k3_both"},
    "a critic of its own": {OWN_CRITIC: True},
    "a critic of its own, lam 0.95": {OWN_CRITIC: True, "lam": 0.95},
    "vf_coef 0.01": {"vf_coef": 0.01},
    "vf_coef 1": {"vf_coef": 1.0},
    "8 epochs of the critic": {"critic_epochs": 8},
    "a warm-up of the critic of 3 steps": {"critic_warmup_steps": 3},
    "baseline auto": {"baseline": "auto"},
    "baseline batch_mean": {"baseline": "batch_mean", **NO_CRITIC},
    "4 completions of each prompt": {"num_generations": 4},
    "the same, baseline leave_one_out": {"num_generations": 4, "baseline": "leave_one_out", **NO_CRITIC},
    "1 epoch": {"ppo_epochs": 1},
    "2 epochs": {"ppo_epochs": 2},
    "minibatches of 64": {"minibatch_size": 64},
    "120 rollouts of 32": {"rollout_batch_size": 32, "max_steps": 120},
    "30 rollouts of 128": {"rollout_batch_size": 128, "max_steps": 30},
    "advantages as they are": {"whiten_advantages": False},
    "clip_range 0.1": {"clip_range": 0.1},
    "no target_kl": UNLIMITED,
    "target_kl 0.003": {"target_kl": 0.003},
    "target_kl 0.03": {"target_kl": 0.03},
    "a rate of 1e-4": {"learning_rate": 1e-4},
    "a rate of 1e-3": {"learning_rate": 1e-3},
    "a rate of 1e-3, no target_kl": {"learning_rate": 1e-3, **UNLIMITED},
    "adam_epsilon 1e-5": {"adam_epsilon": 1e-5},
    "max_grad_norm 0.1": {"max_grad_norm": 0.1},
    "a warm-up of the rate of 6 steps": {"warmup_steps": 6},
    "trpo": {"objective": "trpo"},
}
LEXICON_PRICE = 0.03  # VADER's scores deviate by 0.45 from their mean, the classifier's by 1.45 at a price of 0.1
LEXICON = {
    "reward_funcs": "lexicon", "critic_model_name_or_path": "none", "critic_learning_rate": "none", "max_steps": 60,
    "rollout_batch_size": 64, "minibatch_size": 16, "ppo_epochs": 4, "kl_coef": LEXICON_PRICE, "eval_completions": 1024,
    "eval_steps": 60, "disable_tqdm": "true", "lam": 1.0, "target_kl": "none",
}  # fmt: skip
EXPLAINED = ("critic/explained_variance", "critic/explained_variance_within_prompts")
COLUMNS = ("objective", "reward", "kl", *EXPLAINED)


CHAINS = {"chain": Chain(), "long chain": Chain(length=96)}


def chain(task: Chain, settings: dict[str, Any], seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run of a chain task."""
    model, changed = folder_of(task, args) / "model", only_settings(settings)
    sizes = {
        "batch": changed.get("rollout_batch_size", task.batch),
        "iterations": changed.get("max_steps", task.iterations),
    }
    run = {"task": dataclasses.replace(task, **sizes).job, "model": str(model), "output": str(folder)}
    run |= {"price": PRICE, "learning_rate": RATE, "seed": seed, "settings": changed}
    run[OWN_CRITIC] = OWN_CRITIC in settings
    result = run_job("learn_lmppo", run, threads=args.threads, python=sys.executable, inline=args.smoke)
    if "error" in result:
        raise RuntimeError(f"{folder.name}: {result['error']}")
    return measure(folder, model, task, PRICE) | explained(result["rows"])


def folder_of(task: Chain, args: argparse.Namespace) -> Path:
    """Where the model of a chain task is."""
    return args.folder / "long" if task == CHAINS["long chain"] else args.folder


def lexicon(settings: dict[str, Any], seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the recipe, which ends with an evaluation on held-out prompts."""
    flags = (
        LEXICON
        | ({"critic_model_name_or_path": REFERENCE} if OWN_CRITIC in settings else {})
        | only_settings(settings)
        | {"seed": seed, "output_dir": folder, "cpu_threads": args.threads}
        | ({"max_steps": 1} if args.smoke else {})
    )
    command = [sys.executable, "recipes/ppo_sentiment.py", "--config", "recipes/configs/tiny_reviews.yaml"]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    subprocess.run(
        command,
        check=True,
        cwd=HERE.parent,
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        stdout=subprocess.DEVNULL,
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reward, kl = rows[-1]["eval_reward"], rows[-1]["eval_kl_to_ref"]
    return {"reward": reward, "kl": kl, "objective": reward - LEXICON_PRICE * kl} | explained(rows)


def only_settings(variant: dict[str, Any]) -> dict[str, Any]:
    """What a variant changes in the configuration."""
    return {name: value for name, value in variant.items() if name != OWN_CRITIC}


def explained(rows: list[dict[str, float]]) -> dict[str, float]:
    """What the critic explained in the second quarter of the run, as far as there is a critic and it can be told."""
    quarter = rows[len(rows) // 4 : len(rows) // 2 or 1]
    found = {name: [row[name] for row in quarter if name in row] for name in EXPLAINED}
    return {name: fmean(values) for name, values in found.items() if values}


def best_of_chain(task: Chain, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """What best-of-n gives on a chain task, whose model is made if it is not there."""
    rewards = prepare(task, argparse.Namespace(smoke=args.smoke, folder=folder_of(task, args)))
    return {
        n: {"reward": reward, "kl": kl_bound(n), "objective": reward - PRICE * kl_bound(n)}
        for n, reward in rewards.items()
    }


def best_of_lexicon(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """What best-of-n by VADER's score gives on the recipe's held-out prompts."""
    kept = args.folder / "lexicon-best-of-n.json"
    if not kept.exists():
        tokens = job()["max_completion_length"]
        rows = best_of_n([1, 4, 16, 64], prompts_of("evaluation", 256), tokens, LEXICON_PRICE, seed=0, by="vader")
        kept.write_text(json.dumps({n: row | {"reward": row["vader"]} for n, row in rows.items()}) + "\n")
    return {int(n): row for n, row in json.loads(kept.read_text()).items()}


TASKS = {name: functools.partial(chain, task) for name, task in CHAINS.items()} | {"lexicon": lexicon}


def perform(variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a run, from its file if it is there."""
    settings, task = VARIANTS[variant], args.task
    name = "-".join([task.replace(" ", "_"), *(f"{key}={value}" for key, value in settings.items()), str(seed)])
    kept, whole = args.folder / f"{name}.json", settings_of_lmppo(only_settings(settings))
    if not kept.exists() or json.loads(kept.read_text()).get("settings") != whole:
        print(f"{task}: {variant}, seed {seed}", file=sys.stderr, flush=True)
        result = TASKS[task](settings, seed, (args.folder / name).absolute(), args)
        kept.write_text(json.dumps({"settings": whole, **result}) + "\n")
    return json.loads(kept.read_text())


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="chain")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--folder", type=Path, default=RESULTS / "defaults", help="where the runs are kept")
    parser.add_argument("--markdown", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain: tries the script")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.folder, args.task, args.variants = RESULTS / "defaults-smoke", "chain", args.variants[:2]
        CHAINS["chain"], TASKS["chain"] = SMOKE, functools.partial(chain, SMOKE)
    args.folder = args.folder.absolute()
    best = best_of_chain(CHAINS[args.task], args) if args.task in CHAINS else best_of_lexicon(args)
    jobs = [(variant, seed) for variant in args.variants for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: perform(*job, args), jobs), strict=True))
    rows = [[f"best of {n}", *(f"{row[name]:.3g}" for name in COLUMNS[:3]), "", ""] for n, row in best.items()]
    for variant in args.variants:
        group = [runs[variant, seed] for seed in args.seeds]
        found = [[run[column] for run in group if column in run] for column in COLUMNS]
        rows.append([variant, *(spread(values) if values else "" for values in found)])
    names = ["objective", "reward", "KL", "explained", "explained within prompts"]
    text = f"Medians (least..most); seeds: {', '.join(map(str, args.seeds))}; runs at a time: {args.jobs}. "
    text += origin(args.threads)
    name = f"defaults-{args.task.replace(' ', '-')}"
    write(name, rows, f"{table([args.task, *names], rows)}\n\n{text}", args.markdown)


if __name__ == "__main__":
    main()
