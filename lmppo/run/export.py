"""Exporting the policy as a plain Hugging Face model: tried when a run is made, compared with the policy when written."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as hf_logging

from lmppo.checks import rounding_tolerance
from lmppo.models import ActorCritic, load_weights
from lmppo.models.adapters import copy_to, merge_adapter, probe_ids, probe_logits, trained_beside
from lmppo.models.held import HeldInBFloat16, plain
from lmppo.models.inputs import base_of
from lmppo.models.loading import print_once
from lmppo.models.lora_critic import HEAD
from lmppo.models.names import saved_state_of, uncompiled
from lmppo.models.quantized import is_quantized
from lmppo.protocols import Tokenizer
from lmppo.redaction import scrub_files

# What an export writes, by the beginnings of the names; the tokenizer's files are among what is replaced by name alone.
_WEIGHTS = ("model", "adapter", "critic", "value_head")
_RECORD = "step.json"  # of which step an export is


class ExportError(RuntimeError):
    """What was written is not the policy."""


@dataclass(frozen=True)
class ExportPlan:
    """What of a policy can be exported.

    Attributes:
        model: The whole model, with an adapter merged.
        adapter: The adapter by itself, for the base model that it was trained on.
    """

    model: bool
    adapter: bool


def plan_export(model: ActorCritic, tokenizer: Tokenizer) -> ExportPlan:
    """What can be exported, found out by trying it without the weights; a line says what cannot.

    Raises:
        ValueError: Something cannot be saved, or nothing would hold all that is trained.
    """
    policy = uncompiled(model.policy)
    with tempfile.TemporaryDirectory() as directory, _quiet():
        with _naming("processing_class", "Correct the tokenizer"):
            tokenizer.save_pretrained(directory)
        if not is_quantized(policy):
            _try_to_save(base_of(policy), directory, "model")
        if model.critic is not None and not hasattr(model.critic, "peft_config"):
            _try_to_save(uncompiled(model.critic), directory, "critic")
        if hasattr(policy, "peft_config"):
            with _naming("peft_config", "Correct it"):
                policy.peft_config[policy.active_adapter].save_pretrained(directory)
    return _plan_adapter(policy) if hasattr(policy, "peft_config") else ExportPlan(model=True, adapter=False)


def _try_to_save(model: Any, directory: str, name: str) -> None:
    if model.can_generate():
        with _naming(f"{name}.generation_config", f"Correct it in {name}.generation_config"):
            model.generation_config.save_pretrained(directory)
    with _naming(name, "Correct what it names"):
        model.save_pretrained(directory, state_dict={})


@contextlib.contextmanager
def _naming(name: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a library objects to when it saves
        raise ValueError(
            f"{name} cannot be saved, so the run could not be kept: {' '.join(str(error).split())} {remedy} before the "
            f"trainer is built."
        ) from error


def _plan_adapter(policy: Any) -> ExportPlan:
    beside, merged_before = list(trained_beside(policy)), getattr(base_of(policy), "merged_adapter", None)
    lacks = f"{', '.join(beside[:3])} (trained beside it)" if beside else ""
    lacks = lacks or (f"the adapter {merged_before!r} that was merged into its base" if merged_before else "")
    obstacle = "its base is quantized" if is_quantized(policy) else _why_not_merged(policy)
    if lacks and obstacle:
        raise ValueError(
            f"Nothing could be exported: the adapter cannot be merged, as {obstacle}, and by itself it lacks {lacks}. "
            f"Freeze that, or name it in modules_to_save, or use an adapter that can be merged, such as LoRA."
        )
    if obstacle:
        print_once(f"Export: the adapter alone, in adapter/; it cannot be merged, as {obstacle}.")
    if lacks:
        print_once(f"Export: the merged model alone; the adapter by itself lacks {lacks}.")
    return ExportPlan(model=not obstacle, adapter=not lacks)


def _why_not_merged(policy: Any) -> str:
    """Why peft cannot merge the adapter; empty if it can. Tried on a copy without data, if need be on one with data."""
    error: Exception
    for device in ("meta", "cpu"):  # some methods compute with values where they merge
        try:
            merge_adapter(copy_to(policy, device))
        except Exception as raised:  # differs from method to method
            error = raised
        else:
            return ""
    return f"peft says: {' '.join(str(error).split())}"


def export_model(model: ActorCritic, directory: Path, tokenizer: Tokenizer, plan: ExportPlan) -> None:
    """The policy as a plain Hugging Face model (an adapter merged, and kept in ``adapter/``), tokenizer, critic.

    Raises:
        ExportError: The model that was written gives other logits than the policy.
    """
    policy = uncompiled(model.policy)
    if plan.model:
        _write_whole_model(policy, directory)
        difference = compare_export(policy, directory)
        if difference and not plan.adapter:
            raise ExportError(f"{difference} It was not kept; the run's last checkpoint holds the trained weights.")
        if difference:
            print_once(f"{difference} The adapter alone is exported, in adapter/.")
            shutil.rmtree(directory)
            directory.mkdir()
    if plan.adapter:
        save_adapter(policy, directory / "adapter")
    save_critic(model, directory)
    tokenizer.save_pretrained(directory)
    scrub_files(directory)


def _write_whole_model(policy: Any, directory: Path) -> None:
    if hasattr(policy, "peft_config"):
        policy = merge_adapter(copy_to(policy, "cpu"))
    policy.save_pretrained(directory, state_dict=saved_state_of(policy))


def compare_export(policy: Any, directory: Path) -> str:
    """How the model in a directory differs from the policy, beyond rounding; empty if it does not."""
    with _quiet():
        written = load_weights(type(base_of(policy)), str(directory)).eval()
    ids = probe_ids(policy)
    logits = probe_logits(policy, ids).float().cpu()
    ours, theirs = logits.log_softmax(-1), probe_logits(written, ids.cpu()).log_softmax(-1)
    worst = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max().item()  # both -inf: no difference
    allowed = rounding_tolerance(logits[logits.isfinite()].abs().max().item())
    if worst <= allowed:
        return ""
    return (
        f"The model that was exported to {directory} differs from the policy by up to {worst:.1e} nats on a token "
        f"(allowed: {allowed:.0e})."
    )


def save_adapter(policy: Any, directory: Path) -> None:
    """The active adapter, in the directory itself whatever its name."""
    name = policy.active_adapter
    ends = (policy.get_input_embeddings(), policy.get_output_embeddings())  # of the base peft may save these
    saved = tuple(f"{path}." for path, module in policy.named_modules() if module in ends)
    state = policy.state_dict()
    state = {n: plain(t) for n, t in state.items() if n.startswith(saved) or not isinstance(t, HeldInBFloat16)}
    policy.save_pretrained(directory, selected_adapters=[name], state_dict=state)
    if (directory / name).is_dir():
        for path in (directory / name).iterdir():
            path.rename(directory / path.name)
        (directory / name).rmdir()


def save_critic(model: ActorCritic, directory: Path) -> None:
    """``value_head.safetensors``, or a critic of its own in ``critic/``: a model, or an adapter and its value head."""
    critic = uncompiled(model.critic)
    if hasattr(critic, "peft_config"):
        save_adapter(critic, directory / "critic")
    elif critic is not None:
        critic.save_pretrained(directory / "critic", state_dict=saved_state_of(critic))
    if model.value_head is not None:
        head: dict[str, Tensor] = saved_state_of(model.value_head)
        save_file(head, head_file(model, directory))


def head_file(model: ActorCritic, directory: Path) -> Path:
    """Where a value head is saved: beside the policy, or beside the adapter whose states it reads."""
    return (directory if model.critic is None else directory / "critic") / HEAD


def replace_model(
    model: ActorCritic, target: Path, tokenizer: Tokenizer, plan: ExportPlan, record: dict[str, Any]
) -> None:
    """:func:`export_model` to a directory that may exist, with ``record`` in ``step.json``.

    A directory that holds nothing else is replaced as a whole. One that does keeps what else is in it, and its files
    change places one by one, when all new ones are whole.
    """
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    export_model(model, temporary, tokenizer, plan)
    (temporary / _RECORD).write_text(json.dumps(record) + "\n")
    written = {path.name for path in temporary.iterdir()}
    there = {path.name for path in target.iterdir()} if target.exists() else set()
    stale = {name for name in there - written if name.startswith(_WEIGHTS)}
    if there <= written | stale:
        swap_directory(temporary, target)
        return
    for name in sorted(written):
        swap_directory(temporary / name, target / name)
    for name in stale:
        _remove(target / name)
    temporary.rmdir()


def exported_step(directory: Path) -> int | None:
    """The step of an export; None if there is none, or none that a run has written."""
    try:
        return json.loads((directory / _RECORD).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def swap_directory(new: Path, target: Path) -> None:
    """Put a file or a directory in the place of another; at no time is there a part of one and a part of the other."""
    old = old_of(target)
    _remove(old)
    if target.exists():
        target.rename(old)
    new.rename(target)
    _remove(old)


def old_of(target: Path) -> Path:
    """Where a directory is while another takes its place."""
    return target.with_name(f".old-{target.name}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports of what it saves and loads."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
