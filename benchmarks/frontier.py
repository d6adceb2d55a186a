r"""Reward against KL over the run, for groups of runs: what a nat of KL buys.

    python benchmarks/frontier.py docs/images/frontier.png "with critic warm-up=main-job" "without=without-warmup"

Each group is a label and the name given to benchmarks/main_job.py; all its seeds in runs/benchmarks are drawn.
"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lmppo.plots import read_metrics


def main() -> None:
    """Draw reward against KL and explained variance against steps, one color per group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("groups", nargs="+", metavar="LABEL=NAME")
    args = parser.parse_args()
    figure, (frontier, variance, reward) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for color, group in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], args.groups, strict=False):
        label, name = group.split("=")
        for i, run in enumerate(sorted(Path("runs/benchmarks").glob(f"{name}-[0-9]*"))):
            rows = read_metrics(run)
            style = {"color": color, "alpha": 0.8, "label": label if i == 0 else None}
            steps = [row["step"] for row in rows]
            frontier.plot([row["kl_to_ref"] for row in rows], [row["reward"] for row in rows], ".-", **style)
            variance.plot(steps, [max(row["explained_variance"], -1.0) for row in rows], **style)
            reward.plot(steps, [row["reward"] for row in rows], **style)
    frontier.set(xlabel="KL to reference (nats per completion)", ylabel="reward (log-odds)", title="reward against KL")
    variance.set(xlabel="step", title="explained variance (cut at -1)")
    reward.set(xlabel="step", title="reward (log-odds)")
    for axis in (frontier, variance, reward):
        axis.grid(alpha=0.3)
    frontier.legend()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)
    print(f"{args.picture}: {len(args.groups)} groups, {math.ceil(args.picture.stat().st_size / 1024)} KiB")


if __name__ == "__main__":
    main()
