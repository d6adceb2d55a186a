"""The two records that flow: what a rollout measured, and all that an update may see.

Axes: ``B`` completions, ``P`` prompt positions, ``T`` completion positions, ``V`` vocabulary, ``K`` reward streams.
"""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")

_DTYPES = {"_mask": torch.bool, "_ids": torch.long, "support": torch.bool, "ended": torch.bool}


@dataclass(frozen=True)
class Rollout:
    """What was sampled, and what was measured under the policy that sampled it.

    Attributes:
        prompt_ids: ``(B, P)`` prompt tokens, left-padded; what pads is arbitrary, the mask decides.
        prompt_mask: ``(B, P)`` True on prompt tokens.
        completion_ids: ``(B, T)`` sampled tokens, right-padded.
        completion_mask: ``(B, T)`` True on the sampled tokens that count, EOS included.
        logprobs: ``(B, T)`` of each token under the policy that sampled it.
        ref_logprobs: ``(B, T)`` under the reference.
        values: ``(B, T, K)`` the critic's value of the state each token was chosen in.
        scores: ``(B, T, K)`` what the reward functions gave, before any KL penalty: a score for the whole completion
            stands on its last token.
        kl_penalty: ``(B, T)`` the KL to the reference that the rewards pay for, by ``kl_form``; for k1 it is
            ``kl_to_ref``.
        bootstrap_values: ``(B, K)`` the critic's value of the last state of a completion that was cut, with
            ``truncation='bootstrap'``; else 0.
        ended: ``(B,)`` True where the completion ended with EOS, False where it was cut.
        max_logit: ``(B,)`` the largest |logit| that the tokens of a row were sampled from, -inf left out.
        support: ``(B, T, V)`` True on the tokens that could be sampled (top-k, top-p, min-p); ``(B, T, 1)`` and all
            True where nothing was cut off.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    kl_penalty: Tensor
    bootstrap_values: Tensor
    ended: Tensor
    max_logit: Tensor
    support: Tensor

    def __post_init__(self) -> None:
        _check_record(self)

    @property
    def kl_to_ref(self) -> Tensor:
        """``(B, T)`` k1 estimate per token, ``logprobs - ref_logprobs``, 0 where the mask is False."""
        return torch.where(self.completion_mask, self.logprobs - self.ref_logprobs, 0.0)

    @property
    def completion_lengths(self) -> Tensor:
        """``(B,)`` counted tokens of each completion."""
        return self.completion_mask.sum(dim=1)


@dataclass(frozen=True)
class Experience:
    """All that the update may see; shapes as in :class:`Rollout`.

    Attributes:
        completion_mask: ``(B, T)`` True on the tokens that are learned from.
        old_logprobs: ``(B, T)`` under the policy that sampled the tokens.
        ref_logprobs: ``(B, T)`` under the reference.
        old_values: ``(B, T, K)`` the critic before the update.
        advantages: ``(B, T)`` weight of each token in the policy's gradient.
        returns: ``(B, T, K)`` the critic's targets.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    support: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def __post_init__(self) -> None:
        _check_record(self)

    @classmethod
    def from_rollout(
        cls, rollout: Rollout, advantages: Tensor, returns: Tensor, mask: Tensor | None = None
    ) -> "Experience":
        """The rollout's tokens with what the estimator made of its rewards.

        Args:
            rollout: The rollout.
            advantages: ``(B, T)``.
            returns: ``(B, T, K)``.
            mask: ``(B, T)`` the tokens that are learned from (default: all that count).
        """
        return cls(
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            completion_ids=rollout.completion_ids,
            completion_mask=rollout.completion_mask if mask is None else mask,
            support=rollout.support,
            old_logprobs=rollout.logprobs,
            ref_logprobs=rollout.ref_logprobs,
            old_values=rollout.values,
            advantages=advantages,
            returns=returns,
        )


def select_rows(record: Record, rows: Tensor | slice) -> Record:
    """The record of some rows only (an index tensor, a boolean mask, or a slice)."""
    return replace(record, **{f.name: getattr(record, f.name)[rows] for f in fields(record)})  # type: ignore[type-var,arg-type]


def move(record: Record, device: torch.device | str) -> Record:
    """The record with every tensor on a device."""
    return replace(record, **{f.name: getattr(record, f.name).to(device) for f in fields(record)})  # type: ignore[type-var,arg-type]


def concatenate(records: list[Record]) -> Record:
    """The rows of several records of equal widths, one after the other."""
    names = [f.name for f in fields(records[0])]  # type: ignore[arg-type]
    return replace(records[0], **{n: torch.cat([getattr(r, n) for r in records]) for n in names})  # type: ignore[type-var]


def trim(record: Record) -> Record:
    """The record without the prompt columns and the last completion columns that none of its rows uses."""
    first = int((~record.prompt_mask.any(dim=0)).long().cumprod(dim=0).sum())  # type: ignore[attr-defined]
    used = record.completion_mask.any(dim=0).nonzero()  # type: ignore[attr-defined]
    last = int(used[-1]) + 1 if len(used) else 1
    columns = {}
    for f in fields(record):  # type: ignore[arg-type]
        tensor = getattr(record, f.name)
        if tensor.ndim > 1 and f.name != "bootstrap_values":
            columns[f.name] = tensor[:, first:] if f.name.startswith("prompt") else tensor[:, :last]
    return replace(record, **columns)  # type: ignore[type-var]


def _check_record(record: Rollout | Experience) -> None:
    """Shapes and kinds of all fields against ``prompt_ids`` (B, P) and ``completion_mask`` (B, T)."""
    name = type(record).__name__
    if record.prompt_ids.ndim != 2 or record.completion_mask.ndim != 2:
        raise ValueError(
            f"{name}: prompt_ids {tuple(record.prompt_ids.shape)} and completion_mask "
            f"{tuple(record.completion_mask.shape)} must be (B, P) and (B, T)."
        )
    (n_rows, n_prompt), n_time = record.prompt_ids.shape, record.completion_mask.shape[1]
    n_streams = (record.values if isinstance(record, Rollout) else record.old_values).shape[-1]
    for f in fields(record):
        tensor = getattr(record, f.name)
        if f.name.startswith("prompt"):
            expected: tuple[int, ...] = (n_rows, n_prompt)
        elif f.name in ("ended", "max_logit"):
            expected = (n_rows,)
        elif f.name == "bootstrap_values":
            expected = (n_rows, n_streams)
        elif f.name == "support":
            expected = (n_rows, n_time, tensor.shape[-1])
        elif f.name in ("values", "old_values", "returns", "scores"):
            expected = (n_rows, n_time, n_streams)
        else:
            expected = (n_rows, n_time)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}.{f.name} has shape {tuple(tensor.shape)}; expected {expected}.")
        dtype = next((d for ending, d in _DTYPES.items() if f.name.endswith(ending)), None)
        if (dtype and tensor.dtype != dtype) or (dtype is None and not tensor.is_floating_point()):
            raise TypeError(f"{name}.{f.name} is {tensor.dtype}; expected {dtype or 'a floating type'}.")
