"""How good each token was: returns, temporal differences and generalized advantage estimation.

One completion is one episode: the state before token t is the prompt and the tokens so far, the action is token t, and
the episode ends after its last counted token. "Next" always means the next *counted* token, and the exponent of
``gamma`` counts counted tokens: with gaps in the mask (tokens put there by an environment) every result is that of the
same tokens without the gaps. Rows without a counted token give zeros. All functions are differentiable in rewards and
values; the losses treat what comes out as constants.

Background: docs/notes.md, "Trajectories" to "A smaller gamma", and "GAE".
"""

import math

import torch
from torch import Tensor

from lmppo.functional._inputs import (
    check_dtype,
    check_float,
    check_masked,
    check_masked_over_time,
    check_positive,
    check_shape,
    check_unit_interval,
    widen,
    zero_masked,
)
from lmppo.functional.masked import masked_var


def total_return(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """The whole completion's return, as the weight of every one of its tokens.

    ``R = sum_t gamma^t r_t``, t = 0 at the first counted token, put on all counted tokens

    The plainest policy gradient: unbiased, and of high variance, since each token is also credited with what came
    before it. :func:`rewards_to_go` drops those terms.

    Schulman et al. 2015 (arXiv 1506.02438), eq. 1, choice 1.

    Args:
        rewards: (B, T).
        mask: (B, T) completion mask, True = the token counts.
        gamma: Discount, in [0, 1].

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or ``rewards`` is not float.
        ValueError: Shapes differ or ``gamma`` is outside [0, 1].
    """
    check_masked_over_time("total_return", mask, rewards=rewards)
    check_unit_interval("total_return", gamma=gamma)
    ended = _value_after_last("total_return", None, rewards)
    sums = _discounted_suffix_sums(zero_masked(rewards, mask), mask, gamma, ended)
    return zero_masked(sums[:, :1], mask)


def rewards_to_go(
    rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, bootstrap_values: Tensor | None = None
) -> Tensor:
    """The sum of rewards from each token on: a token cannot change what came before it.

    ``R_t = r_t + gamma * R_next``, and ``R_next = bootstrap`` after the last counted token

    Same expected gradient as :func:`total_return` at ``gamma=1``, usually with less variance. Minus a critic's values
    it is ``gae(..., lam=1)``, the usual weight for language models.

    Schulman et al. 2015 (arXiv 1506.02438), eq. 1, choice 2.

    Args:
        rewards: (B, T).
        mask: (B, T) completion mask, True = the token counts.
        gamma: Discount, in [0, 1].
        bootstrap_values: (B,), the value of the state after the last counted token, for completions that were cut;
            0 for those that ended. None: all ended.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes do not fit or ``gamma`` is outside [0, 1].
    """
    check_masked_over_time("rewards_to_go", mask, rewards=rewards)
    check_unit_interval("rewards_to_go", gamma=gamma)
    after_last = _value_after_last("rewards_to_go", bootstrap_values, rewards)
    sums = _discounted_suffix_sums(zero_masked(rewards, mask), mask, gamma, after_last)
    return zero_masked(sums[:, :-1], mask)


def immediate_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """Each token's own reward and nothing later: the contextual bandit.

    ``R_t = r_t``

    Unbiased only if later rewards do not depend on the present token given the past, which for text they do; it equals
    :func:`rewards_to_go` with ``gamma=0``.

    Args:
        rewards: (B, T).
        mask: (B, T) completion mask, True = the token counts.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: ``mask`` is not bool or ``rewards`` is not float.
        ValueError: Shapes differ.
    """
    check_masked_over_time("immediate_rewards", mask, rewards=rewards)
    return zero_masked(rewards, mask)


def td_residuals(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, bootstrap_values: Tensor | None = None
) -> Tensor:
    """By how much each step went better than the critic expected.

    ``delta_t = r_t + gamma * V_next - V_t``, and ``V_next = bootstrap`` after the last counted token

    The one-step advantage estimate: low variance, and as biased as the critic. It is ``gae(..., lam=0)``.

    Schulman et al. 2015 (arXiv 1506.02438), eq. 1, choice 6, and eq. 11.

    Args:
        rewards: (B, T).
        values: (B, T), the critic's V of the state *before* each token.
        mask: (B, T) completion mask, True = the token counts.
        gamma: Discount, in [0, 1].
        bootstrap_values: (B,), the value of the state after the last counted token, for completions that were cut;
            0 for those that ended. None: all ended.

    Returns:
        (B, T), 0 where the mask is False.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes do not fit or ``gamma`` is outside [0, 1].
    """
    check_masked_over_time("td_residuals", mask, rewards=rewards, values=values)
    check_unit_interval("td_residuals", gamma=gamma)
    after_last = _value_after_last("td_residuals", bootstrap_values, values)
    return _td_residuals(rewards, values, mask, gamma, after_last)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, and the returns the critic is fitted to.

    ``delta_t = r_t + gamma * V_next - V_t``
    ``A_t = delta_t + gamma * lam * A_next``, and ``A_next = 0`` after the last counted token
    ``returns_t = A_t + V_t``

    ``lam`` trades variance for bias: ``lam=1`` *is* ``rewards_to_go(...) - values`` (no bias), ``lam=0`` is
    :func:`td_residuals`. Smaller ``gamma`` also cuts variance, for tasks whose later rewards hardly depend on the
    present token. Where TRL zeroes masked values, so that a token before a gap or before the padding sees a next
    value of 0, here it sees the next counted token's, and after the last one the bootstrap value.

    Schulman et al. 2015 (arXiv 1506.02438), eq. 16, with eq. 17 (lam=0) and 18 (lam=1); Schulman et al. 2017 (arXiv
    1707.06347), eq. 11 and 12, truncated at the end of the completion.

    Args:
        rewards: (B, T), usually from :func:`~lmppo.functional.kl.kl_shaped_rewards`.
        values: (B, T), the critic's V of the state *before* each token.
        mask: (B, T) completion mask, True = the token counts.
        gamma: Discount, in [0, 1].
        lam: The weight of longer looks ahead, in [0, 1]; (B,) to give each row its own
            (:func:`length_adaptive_lam`).
        bootstrap_values: (B,), the value of the state after the last counted token, for completions that were cut;
            0 for those that ended. None: all ended.

    Returns:
        ``(advantages, returns)``, both (B, T), 0 where the mask is False. The advantages are not whitened.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes do not fit, or ``gamma`` or ``lam`` is outside [0, 1].
    """
    check_masked_over_time("gae", mask, rewards=rewards, values=values)
    check_unit_interval("gae", gamma=gamma)
    if isinstance(lam, Tensor):
        check_float("gae", lam=lam)
        check_shape("gae", mask.shape[:1], "one value per row of mask", lam=lam)
        lam = widen(lam)
        check_unit_interval("gae", lam_min=lam.min().item(), lam_max=lam.max().item())
    else:
        check_unit_interval("gae", lam=lam)
    after_last = _value_after_last("gae", bootstrap_values, values)
    deltas = _td_residuals(rewards, values, mask, gamma, after_last)
    sums = _discounted_suffix_sums(deltas, mask, gamma * lam, torch.zeros_like(after_last))
    advantages = zero_masked(sums[:, :-1], mask)
    return advantages, advantages + zero_masked(values, mask)


def length_adaptive_lam(mask: Tensor, *, lam: float, alpha: float) -> Tensor:
    """GAE's lambda for each completion, closer to 1 the longer it is, so that its reward reaches its first tokens.

    ``lam_i = max(lam, 1 - 1 / (alpha * n_i))`` with n_i the counted tokens of row i

    The weight of the last reward in the first token's advantage is about ``lam^n``; with ``1 - 1/(alpha n)`` it stays
    near ``exp(-1/alpha)`` at every length. The floor is ours: without it short completions (``alpha * n < 1``) would
    get a negative lambda. The length is known only in hindsight: where it varies, the estimate is a little biased even
    with a true critic.

    Yue et al. 2025 (VAPO, arXiv 2504.05118), section 4.2.

    Args:
        mask: (B, T) completion mask, True = the token counts.
        lam: The smallest lambda, in [0, 1].
        alpha: Positive; VAPO's is 0.05.

    Returns:
        (B,) float32.

    Raises:
        TypeError: ``mask`` is not bool.
        ValueError: ``mask`` is not (B, T), ``lam`` is outside [0, 1] or ``alpha`` is not positive.
    """
    check_masked_over_time("length_adaptive_lam", mask)
    check_unit_interval("length_adaptive_lam", lam=lam)
    check_positive("length_adaptive_lam", alpha=alpha)
    lengths = mask.sum(dim=1).clamp(min=1)
    return (1.0 - 1.0 / (alpha * lengths)).clamp(min=lam)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """The share of the returns' variance that the critic foresaw.

    ``1 - Var[returns - values] / Var[returns]``, population variances over counted tokens

    1: a perfect critic (up to a constant); 0: no better than a constant; below 0: the critic adds noise to the
    advantages. Where all returns are equal there is nothing to explain and the answer is 0, whatever the
    values are; and the quotient is capped at the largest number of its dtype: the answer is always finite.

    Args:
        values: (B, T), the critic's estimates, made before it was fitted to ``returns``.
        returns: (B, T), what was observed, usually from :func:`gae`.
        mask: (B, T) completion mask, True = the token counts.

    Returns:
        A 0-d tensor.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes differ.
    """
    check_masked("explained_variance", mask, values=values, returns=returns)
    total = masked_var(returns, mask)
    return _share_explained(masked_var(zero_masked(returns, mask) - zero_masked(values, mask), mask), total)


def explained_variance_within_prompts(values: Tensor, returns: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
    """The share of the returns' variance among completions of the same prompt that the critic foresaw.

    ``1 - S[returns - values] / S[returns]``, ``S[x] = sum over counted tokens of (x - c)^2``, and c is the mean of x over
    the tokens at the same position (the n-th counted token) of all completions of the same prompt

    :func:`explained_variance` without what can be known before a token is read: how good the prompt is, and how far the
    completion has come. 1: a perfect critic; 0: values that depend on nothing but the prompt and the position, such as
    each prompt's average; below 0: the critic adds noise. A token that no other completion of its prompt has at its
    position tells nothing and counts for nothing. Where the returns within all prompts are equal the answer is 0, as there;
    where no two tokens can be compared, as with one completion per prompt, it is NaN.

    Args:
        values: (B, T), the critic's estimates, made before it was fitted to ``returns``.
        returns: (B, T), what was observed, usually from :func:`rewards_to_go` or :func:`gae`.
        mask: (B, T) completion mask, True = the token counts.
        prompts: (B,) int64, the same number for completions of the same prompt.

    Returns:
        A 0-d tensor.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes do not fit.
    """
    name = "explained_variance_within_prompts"
    check_masked_over_time(name, mask, values=values, returns=returns)
    check_dtype(name, torch.long, prompts=prompts)
    check_shape(name, mask.shape[:1], "one number per row of mask", prompts=prompts)
    places = torch.stack([prompts[:, None].expand(mask.shape), mask.cumsum(dim=1)], dim=-1)[mask]
    _, place, counts = torch.unique(places, dim=0, return_inverse=True, return_counts=True)

    def centered(x: Tensor) -> Tensor:
        for _ in range(2):  # the second pass removes the rounding error of the first, so constants give 0
            x = x - (x.new_zeros(len(counts)).index_add(0, place, x) / counts)[place]
        return x

    observed, foreseen = centered(widen(returns[mask])), centered(widen(values[mask]))
    share = _share_explained((observed - foreseen).square().sum(), observed.square().sum())
    return torch.where((counts > 1).any(), share, math.nan)


def _share_explained(unexplained: Tensor, total: Tensor) -> Tensor:
    """``1 - unexplained / total``, always finite, and 0 where there is nothing to explain."""
    constant = total == 0
    share = unexplained / torch.where(constant, 1.0, total)
    return torch.where(constant, 0.0, 1.0 - share.clamp(max=torch.finfo(share.dtype).max))


def _value_after_last(function: str, bootstrap_values: Tensor | None, like: Tensor) -> Tensor:
    """(B,) value of the state after each row's last counted token: 0 where the episode ended."""
    if bootstrap_values is None:
        return widen(like.new_zeros(like.shape[0]))
    check_float(function, bootstrap_values=bootstrap_values)
    check_shape(function, like.shape[:1], "one value per row of mask", bootstrap_values=bootstrap_values)
    return widen(bootstrap_values)


def _td_residuals(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, after_last: Tensor) -> Tensor:
    rewards, values = zero_masked(rewards, mask), zero_masked(values, mask)
    upcoming = [after_last]  # column t: the value at the first counted position at or after t
    for t in reversed(range(values.shape[1])):
        upcoming.append(torch.where(mask[:, t], values[:, t], upcoming[-1]))
    next_values = torch.stack(upcoming[::-1], dim=1)[:, 1:]
    return zero_masked(rewards + gamma * next_values - values, mask)


def _discounted_suffix_sums(x: Tensor, mask: Tensor, discount: float | Tensor, after_last: Tensor) -> Tensor:
    """(B, T + 1): column t is ``y = x + discount * y_next`` at the first counted position at or after t.

    After the last counted position ``y_next``, and so the last column, is ``after_last`` (B,).
    """
    sums = [after_last]
    for t in reversed(range(x.shape[1])):
        sums.append(torch.where(mask[:, t], x[:, t] + discount * sums[-1], sums[-1]))
    return torch.stack(sums[::-1], dim=1)
