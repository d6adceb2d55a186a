"""What is logged of a rollout and of the critic, by counted tokens alone; docs/metrics.md explains every name.

The rollout record is the same on every process, so what is computed from it here needs no reduction; the update's
numbers are reduced where they arise (:mod:`lmppo.update`).
"""

import torch
from torch import Tensor

from lmppo.collector import ScoredRollout
from lmppo.estimators import explained_variances
from lmppo.functional import masked_mean, masked_var


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


def critic_metrics(values: Tensor, returns: Tensor, mask: Tensor, prompts: Tensor) -> dict[str, float]:
    """How good the critic was when the batch was sampled, and what it will be taught.

    Args:
        values: ``(B, T, K)`` at sampling.
        returns: ``(B, T, K)`` the targets.
        mask: ``(B, T)``.
        prompts: ``(B,)`` the same number for completions of the same prompt.
    """
    value, target = values.sum(dim=-1), returns.sum(dim=-1)
    return {
        "return/mean": masked_mean(target, mask).item(),
        "return/std": masked_var(target, mask).sqrt().item(),
        "value/mean": masked_mean(value, mask).item(),
        **explained_variances(value, target, mask, prompts),
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
