"""What holds for every masked function: only counted tokens exist.

Garbage at masked positions changes no output and no gradient, bit for bit; gaps, padding on either side, the order of
the rows and the other rows of the batch change nothing either. A new public function with a mask must enter ``CASES``.
"""

import inspect

import pytest
import torch
from ragged import GARBAGE, compressed, random_batch

import lmppo.functional
from lmppo.functional import (
    approx_kl,
    batch_mean_baseline,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    explained_variance_within_prompts,
    gae,
    immediate_rewards,
    importance_sampled_loss,
    kl_k1,
    kl_penalized_policy_loss,
    kl_shaped_rewards,
    leave_one_out_baseline,
    length_adaptive_lam,
    masked_mean,
    masked_rescale,
    masked_var,
    masked_whiten,
    policy_gradient_loss,
    rewards_to_go,
    td_residuals,
    token_mean_loss,
    total_return,
)

# Each takes (mask, x, y, z), three (B, T) tensors, and uses as many of them as the function has.
# (B,) arguments are made from constants, so that they stay what they are when columns are added or removed.


def per_row(x, value=0.5):
    """A (B,) argument."""
    return x.new_full(x.shape[:1], value)


PER_TOKEN = {
    "masked_whiten": lambda m, x, y, z: masked_whiten(x, m),
    "masked_rescale": lambda m, x, y, z: masked_rescale(x, m),
    "kl_shaped_rewards": lambda m, x, y, z: kl_shaped_rewards(per_row(x), x, m, kl_coef=0.1),
    "kl_shaped_rewards, dense scores": lambda m, x, y, z: kl_shaped_rewards(y, x, m, kl_coef=0.1),
    "total_return": lambda m, x, y, z: total_return(x, m, gamma=0.9),
    "rewards_to_go": lambda m, x, y, z: rewards_to_go(x, m, gamma=0.9),
    "rewards_to_go, bootstrapped": lambda m, x, y, z: rewards_to_go(x, m, gamma=0.9, bootstrap_values=per_row(x)),
    "immediate_rewards": lambda m, x, y, z: immediate_rewards(x, m),
    "td_residuals": lambda m, x, y, z: td_residuals(x, y, m, gamma=0.9),
    "td_residuals, bootstrapped": lambda m, x, y, z: td_residuals(x, y, m, bootstrap_values=per_row(x)),
    "gae, advantages": lambda m, x, y, z: gae(x, y, m, gamma=0.9, lam=0.8)[0],
    "gae, returns": lambda m, x, y, z: gae(x, y, m, gamma=0.9, lam=0.8)[1],
    "gae, lambda by length": lambda m, x, y, z: gae(x, y, m, lam=length_adaptive_lam(m.bool(), lam=0.5, alpha=0.6))[0],
    "batch_mean_baseline": lambda m, x, y, z: batch_mean_baseline(x, m),
    "leave_one_out_baseline": lambda m, x, y, z: leave_one_out_baseline(x, m, group_size=2),
    "gae, bootstrapped": lambda m, x, y, z: gae(x, y, m, bootstrap_values=per_row(x))[0],
    "policy_gradient_loss": lambda m, x, y, z: policy_gradient_loss(x, y, m),
    "importance_sampled_loss": lambda m, x, y, z: importance_sampled_loss(x, y, z, m),
    "clipped_policy_loss": lambda m, x, y, z: clipped_policy_loss(x, y, z, m),
    "clipped_policy_loss, dual": lambda m, x, y, z: clipped_policy_loss(x, y, z, m, dual_clip=1.5),
    "kl_penalized_policy_loss": lambda m, x, y, z: kl_penalized_policy_loss(x, y, z, m, beta=0.5),
    "clipped_value_loss": lambda m, x, y, z: clipped_value_loss(x, y, z, m, clip_range=0.2),
    "clipped_value_loss, unclipped": lambda m, x, y, z: clipped_value_loss(x, y, z, m, clip_range=None),
}
SUMMARIES = {
    "masked_mean": lambda m, x, y, z: masked_mean(x, m),
    "masked_var": lambda m, x, y, z: masked_var(x, m),
    "explained_variance": lambda m, x, y, z: explained_variance(x, y, m),
    "explained_variance_within_prompts": lambda m, x, y, z: explained_variance_within_prompts(
        x, y, m, torch.zeros(len(m), dtype=torch.long)
    ),
    "token_mean_loss": lambda m, x, y, z: token_mean_loss(x, m, token_count=11),
    "clip_fraction": lambda m, x, y, z: clip_fraction(x, y, m, clip_range=0.2),
    "approx_kl": lambda m, x, y, z: approx_kl(x, y, m),
    # the whole way from log-probabilities to the loss of a minibatch
    "everything": lambda m, x, y, z: token_mean_loss(
        clipped_policy_loss(
            x, y, masked_whiten(gae(kl_shaped_rewards(per_row(x), kl_k1(y, z), m, kl_coef=0.1), z, m)[0], m), m
        )
        + clipped_value_loss(x, z, gae(y, z, m)[1], m, clip_range=0.2),
        m,
        token_count=11,
    ),
}
CASES = PER_TOKEN | SUMMARIES
WHOLE_BATCH = {
    "masked_whiten",
    "masked_rescale",
    "batch_mean_baseline",
    "leave_one_out_baseline",
}  # per token, and by design dependent on all rows

per_token = pytest.mark.parametrize("name", PER_TOKEN)
every_case = pytest.mark.parametrize("name", CASES)


def value_and_gradients(function, mask, *tensors, upstream=None):
    """The value, and the gradients of all inputs (zeros for those that get none)."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    value = function(mask, *tensors)
    if not value.requires_grad:
        return [value]
    weights = torch.ones_like(value) if upstream is None else upstream
    gradients = torch.autograd.grad(value, tensors, weights, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(mask) if g is None else g for g in gradients)]


def test_every_masked_function_is_here():
    """Found by the name of the argument; length_adaptive_lam takes the mask alone, and stands in gae's case."""
    masked = {
        name
        for name in lmppo.functional.__all__
        if "mask" in inspect.signature(getattr(lmppo.functional, name)).parameters
    }
    assert masked - {"length_adaptive_lam"} == {name.split(",")[0] for name in CASES} - {"everything"}


@every_case
def test_masked_positions_never_matter(name):
    """Not in the value and not in a gradient, bit for bit; masked results are 0 and so are masked gradients."""
    mask, *tensors = random_batch()
    clean = value_and_gradients(CASES[name], mask, *(torch.where(mask, x, 0.0) for x in tensors))
    for garbage in GARBAGE:
        dirty = value_and_gradients(CASES[name], mask, *(torch.where(mask, x, garbage) for x in tensors))
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(before, after), garbage
            if before.shape == mask.shape:
                assert not after[~mask].any(), garbage
    if clean[0].shape == mask.shape:
        assert not clean[0][~mask].signbit().any()  # 0, and not -0


@per_token
def test_what_comes_back_to_masked_positions_never_matters(name):
    """A NaN in the gradient of a masked *output* (another branch of the graph made it) stops there."""
    mask, *tensors = random_batch()
    clean = value_and_gradients(CASES[name], mask, *tensors, upstream=torch.where(mask, tensors[1], 0.0))
    dirty = value_and_gradients(CASES[name], mask, *tensors, upstream=torch.where(mask, tensors[1], float("nan")))
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", sorted(PER_TOKEN.keys() - WHOLE_BATCH))
def test_rows_are_independent_and_gaps_do_not_exist(name):
    """Each row alone, its counted tokens pushed together, gives the same numbers bit for bit."""
    mask, *tensors = random_batch()
    whole = CASES[name](mask, *tensors)
    for row in range(len(mask)):
        alone = [compressed(x, mask, row) for x in tensors]
        expected = CASES[name](torch.ones_like(alone[0], dtype=torch.bool), *alone)
        assert torch.equal(compressed(whole, mask, row), expected)


@every_case
def test_gaps_do_not_exist_for_what_looks_at_the_whole_batch(name):
    """All rows together: the same tokens pushed to the left, in as many columns as the longest row needs."""
    mask, *tensors = random_batch()
    order = (~mask).long().argsort(dim=1, stable=True)
    pushed = [x.gather(1, order) for x in (mask, *tensors)]
    whole, expected = CASES[name](mask, *tensors), CASES[name](*pushed)
    torch.testing.assert_close(whole.gather(1, order) if whole.ndim else whole, expected, rtol=1e-12, atol=1e-12)


@every_case
def test_padding_columns_change_nothing(name):
    """On the left or on the right, whatever is in them."""
    mask, *tensors = random_batch()
    expected = CASES[name](mask, *tensors)
    for left, right in ((2, 0), (0, 2), (1, 1)):
        padded = [torch.nn.functional.pad(x, (left, right), value=float("nan")) for x in tensors]
        got = CASES[name](torch.nn.functional.pad(mask, (left, right)), *padded)
        if got.ndim:
            got = got[:, left : left + mask.shape[1]]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"leave_one_out_baseline"}))  # its groups are rows in a row
def test_the_order_of_rows_does_not_matter(name):
    """Permuted rows in, permuted rows out."""
    mask, *tensors = random_batch()
    order = torch.tensor([2, 0, 3, 1])
    whole, permuted = CASES[name](mask, *tensors), CASES[name](mask[order], *(x[order] for x in tensors))
    torch.testing.assert_close(permuted, whole[order] if whole.ndim else whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"explained_variance_within_prompts"}))  # NaN: undefined
def test_nothing_counted_is_zero_and_harmless(name):
    """An empty row, an empty batch: zeros, with zero gradients."""
    mask, *tensors = random_batch()
    nothing = torch.zeros_like(mask)
    for result in value_and_gradients(CASES[name], nothing, *(torch.full_like(x, float("nan")) for x in tensors)):
        assert not result.any()
    if name in PER_TOKEN:
        mask[1] = False
        assert not CASES[name](mask, *tensors)[1].any()


@every_case
def test_float64_is_computed_in_float64(name):
    """The difference to float32 is float32's, and the result says float64."""
    mask, *tensors = random_batch()
    double, single = CASES[name](mask, *tensors), CASES[name](mask, *(x.float() for x in tensors))
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
    # Numbers that float32 cannot tell apart. (A fraction of tokens does not change with them.)
    nudged = [x + 1e-10 * x.square() for x in tensors]
    assert name == "clip_fraction" or not torch.equal(CASES[name](mask, *nudged), double)


@every_case
def test_half_precision_is_computed_in_float32(name):
    """As if the inputs had been converted first."""
    for dtype in (torch.float16, torch.bfloat16):
        mask, *tensors = random_batch(dtype=dtype)
        assert torch.equal(CASES[name](mask, *tensors), CASES[name](mask, *(x.float() for x in tensors)))


@every_case
def test_arguments_are_not_changed(name):
    """Pure functions."""
    mask, *tensors = random_batch()
    before = [x.clone() for x in (mask, *tensors)]
    CASES[name](mask, *tensors)
    assert all(torch.equal(x, y) for x, y in zip(before, (mask, *tensors), strict=True))


@every_case
def test_masks_and_tensors_of_the_wrong_kind_are_refused(name):
    """A mask of integers, a mask of another shape, integer tensors: the error names the function and the argument."""
    mask, *tensors = random_batch()
    function = "kl_shaped_rewards" if name == "everything" else name.split(",")[0]  # the first one called
    with pytest.raises(TypeError, match=f"{function}: mask must be a torch.bool tensor, got a torch.int64 tensor"):
        CASES[name](mask.long(), *tensors)
    with pytest.raises(ValueError, match=rf"{function}: \w+ must have shape \(4, 6\).*got \(4, 7\)"):
        CASES[name](mask[:, :6], *tensors)
    if name != "everything":
        with pytest.raises(TypeError, match=rf"{function}: \w+ must be a float tensor, got a torch.int64 tensor"):
            CASES[name](mask, *(x.long() for x in tensors))
