"""Moments over the counted elements of a tensor, and the two ways to normalize by them."""

import torch
from torch import Tensor

from lmppo.functional._inputs import check_masked, check_not_negative, zero_masked


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over counted elements: every counted token weighs the same, however long its sequence.

    ``mean = sum_i m_i x_i / max(1, sum_i m_i)``

    With no counted element the mean is 0 (not NaN, not an error), so that the empty part of a process or micro-batch
    can be summarized like any other. Parts combine exactly when weighted by their counts.

    Args:
        x: Float tensor of any shape.
        mask: Bool tensor of the same shape; True = the element counts.

    Returns:
        A 0-d tensor.

    Raises:
        TypeError: ``mask`` is not bool or ``x`` is not float.
        ValueError: The shapes differ.
    """
    check_masked("masked_mean", mask, x=x)
    return zero_masked(x, mask).sum() / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """The population variance over counted elements.

    ``var = sum_i m_i (x_i - mean)^2 / max(1, sum_i m_i)``

    The divisor is the count, as in OpenAI's code, and not the count minus one as in TRL 0.11: one counted element has
    variance 0, and parts combine exactly from their counts, means and variances. A constant input gives exactly 0.

    Args:
        x: Float tensor of any shape.
        mask: Bool tensor of the same shape; True = the element counts.

    Returns:
        A 0-d tensor, 0 where no element is counted.

    Raises:
        TypeError: ``mask`` is not bool or ``x`` is not float.
        ValueError: The shapes differ.
    """
    check_masked("masked_var", mask, x=x)
    return masked_mean(_centered(x, mask).square(), mask)


def masked_whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Shift and scale counted elements to mean 0 and variance 1: what PPO does to advantages.

    ``y_i = (x_i - mean) / sqrt(var + eps)``

    Subtracting the mean is a baseline, dividing by the deviation makes the step size independent of the reward's
    unit. A constant input gives zeros. To keep the mean, as is done with rewards, use :func:`masked_rescale`: there
    is no flag for it, since OpenAI's ``shift_mean=True`` and torchtune's flag of the same name mean opposite things.

    Args:
        x: Float tensor of any shape.
        mask: Bool tensor of the same shape; True = the element counts.
        eps: Added to the variance, 1e-8 as in OpenAI's code.

    Returns:
        A tensor of the same shape, 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or ``x`` is not float.
        ValueError: The shapes differ, or ``eps`` is negative.
    """
    check_masked("masked_whiten", mask, x=x)
    check_not_negative("masked_whiten", eps=eps)
    return zero_masked(_centered(x, mask) * torch.rsqrt(masked_var(x, mask) + eps), mask)


def masked_rescale(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Scale counted elements about their mean to variance 1, and keep the mean.

    ``y_i = mean + (x_i - mean) / sqrt(var + eps)``

    This is OpenAI's and TRL's ``whiten(x, shift_mean=False)``, meant for rewards: there the mean says how long an
    episode should last, so shifting it would change the task.

    Args:
        x: Float tensor of any shape.
        mask: Bool tensor of the same shape; True = the element counts.
        eps: Added to the variance.

    Returns:
        A tensor of the same shape, 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or ``x`` is not float.
        ValueError: The shapes differ, or ``eps`` is negative.
    """
    check_masked("masked_rescale", mask, x=x)
    check_not_negative("masked_rescale", eps=eps)
    return zero_masked(masked_mean(x, mask) + masked_whiten(x, mask, eps=eps), mask)


def _centered(x: Tensor, mask: Tensor) -> Tensor:
    """``x - mean``, 0 where masked; the second pass removes the rounding error of the first, so constants give 0."""
    centered = zero_masked(zero_masked(x, mask) - masked_mean(x, mask), mask)
    return zero_masked(centered - masked_mean(centered, mask), mask)
