"""From a rollout to the rewards, advantages and returns the update needs: the math of `lmppo.functional`, by name."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmppo.config import RewardStream
from lmppo.functional import (
    batch_mean_baseline,
    explained_variance,
    explained_variance_within_prompts,
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
from lmppo.records import Rollout
from lmppo.rewards.streams import default_streams, kl_stream
from lmppo.settings import AdvantageSettings, EstimatorSettings, ShapingSettings


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
    rollout: Rollout, config: ShapingSettings, streams: Sequence[RewardStream] | None = None, *, kl_coef: float
) -> Tensor:
    """``(B, T, K)`` rewards per token: the scores, less the price of the KL to the reference and of being cut.

    Both prices are paid by the stream named ``kl``, else by the first.

    Args:
        rollout: The rollout.
        config: Gives ``kl_form``, ``truncation`` and ``truncation_penalty``; and what decides where ``kl_form`` is None.
        streams: The reward streams.
        kl_coef: Price of a nat.
    """
    streams = streams or default_streams(rollout.scores.shape[-1])
    kl_index, kl = kl_stream(streams), rollout.kl_penalty
    if _pays_at_end(streams[kl_index], config):
        kl = _paid_at_end(rollout)
    rewards = []
    for k in range(len(streams)):
        coef = kl_coef if k == kl_index and config.kl_in_reward else 0.0
        scores = rollout.scores[..., k]
        if k == kl_index and config.truncation == "penalty":
            scores = scores - config.truncation_penalty * _last_token_of_cut_rows(rollout)
        rewards.append(kl_shaped_rewards(scores, kl, rollout.completion_mask, kl_coef=coef))
    return torch.stack(rewards, dim=-1)


def _pays_at_end(stream: RewardStream, config: ShapingSettings) -> bool:
    """Whether a completion's KL is paid all at once, with its last token.

    Without a discount this changes no expected gradient: a token's weight is then its later rewards, and what tokens
    before it have paid, which it cannot change, is a baseline. It is a good one. As the policy nears the best one, whose
    log-ratio to the reference is (reward - a constant) / kl_coef, a completion's reward less all of its KL nears that
    constant, while its reward less the KL of later tokens alone still differs from token to token.

    A completion that was cut has no end to pay at where a value stands for what would follow, and is no sample of its
    prefix's completions where it is left out.
    """
    if config.kl_form is not None or config.truncation in ("bootstrap", "mask"):
        return config.kl_form == "k1_end"
    gamma, lam = _discounts(stream, config)
    if config.estimator == "gae":
        return gamma == lam == 1
    return gamma == 1 and config.estimator != "immediate_rewards"


def _discounts(stream: RewardStream, config: AdvantageSettings) -> tuple[float, float]:
    """A stream's gamma and lambda."""
    gamma = config.gamma if stream.gamma is None else stream.gamma
    return gamma, config.lam if stream.lam is None else stream.lam


def _paid_at_end(rollout: Rollout) -> Tensor:
    """``(B, T)`` the KL of each completion, at its last token."""
    paid = torch.where(rollout.completion_mask, rollout.kl_penalty, 0.0).sum(dim=1, keepdim=True)
    return paid * _last_tokens(rollout)


@dataclass(frozen=True)
class StreamView:
    """One reward stream as the math sees it: tensors are ``(B, T)``.

    Attributes:
        mask: The tokens that count.
        learned: Those of them that are learned from.
        rewards: Per token, penalties included.
        values: The critic's, before each token.
        after_last: ``(B,)`` the value after the last token of a completion that was cut, if it is bootstrapped.
        gamma: Discount.
        lam: GAE's lambda.
        sampled_returns: What a critic that knows everything would give the mean of: Monte-Carlo returns.
    """

    mask: Tensor
    learned: Tensor
    rewards: Tensor
    values: Tensor
    after_last: Tensor | None
    gamma: float
    lam: float
    sampled_returns: Tensor


def stream_views(
    rollout: Rollout, rewards: Tensor, learned: Tensor, config: EstimatorSettings, streams: Sequence[RewardStream]
) -> list[StreamView]:
    """A view of each stream, the only place where a stream is selected from tensors that end in K."""
    views = []
    for k, stream in enumerate(streams):
        gamma, lam = _discounts(stream, config)
        after_last = rollout.bootstrap_values[:, k] if config.truncation == "bootstrap" else None
        if config.estimator == "immediate_rewards":
            sampled = immediate_rewards(rewards[..., k], rollout.completion_mask)
        else:
            sampled = rewards_to_go(rewards[..., k], rollout.completion_mask, gamma=gamma, bootstrap_values=after_last)
        views.append(
            StreamView(
                rollout.completion_mask,
                learned,
                rewards[..., k],
                rollout.values[..., k],
                after_last,
                gamma,
                lam,
                sampled,
            )
        )
    return views


def estimate(
    rollout: Rollout, rewards: Tensor, config: EstimatorSettings, streams: Sequence[RewardStream] | None = None
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

    Warns:
        UserWarning: Every advantage is 0: nothing can be learned, as from one token that is whitened.

    Raises:
        RuntimeError: ``truncation='mask'``, and every completion was cut: there is nothing to learn from.
    """
    mask = _learned(rollout, config)
    views = stream_views(rollout, rewards, mask, config, streams or default_streams(rewards.shape[-1]))
    relied = [_relies_on_critic(view, config) for view in views]
    advantages = torch.stack([_advantages(view, relies, config) for view, relies in zip(views, relied, strict=True)])
    advantages = torch.where(mask, advantages.sum(dim=0), 0.0)
    metrics: dict[str, float] = {}
    if config.baseline == "auto":
        metrics["critic/trusted"] = sum(relied) / len(relied)
    if config.uses_critic:
        sampled = torch.stack([view.sampled_returns for view in views]).sum(dim=0)
        shares = explained_variances(rollout.values.sum(dim=-1), sampled, mask, rollout.tokens.prompt_numbers)
        metrics |= {f"critic/{name}": share for name, share in shares.items()}
    variance = masked_var(advantages, mask).item()
    metrics |= {"advantage/mean": masked_mean(advantages, mask).item(), "advantage/std": variance**0.5}
    scale = 1.0
    if config.whiten_advantages:
        scale = 1.0 / (variance + 1e-8) ** 0.5
        advantages = masked_whiten(advantages, mask)
    if not advantages.any():
        warnings.warn(
            f"Every advantage of this rollout is 0 (tokens that count: {int(mask.sum())}), so the policy learns nothing from "
            f"it. A whitened advantage is 0 where one token counts, or where all are alike: raise rollout_batch_size or "
            f"max_completion_length, set whiten_advantages=False, or look at the rewards.",
            stacklevel=2,
        )
    returns = torch.stack([_critic_targets(view, config) for view in views], dim=-1)
    return Estimate(mask, advantages, returns, scale, metrics)


def explained_variances(values: Tensor, returns: Tensor, mask: Tensor, prompts: Tensor) -> dict[str, float]:
    """What the critic explains of the batch's returns, and of those within prompts if two tokens can be compared.

    Args:
        values: ``(B, T)`` at sampling.
        returns: ``(B, T)`` what is to be explained.
        mask: ``(B, T)`` the tokens that count.
        prompts: ``(B,)`` the same number for completions of the same prompt.
    """
    shares = {"explained_variance": explained_variance(values, returns, mask).item()}
    within = explained_variance_within_prompts(values, returns, mask, prompts).item()
    return shares if math.isnan(within) else shares | {"explained_variance_within_prompts": within}


def _learned(rollout: Rollout, config: EstimatorSettings) -> Tensor:
    """``(B, T)`` the tokens that are learned from."""
    if config.truncation != "mask":
        return rollout.completion_mask
    mask = rollout.completion_mask & rollout.ended[:, None]
    if not mask.any():
        raise RuntimeError(
            "truncation='mask': no completion of this rollout ended with EOS, so none is left to learn from. Raise "
            "max_completion_length, or set truncation='penalty' or 'end'."
        )
    return mask


def _relies_on_critic(view: StreamView, config: EstimatorSettings) -> bool:
    """Whether the critic is the baseline of this stream."""
    if config.baseline == "auto":
        return explained_variance(view.values, view.sampled_returns, view.learned).item() > 0
    return config.baseline == "critic"


def _advantages(view: StreamView, relies_on_critic: bool, config: EstimatorSettings) -> Tensor:
    """``(B, T)`` the weights of one stream's tokens, less their baseline."""
    if config.estimator == "gae" and relies_on_critic:
        return _gae(view, _lam(view, config))[0]
    weights = view.sampled_returns
    if config.estimator == "total_return":
        weights = total_return(view.rewards, view.mask, gamma=view.gamma)
    baseline = torch.zeros_like(weights)
    if relies_on_critic:
        baseline = view.values
    elif config.baseline == "leave_one_out":
        baseline = leave_one_out_baseline(weights, view.learned, group_size=config.num_generations)
    elif config.baseline != "none":
        baseline = batch_mean_baseline(weights, view.learned)
    return torch.where(view.mask, weights - baseline, 0.0)


def _critic_targets(view: StreamView, config: EstimatorSettings) -> Tensor:
    """``(B, T)`` what the critic of one stream is taught: with GAE its returns, with a lambda of their own if asked."""
    if config.estimator != "gae":
        return view.sampled_returns
    return _gae(view, _lam(view, config) if config.critic_lam is None else config.critic_lam)[1]


def _lam(view: StreamView, config: EstimatorSettings) -> float | Tensor:
    """GAE's lambda, or with ``adaptive_lam_alpha`` one for each completion."""
    alpha = config.adaptive_lam_alpha
    return view.lam if alpha is None else length_adaptive_lam(view.mask, lam=view.lam, alpha=alpha)


def _gae(view: StreamView, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    return gae(view.rewards, view.values, view.mask, gamma=view.gamma, lam=lam, bootstrap_values=view.after_last)


def _last_token_of_cut_rows(rollout: Rollout) -> Tensor:
    """``(B, T)`` 1 on the last counted token of each completion that was cut, else 0."""
    return _last_tokens(rollout) * ~rollout.ended[:, None]


def _last_tokens(rollout: Rollout) -> Tensor:
    """``(B, T)`` 1 on the last counted token of each completion, else 0."""
    mask = rollout.completion_mask
    return (mask & (mask.flip(1).cumsum(1).flip(1) == 1)).to(rollout.scores.dtype)
