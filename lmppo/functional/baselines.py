"""Baselines that need no critic: means over the batch, or over other completions of the same prompt.

A baseline is subtracted from the weights (returns) of :mod:`lmppo.functional.advantages`. What depends only on the state,
or on other, independent completions, changes no expected gradient (the expected grad-log-prob lemma), only the variance.

Background: docs/notes.md, "A baseline".
"""

from torch import Tensor

from lmppo.functional._inputs import check_masked, check_masked_over_time, zero_masked
from lmppo.functional.masked import masked_mean


def batch_mean_baseline(weights: Tensor, mask: Tensor) -> Tensor:
    """The mean weight of all counted tokens, as the baseline of every token.

    ``b_t = mean over counted tokens of the batch of w``

    The mean contains the completion's own weights, so the expected gradient shrinks a little: for returns of N
    completions of equal length, by the factor 1 - 1/N. Whitening subtracts it as well.

    Greensmith et al. 2004 (JMLR 5), section 4.

    Args:
        weights: (B, T), for example from :func:`~lmppo.functional.advantages.rewards_to_go`.
        mask: (B, T) completion mask, True = the token counts.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or ``weights`` is not float.
        ValueError: Shapes differ.
    """
    check_masked("batch_mean_baseline", mask, weights=weights)
    return zero_masked(masked_mean(weights, mask).expand_as(weights), mask)


def leave_one_out_baseline(weights: Tensor, mask: Tensor, *, group_size: int) -> Tensor:
    """What the other completions of the same prompt got: independent of the token's own completion, so unbiased.

    ``b_i = mean over the other completions j of the group of (mean over j's counted tokens of w_j)``

    With :func:`~lmppo.functional.advantages.total_return` this is RLOO. A completion without a counted token takes no
    part; where it leaves a completion alone, that one's baseline is 0.

    Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free!"); Ahmadian et al. 2024 (arXiv 2402.14740),
    section 3.2.

    Args:
        weights: (B, T); rows ``k * group_size`` to ``(k + 1) * group_size - 1`` answer one prompt.
        mask: (B, T) completion mask, True = the token counts.
        group_size: Completions per prompt, at least 2.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or ``weights`` is not float.
        ValueError: Shapes differ, or B is no multiple of ``group_size``, or that is below 2.
    """
    check_masked_over_time("leave_one_out_baseline", mask, weights=weights)
    if group_size < 2 or len(mask) % group_size:
        raise ValueError(
            f"leave_one_out_baseline: group_size must be 2 or more and divide the number of rows, {len(mask)}; "
            f"got {group_size}"
        )
    means = (zero_masked(weights, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).view(-1, group_size)
    takes_part = mask.any(dim=1).view(-1, group_size).long()
    n_others = takes_part.sum(dim=1, keepdim=True) - takes_part
    others = (means.sum(dim=1, keepdim=True) - means) / n_others.clamp(min=1)
    return zero_masked(others.view(-1, 1).expand_as(weights), mask)
