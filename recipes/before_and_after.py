"""Held-out completions and metrics before and after training, side by side."""

from typing import Any

from lmppo.tables import print_completions, print_metrics


def show_change(before: Any, after: Any, metrics: tuple[dict, dict], rows: int) -> None:
    """Print held-out completions and metrics before and after, side by side."""
    score = [f"{a:.2f} -> {b:.2f}" for a, b in zip(scores_of(before), scores_of(after), strict=True)]
    columns = {"after": after.completions, "score": score}
    print_completions("Held-out prompts, before and after", before.prompts, before.completions, columns, rows=rows)
    print_metrics("Held-out prompts: means", {"before": metrics[0], "after": metrics[1]})


def scores_of(scored: Any) -> list[float]:
    """Each completion's score."""
    return scored.rollout.scores.sum(dim=(1, 2)).tolist()
