"""What the policy's update climbs, by name: one loss per token for each objective, and the KL to the reference as a loss.

``clip`` (PPO), ``kl_penalty`` (PPO's other form), ``importance_sampled`` (no bound on how far the policy moves) and
``policy_gradient`` (no ratio: one step per rollout). ``trpo`` is no loss: see :mod:`lmppo.trpo`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmppo.config import PPOConfig
from lmppo.experience import Experience
from lmppo.functional import (
    clipped_policy_loss,
    exact_kl,
    importance_sampled_loss,
    kl_k2,
    kl_k3,
    kl_penalized_policy_loss,
    policy_gradient_loss,
)
from lmppo.models import Reference


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


def policy_loss(logprobs: Tensor, micro: Experience, config: PPOConfig, penalties: Penalties) -> Tensor:
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
    logits: Tensor, logprobs: Tensor, micro: Experience, config: PPOConfig, penalties: Penalties
) -> Tensor:
    """``(B, T)`` the KL to the reference as a term of the loss, by the configured estimator; 0 where the mask is False.

    ``exact`` is differentiable over the whole vocabulary: the gradient of each state's own KL, without sampling noise.
    As a loss, ``k2`` has the same expected gradient on the policy's own samples.

    Args:
        logits: ``(B, T, V)`` now.
        logprobs: ``(B, T)`` now.
        micro: The rows.
        config: Gives ``kl_form`` and ``temperature``.
        penalties: Gives the reference.
    """
    if config.kl_measure == "exact":
        assert penalties.reference is not None
        ref_logits = penalties.reference.logits(
            micro.prompt_ids, micro.prompt_mask, micro.completion_ids, micro.completion_mask
        )
        kl = exact_kl(logits, ref_logits, temperature=config.temperature, support=micro.support)
    else:
        kl = {"k2": kl_k2, "k3": kl_k3}[config.kl_measure](logprobs, micro.ref_logprobs)
    return torch.where(micro.completion_mask, kl, 0.0)
