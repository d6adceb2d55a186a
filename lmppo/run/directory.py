"""The run directory: what it holds; decides whether a run may start, resume, or must refuse."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from lmppo.redaction import scrub
from lmppo.run.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    check_format,
    list_checkpoints,
    newest_valid_checkpoint,
    verify_checkpoint,
)
from lmppo.run.export import old_of

# Settings that may change when a run is resumed: they affect what is shown and kept, not what is learned.
FREE_SETTINGS = {
    "output_dir", "max_steps", "resume_from_checkpoint", "use_cpu", "cpu_threads", "gradient_checkpointing",
    "trust_remote_code", "micro_batch_size", "sample_batch_size", "cuda_graphs", "logging_steps", "eval_steps",
    "eval_completions", "save_steps", "save_rollouts", "save_total_limit", "log_completions", "report_to", "run_name",
    "disable_tqdm", "watch_funcs",
}  # fmt: skip


def read_run_config(output_dir: str | Path) -> dict[str, Any] | None:
    """The settings that ``run_config.yaml`` holds, or None if there are none.

    Raises:
        FormatError: It was written by an earlier or a newer lmppo.
        CheckpointError: It is damaged.
    """
    path = Path(output_dir) / "run_config.yaml"
    try:
        settings = yaml.safe_load(path.read_text()) if path.exists() else None
        if settings is not None:
            check_format(Path(output_dir), settings.pop("format_version", 1))  # the first format did not name itself
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged: delete it, and pass --resume_from_checkpoint true to go on with the run."
        ) from error
    return settings


def write_run_config(output_dir: str | Path, settings: dict[str, Any]) -> None:
    """Write ``run_config.yaml``."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"format_version": FORMAT_VERSION} | settings, sort_keys=False)
    (Path(output_dir) / "run_config.yaml").write_text(text)


def find_resume_point(output_dir: str | Path, resume: str | bool | None, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning. Changes nothing on disk.

    Args:
        output_dir: The run directory.
        resume: None: the directory must not hold a run. ``"auto"``: the newest valid checkpoint of this same run, or the
            beginning. True or ``"true"``: the newest valid checkpoint. Otherwise a checkpoint's directory.
        settings: The configuration and model of the new run.

    Raises:
        FormatError: The directory or the checkpoint was made by an earlier or a newer lmppo.
        CheckpointError: The directory holds another run, or the checkpoint asked for is missing or damaged.
    """
    root = Path(output_dir)
    holds_run = any((root / name).exists() for name in ("metrics.jsonl", "checkpoints", "final"))
    old = read_run_config(root) if holds_run else None  # another format is refused, however one resumes
    if resume in (None, False, "false", "none"):
        if holds_run:
            raise CheckpointError(
                f"output_dir={str(root)!r} already holds a run. Pass --resume_from_checkpoint auto to resume it, "
                f"or another --output_dir."
            )
        return None
    if resume not in (True, "true", "auto"):
        return _explicit(root, Path(str(resume)))
    if resume == "auto" and holds_run:
        _refuse_another_run(root, old, settings)
    point, rejected = newest_valid_checkpoint(root)
    for reason in rejected:
        print(f"Skipped a damaged checkpoint. {reason}")
    if point is None and (rejected or resume != "auto"):
        reasons = "; ".join(rejected) or "there is none"
        raise CheckpointError(f"No checkpoint in {root} can be resumed: {reasons}.")
    return point


def discard_unsaved(output_dir: str | Path) -> None:
    """Remove what an interrupted save or export left behind; an export that was being replaced is put back."""
    leftovers = list((Path(output_dir) / "checkpoints").glob(".tmp-step-*"))
    for export in (Path(output_dir) / "final", Path(output_dir) / "best"):
        if old_of(export).exists() and not export.exists():
            old_of(export).rename(export)
        leftovers += [export.with_name(f".tmp-{export.name}"), old_of(export)]
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that affect what is learned and that differ: name -> (old, new), without passwords and tokens."""
    old, new = scrub(old), scrub(new)
    names = (set(old) | set(new)) - FREE_SETTINGS
    return {n: (old.get(n), new.get(n)) for n in sorted(names) if old.get(n) != new.get(n)}


def _explicit(root: Path, path: Path) -> Path:
    if not path.is_dir():
        names = ", ".join(p.name for p in list_checkpoints(root)) or "none"
        raise CheckpointError(
            f"resume_from_checkpoint={str(path)!r} is not a directory. Checkpoints in {root}: {names}."
        )
    verify_checkpoint(path)
    return path


def _refuse_another_run(root: Path, old: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    if old is None:
        raise CheckpointError(f"output_dir={str(root)!r} is not empty and has no run_config.yaml: choose another one.")
    changed = changed_settings(old, settings)
    if changed:
        listed = "; ".join(f"{name}: was {a!r}, now {b!r}" for name, (a, b) in changed.items())
        raise CheckpointError(
            f"output_dir={str(root)!r} holds a run with other settings ({listed}). Choose another --output_dir, or "
            f"pass --resume_from_checkpoint true to resume with the new settings."
        )
