"""``best/``: the policy at its best evaluation, exported as ``final/`` is.

Between two checkpoints, the best one that the last checkpoint knows of is kept in ``.kept-best``. A run that is killed and
resumes from that checkpoint takes it back, and meets the later one again.
"""

import difflib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import TrainingArguments

from lmppo.run.checkpoint import CheckpointError
from lmppo.run.export import exported_step


def best_metric_name(args: TrainingArguments) -> str:
    """``metric_for_best_model`` with its ``eval_``, which may be left out."""
    name = args.metric_for_best_model
    return name if name.startswith("eval_") else f"eval_{name}"


def check_best_metric(args: TrainingArguments, metrics: Mapping[str, float]) -> None:
    """Refuse a ``metric_for_best_model`` that no evaluation gives.

    Raises:
        ValueError: Names it and the metrics there are.
    """
    name = best_metric_name(args)
    if name not in metrics:
        near = difflib.get_close_matches(name, metrics, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not among the metrics of the evaluation: "
            f"{', '.join(sorted(metrics))}.{hint}"
        )


def is_better(args: TrainingArguments, value: float, best: float | None) -> bool:
    """Whether a metric is strictly better than the best so far; NaN never is."""
    if math.isnan(value) or best is None:
        return not math.isnan(value)
    return value > best if args.greater_is_better else value < best


def refuse_foreign(best: Path) -> None:
    """Before a run that may write ``best/``: what is there must be an export, since later ones replace it.

    Raises:
        CheckpointError: It is something else.
    """
    if best.exists() and exported_step(best) is None:
        raise CheckpointError(f"{best} is not an export of lmppo, and metric_for_best_model would replace it: move it.")


def set_aside(best: Path) -> None:
    """Before ``best/`` is written anew: keep the one that belongs to the last checkpoint, unless it is kept already."""
    if best.exists() and not _kept(best).exists():
        best.rename(_kept(best))


def forget_kept(best: Path) -> None:
    """After a checkpoint: ``best/`` is the one that belongs to it."""
    shutil.rmtree(_kept(best), ignore_errors=True)


def settle_best(best: Path, step: int | None, newest_checkpoint: int) -> None:
    """When a run is opened: make ``best/`` the one that belongs to the checkpoint resumed from.

    A later one that no checkpoint knows of is removed, as the run meets it again; one that belongs to a later
    checkpoint than the one resumed from is renamed to ``best-step-...``.

    Args:
        best: The directory.
        step: The best step by the checkpoint, if it knows of one.
        newest_checkpoint: The step of the newest checkpoint in the run directory; 0 without any.
    """
    there = exported_step(best)
    if there is not None and there != step:
        if there <= newest_checkpoint and not _kept(best).exists():
            other = best.with_name(f"best-step-{there:06d}")
            shutil.rmtree(other, ignore_errors=True)
            best.rename(other)
            print(f"best/ is of step {there}, which is not the best step of the checkpoint: it is now {other.name}/.")
        else:
            shutil.rmtree(best)
    if step is not None and exported_step(_kept(best)) == step and not best.exists():
        _kept(best).rename(best)
    forget_kept(best)


def _kept(best: Path) -> Path:
    return best.with_name(".kept-best")
