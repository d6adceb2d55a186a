"""The lab's pictures of learning: one finding each, said in the title."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from plots import COLORS, MARKERS, UNIT, Numbers, save

LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)))
SHARE = "share of the way to the optimum (exact)"


def band(axis: Any, x: Sequence[float], curves: list[list[float]], i: int, label: str) -> None:
    """The mean of several seeds' curves, within their range."""
    columns = list(zip(*curves, strict=True))
    mean = [sum(column) / len(column) for column in columns]
    axis.plot(x, mean, color=COLORS[i], linestyle=LINES[i], label=label)
    axis.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=COLORS[i], alpha=0.15, linewidth=0)


def draw_dense(tables: dict[str, dict[str, Numbers]], runs: dict[str, Numbers], size: int, path: Path) -> None:
    """The same pay given token by token or at the end: variance of the gradient, and learning."""
    names = ("total_return, none", "rewards_to_go, none", "rewards_to_go, batch_mean", "rewards_to_go, true critic")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for i, (pay, table) in enumerate(tables.items()):
        rows = [table[name][str(size)] for name in names]
        y = [j + 0.2 * (i - 0.5) for j in range(len(names))]
        errors = [2 * row["variance_error"] for row in rows]
        left.errorbar([r["variance"] for r in rows], y, xerr=errors, fmt=MARKERS[i], color=COLORS[i], label=pay)
        band(right, runs[pay]["samples"], runs[pay]["share"], i, pay)
    left.set(yticks=range(len(names)), yticklabels=names, xlabel=f"variance, {UNIT}", xlim=(0, None))
    right.set(xlabel="completions sampled", ylabel=SHARE, title="PPO, three seeds and their range", ylim=(-0.1, 1.02))
    for axis in (left, right):
        axis.legend()
    save(figure, path, "Dense rewards cut the variance of the reward-to-go without a critic; with one, either will do")


def draw_objectives(objectives: dict[str, Numbers], path: Path) -> None:
    """Learning curves at equal samples, and what a step costs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(2, 1), layout="constrained")
    for i, (name, run) in enumerate(objectives.items()):
        band(left, run["samples"], run["share"], i, name)
    milliseconds = [1000 * run["seconds_per_step"] for run in objectives.values()]
    bars = right.barh(list(objectives), milliseconds, color=COLORS[: len(objectives)])
    right.bar_label(bars, fmt="%.0f ms", padding=3)
    right.set(xlabel="CPU time of a step (median, one thread)", title="cost", xlim=(0, 1.25 * max(milliseconds)))
    left.set(xlabel="completions sampled", ylabel=SHARE, ylim=(-0.5, 1.02), title="mean and range of the seeds")
    left.legend(loc="lower right")
    save(
        figure,
        path,
        "At equal samples clip, KL penalty and TRPO come near the optimum; plain importance sampling swings",
    )


def draw_reuse(reuse: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """What more and more passes over one rollout do to the policy."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for i, (name, run) in enumerate(reuse.items()):
        passes = range(len(run["share"][0]))
        band(left, passes, run["share"], i, name)
        band(right, passes, run["kl"], i, name)
    left.set(xlabel="passes over the same rollout", ylabel=SHARE)
    right.set(xlabel="passes over the same rollout", ylabel="KL(old || new), nats per completion (exact)")
    right.set_yscale("symlog", linthresh=0.1)
    left.legend()
    save(figure, path, "One rollout used too often ruins plain importance sampling; clip and KL penalty lose far less")


def draw_streams(streams: dict[str, Numbers], path: Path) -> None:
    """Each critic output's error over training, and its values against the true ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for i, (name, run) in enumerate(streams.items()):
        left.plot(range(1, len(run["error"]) + 1), run["error"], color=COLORS[i], linestyle=LINES[i], label=name)
        truth, values = zip(*run["states"], strict=True)
        right.plot(truth, values, MARKERS[i], color=COLORS[i], alpha=0.5, label=name, markersize=4)
    limits = [min(right.get_xlim()), max(right.get_xlim())]
    right.plot(limits, limits, color="black", linewidth=1)
    left.set(xlabel="step", ylabel="error over the true values' deviation", yscale="log")
    right.set(xlabel="true value of the state, by the stream's own gamma", ylabel="the critic's, after training")
    for axis in (left, right):
        axis.legend()
    save(figure, path, "Each stream's critic learns that stream's own values (pairs: gamma 1; cs: gamma 0.5)")
