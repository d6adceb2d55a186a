r"""Why the main job is set up as it is: its critic, estimators and baselines side by side, over several seeds.

    python benchmarks/compare.py --seeds 0 1 2 --jobs 2

Each variant and seed is one run of 30 steps of the recipe with one CPU thread, `jobs` of them at a time; runs that are there
already are not repeated. Prints a table and draws reward against KL, steps and seconds, and the critic's explained variance.
Seconds mean something only if nothing else runs: the first three variants do the same work, so they must agree.
"""

import argparse
import os
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lmppo.plots import read_metrics

EXPLAINED = "critic/explained_variance"
NO_CRITIC = "--critic_model_name_or_path none --estimator rewards_to_go --kl_form k1_reward"
ZERO_HEAD = "--critic_model_name_or_path none --critic_learning_rate none"
VARIANTS = {
    "reward model as critic, gae 0.7": "--lam 0.7",
    "the same, gae 0.95": "",
    "the same, rewards-to-go (gae 1.0)": "--lam 1.0 --kl_form k1_reward",
    "no critic: leave_one_out of 4": f"{NO_CRITIC} --baseline leave_one_out --num_generations 4",
    "no critic: batch_mean": f"{NO_CRITIC} --baseline batch_mean",
    "zero value head, gae 0.95": ZERO_HEAD,
    "zero value head, 3 steps of warm-up": f"{ZERO_HEAD} --critic_warmup_steps 3 --critic_warmup_epochs 4",
}


def run_dir(variant: int, seed: int) -> Path:
    """Where a run of a variant is."""
    return Path(f"runs/benchmarks/compare-{variant}-{seed}")


def launch(variant: int, seed: int) -> None:
    """Run the recipe as a user would, its output in a file beside the run."""
    output_dir, flags = run_dir(variant, seed), list(VARIANTS.values())[variant]
    if (output_dir / "final").exists():
        return
    command = ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "recipes/ppo_sentiment.py"]
    command += ["--config", "recipes/configs/tiny_reviews.yaml", "--seed", str(seed), "--output_dir", str(output_dir)]
    command += ["--max_steps", "30", "--cpu_threads", "1", "--disable_tqdm", "true", *shlex.split(flags)]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with output_dir.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def curves(variant: int, seeds: list[int]) -> dict[str, torch.Tensor]:
    """Reward, KL, what the critic (if any) explains of Monte-Carlo returns, seconds since the start: ``(seeds, steps)``."""
    runs = [read_metrics(run_dir(variant, seed)) for seed in seeds]
    names = ("reward", "kl_to_ref", "rlhf_reward", EXPLAINED, "time/rollout", "time/update")
    found = {n: torch.tensor([[row[n] for row in rows] for rows in runs]) for n in names if n in runs[0][0]}
    return found | {"seconds": (found["time/rollout"] + found["time/update"]).cumsum(1)}


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/compare.png"))
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(launch, *zip(*[(v, s) for s in args.seeds for v in range(len(VARIANTS))], strict=True)))

    figure, axes = plt.subplots(1, 4, figsize=(19, 4.6), layout="constrained")
    columns = ("reward, last 5 steps", "KL", "reward - kl_coef * KL", "reward 2 at step (after seconds)")
    print(f"| variant | {' | '.join(columns)} | seconds per step (range) |")
    print("|---|---|---|---|---|---|")
    for variant, label in enumerate(VARIANTS):
        c = curves(variant, args.seeds)
        per_step = c["seconds"][:, -1] / c["seconds"].shape[1]
        c = {name: numbers.mean(dim=0) for name, numbers in c.items()}
        steps = torch.arange(1, len(c["reward"]) + 1)
        pairs = ((c["kl_to_ref"], "reward"), (steps, "reward"), (c["seconds"], "reward"), (steps, EXPLAINED))
        for axis, (x, name) in zip(axes, pairs, strict=True):
            if name in c:
                axis.plot(x, c[name].clamp(min=-1.0), label=label, color=f"C{variant}", alpha=0.85)
        first = int((c["reward"] >= 2.0).int().argmax())
        rise = f"{first + 1} ({c['seconds'][first]:.0f})" if c["reward"].max() >= 2.0 else "never"
        last = [c[n][-5:].mean().item() for n in ("reward", "kl_to_ref", "rlhf_reward")]
        seconds = f"{per_step.mean():.2f} ({per_step.min():.2f} to {per_step.max():.2f})"
        print(f"| {label} | {last[0]:.2f} | {last[1]:.1f} | {last[2]:.2f} | {rise} | {seconds} |")
    titles = (
        "reward against KL (nats)",
        "reward by step",
        "reward by seconds",
        "share of Monte-Carlo returns explained",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=100)
    print(f"{time.strftime('%Y-%m-%d')}, {args.jobs} runs at a time of 1 thread each; {args.picture}")


if __name__ == "__main__":
    main()
