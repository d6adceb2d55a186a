"""Policy and value losses, their mean over a minibatch, clip fraction and approximate KL."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import mask_of, modest, ragged, random_batch, tensor, unit_numbers

from lmppo.functional import (
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    exact_kl,
    importance_sampled_loss,
    kl_k3,
    kl_penalized_policy_loss,
    policy_gradient_loss,
    token_mean_loss,
)

ONE = mask_of("1")


def value_and_gradient(loss, start):
    """A per-token loss at one number, and its derivative there."""
    x = tensor([[start]]).requires_grad_()
    value = loss(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.item(), gradient.item()


# --- Policy losses


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_policy_gradient_loss_by_hand(advantage):
    """-A log pi, derivative -A: descending it raises log pi where A > 0 (N12)."""
    got = value_and_gradient(lambda lp: policy_gradient_loss(lp, tensor([[advantage]]), ONE), start=-3.0)
    assert got == (3.0 * advantage, -advantage)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_importance_sampled_loss_by_hand(advantage, ratio):
    """-A ratio; d ratio / d log pi = ratio, so the derivative equals the loss."""
    old, advantages = tensor([[-3.0]]), tensor([[advantage]])
    got = value_and_gradient(lambda lp: importance_sampled_loss(lp, old, advantages, ONE), start=-3.0 + math.log(ratio))
    assert got == pytest.approx((-advantage * ratio, -advantage * ratio))


CLIP_CASES = [
    # advantage, ratio, options -> loss, derivative by log pi. The band is [.8, 1.2]; |A| = 2.
    (+2, 1.0, {}, -2.0, -2.0),  # inside: -A ratio, and d ratio / d log pi = ratio
    (+2, 1.1, {}, -2.2, -2.2),
    (+2, 1.5, {}, -2.4, 0.0),  # a good token, already likelier: max(-3, -2.4), no more to gain
    (+2, 0.5, {}, -1.0, -1.0),  # a good token, by mistake less likely: max(-1, -1.6), pulled back
    (-2, 1.0, {}, 2.0, 2.0),
    (-2, 0.9, {}, 1.8, 1.8),
    (-2, 0.5, {}, 1.6, 0.0),  # a bad token, already less likely: max(1, 1.6), no more to gain
    (-2, 1.5, {}, 3.0, 3.0),  # a bad token, by mistake likelier: max(3, 2.4), pushed back
    (-2, 5.0, {}, 10.0, 10.0),  # ... however far: this is what dual_clip bounds
    # the upper edge alone at 1.4
    (+2, 1.3, {"clip_range_high": 0.4}, -2.6, -2.6),
    (+2, 1.5, {"clip_range_high": 0.4}, -2.8, 0.0),
    (-2, 0.5, {"clip_range_high": 0.4}, 1.6, 0.0),  # the lower edge stays at .8
    # both edges at .5
    (+2, 1.4, {"clip_range": 0.5}, -2.8, -2.8),
    (-2, 0.6, {"clip_range": 0.5}, 1.2, 1.2),
    (+2, 1.7, {"clip_range": 0.5}, -3.0, 0.0),
    (-2, 0.4, {"clip_range": 0.5}, 1.0, 0.0),
    # dual clip: a negative advantage is charged at most 3 times
    (-2, 2.0, {"dual_clip": 3.0}, 4.0, 4.0),
    (-2, 5.0, {"dual_clip": 3.0}, 6.0, 0.0),
    (+2, 5.0, {"dual_clip": 3.0}, -2.4, 0.0),  # a positive advantage knows nothing of it
]


@pytest.mark.parametrize(("advantage", "ratio", "options", "loss", "slope"), CLIP_CASES)
def test_clipped_policy_loss_by_hand(advantage, ratio, options, loss, slope):
    """Every region of the clipped objective: its value, and whether a gradient is left."""
    old, advantages = tensor([[-3.0]]), tensor([[float(advantage)]])
    got = value_and_gradient(
        lambda lp: clipped_policy_loss(lp, old, advantages, ONE, **options), start=-3.0 + math.log(ratio)
    )
    assert got == pytest.approx((loss, slope))


def test_at_ratio_1_every_surrogate_has_the_policy_gradient():
    """Bit for bit, so the first minibatch of PPO is a plain policy-gradient step (N14, N17)."""
    mask, logprobs, advantages, _ = random_batch()
    old = logprobs.clone()
    logprobs.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), logprobs)[0]

    expected = gradient(policy_gradient_loss(logprobs, advantages, mask))
    assert torch.equal(expected, torch.where(mask, -advantages, 0.0))
    for loss in (
        importance_sampled_loss(logprobs, old, advantages, mask),
        clipped_policy_loss(logprobs, old, advantages, mask, dual_clip=3.0),
        kl_penalized_policy_loss(logprobs, old, advantages, mask, beta=10.0),
    ):
        assert torch.equal(gradient(loss), expected)
        assert torch.equal(loss, torch.where(mask, -advantages, 0.0))


@modest
@given(ragged(count=3), st.floats(0.05, 0.9), st.floats(0.05, 3.0), st.floats(1.1, 5.0))
def test_clipping_is_pessimistic_and_dual_clipping_bounds_it(batch, low, high, dual):
    """Never below the unclipped loss; the same inside the band; with dual clip never above |A| dual for A < 0."""
    mask, logprobs, old, advantages = batch
    options = {"clip_range": low, "clip_range_high": high}
    unclipped = importance_sampled_loss(logprobs, old, advantages, mask)
    clipped = clipped_policy_loss(logprobs, old, advantages, mask, **options)
    assert (clipped >= unclipped).all()
    ratio = (logprobs - old).exp()
    inside = (ratio > 1 - low) & (ratio < 1 + high)
    assert torch.equal(clipped[inside], unclipped[inside])
    bounded = clipped_policy_loss(logprobs, old, advantages, mask, **options, dual_clip=dual)
    assert (bounded <= clipped).all()
    bad = mask & (advantages < 0)
    assert (bounded[bad] <= -advantages[bad] * dual).all()
    assert torch.equal(bounded[~bad], clipped[~bad])


def test_a_step_down_each_policy_loss_moves_probabilities_the_right_way():
    """The sign, by finite differences on the logits of a policy: good tokens get likelier, bad ones less likely."""
    old = torch.zeros(2, 3, dtype=torch.float64).log_softmax(-1)[:, :1]
    advantages, mask = tensor([[1.5], [-0.5]]), mask_of("1", "1")
    losses = {
        "gradient": lambda lp: policy_gradient_loss(lp, advantages, mask),
        "sampled": lambda lp: importance_sampled_loss(lp, old, advantages, mask),
        "clipped": lambda lp: clipped_policy_loss(lp, old, advantages, mask),
        "penalized": lambda lp: kl_penalized_policy_loss(lp, old, advantages, mask, beta=0.1),
    }
    for name, loss in losses.items():

        def total(logits, loss=loss):
            return loss(logits.log_softmax(-1)[:, :1]).sum()

        step = 1e-5
        for row, direction in ((0, -1), (1, 1)):  # the loss falls as the good token rises, and as the bad one falls
            raised = torch.zeros(2, 3, dtype=torch.float64)
            raised[row, 0] = step
            slope = (total(raised) - total(-raised)) / (2 * step)
            # d(-A log p)/dz = -A (1 - p) with p = 1/3
            assert slope.item() == pytest.approx(-advantages[row].item() * 2 / 3, abs=1e-6), name
            assert slope.sign() == direction, name


def test_gradients_agree_with_finite_differences():
    """Everywhere but at the kinks, for log-probabilities and for values."""
    mask, logprobs, old, advantages = random_batch(seed=3)
    logprobs = (0.3 * logprobs).requires_grad_()
    old = 0.3 * old
    for loss in (
        lambda x: policy_gradient_loss(x, advantages, mask),
        lambda x: importance_sampled_loss(x, old, advantages, mask),
        lambda x: clipped_policy_loss(x, old, advantages, mask, clip_range_high=0.3, dual_clip=1.5),
        lambda x: kl_penalized_policy_loss(x, old, advantages, mask, beta=0.7),
        lambda x: clipped_value_loss(x, old, advantages, mask, clip_range=0.2),
        lambda x: approx_kl(x, old, mask),
    ):
        assert torch.autograd.gradcheck(loss, logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
def test_finite_for_any_log_ratio(log_ratio, dtype):
    """Losses, gradients and metrics: the ratio is capped at e^20, where its gradient is 0."""
    mask = mask_of("11")
    logprobs = torch.full((1, 2), log_ratio, dtype=dtype, requires_grad=True)
    old, advantages = torch.zeros(1, 2, dtype=dtype), torch.tensor([[1.0, -1.0]], dtype=dtype)
    for loss in (
        importance_sampled_loss(logprobs, old, advantages, mask),
        clipped_policy_loss(logprobs, old, advantages, mask),
        clipped_policy_loss(logprobs, old, advantages, mask, dual_clip=3.0),
        kl_penalized_policy_loss(logprobs, old, advantages, mask, beta=0.1),
        approx_kl(logprobs, old, mask),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert loss.isfinite().all() and gradient.isfinite().all()
        if log_ratio > 20:
            assert not gradient.any()
    assert clip_fraction(logprobs, old, mask, clip_range=0.2).item() == 1.0


def test_what_the_losses_treat_as_constant():
    """Advantages, returns and all that is old get no gradient: no policy loss trains the critic by accident."""
    mask, *tensors = random_batch()
    now, old, weight = (x.requires_grad_() for x in tensors)
    for loss in (
        policy_gradient_loss(now, weight, mask),
        importance_sampled_loss(now, old, weight, mask),
        clipped_policy_loss(now, old, weight, mask, dual_clip=3.0),
        kl_penalized_policy_loss(now, old, weight, mask, beta=1.0),
        clipped_value_loss(now, old, weight, mask, clip_range=0.2),
        approx_kl(now, old, mask),
    ):
        gradients = torch.autograd.grad(loss.sum(), (now, old, weight), allow_unused=True)
        assert gradients[0] is not None and gradients[1:] == (None, None)


# --- The KL penalty, by enumeration of a vocabulary of five


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_is_kl_of_old_against_new(seed):
    """Eq. 8 of the PPO paper: under the old policy's samples, value and gradient are those of KL(old || new)."""
    generator = torch.Generator().manual_seed(seed)
    old_logits, logits = torch.randn(2, 5, generator=generator, dtype=torch.float64).unbind(0)
    logits.requires_grad_()
    old, mask = old_logits.log_softmax(-1).unsqueeze(0), mask_of("11111")
    chances = old.exp()

    def expected_penalty(beta):
        new = logits.log_softmax(-1).unsqueeze(0)
        return (chances * kl_penalized_policy_loss(new, old, torch.zeros_like(old), mask, beta=beta)).sum()

    exact = exact_kl(old_logits, logits)
    (gradient,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(expected_penalty(2.0), 2.0 * exact)
    torch.testing.assert_close(torch.autograd.grad(expected_penalty(2.0), logits)[0], 2.0 * gradient)
    # The other direction, KL(new || old), is another function with another gradient.
    (other_way,) = torch.autograd.grad(exact_kl(logits, old_logits), logits)
    assert (other_way - gradient).abs().max() > 0.01


def test_kl_penalized_loss_by_hand():
    """-A ratio + beta (ratio - 1 - log ratio); derivative -A ratio + beta (ratio - 1)."""

    def at_ratio(ratio):
        old, advantages = tensor([[-3.0]]), tensor([[2.0]])
        return value_and_gradient(
            lambda lp: kl_penalized_policy_loss(lp, old, advantages, ONE, beta=0.5), start=-3.0 + math.log(ratio)
        )

    # ratio 4: -8 + .5 (3 - log 4), -8 + 1.5
    assert at_ratio(4) == pytest.approx((-8 + 0.5 * (3 - math.log(4)), -6.5))
    # ratio 1/4: -.5 + .5 (-3/4 + log 4), -.5 - .375
    assert at_ratio(1 / 4) == pytest.approx((-0.5 + 0.5 * (math.log(4) - 0.75), -0.875))


def test_the_penalty_pulls_back_from_both_sides():
    """Whatever the advantage would say: with A = 0 the derivative has the sign of the log-ratio, even far out."""
    nothing = tensor([[0.0]])
    for log_ratio in (-1e4, -30.0, -1.0, 1.0, 19.0):
        value, slope = value_and_gradient(
            lambda lp: kl_penalized_policy_loss(lp, nothing, nothing, ONE, beta=1.0), start=log_ratio
        )
        assert value > 0 and slope * log_ratio > 0


# --- Value loss

VALUE_CASES = [
    # value, clip_range -> loss, derivative. The old value is 0, the return 1.
    (0.1, 0.2, 0.405, -0.9),  # inside the range: .5 * .9^2
    (0.5, 0.2, 0.32, 0.0),  # moved .5 towards the return, .2 are allowed: .5 * .8^2, no more to gain
    (1.5, 0.2, 0.32, 0.0),  # beyond the return: .5 * max(.5^2, .8^2)
    (3.0, 0.2, 2.0, 2.0),  # so far beyond that the unclipped error is the larger one: .5 * 2^2
    (-0.5, 0.2, 1.125, -1.5),  # moved away from the return: .5 * max(1.5^2, 1.2^2), pulled back
    (0.5, 1.0, 0.125, -0.5),  # a wide range clips nothing
    (0.5, None, 0.125, -0.5),
    (3.0, None, 2.0, 2.0),
]


@pytest.mark.parametrize(("value", "clip_range", "loss", "slope"), VALUE_CASES)
def test_clipped_value_loss_by_hand(value, clip_range, loss, slope):
    """Every region: its value, and whether a gradient is left."""
    old, returns = tensor([[0.0]]), tensor([[1.0]])
    got = value_and_gradient(lambda v: clipped_value_loss(v, old, returns, ONE, clip_range=clip_range), start=value)
    assert got == pytest.approx((loss, slope))


@modest
@given(ragged(count=3), st.floats(0.01, 20.0))
def test_value_clipping_is_pessimistic(batch, clip_range):
    """Never below half the squared error; equal to it within the range; it does not matter where zero is."""
    mask, values, old, returns = batch
    plain = clipped_value_loss(values, old, returns, mask, clip_range=None)
    assert torch.equal(plain, torch.where(mask, 0.5 * (values - returns) ** 2, 0.0))
    clipped = clipped_value_loss(values, old, returns, mask, clip_range=clip_range)
    assert (clipped >= plain).all()
    inside = (values - old).abs() <= clip_range
    torch.testing.assert_close(clipped[inside], plain[inside])
    shifted = clipped_value_loss(values + 4.0, old + 4.0, returns + 4.0, mask, clip_range=clip_range)
    torch.testing.assert_close(shifted, clipped)
    mirrored = clipped_value_loss(-values, -old, -returns, mask, clip_range=clip_range)
    torch.testing.assert_close(mirrored, clipped)


# --- The mean over a minibatch


def test_token_mean_loss_by_hand():
    """The sum over counted tokens, over the count of the whole minibatch."""
    loss = tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    assert token_mean_loss(loss, mask_of("11.", "1.."), token_count=3).item() == 3.0
    assert token_mean_loss(loss, mask_of("11.", "1.."), token_count=6).item() == 1.5


def test_micro_batches_add_up_to_the_minibatch():
    """Any split gives the same loss and the same gradient; averaging the parts' own means does not."""
    mask, loss, *_ = random_batch(rows=6)
    mask[3:] &= torch.arange(7) < 2  # the later rows are short
    loss.requires_grad_()
    count = int(mask.sum())

    def value_and_slope(total):
        return total.detach(), torch.autograd.grad(total, loss)[0]

    whole = value_and_slope(token_mean_loss(loss, mask, token_count=count))
    torch.testing.assert_close(whole[0], loss.detach()[mask].mean())
    for size in (1, 2, 4):
        rows = [slice(start, start + size) for start in range(0, 6, size)]
        parts = value_and_slope(sum(token_mean_loss(loss[part], mask[part], token_count=count) for part in rows))
        torch.testing.assert_close(parts, whole)
    halves = [loss[:3][mask[:3]].mean(), loss[3:][mask[3:]].mean()]
    assert abs(sum(halves).item() / 2 - whole[0].item()) > 0.01


def test_a_part_without_counted_tokens_adds_nothing():
    """It still can be part of the backward pass, as the empty part of one process must be."""
    loss = tensor([[math.nan, 2.0]]).requires_grad_()
    share = token_mean_loss(loss, mask_of(".."), token_count=5)
    share.backward()
    assert share.item() == 0.0 and not loss.grad.any()


# --- How far the policy has moved


def test_clip_fraction_by_hand():
    """Both edges count, the edges themselves and masked tokens do not."""
    ratio = tensor([[1.0, 1.19, 1.21, 0.81, 0.79, 1.35, 9.0, 9.0]])
    mask = mask_of("111111..")
    old = torch.full_like(ratio, -2.0)
    new = old + ratio.log()
    # outside [.8, 1.2]: 1.21, .79, 1.35
    assert clip_fraction(new, old, mask, clip_range=0.2).item() == pytest.approx(3 / 6)
    # outside [.8, 1.3]: .79, 1.35
    assert clip_fraction(new, old, mask, clip_range=0.2, clip_range_high=0.3).item() == pytest.approx(2 / 6)
    # outside [.5, 1.5]: nothing
    assert clip_fraction(new, old, mask, clip_range=0.5).item() == 0.0
    assert clip_fraction(old, old, mask, clip_range=0.01).item() == 0.0


def test_approx_kl_by_hand():
    """The mean over counted tokens of ratio - 1 - log ratio."""
    old, mask = tensor([[-1.0, -1.0, -1.0]]), mask_of("11.")
    new = old + tensor([[math.log(2), -math.log(2), 5.0]])
    # (2 - 1 - log 2 + 1/2 - 1 + log 2) / 2 = 1/4
    assert approx_kl(new, old, mask).item() == pytest.approx(0.25)
    assert approx_kl(old, old, mask).item() == 0.0
    assert approx_kl(new, old, mask_of("...")).item() == 0.0


@modest
@given(ragged(count=2), unit_numbers)
def test_approx_kl_is_the_mean_of_k3(batch, shrink):
    """Sampled from old, so old comes first; never negative."""
    mask, new, old = batch
    new = old + shrink * (new - old)
    counted = kl_k3(old, new)[mask]
    assert approx_kl(new, old, mask).item() == pytest.approx(counted.mean().item() if len(counted) else 0.0)
    assert approx_kl(new, old, mask).item() >= 0.0


# --- Errors


def test_bad_arguments():
    """Named, before anything is computed; shapes are never broadcast."""
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for clip_range in (0.0, -0.2, math.nan, math.inf):
        with pytest.raises(ValueError, match="clipped_policy_loss: clip_range must be positive and finite"):
            clipped_policy_loss(x, x, x, mask, clip_range=clip_range)
        with pytest.raises(ValueError, match="clipped_policy_loss: clip_range_high must be positive and finite"):
            clipped_policy_loss(x, x, x, mask, clip_range_high=clip_range)
        with pytest.raises(ValueError, match="clipped_value_loss: clip_range must be positive and finite"):
            clipped_value_loss(x, x, x, mask, clip_range=clip_range)
        with pytest.raises(ValueError, match="clip_fraction: clip_range must be positive and finite"):
            clip_fraction(x, x, mask, clip_range=clip_range)
    for dual_clip in (1.0, 0.5, math.nan):
        with pytest.raises(ValueError, match="clipped_policy_loss: dual_clip must be above 1"):
            clipped_policy_loss(x, x, x, mask, dual_clip=dual_clip)
    with pytest.raises(ValueError, match="kl_penalized_policy_loss: beta must be 0 or more and finite, got -1"):
        kl_penalized_policy_loss(x, x, x, mask, beta=-1.0)
    with pytest.raises(ValueError, match="token_mean_loss: token_count must be positive and finite, got 0"):
        token_mean_loss(x, mask, token_count=0)
    with pytest.raises(ValueError, match=r"clipped_policy_loss: advantages must have shape \(2, 3\).*got \(2,\)"):
        clipped_policy_loss(x, x, torch.zeros(2), mask)
    with pytest.raises(ValueError, match=r"clipped_value_loss: returns must have shape \(2, 3\).*got \(2, 1\)"):
        clipped_value_loss(x, x, torch.zeros(2, 1), mask, clip_range=0.2)
