"""The lab's pictures of bias and variance: one finding each, said in the title."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any colour vision tell apart; different markers and line styles go with them."""
MARKERS = "osD^vPX"
UNIT = "in units of the true gradient's squared length"
Numbers = dict[str, Any]


def save(figure: Any, path: Path, title: str) -> None:
    """Write the figure under its title, with a light grid."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_estimators(table: dict[str, Numbers], size: int, path: Path) -> None:
    """Squared bias and variance of every estimator."""
    names = list(table)[::-1]
    rows = [table[name][str(size)] for name in names]
    figure, axis = plt.subplots(figsize=(9, 8.5), layout="constrained")
    for i, kind in enumerate(("variance", "bias2")):
        errors = [2 * row[f"{kind}_error"] for row in rows]
        label = f"{'squared bias' if kind == 'bias2' else kind} (bars: 2 standard errors)"
        x = [row[kind] for row in rows]
        axis.errorbar(x, range(len(rows)), xerr=errors, fmt=MARKERS[i], color=COLORS[i], label=label, capsize=2)
    axis.set(yticks=range(len(rows)), yticklabels=names, xlabel=f"batches of {size} completions, {UNIT}")
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path, "A critic cuts the variance; looking less far ahead on a wrong one brings bias")


def draw_sizes(table: dict[str, Numbers], sizes: list[int], path: Path) -> None:
    """Mean squared error over batch size."""
    names = ("total_return, none", "rewards_to_go, none", "rewards_to_go, leave_one_out", "gae lam 0.95, true critic",
             "gae lam 0.5, wrong critic", "immediate_rewards, batch_mean")  # fmt: skip
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, color, marker in zip(names, COLORS, MARKERS, strict=False):
        rows = [table[name][str(size)] for size in sizes]
        style = {"color": color, "marker": marker, "label": name}
        axis.plot(sizes, [max(row["bias2"], 0.0) + row["variance"] for row in rows], **style)
    axis.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes, xlabel="completions in a batch")
    axis.set_ylabel(f"squared error, {UNIT}", fontsize="small")
    axis.minorticks_off()
    axis.legend(fontsize="small")
    save(figure, path, "More samples cure variance, and never bias")


def draw_knobs(knobs: dict[str, Numbers], size: int, path: Path) -> None:
    """Bias and variance over lam and over gamma: exact lines, measured points."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    for axis, (knob, by_number) in zip(axes, knobs.items(), strict=True):
        x = [float(number) for number in by_number]
        for i, kind in enumerate(("variance", "bias2")):
            y, errors = ([row[f"{kind}{end}"] for row in by_number.values()] for end in ("", "_error"))
            label = "squared bias" if kind == "bias2" else kind
            axis.plot(x, [row[f"exact_{kind}"] for row in by_number.values()], "--" if i else "-", color=COLORS[i])
            axis.errorbar(x, y, [2 * e for e in errors], fmt=MARKERS[i], color=COLORS[i], label=label, capsize=2)
        axis.set(title=knob, xlabel=knob.split(",")[0])
        axis.legend()
    axes[0].set_ylabel(f"batches of {size}, {UNIT}", fontsize="small")
    save(figure, path, "A small lambda is as good as its critic; a small gamma always costs bias (lines: exact)")


def draw_bandits(bandits: dict[str, Numbers], size: int, path: Path) -> None:
    """Bias and variance of the immediate reward and of the reward-to-go on two machines."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    names = list(bandits)[::-1]
    for i, kind in enumerate(("variance", "bias2")):
        x = [bandits[name][kind] for name in names]
        errors = [2 * bandits[name][f"{kind}_error"] for name in names]
        y = [j + 0.2 * (i - 0.5) for j in range(len(names))]
        label = "squared bias" if kind == "bias2" else kind
        axis.errorbar(x, y, xerr=errors, fmt=MARKERS[i], color=COLORS[i], label=label, capsize=2)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel=f"batches of {size}, {UNIT}")
    axis.legend()
    save(figure, path, "The immediate reward is exact without a state, and wrong with one")
