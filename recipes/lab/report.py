"""The lab's tables, as Markdown."""

from typing import Any


def report(lab: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    sizes = [str(size) for size in lab["effort"]["sizes"]]
    header = [f"{kind}, {size}" for size in sizes for kind in ("bias^2", "variance")]
    parts = []
    for title, rows in (("Dense rewards", lab["dense"]), ("Sparse rewards", lab["sparse"])):
        cells = [
            [name, *(_cell(row[s], k) for s in sizes for k in ("bias2", "variance"))] for name, row in rows.items()
        ]
        parts.append((f"{title}: bias and variance by completions in a batch", ["estimator", *header], cells))
    cells = [[name, _cell(row, "bias2"), _cell(row, "variance")] for name, row in lab["bandits"].items()]
    parts.append((f"Bandits, batches of {sizes[1]}", ["machine and estimator", "bias^2", "variance"], cells))
    clip = lab["objectives"]["clip"]["seconds_per_step"]
    cells = []
    for name, row in lab["objectives"].items():
        ends = [curve[-1] for curve in row["share"]]
        spread = f"{sum(ends) / len(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})"
        cells.append([name, spread, f"{row['seconds_per_step']:.4f}", f"{row['seconds_per_step'] / clip:.2f}"])
    samples = lab["objectives"]["clip"]["samples"][-1]
    header = ["objective", "share of the way: mean (range)", "CPU seconds per step", "of the clip's"]
    parts.append((f"Objectives after {samples} completions", header, cells))
    cells = [[name, _last(row["share"], 3), _last(row["kl"], 2)] for name, row in lab["variants"].items()]
    header = ["PPO with", "share of the way: mean (range)", "KL to the reference"]
    optimum = f"the optimum's KL is {lab['optimum_kl']:.2f}"
    parts.append((f"Variants over the last five steps of {samples} completions; {optimum}", header, cells))
    cells = [[name, row["target"], f"{row['bias2']:.4f}"] for name, row in lab["truncation"].items()]
    parts.append(("Completions that were cut: exact bias", ["truncation and estimator", "target", "bias^2"], cells))
    return "\n".join(_markdown(*part) for part in parts)


def _last(curves: list[list[float]], digits: int) -> str:
    """Mean and range over the seeds of the mean over the last five steps."""
    ends = [sum(curve[-5:]) / len(curve[-5:]) for curve in curves]
    return f"{sum(ends) / len(ends):.{digits}f} ({min(ends):.{digits}f} to {max(ends):.{digits}f})"


def _cell(row: dict[str, float], kind: str) -> str:
    return f"{row[kind]:.4f} ± {row[f'{kind}_error']:.4f}"


def _markdown(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
