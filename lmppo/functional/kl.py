"""How far two policies are apart, per token, and the penalty for it inside the reward.

The estimators see only the log-probabilities of tokens sampled from the *first* argument's policy, p, and estimate
KL(p || q) = E_{a~p}[log p(a) - log q(a)]. They have no mask: each position is computed from its own numbers, and
:func:`kl_shaped_rewards` or :func:`~lmppo.functional.masked.masked_mean` drop what does not count.

Where p is renormalized over a support S (top-k, top-p, min-p) and q is a distribution over all tokens, the KL is that of
the two over S, plus ``-log q(S)``: what p pays for never choosing the other tokens, however close it is to q. The support
is held fixed in gradients.

Background: docs/notes.md, "The KL penalty to the reference".
"""

import torch
from torch import Tensor

from lmppo.functional._inputs import (
    check_float,
    check_masked_over_time,
    check_not_negative,
    check_shape,
    widen,
    zero_masked,
)
from lmppo.functional.logprobs import log_distribution

ALL_TOKENS = torch.ones(1, dtype=torch.bool)
"""The support that leaves every token; it broadcasts to any logits."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are capped here before ``exp``: e^20 = 4.9e8 is far beyond any useful ratio, and float32 holds it."""


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The plain estimator of KL(policy || reference): unbiased, of either sign, the one PPO puts into the reward.

    ``k1_t = log p_t - log q_t``

    Its sum over a completion is the log-ratio of the completion, so E[sum_t k1_t] is the KL of the sequences. As a
    *loss* it is useless: its own gradient, the score, has expectation 0.

    Schulman, "Approximating KL Divergence" (2020), k1.

    Args:
        logprobs: (B, T) of sampled tokens, under the policy p that sampled them.
        ref_logprobs: (B, T) of the same tokens under q.

    Returns:
        (B, T).

    Raises:
        TypeError: An argument is not a float tensor.
        ValueError: The shapes differ.
    """
    return _log_ratio("kl_k1", logprobs, ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The squared estimator: never negative, biased by third-order terms, and right as a loss.

    ``k2_t = (log p_t - log q_t)^2 / 2``

    Its gradient has the expectation grad KL(p || q), exactly, for tokens sampled from the present p.

    Schulman, "Approximating KL Divergence" (2020), k2.

    Args:
        logprobs: (B, T) of sampled tokens, under the policy p that sampled them.
        ref_logprobs: (B, T) of the same tokens under q.

    Returns:
        (B, T).

    Raises:
        TypeError: An argument is not a float tensor.
        ValueError: The shapes differ.
    """
    return 0.5 * _log_ratio("kl_k2", logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, *, ref_support_logprobs: Tensor | None = None) -> Tensor:
    """The estimator that is both unbiased and never negative: k1 plus the zero-mean control variate q/p - q(S).

    ``k3_t = exp(d_t) - q_t(S) - d_t`` with ``d_t = min(log q_t - log p_t, 20)``, by ``expm1``, which keeps small values

    S are the tokens that p can choose: q(S) is 1 unless p is renormalized over a support and q is not. The mean of q/p
    over p's tokens is q(S); with 1 in its place the estimate would be off by 1 - q(S).

    As a *loss* on the present policy p its gradient is that of KL(q || p), not of KL(p || q): where the second argument
    is the one that learns (see :func:`~lmppo.functional.losses.kl_penalized_policy_loss`) it is right.

    Schulman, "Approximating KL Divergence" (2020), k3, where q(S) is 1. The cap at 20 is ours: a finite number for any
    log-ratio.

    Args:
        logprobs: (B, T) of sampled tokens, under the policy p that sampled them.
        ref_logprobs: (B, T) of the same tokens under q.
        ref_support_logprobs: (B, T) log q(S), from :func:`~lmppo.functional.logprobs.support_logprobs`. None: 0.

    Returns:
        (B, T).

    Raises:
        TypeError: An argument is not a float tensor.
        ValueError: The shapes differ.
    """
    log_ratio = (-_log_ratio("kl_k3", logprobs, ref_logprobs)).clamp(max=MAX_LOG_RATIO)
    if ref_support_logprobs is None:
        return torch.expm1(log_ratio) - log_ratio
    check_float("kl_k3", ref_support_logprobs=ref_support_logprobs)
    check_shape("kl_k3", logprobs.shape, "that of logprobs", ref_support_logprobs=ref_support_logprobs)
    return torch.expm1(log_ratio) - torch.expm1(widen(ref_support_logprobs)) - log_ratio


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    support: Tensor | None = None,
    ref_support: Tensor | None = None,
) -> Tensor:
    """KL(policy || reference) of the next-token distributions, summed over the vocabulary: no sampling noise.

    ``KL = sum_{v in support} p_v (log p_v - log q_v)`` with 0 log 0 = 0; both at the same temperature

    With ``support`` alone both are renormalized over it: two policies that are sampled alike. With
    ``ref_support=ALL_TOKENS`` as well, q is the softmax over all tokens: the sampled policy against a whole reference.

    Differentiable in both arguments. It is what k1 and k3 estimate from one token.

    Args:
        logits: (..., V) float, of the policy p.
        ref_logits: (..., V) float, of q.
        temperature: Both logits are divided by it.
        support: Bool, broadcastable to ``logits``; p is renormalized over it. None: all tokens.
        ref_support: Bool, broadcastable to ``logits``; q is renormalized over it. None: ``support``.

    Returns:
        (...) divergences, 0 or more up to rounding; inf where q gives 0 to a token that p can choose.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes do not fit, the temperature is not positive, or a position has an empty support.
    """
    check_float("exact_kl", logits=logits, ref_logits=ref_logits)
    check_shape("exact_kl", logits.shape, "that of logits", ref_logits=ref_logits)
    logprobs = log_distribution("exact_kl", logits, temperature=temperature, support=support)
    ref_support = support if ref_support is None else ref_support
    ref_logprobs = log_distribution("exact_kl", ref_logits, temperature=temperature, support=ref_support)
    possible = logprobs > -torch.inf
    log_ratio = torch.where(possible, logprobs, 0.0) - torch.where(possible, ref_logprobs, 0.0)
    return (logprobs.exp() * log_ratio).sum(dim=-1)


def kl_shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Per-token rewards: the task's score, minus a price for every nat of distance from the reference.

    ``r_t = -kl_coef * kl_t + score_t``, where a score per completion sits on the last counted token

    The last counted token is the EOS, or the last token of a completion that was cut. (TRL's later trainer puts the
    score on the pad after EOS; with lam = .95 that scales every finished completion's credit by .95.) The other
    tokens' rewards, the KL terms, are dense. A row with no counted token carries nothing, not even its
    score: there is no action to reward.

    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over the tokens.

    Args:
        scores: (B,), one per completion, or (B, T), one per token (at masked positions they are ignored).
        kl: (B, T), from any per-token estimator, usually :func:`kl_k1`.
        mask: (B, T) completion mask, True = the token counts.
        kl_coef: The price of a nat, 0 or more.

    Returns:
        (B, T) rewards, 0 where the mask is False.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes do not fit, or ``kl_coef`` is negative or not finite.
    """
    check_masked_over_time("kl_shaped_rewards", mask, kl=kl)
    check_float("kl_shaped_rewards", scores=scores)
    check_not_negative("kl_shaped_rewards", kl_coef=kl_coef)
    if scores.ndim == 1:
        check_shape("kl_shaped_rewards", mask.shape[:1], "one score per row of mask", scores=scores)
        counted_from_here = mask.flip(1).cumsum(1).flip(1)
        rewarded = mask & (counted_from_here == 1)
        scores = scores.unsqueeze(1)
    else:
        check_shape("kl_shaped_rewards", mask.shape, "that of mask; or (B,), one per completion", scores=scores)
        rewarded = mask
    return zero_masked(scores, rewarded) - kl_coef * zero_masked(kl, mask)


def _log_ratio(function: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    check_float(function, logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_shape(function, logprobs.shape, "that of logprobs", ref_logprobs=ref_logprobs)
    return widen(logprobs) - widen(ref_logprobs)
