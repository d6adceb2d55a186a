"""Everything that is logged: names, meanings, and the numbers themselves. All are weighted by the completion mask.

The rollout record is the same on every process, so what is computed from it here needs no reduction; the update's
numbers are reduced where they arise (:mod:`lmppo.update`).
"""

import torch
from torch import Tensor

from lmppo.collector import ScoredRollout
from lmppo.functional import explained_variance, masked_mean, masked_var

# Name -> meaning; docs/metrics.md gives formulas and healthy ranges, and a test holds the two together.
METRICS = {
    "step": "PPO iterations done, this one included",
    "epoch": "passes over the prompts so far",
    "reward": "mean over completions of the weighted sum of what the reward functions return, before any KL penalty",
    "reward_std": "standard deviation of the same over the batch",
    "rewards/{name}/mean": "mean of what one reward or watch function returns, where it applies",
    "rewards/{name}/std": "standard deviation of the same",
    "kl_to_ref": "k1 estimate of KL(policy || reference), summed over the completion, mean over completions, in nats",
    "kl_coef": "coefficient of the KL penalty in this iteration's rewards",
    "rlhf_reward": "reward minus kl_coef times kl_to_ref: what the policy is trained on",
    "entropy": "mean entropy of the next-token distribution during the update, in nats per token",
    "sampled_entropy": "mean of -logprob over the sampled tokens, in nats per token",
    "completion_length": "mean number of tokens per completion, EOS included",
    "completion_length/min": "the shortest completion",
    "completion_length/max": "the longest completion",
    "eos_rate": "share of completions that ended with EOS",
    "distinct_2": "distinct token pairs over all token pairs of the batch's completions",
    "advantage/mean": "mean advantage before whitening",
    "advantage/std": "standard deviation of the same",
    "return/mean": "mean of the critic's targets",
    "return/std": "standard deviation of the same",
    "value/mean": "mean value the critic gave at sampling",
    "explained_variance": "1 - Var[returns - values] / Var[returns], with the values at sampling",
    "critic/explained_variance": "the same against Monte-Carlo returns (rewards-to-go), streams summed",
    "critic/trusted": "with baseline=auto: share of reward streams whose critic was used, not the batch mean",
    "policy_loss": "mean policy loss over the update's steps",
    "value_loss": "mean value loss over the update's steps",
    "approx_kl": "k3 estimate of KL(old || new), mean over the update's tokens, in nats per token",
    "policy_kl": "with objective=kl_penalty: the same KL after the whole update",
    "policy_kl_coef": "with objective=kl_penalty: beta, the price of that KL in this iteration's loss",
    "kl_loss": "with the KL to the reference in the loss: its estimate there, mean over the update's tokens",
    "trpo/kl": "with objective=trpo: exact mean KL(old || new) per token of the step taken",
    "trpo/grad_norm": "norm of the surrogate's gradient",
    "trpo/expected_improvement": "rise of the surrogate that the gradient promised for the whole step",
    "trpo/improvement": "rise of the surrogate by the step taken",
    "trpo/step_fraction": "share of the whole step that the line search took; 0: none",
    "trpo/cg_residual": "relative residual of the conjugate gradients",
    "clip_frac": "share of tokens whose ratio left the clip range",
    "value_clip_frac": "share of tokens whose value moved further than value_clip_range",
    "ratio": "mean ratio of new to old probability",
    "grad_norm": "mean gradient norm before clipping, over the optimizer's steps",
    "learning_rate": "learning rate of the policy in this iteration",
    "critic_learning_rate": "learning rate of the critic in this iteration",
    "optimizer_steps": "optimizer steps taken in this iteration",
    "early_stop": "1 if target_kl ended the update early",
    "first_ratio_error": "largest |log ratio| on the first minibatch: rounding alone, or a bug",
    "num_tokens": "completion tokens sampled so far",
    "tokens_per_second": "completion tokens per second of this iteration, sampling and update together",
    "time/rollout": "seconds spent on sampling, scoring and reference log-probabilities",
    "time/update": "seconds spent on the update",
}


def rollout_metrics(scored: ScoredRollout, *, kl_coef: float) -> dict[str, float]:
    """What can be said of a rollout before the update.

    Args:
        scored: The rollout.
        kl_coef: Coefficient of the KL penalty.
    """
    rollout, mask = scored.rollout, scored.rollout.completion_mask
    scores = rollout.scores.sum(dim=(1, 2))
    kl = rollout.kl_to_ref.sum(dim=1).mean().item()
    lengths = rollout.tokens.lengths.float()
    metrics = {
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "kl_to_ref": kl,
        "kl_coef": kl_coef,
        "rlhf_reward": scores.mean().item() - kl_coef * kl,
        "sampled_entropy": -masked_mean(rollout.logprobs, mask).item(),
        "completion_length": lengths.mean().item(),
        "completion_length/min": lengths.min().item(),
        "completion_length/max": lengths.max().item(),
        "eos_rate": rollout.ended.float().mean().item(),
        "distinct_2": distinct_n(rollout.tokens.completion_ids, mask, 2),
    }
    for name, column in zip(scored.function_names, scored.per_function.unbind(dim=1), strict=True):
        applied = column[~column.isnan()]
        if len(applied):
            metrics[f"rewards/{name}/mean"] = applied.mean().item()
            metrics[f"rewards/{name}/std"] = applied.std(correction=0).item()
    return scored.metrics | metrics


def completion_columns(scored: ScoredRollout) -> dict[str, list]:
    """What is shown beside each completion: every reward function's score, the KL, and the functions' own columns."""
    scores = {name: scored.per_function[:, i].tolist() for i, name in enumerate(scored.function_names)}
    return scores | {"kl": scored.rollout.kl_to_ref.sum(dim=1).tolist(), **scored.extras}


def critic_metrics(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
    """How good the critic was when the batch was sampled, and what it will be taught.

    Args:
        values: ``(B, T, K)`` at sampling.
        returns: ``(B, T, K)`` the targets.
        mask: ``(B, T)``.
    """
    value, target = values.sum(dim=-1), returns.sum(dim=-1)
    return {
        "return/mean": masked_mean(target, mask).item(),
        "return/std": masked_var(target, mask).sqrt().item(),
        "value/mean": masked_mean(value, mask).item(),
        "explained_variance": explained_variance(value, target, mask).item(),
    }


def distinct_n(token_ids: Tensor, mask: Tensor, n: int) -> float:
    """Distinct n-grams over all n-grams of the counted tokens (Li et al., 2016, arXiv 1510.03055); 1 if there is none.

    It falls with the number of completions, so compare only equal numbers of them.

    Args:
        token_ids: ``(B, T)``.
        mask: ``(B, T)``.
        n: Length of the n-grams.
    """
    grams = []
    for row, keep in zip(token_ids, mask, strict=True):
        kept = row[keep]
        grams.append(kept.unfold(0, n, 1) if len(kept) >= n else kept.new_empty(0, n))
    pooled = torch.cat(grams)
    return len(pooled.unique(dim=0)) / len(pooled) if len(pooled) else 1.0
