"""From a rollout to the rewards, advantages and returns the update needs: the math of `lmppo.functional`, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmppo.config import PPOConfig, RewardStream
from lmppo.experience import Rollout
from lmppo.functional import (
    batch_mean_baseline,
    explained_variance,
    gae,
    immediate_rewards,
    kl_shaped_rewards,
    leave_one_out_baseline,
    length_adaptive_lam,
    masked_mean,
    masked_var,
    masked_whiten,
    rewards_to_go,
    total_return,
)
from lmppo.rewards.streams import default_streams, kl_stream


@dataclass(frozen=True)
class Estimate:
    """What the estimator made of a rollout's rewards.

    Attributes:
        mask: ``(B, T)`` the tokens that are learned from: the completion mask, without cut rows if they are masked.
        advantages: ``(B, T)`` weight of each token in the policy's gradient, whitened if asked.
        returns: ``(B, T, K)`` the critic's targets.
        scale: What whitening multiplied the advantages by (1 without): a loss beside them needs the same factor.
        metrics: How good the critic was, against Monte-Carlo returns, and whether ``baseline='auto'`` used it.
    """

    mask: Tensor
    advantages: Tensor
    returns: Tensor
    scale: float
    metrics: dict[str, float]


def shape_rewards(
    rollout: Rollout, config: PPOConfig, streams: Sequence[RewardStream] | None = None, *, kl_coef: float
) -> Tensor:
    """``(B, T, K)`` rewards per token: the scores, less the price of the KL to the reference and of being cut.

    Both prices are paid by the stream named ``kl``, else by the first.

    Args:
        rollout: The rollout.
        config: Gives ``kl_placement``, ``truncation`` and ``truncation_penalty``.
        streams: The reward streams.
        kl_coef: Price of a nat.
    """
    payer = kl_stream(streams or ())
    rewards = []
    for k in range(rollout.scores.shape[-1]):
        coef = kl_coef if k == payer and config.kl_placement != "loss" else 0.0
        scores = rollout.scores[..., k]
        if k == payer and config.truncation == "penalty":
            scores = scores - config.truncation_penalty * _last_token_of_cut_rows(rollout)
        rewards.append(kl_shaped_rewards(scores, rollout.kl_penalty, rollout.completion_mask, kl_coef=coef))
    return torch.stack(rewards, dim=-1)


def estimate(
    rollout: Rollout, rewards: Tensor, config: PPOConfig, streams: Sequence[RewardStream] | None = None
) -> Estimate:
    """Advantages and the critic's targets, by the estimator and the baseline that the configuration names.

    ``gae`` holds its baseline, the critic. From the other estimators' weights the baseline is subtracted; where there is
    a critic it learns the same quantity (for ``total_return`` the reward-to-go, which is what a state's value means).
    ``baseline='auto'`` uses the critic of a stream if it explains any of the variance of the batch's Monte-Carlo
    returns, else the batch mean (and rewards-to-go in place of gae): EVPO, arXiv 2604.19485.

    Args:
        rollout: The rollout.
        rewards: ``(B, T, K)`` per token, penalties included.
        config: Gives estimator, baseline, gamma, the lambdas, truncation and whitening.
        streams: Each stream's own gamma and lambda (default: the configuration's for all).

    Raises:
        RuntimeError: ``truncation='mask'``, and every completion was cut: there is nothing to learn from.
    """
    streams = streams or default_streams(rewards.shape[-1])
    mask = rollout.completion_mask
    if config.truncation == "mask":
        mask = mask & rollout.ended[:, None]
        if not mask.any():
            raise RuntimeError(
                "truncation='mask': no completion of this rollout ended with EOS, so none is left to learn from. Raise "
                "max_completion_length, or set truncation='penalty' or 'end'."
            )
    parts = [
        _estimate_stream(select_stream(rollout, k), rewards[..., k], mask, config, stream)
        for k, stream in enumerate(streams)
    ]
    advantages = torch.where(mask, torch.stack([part.advantages for part in parts]).sum(dim=0), 0.0)
    metrics = {name: sum(part.metrics[name] for part in parts) / len(parts) for name in parts[0].metrics}
    if config.uses_critic:
        sampled = [
            _sampled_returns(select_stream(rollout, k), rewards[..., k], config, s) for k, s in enumerate(streams)
        ]
        explained = explained_variance(rollout.values.sum(dim=-1), torch.stack(sampled).sum(dim=0), mask)
        metrics["critic/explained_variance"] = explained.item()
    variance = masked_var(advantages, mask).item()
    metrics |= {"advantage/mean": masked_mean(advantages, mask).item(), "advantage/std": variance**0.5}
    scale = 1.0
    if config.whiten_advantages:
        scale = 1.0 / (variance + 1e-8) ** 0.5
        advantages = masked_whiten(advantages, mask)
    return Estimate(mask, advantages, torch.cat([part.returns for part in parts], dim=-1), scale, metrics)


def select_stream(rollout: Rollout, k: int) -> Rollout:
    """The rollout with one of its reward streams."""
    names = ("values", "scores", "bootstrap_values")
    return replace(rollout, **{name: getattr(rollout, name)[..., k : k + 1] for name in names})


def _sampled_returns(rollout: Rollout, rewards: Tensor, config: PPOConfig, stream: RewardStream) -> Tensor:
    """``(B, T)`` what a critic that knows everything would give the mean of: the Monte-Carlo returns of one stream."""
    if config.estimator == "immediate_rewards":
        return immediate_rewards(rewards, rollout.completion_mask)
    gamma = config.gamma if stream.gamma is None else stream.gamma
    after = rollout.bootstrap_values[..., 0] if config.truncation == "bootstrap" else None
    return rewards_to_go(rewards, rollout.completion_mask, gamma=gamma, bootstrap_values=after)


def _estimate_stream(
    rollout: Rollout, rewards: Tensor, learned: Tensor, config: PPOConfig, stream: RewardStream
) -> Estimate:
    mask, values = rollout.completion_mask, rollout.values[..., 0]
    gamma = config.gamma if stream.gamma is None else stream.gamma
    to_go = _sampled_returns(rollout, rewards, config, stream)
    metrics: dict[str, float] = {}
    trusted = config.baseline == "critic"
    if config.baseline == "auto":
        trusted = explained_variance(values, to_go, learned).item() > 0
        metrics["critic/trusted"] = float(trusted)
    if config.estimator == "gae":
        advantages, returns = _gae(rollout, rewards, config, gamma, config.lam if stream.lam is None else stream.lam)
        if trusted:
            return Estimate(mask, advantages, returns[..., None], 1.0, metrics)
        weights = to_go
    else:
        weights, returns = {
            "rewards_to_go": (to_go, to_go),
            "total_return": (total_return(rewards, mask, gamma=gamma), to_go),
            "immediate_rewards": (to_go, to_go),
        }[config.estimator]
    baseline = torch.zeros_like(weights)
    if trusted:
        baseline = values
    elif config.baseline == "leave_one_out":
        baseline = leave_one_out_baseline(weights, learned, group_size=config.num_generations)
    elif config.baseline != "none":
        baseline = batch_mean_baseline(weights, learned)
    return Estimate(mask, torch.where(mask, weights - baseline, 0.0), returns[..., None], 1.0, metrics)


def _gae(rollout: Rollout, rewards: Tensor, config: PPOConfig, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE, the critic's targets with a lambda of their own if asked."""
    mask, values = rollout.completion_mask, rollout.values[..., 0]
    after = rollout.bootstrap_values[..., 0] if config.truncation == "bootstrap" else None

    def run(lam: float | Tensor) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_values=after)

    alpha = config.adaptive_lam_alpha
    advantages, returns = run(lam if alpha is None else length_adaptive_lam(mask, lam=lam, alpha=alpha))
    return advantages, returns if config.critic_lam is None else run(config.critic_lam)[1]


def _last_token_of_cut_rows(rollout: Rollout) -> Tensor:
    """``(B, T)`` 1 on the last counted token of each completion that was cut, else 0."""
    mask = rollout.completion_mask
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return (last & ~rollout.ended[:, None]).to(rollout.scores.dtype)
