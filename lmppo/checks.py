"""What stops a run: numbers that are not finite, and numbers that differ before the first step.

Before the first step, up to rounding, every ratio is 1, and the policy is the reference.

A log-probability is a logit minus the logsumexp of all of them, so its rounding error grows with the logits: those of
GPT-2 lie at -30 to -130, and a bound that was measured on smaller ones stops runs that are right.
"""

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

# Nats of rounding in a log-probability, and the |logit| up to which that bound holds; beyond it grows in proportion.
_ROUNDING = {"no": (1e-4, 20.0), "bf16": (1e-2, 1.0), "fp16": (1e-2, 1.0), "int4": (5e-2, 1.0), "int8": (1e-1, 1.0)}


class StepZeroError(RuntimeError):
    """Something that must be exact before the first update is not: learning on would train on wrong numbers."""


def rounding_tolerance(max_logit: float, precision: str = "no") -> float:
    """The largest difference, in nats, that rounding alone can make between two log-probabilities of one token.

    ``1e-4 * max(1, max_logit / 20)`` in float32, ``1e-2 * max(1, max_logit)`` in 16 bits, five times
    that with layers of 4 bits that compute in 16, and ten times with layers of 8 bits

    Args:
        max_logit: The largest |logit| of the distributions.
        precision: What is computed in: ``no`` (float32), ``bf16``, ``fp16``, ``int4`` for layers quantized to 4 bits that
            compute in 16, or ``int8`` for layers quantized to 8 bits.
    """
    nats, scale = _ROUNDING[precision]
    return nats * max(1.0, max_logit / scale)


def check_first_ratio(stats: dict[str, float], tolerance: float) -> None:
    """On the first minibatch, before any step, every ratio is 1.

    Raises:
        StepZeroError: ``stats["log_ratio_max"]`` is above ``tolerance``.
    """
    worst = stats.get("log_ratio_max", 0.0)
    if worst > tolerance:
        raise StepZeroError(
            f"Before the first step the update's log-probabilities differ from the rollout's by up to {worst:.2e} nats "
            f"(allowed: {tolerance:.0e}), so the ratio does not start at 1. Usual causes: dropout or another source of "
            f"randomness in the model, a model that depends on padding or batch composition, logits changed after the "
            f"forward pass. If it is rounding, raise step_zero_tolerance."
        )


def check_kl_zero(worst: float, tolerance: float) -> None:
    """Before any update the policy is the reference, and every token's KL is what its support makes it: 0 without one.

    Args:
        worst: The largest |log-ratio of policy and reference + log of the kept mass| on a token; the kept mass is the
            probability of the tokens that could be sampled, 1 where all could.
        tolerance: The largest one allowed.

    Raises:
        StepZeroError: ``worst`` is above ``tolerance``.
    """
    if worst > tolerance:
        raise StepZeroError(
            f"Before any update the policy and the reference differ by up to {worst:.2e} nats on a token (allowed: "
            f"{tolerance:.0e}), though they are the same weights. Usual causes: a model whose output depends on the "
            f"batch or on padding, weights changed after the trainer was built, an adapter that does not start at zero. "
            f"If it is rounding, raise step_zero_tolerance."
        )


class NonFiniteError(RuntimeError):
    """A number that must be finite is NaN or infinite; nothing was updated or saved with it."""


def can_be_sampled(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """``(B,)`` False on the rows that :func:`check_logits` and :func:`check_choice` refuse.

    Args:
        logits: ``(B, V)``.
        allowed: ``(B, V)`` True on the tokens that may be sampled; None: all.
    """
    usable = logits.amax(dim=-1).isfinite()
    return usable if allowed is None else usable & ((logits > float("-inf")) & allowed).any(dim=-1)


def check_logits(logits: Tensor, rows: Tensor) -> None:
    """No NaN and no +inf; -inf is a token that the model itself rules out.

    Args:
        logits: ``(B, V)``.
        rows: ``(B,)`` the numbers of those rows, for the message.

    Raises:
        NonFiniteError: Names the rows.
    """
    broken = rows[~logits.amax(dim=-1).isfinite()].tolist()
    if broken:
        raise NonFiniteError(f"The policy's logits are not finite in rows {broken[:8]} of this process's batch.")


def check_choice(logits: Tensor, allowed: Tensor | None, rows: Tensor) -> None:
    """Some token that may be sampled has a probability above 0.

    Args:
        logits: ``(B, V)``.
        allowed: ``(B, V)`` True on the tokens that may be sampled; None: all.
        rows: ``(B,)`` the numbers of those rows, for the message.

    Raises:
        NonFiniteError: Names the rows.
    """
    empty = rows[~can_be_sampled(logits, allowed)].tolist()
    if empty:
        raise NonFiniteError(
            f"No token can be sampled in rows {empty[:8]} of this process's batch: those that suppress_tokens, "
            f"bad_words_ids and min_new_tokens leave have the logit -inf in the policy. Forbid fewer tokens."
        )


def check_reference(ref_logprobs: Tensor, kl: Tensor, completion_ids: Tensor) -> None:
    """The reference gives every token that was sampled a probability above 0, and the KL to it is finite.

    Args:
        ref_logprobs: ``(B, T)`` under the reference, 0 where no token counts.
        kl: ``(B, T)`` the KL to it per token, by the configured estimator, 0 where no token counts.
        completion_ids: ``(B, T)``.

    Raises:
        NonFiniteError: Names the first row and its token.
    """
    broken = (~(ref_logprobs.isfinite() & kl.isfinite())).nonzero().tolist()
    if not broken:
        return
    row, t = broken[0]
    logprob = ref_logprobs[row, t].item()
    what = f"has the log-probability {logprob} under the reference"
    if math.isfinite(logprob):
        what = "was sampled where the reference gives probability 0 to another token that could be sampled"
    raise NonFiniteError(
        f"Row {row} of the batch: its token {t} (counted from 0), with the id {int(completion_ids[row, t])}, {what}, so "
        f"the KL to the reference is not finite (tokens like it in the batch: {len(broken)}). The reference must give "
        f"every token that can be sampled a probability above 0: use a ref_model whose logits are finite."
    )


def check_gradients(
    gradients: Mapping[str, Tensor | None], norms: Iterable[float], stats: Mapping[str, float], iteration: int
) -> None:
    """Every loss and the norms of the gradient are finite.

    Args:
        gradients: By the parameter's name.
        norms: Their norms.
        stats: The losses and what was measured beside them.
        iteration: The PPO iteration, for the message.

    Raises:
        NonFiniteError: Names the first parameter whose gradient is not finite.
    """
    if all(map(math.isfinite, [*norms, *stats.values()])):
        return
    culprit = next(
        (n for n, g in gradients.items() if g is not None and not g.isfinite().all()), "none: the loss itself"
    )
    raise NonFiniteError(
        f"Iteration {iteration}: the loss or its gradient is not finite (first parameter: {culprit}; losses: "
        f"{dict(stats)}). The step was not taken. Lower learning_rate, or look at the rewards of this batch."
    )
