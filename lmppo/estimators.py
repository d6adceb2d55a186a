"""From a rollout to the rewards, advantages and returns the update needs: the math of `lmppo.functional`, by name."""

import torch
from torch import Tensor

from lmppo.config import PPOConfig
from lmppo.experience import Rollout
from lmppo.functional import gae, immediate_rewards, kl_shaped_rewards, masked_whiten, rewards_to_go, total_return


def shape_rewards(rollout: Rollout, *, kl_coef: float) -> Tensor:
    """``(B, T, K)`` rewards per token: the scores, and in the first stream the KL penalty to the reference."""
    penalty = torch.zeros_like(rollout.kl_to_ref)
    streams = [
        kl_shaped_rewards(
            rollout.scores[..., k],
            rollout.kl_to_ref if k == 0 else penalty,
            rollout.completion_mask,
            kl_coef=kl_coef,
        )
        for k in range(rollout.scores.shape[-1])
    ]
    return torch.stack(streams, dim=-1)


def estimate(rollout: Rollout, rewards: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Advantages and the critic's targets, by the estimator that the configuration names.

    ``gae``: generalized advantage estimation; its returns are advantages plus values. The others subtract the critic's
    value, as a baseline, from what they are named after; the critic learns the same quantity (for ``total_return``, the
    reward-to-go, which is what a state's value means).

    Args:
        rollout: The rollout.
        rewards: ``(B, T, K)`` per token, KL penalty included.
        config: Gives ``estimator``, ``gamma``, ``lam`` and ``whiten_advantages``.

    Returns:
        ``advantages (B, T)``, whitened over the whole batch if asked, and ``returns (B, T, K)``.
    """
    streams = [
        _estimate_stream(rollout, rewards[..., k], rollout.values[..., k], config) for k in range(rewards.shape[-1])
    ]
    advantages = torch.stack([a for a, _ in streams]).sum(dim=0)
    returns = torch.stack([r for _, r in streams], dim=-1)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, rollout.completion_mask)
    return advantages, returns


def _estimate_stream(rollout: Rollout, rewards: Tensor, values: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    mask = rollout.completion_mask
    if config.estimator == "gae":
        return gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    to_go = rewards_to_go(rewards, mask, gamma=config.gamma)
    weight, returns = {
        "rewards_to_go": (to_go, to_go),
        "total_return": (total_return(rewards, mask, gamma=config.gamma), to_go),
        "immediate_rewards": (immediate_rewards(rewards, mask),) * 2,
    }[config.estimator]
    return torch.where(mask, weight - values, 0.0), returns
