"""Curves of a run as one PNG, from its ``metrics.jsonl``.

Importing this module needs the ``plots`` extra, so that a recipe without it fails before training rather than after; the
import of matplotlib itself waits until there is something to draw.
"""

import importlib.util
import json
from pathlib import Path

if importlib.util.find_spec("matplotlib") is None:
    raise ModuleNotFoundError("Plots need matplotlib: pip install 'lmppo[plots]'.")

PANELS = {
    "reward": ["reward"],
    "KL to reference (nats per completion)": ["kl_to_ref"],
    "value loss": ["value_loss"],
    "explained variance": ["explained_variance"],
    "entropy (nats per token)": ["entropy"],
    "completion length (tokens)": ["completion_length"],
}


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The rows of a run's ``metrics.jsonl``.

    Raises:
        FileNotFoundError: The directory holds no run.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} has no metrics.jsonl: give the output_dir of a run.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_run(run_dir: str | Path) -> Path:
    """Draw reward, KL, value loss and explained variance, entropy and length over steps, and reward against KL.

    Returns:
        The path of ``curves.png`` in the run directory.

    Raises:
        FileNotFoundError: The directory holds no run.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=False):
        for name in names:
            values = [float("nan") if row.get(name) is None else row[name] for row in rows]
            axis.plot(steps, values, label=name)
        axis.set(title=title, xlabel="step")
    frontier, scores = axes.flat[len(PANELS)], axes.flat[len(PANELS) + 1]
    points = frontier.scatter([r["kl_to_ref"] for r in rows], [r["reward"] for r in rows], c=steps, s=12)
    frontier.set(title="reward against KL", xlabel="KL to reference (nats)", ylabel="reward")
    figure.colorbar(points, ax=frontier, label="step")
    for name in sorted({n for row in rows for n in row if n.startswith("rewards/") and n.endswith("/mean")}):
        scores.plot(steps, [row.get(name, float("nan")) for row in rows], label=name.split("/")[1])
    scores.set(title="each reward and watch function", xlabel="step")
    scores.legend(fontsize="small")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    path = Path(run_dir) / "curves.png"
    figure.savefig(path, dpi=110)
    return path
