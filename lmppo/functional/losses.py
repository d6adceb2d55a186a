"""Policy and value losses per token, their mean over a minibatch, and two measures of how far the policy has moved.

Losses are to be minimized. Gradients flow into ``logprobs`` and ``values`` only: advantages, returns and everything
old are constants of the update, and are detached here so that no policy loss can train the critic by accident.

Background: docs/notes.md, "The gradient of an expected reward", "V must be refitted", "Reusing old samples" and "PPO".
"""

import torch
from torch import Tensor

from lmppo.functional._inputs import check_masked, check_not_negative, check_positive, zero_masked
from lmppo.functional.kl import MAX_LOG_RATIO, kl_k3
from lmppo.functional.masked import masked_mean


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The policy gradient as a loss: raise log pi where the advantage is positive, lower it where negative.

    ``L_t = -A_t * log pi_t``

    Only its gradient means something, and only for tokens sampled from the present policy.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 2.

    Args:
        logprobs: (B, T) of the sampled tokens, now.
        advantages: (B, T), constant; any weights of :mod:`lmppo.functional.advantages`.
        mask: (B, T) completion mask, True = the token counts.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or another argument is not float.
        ValueError: Shapes differ.
    """
    check_masked("policy_gradient_loss", mask, logprobs=logprobs, advantages=advantages)
    return zero_masked(-zero_masked(advantages.detach(), mask) * zero_masked(logprobs, mask), mask)


def importance_sampled_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The surrogate for tokens sampled from an older policy, with nothing that keeps the new one near it.

    ``L_t = -A_t * ratio_t`` with ``ratio_t = exp(min(log pi_t - log pi_old_t, 20))``

    At ratio 1 its gradient is that of :func:`policy_gradient_loss`. The cap is ours: the loss and its gradient stay
    finite for any log-ratio, and beyond the cap the gradient is 0.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 6 (CPI).

    Args:
        logprobs: (B, T) of the sampled tokens, now.
        old_logprobs: (B, T) of the same tokens under the policy that sampled them, constant.
        advantages: (B, T), constant.
        mask: (B, T) completion mask, True = the token counts.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or another argument is not float.
        ValueError: Shapes differ.
    """
    check_masked("importance_sampled_loss", mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    return zero_masked(-zero_masked(advantages.detach(), mask) * _ratio(logprobs, old_logprobs, mask), mask)


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's loss: nothing is gained by moving the ratio out of its band in the direction the advantage asks for.

    ``L_t = max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - clip_range, 1 + clip_range_high))``
    with ``ratio_t = exp(min(log pi_t - log pi_old_t, 20))``; with ``dual_clip`` and ``A_t < 0``:
    ``L_t = min(L_t, -A_t * dual_clip)``

    The gradient is 0 where ``A > 0`` and the ratio is above the band, or ``A < 0`` and it is below. The maximum is the
    pessimistic choice: the loss is never below the unclipped one (before ``dual_clip``, which bounds it for tokens that
    became far *likelier* although their advantage is negative). The cap at 20 is ours, as in
    :func:`importance_sampled_loss`.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, negated; a wider upper band: Yu et al. 2025 (arXiv 2503.14476),
    "clip-higher"; dual clip: Ye et al. 2020 (arXiv 1912.09729).

    Args:
        logprobs: (B, T) of the sampled tokens, now.
        old_logprobs: (B, T) of the same tokens under the policy that sampled them, constant.
        advantages: (B, T), constant.
        mask: (B, T) completion mask, True = the token counts.
        clip_range: How far below 1 the ratio may go, positive.
        clip_range_high: How far above 1 it may go. None: as far as below.
        dual_clip: The largest ratio charged to a negative advantage, above 1. None: no such bound.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or another tensor is not float.
        ValueError: Shapes differ, a clip range is not positive, or ``dual_clip`` is not above 1.
    """
    check_masked("clipped_policy_loss", mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low, high = _band("clipped_policy_loss", clip_range, clip_range_high)
    ratio = _ratio(logprobs, old_logprobs, mask)
    advantages = zero_masked(advantages.detach(), mask)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ValueError(f"clipped_policy_loss: dual_clip must be above 1 (3 is usual), got {dual_clip}")
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return zero_masked(loss, mask)


def kl_penalized_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """The surrogate with a price on the distance from the old policy, PPO's other way to stay near it.

    ``L_t = -A_t * ratio_t + beta * (exp(d_t) - 1 - d_t)`` with ``d_t = min(log pi_t - log pi_old_t, 20)`` and
    ``ratio_t = exp(d_t)``

    The penalty is :func:`~lmppo.functional.kl.kl_k3` of (old, new): the paper's KL(old || new), estimated from the
    tokens that the old policy sampled. Each term is 0 or more, its expectation is exactly that KL, and the expectation
    of its gradient is exactly that KL's gradient; at ratio 1 it pushes nothing.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 8, negated.

    Args:
        logprobs: (B, T) of the sampled tokens, now.
        old_logprobs: (B, T) of the same tokens under the policy that sampled them, constant.
        advantages: (B, T), constant.
        mask: (B, T) completion mask, True = the token counts.
        beta: The price of a nat, 0 or more.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or another tensor is not float.
        ValueError: Shapes differ, or ``beta`` is negative or not finite.
    """
    check_masked("kl_penalized_policy_loss", mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_not_negative("kl_penalized_policy_loss", beta=beta)
    penalty = kl_k3(zero_masked(old_logprobs.detach(), mask), zero_masked(logprobs, mask))
    return importance_sampled_loss(logprobs, old_logprobs, advantages, mask) + beta * penalty


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float | None
) -> Tensor:
    """Half the squared error of the critic, with no gain from moving further than the clip range in one update.

    ``L_t = 0.5 * max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -clip_range, clip_range) - R_t)^2)``

    The gradient is 0 where the clipped error is the larger one: the value has moved its full range towards the return.

    OpenAI's PPO code; Engstrom et al. 2020 (arXiv 2005.12729). V is refitted to each new batch.

    Args:
        values: (B, T), now.
        old_values: (B, T), when the tokens were sampled, constant.
        returns: (B, T), the targets, constant; usually from :func:`~lmppo.functional.advantages.gae`.
        mask: (B, T) completion mask, True = the token counts.
        clip_range: In the unit of the values, positive. None: the plain squared error.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or another tensor is not float.
        ValueError: Shapes differ or ``clip_range`` is not positive.
    """
    check_masked("clipped_value_loss", mask, values=values, old_values=old_values, returns=returns)
    values = zero_masked(values, mask)
    old_values = zero_masked(old_values.detach(), mask)
    returns = zero_masked(returns.detach(), mask)
    squared_error = (values - returns).square()
    if clip_range is not None:
        check_positive("clipped_value_loss", clip_range=clip_range)
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        squared_error = torch.maximum(squared_error, (clipped - returns).square())
    return 0.5 * squared_error


def token_mean_loss(per_token_loss: Tensor, mask: Tensor, *, token_count: float) -> Tensor:
    """One part's share of the mean loss over a whole minibatch.

    ``sum_{counted} L_t / token_count``

    ``token_count`` is the number of counted tokens of the *whole* minibatch, so the shares of its micro-batches, and of
    the processes it is spread over, add up to its mean exactly. Dividing each part by its own count instead, as TRL
    did, weighs the tokens of a part with short completions more. (Where gradients are averaged over processes rather
    than summed, pass ``token_count / world_size``.)

    Args:
        per_token_loss: (B, T) of this part.
        mask: (B, T) completion mask of this part, True = the token counts.
        token_count: Counted tokens in the whole minibatch, positive.

    Returns:
        A 0-d tensor; 0, with a gradient of 0, for a part without counted tokens.

    Raises:
        TypeError: ``mask`` is not bool or ``per_token_loss`` is not float.
        ValueError: Shapes differ, or ``token_count`` is not positive: skip a minibatch in which no token counts.
    """
    check_masked("token_mean_loss", mask, per_token_loss=per_token_loss)
    check_positive("token_mean_loss", token_count=token_count)
    return zero_masked(per_token_loss, mask).sum() / token_count


def clip_fraction(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """The share of counted tokens whose ratio has left the band.

    ``mean over counted tokens of [ratio_t < 1 - clip_range or ratio_t > 1 + clip_range_high]``

    It counts both directions, whatever the sign of the advantage; OpenAI's counts only tokens whose loss is clipped.

    Args:
        logprobs: (B, T) of the sampled tokens, now.
        old_logprobs: (B, T) of the same tokens under the policy that sampled them.
        mask: (B, T) completion mask, True = the token counts.
        clip_range: As in :func:`clipped_policy_loss`.
        clip_range_high: As in :func:`clipped_policy_loss`.

    Returns:
        A 0-d tensor in [0, 1], 0 where no token counts.

    Raises:
        TypeError: ``mask`` is not bool or another tensor is not float.
        ValueError: Shapes differ or a clip range is not positive.
    """
    check_masked("clip_fraction", mask, logprobs=logprobs, old_logprobs=old_logprobs)
    low, high = _band("clip_fraction", clip_range, clip_range_high)
    ratio = _ratio(logprobs, old_logprobs, mask)
    return masked_mean(((ratio < low) | (ratio > high)).to(ratio.dtype), mask)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """How far the update has moved the policy: KL(old || new) per token, estimated from the old policy's tokens.

    ``mean over counted tokens of exp(d_t) - 1 - d_t`` with ``d_t = min(log pi_t - log pi_old_t, 20)``

    :func:`~lmppo.functional.kl.kl_k3` of (old, new): 0 or more, unbiased. (TRL's ``approxkl`` is k2, biased.)

    Schulman, "Approximating KL Divergence" (2020), k3.

    Args:
        logprobs: (B, T) of the sampled tokens, now.
        old_logprobs: (B, T) of the same tokens under the policy that sampled them.
        mask: (B, T) completion mask, True = the token counts.

    Returns:
        A 0-d tensor, 0 where no token counts. Differentiable: detach it before logging.

    Raises:
        TypeError: ``mask`` is not bool or another argument is not float.
        ValueError: Shapes differ.
    """
    check_masked("approx_kl", mask, logprobs=logprobs, old_logprobs=old_logprobs)
    return masked_mean(kl_k3(zero_masked(old_logprobs.detach(), mask), zero_masked(logprobs, mask)), mask)


def _ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The ratio pi / pi_old where the mask is True, 1 elsewhere, at most e^20."""
    log_ratio = zero_masked(logprobs, mask) - zero_masked(old_logprobs.detach(), mask)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _band(function: str, clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    high = clip_range if clip_range_high is None else clip_range_high
    check_positive(function, clip_range=clip_range, clip_range_high=high)
    return 1.0 - clip_range, 1.0 + high
