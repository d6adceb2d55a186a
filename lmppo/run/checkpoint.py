"""Checkpoints: everything an exact resume needs, in safetensors and JSON, checked by SHA-256, never pickled.

``checkpoints/step-000120/`` holds ``policy/`` (a Hugging Face directory, or an adapter and what of the base model is
trained beside it), ``value_head.safetensors`` or ``critic/`` (a Hugging Face directory, or an adapter and its value head),
``optimizer.safetensors``, ``state.json``, and ``MANIFEST.json`` with every file's size and hash. It is written under a
temporary name, and renamed when it is whole. There is no random state to save: the noise of sampling, prompt order and
minibatch order is a function of the seed and the iteration.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lmppo.models import ActorCritic, load_weights
from lmppo.models.adapters import trained_beside
from lmppo.models.names import parameters_of, saved_state_of, state_of, uncompiled
from lmppo.pretrained import load_adapter_weights
from lmppo.protocols import Tokenizer
from lmppo.redaction import scrub_files
from lmppo.run.export import head_file, save_adapter, save_critic

FORMAT_VERSION = 2  # of run directories and their checkpoints: 2 since kl_form
_BESIDE = "trained_beside.safetensors"  # the base model's weights that are trained beside an adapter
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not of this run."""


class FormatError(CheckpointError):
    """A run directory or a checkpoint is whole, and of another version's format."""


def checkpoint_dir(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return Path(output_dir) / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    target: Path,
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    tokenizer: Tokenizer,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint beside its final place, verify nothing is missing, and rename it.

    Args:
        target: Final directory, as :func:`checkpoint_dir` gives it.
        model: Policy and critic.
        optimizer: AdamW over the model's parameters.
        state: JSON values: step, prompts drawn, KL coefficient, configuration, versions.
        tokenizer: The policy's tokenizer, saved beside the policy.
        write_more: Writes further files into the directory it is given, before the manifest is made.
    """
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save_policy(uncompiled(model.policy), temporary / "policy")
    save_critic(model, temporary)
    tokenizer.save_pretrained(temporary / "policy")
    save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2, allow_nan=False) + "\n")
    if write_more is not None:
        write_more(temporary)
    scrub_files(temporary)
    manifest = {"format_version": FORMAT_VERSION, "files": _hashes(temporary)}
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [p for p in temporary.rglob("*") if p.is_file()]:
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _sync(target.parent)


def _save_policy(policy: Any, directory: Path) -> None:
    if hasattr(policy, "peft_config"):
        save_adapter(policy, directory)
        beside = {name: p.detach().contiguous() for name, p in trained_beside(policy).items()}
        if beside:
            save_file(beside, directory / _BESIDE)
    else:
        policy.save_pretrained(directory, state_dict=saved_state_of(policy))


def load_checkpoint(source: Path, model: ActorCritic, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a verified checkpoint's weights and optimizer state in place.

    Returns:
        The ``state`` it was saved with.

    Raises:
        CheckpointError: The checkpoint is damaged, or its tensors do not fit the model.
    """
    verify_checkpoint(source)
    _load_model(model, source)
    restore_optimizer(model, optimizer, load_file(source / "optimizer.safetensors"))
    return json.loads((source / "state.json").read_text())


def _load_model(model: ActorCritic, directory: Path) -> None:
    for name, part in (("policy", uncompiled(model.policy)), ("critic", uncompiled(model.critic))):
        if hasattr(part, "peft_config"):
            _load_adapter(part, directory / name)
        elif part is not None:
            _load_into(part, directory / name)
    if model.value_head is not None:
        _put(state_of(model.value_head), load_file(head_file(model, directory)), directory)


def _load_adapter(policy: Any, directory: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = policy.active_adapter
    weights = load_adapter_weights(directory)
    _check_fit(get_peft_model_state_dict(policy, adapter_name=name), weights, directory)
    set_peft_model_state_dict(policy, weights, adapter_name=name)
    beside = directory / _BESIDE
    _put(trained_beside(policy), load_file(beside) if beside.exists() else {}, directory)


def _load_into(module: PreTrainedModel, directory: Path) -> None:
    """Copy saved weights into a model of the same class, through transformers (which may rename what it saves)."""
    family = json.loads((directory / "config.json").read_text())["model_type"]
    if family != module.config.model_type:
        raise CheckpointError(
            f"{directory} does not fit this model: it is a {family}, not a {module.config.model_type}."
        )
    _put(state_of(module), load_weights(type(module), str(directory)).state_dict(), directory)


@torch.no_grad()
def _put(own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Copy saved tensors into a model's own."""
    _check_fit(own, saved, directory)
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _check_fit(own: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], directory: Path) -> None:
    differing = sorted(
        n for n in set(own) | set(saved) if n not in own or n not in saved or own[n].shape != saved[n].shape
    )
    if differing:
        raise CheckpointError(
            f"{directory} does not fit this model: {', '.join(differing[:3])} differ. Resume with the model the run "
            f"was started with."
        )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as named tensors: ``{parameter}/{step, exp_avg, exp_avg_sq}``."""
    names = {id(p): name for name, p in parameters_of(model).items()}
    return {
        f"{names[id(p)]}/{key}": torch.as_tensor(value).contiguous()
        for p, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put saved AdamW state back, by parameter name.

    Raises:
        CheckpointError: A saved entry belongs to no parameter of the model.
    """
    parameters = parameters_of(model)
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        if name not in parameters:
            raise CheckpointError(f"The saved optimizer state has {name!r}, which is no parameter of this model.")
        parameter = parameters[name]
        entry = optimizer.state.setdefault(parameter, {})
        on_cpu = key == "step" and id(parameter) not in fused
        entry[key] = tensor.to("cpu" if on_cpu else parameter.device, copy=True)


def verify_checkpoint(directory: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        FormatError: The checkpoint was made by an earlier or a newer lmppo.
        CheckpointError: The directory is no checkpoint, or a file is missing or changed.
    """
    try:
        manifest = json.loads((directory / "MANIFEST.json").read_text())
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} is no complete checkpoint: MANIFEST.json is missing or unreadable."
        ) from error
    check_format(directory, version)
    try:
        found = _hashes(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
    for name in sorted({"optimizer.safetensors", "state.json", *files}):
        if name not in found:
            raise CheckpointError(f"{directory}: {name} is missing.")
        if found[name] != files.get(name):
            raise CheckpointError(f"{directory}: {name} is not the file that was saved (its size or SHA-256 differs).")


def check_format(path: Path, version: int) -> None:
    """Refuse what another version's format says.

    Raises:
        FormatError: It is older or newer than this lmppo's.
    """
    if version > FORMAT_VERSION:
        raise FormatError(f"{path} was made by a newer lmppo (format {version}): upgrade lmppo to resume it.")
    if version < FORMAT_VERSION:
        raise FormatError(
            f"{path} was made by an earlier lmppo (format {version}), which this one cannot continue: choose another "
            f"output_dir, and start a new run there."
        )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The run's checkpoints, oldest first, by step number; links and foreign directories are not among them."""
    folder = Path(output_dir) / "checkpoints"
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its directory's name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_valid_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and why each newer one was passed over.

    Raises:
        FormatError: One that would be taken is of another version's format.
    """
    rejected: list[str] = []
    for candidate in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(candidate)
        except FormatError:
            raise
        except CheckpointError as error:
            rejected.append(str(error))
        else:
            return candidate, rejected
    return None, rejected


def prune_checkpoints(output_dir: str | Path, keep: int) -> None:
    """Delete the oldest checkpoints until ``keep`` are left; only directories that carry our manifest."""
    for old in list_checkpoints(output_dir)[:-keep]:
        if (old / "MANIFEST.json").exists():
            shutil.rmtree(old, ignore_errors=True)


def _hashes(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    return {
        p.relative_to(directory).as_posix(): {
            "size": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
