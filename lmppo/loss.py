"""The loss of the update: the policy's terms, the critic's, and the sums over tokens that are reported of them.

``clip`` (PPO), ``kl_penalty`` (PPO's other form), ``importance_sampled`` (no bound on how far the policy moves) and
``policy_gradient`` (no ratio: one step per rollout). ``trpo`` is no loss: see :mod:`lmppo.trpo`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmppo.functional import (
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    exact_kl,
    importance_sampled_loss,
    kl_k2,
    kl_k3,
    kl_penalized_policy_loss,
    masked_mean,
    policy_gradient_loss,
    token_logprobs_and_entropy,
    token_mean_loss,
)
from lmppo.functional.kl import ALL_TOKENS
from lmppo.models import HEADS, Reference, Sums
from lmppo.records import Experience
from lmppo.settings import LossSettings


@dataclass(frozen=True)
class Penalties:
    """The prices that hold during one iteration's update.

    Attributes:
        beta: Price of a nat from the old policy, with ``objective='kl_penalty'``.
        kl_coef: Price of a nat from the reference within the loss, in the unit of the advantages; 0: none there.
        reference: The reference policy, with the exact KL in the loss.
    """

    beta: float = 0.0
    kl_coef: float = 0.0
    reference: Reference | None = None


def ppo_loss(
    model: nn.Module,
    micro: Experience,
    config: LossSettings,
    penalties: Penalties,
    *,
    heads: Sequence[str] = HEADS,
    token_count: int,
) -> tuple[Tensor, Sums]:
    """One micro-batch's share of the loss ``policy + kl_coef * kl - ent_coef * entropy + vf_coef * value``.

    Args:
        model: Policy and critic.
        micro: The rows.
        config: Gives the objective, its clips and coefficients.
        penalties: Prices of the KL to the old and to the reference policy.
        heads: ``"logits"``: the policy learns; ``"values"``: the critic does. The terms of whoever does not are left
            out, and their forward passes as far as possible.
        token_count: Counted tokens of the whole minibatch.

    Returns:
        The loss, and sums over counted tokens for the metrics.
    """
    counted = micro.counted()
    reference = penalties.reference if "logits" in heads and penalties.kl_coef > 0 else None
    ref_states = reference.read(micro.tokens) if reference is not None and config.kl_measure == "exact" else None

    def of_logits(logits: Tensor, part: slice) -> tuple[Tensor, Sums]:
        some, ref_logits = counted.cut(T=part), None
        if reference is not None and ref_states is not None:
            ref_logits = reference.logits_of(ref_states.cut(part))
        per_token, sums = _policy_terms(logits, some, config, penalties, ref_logits)
        return token_mean_loss(per_token, some.completion_mask, token_count=token_count), sums

    outputs = model(micro.tokens, heads, of_logits)
    loss, sums = outputs["logits"] if "logits" in outputs else (torch.zeros_like(counted.advantages).sum(), {})
    if "values" in outputs:
        value_loss, value_sums = _value_terms(outputs["values"], counted, config)
        loss = loss + config.vf_coef * token_mean_loss(value_loss, counted.completion_mask, token_count=token_count)
        sums = sums | value_sums
    return loss, sums


def _value_terms(values: Tensor, micro: Experience, config: LossSettings) -> tuple[Tensor, Sums]:
    mask = micro.completion_mask.unsqueeze(-1).expand_as(values)
    loss = clipped_value_loss(values, micro.old_values, micro.returns, mask, clip_range=config.value_clip_range)
    loss, clipped = loss.sum(dim=-1), values.new_zeros(())
    if config.value_clip_range is not None:
        moved = ((values.detach() - micro.old_values).abs() > config.value_clip_range).any(dim=-1)
        clipped = (moved & micro.completion_mask).float().sum()
    return loss, {"value_loss": loss.detach().sum(), "value_clip_frac": clipped}


def _policy_terms(
    logits: Tensor, micro: Experience, config: LossSettings, penalties: Penalties, ref_logits: Tensor | None
) -> tuple[Tensor, Sums]:
    logprobs, entropy = token_logprobs_and_entropy(
        logits,
        micro.tokens.completion_ids,
        temperature=config.temperature,
        support=micro.support.allowed(),
        entropy_gradient=config.ent_coef > 0,
    )
    loss = policy_loss(logprobs, micro, config, penalties)
    entropy = torch.where(micro.completion_mask, entropy, 0.0)
    sums = {"policy_loss": loss.detach().sum(), "entropy": entropy.detach().sum()}
    if config.ent_coef > 0:
        loss = loss - config.ent_coef * entropy
    if penalties.kl_coef > 0:
        kl = reference_kl(logits, logprobs, micro, config, ref_logits)
        loss = loss + penalties.kl_coef * kl
        sums["kl_loss"] = kl.detach().sum()
    clip = clip_fraction(
        logprobs.detach(),
        micro.old_logprobs,
        micro.completion_mask,
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high,
    )
    sums["clip_frac"] = clip * micro.completion_mask.sum()
    return loss, sums | ratio_sums(logprobs.detach(), micro)


def ratio_sums(logprobs: Tensor, micro: Experience) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled: sums over counted tokens, and the largest |log ratio|."""
    mask, old = micro.completion_mask, micro.old_logprobs
    log_ratio = torch.where(mask, logprobs - old, 0.0)
    return {
        "approx_kl": approx_kl(logprobs, old, mask) * mask.sum(),
        "ratio": masked_mean(log_ratio.exp(), mask) * mask.sum(),
        "log_ratio_max": log_ratio.abs().max() if log_ratio.numel() else log_ratio.sum(),
    }


def policy_loss(logprobs: Tensor, micro: Experience, config: LossSettings, penalties: Penalties) -> Tensor:
    """``(B, T)`` the objective's loss per token, to be minimized.

    Args:
        logprobs: ``(B, T)`` now.
        micro: The rows.
        config: Gives ``objective`` and the clips.
        penalties: Gives ``beta``.
    """
    old, advantages, mask = micro.old_logprobs, micro.advantages, micro.completion_mask
    if config.objective == "clip":
        return clipped_policy_loss(
            logprobs,
            old,
            advantages,
            mask,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
        )
    if config.objective == "kl_penalty":
        return kl_penalized_policy_loss(logprobs, old, advantages, mask, beta=penalties.beta)
    if config.objective == "policy_gradient":
        return policy_gradient_loss(logprobs, advantages, mask)
    return importance_sampled_loss(logprobs, old, advantages, mask)


def reference_kl(
    logits: Tensor, logprobs: Tensor, micro: Experience, config: LossSettings, ref_logits: Tensor | None
) -> Tensor:
    """``(B, T)`` the KL to the reference as a term of the loss, by the configured estimator; 0 where the mask is False.

    It is that of the distribution that is sampled, over its support, to the reference's over all tokens; the support
    stays that of the rollout.
    ``exact`` is differentiable over the whole vocabulary: the gradient of each state's own KL, without sampling noise.
    As a loss, ``k2`` has the same expected gradient on the policy's own samples.

    Args:
        logits: ``(B, T, V)`` now.
        logprobs: ``(B, T)`` now.
        micro: The rows.
        config: Gives ``kl_form`` and ``temperature``.
        ref_logits: ``(B, T, V)`` the reference's, for the exact KL.
    """
    if config.kl_measure == "exact":
        assert ref_logits is not None
        support = micro.support.allowed()
        kl = exact_kl(logits, ref_logits, temperature=config.temperature, support=support, ref_support=ALL_TOKENS)
    elif config.kl_measure == "k3":
        kl = kl_k3(logprobs, micro.ref_logprobs, ref_support_logprobs=micro.ref_support_logprobs)
    else:
        kl = kl_k2(logprobs, micro.ref_logprobs)
    return torch.where(micro.completion_mask, kl, 0.0)
