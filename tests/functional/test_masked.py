"""Moments over counted tokens, whitening and rescaling."""

import statistics

import pytest
import torch
from hypothesis import assume, given
from ragged import mask_of, modest, ragged, tensor

from lmppo.functional import masked_mean, masked_rescale, masked_var, masked_whiten


def test_mean_weighs_tokens_not_sequences():
    """Every counted token weighs the same."""
    x = tensor([[1.0, 2.0, 6.0], [11.0, 99.0, 99.0]])
    mask = mask_of("111", "1..")
    # (1 + 2 + 6 + 11) / 4 = 5
    assert masked_mean(x, mask).item() == 5.0
    # The other common choice, the mean of the rows' means, is (3 + 11) / 2 = 7.
    assert masked_mean(x, mask).item() != 7.0


def test_variance_is_of_the_population():
    """Divided by the count, not by the count minus one."""
    x = tensor([[1.0, 99.0, 3.0], [5.0, 7.0, 99.0]])
    mask = mask_of("1.1", "11.")
    # mean 4, squared distances 9, 1, 1, 9: their sum 20, over 4 is 5. (The sample variance would be 20/3.)
    assert masked_var(x, mask).item() == 5.0


def test_whiten_by_hand():
    """Mean 0, variance 1."""
    x = tensor([[1.0, 5.0, 99.0]])
    # mean 3, variance 4: (1 - 3)/2 = -1, (5 - 3)/2 = 1.
    assert masked_whiten(x, mask_of("11."), eps=0.0).tolist() == [[-1.0, 1.0, 0.0]]


def test_rescale_by_hand():
    """Variance 1, and the mean stays where it was."""
    x = tensor([[1.0, 5.0, 99.0]])
    # mean 3, variance 4: 3 + (1 - 3)/2 = 2, 3 + (5 - 3)/2 = 4
    assert masked_rescale(x, mask_of("11."), eps=0.0).tolist() == [[2.0, 4.0, 0.0]]


def test_default_eps_is_that_of_openai():
    """1e-8 inside the root: visible when the variance is as small."""
    x = tensor([[-1e-4, 1e-4]])
    # variance 1e-8, so the deviation counts as sqrt(2e-8) and the result is 1 / sqrt(2).
    torch.testing.assert_close(masked_whiten(x, mask_of("11")), tensor([[-(0.5**0.5), 0.5**0.5]]))
    torch.testing.assert_close(masked_rescale(x, mask_of("11")), tensor([[-(0.5**0.5), 0.5**0.5]]))


@modest
@given(ragged())
def test_moments_equal_the_standard_library(batch):
    """Another implementation: Python's statistics module, on the counted numbers alone."""
    mask, x = batch
    counted = x[mask].tolist()
    assume(counted)
    assert masked_mean(x, mask).item() == pytest.approx(statistics.fmean(counted), abs=1e-12)
    assert masked_var(x, mask).item() == pytest.approx(statistics.pvariance(counted), abs=1e-12)


@modest
@given(ragged())
def test_moments_of_two_parts_combine_to_those_of_the_whole(batch):
    """Parts (micro-batches, processes) weighted by their counts; a part may be empty."""
    mask, x = batch
    left, right = mask.clone(), mask.clone()
    left[:, 1::2] = False
    right[:, ::2] = False
    count, counts = mask.sum(), [left.sum(), right.sum()]
    assume(count > 0)
    means = [masked_mean(x, part) for part in (left, right)]
    variances = [masked_var(x, part) for part in (left, right)]
    mean = sum(n * m for n, m in zip(counts, means, strict=True)) / count
    # Law of total variance: the mean of the parts' variances plus the variance of the parts' means.
    var = sum(n * (v + (m - mean) ** 2) for n, m, v in zip(counts, means, variances, strict=True)) / count
    torch.testing.assert_close(masked_mean(x, mask), mean)
    torch.testing.assert_close(masked_var(x, mask), var)


@modest
@given(ragged())
def test_whitened_numbers_have_mean_0_and_variance_1(batch):
    """The definition, and the order of the numbers is kept: whitening never flips the sign of an advantage's rank."""
    mask, x = batch
    assume(masked_var(x, mask) > 1e-3)
    white = masked_whiten(x, mask)
    assert masked_mean(white, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert masked_var(white, mask).item() == pytest.approx(1.0, abs=1e-4)  # 1 - eps/var, and var > 1e-3
    assert torch.equal(x[mask].argsort(stable=True), white[mask].argsort(stable=True))


@modest
@given(ragged())
def test_rescaled_is_whitened_plus_the_mean(batch):
    """The two functions differ by the mean and by nothing else."""
    mask, x = batch
    expected = torch.where(mask, masked_whiten(x, mask) + masked_mean(x, mask), 0.0)
    torch.testing.assert_close(masked_rescale(x, mask), expected)


@modest
@given(ragged())
def test_whitening_forgets_shift_and_scale(batch):
    """Adding a constant to all rewards, or changing their unit, changes nothing (N2)."""
    mask, x = batch
    assume(masked_var(x, mask) > 1e-3)
    torch.testing.assert_close(masked_whiten(8.0 * x - 40.0, mask, eps=0.0), masked_whiten(x, mask, eps=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.1, 1e6 / 3, -1e20, 0.0])
def test_constants_have_variance_0_and_whiten_to_0(constant, dtype):
    """Exactly: a rounding error of the mean, divided by a tiny deviation, would look like an advantage."""
    x = torch.full((7, 13), constant, dtype=dtype)
    mask = torch.rand(7, 13, generator=torch.Generator().manual_seed(0)) < 0.7
    assert masked_var(x, mask).item() == 0.0
    assert torch.equal(masked_whiten(x, mask), torch.zeros_like(x))
    torch.testing.assert_close(masked_rescale(x, mask), torch.where(mask, x, 0.0))


def test_one_or_no_counted_element():
    """Defined and finite: 0 for what cannot be computed."""
    x = tensor([[5.0, 7.0]])
    one, none = mask_of("1."), mask_of("..")
    assert masked_mean(x, one).item() == 5.0
    assert masked_var(x, one).item() == 0.0
    assert masked_whiten(x, one).tolist() == [[0.0, 0.0]]
    assert masked_rescale(x, one).tolist() == [[5.0, 0.0]]
    assert masked_mean(x, none).item() == masked_var(x, none).item() == 0.0
    assert masked_whiten(x, none).tolist() == masked_rescale(x, none).tolist() == [[0.0, 0.0]]


def test_whitening_survives_a_large_mean_in_float32():
    """Two passes: the variance is taken about the mean, never as a difference of two large squares."""
    x = torch.tensor([[4096.0, 4097.0, 4098.0, 4099.0]])
    # distances from the mean: -1.5, -.5, .5, 1.5; variance 1.25. (E[x^2] - E[x]^2 in float32 gives 0 or 2.)
    assert masked_var(x, mask_of("1111")).item() == 1.25


def test_half_precision_counts_more_tokens_than_it_can_hold():
    """70,000 is above float16's largest number: counting in float16 would divide by infinity."""
    x = torch.ones(70, 1000, dtype=torch.float16)
    assert masked_mean(x, x.bool()).item() == 1.0


def test_gradients():
    """The mean's is 1/n on counted elements; whitening is blind to shift and scale, so its gradient is too."""
    x = tensor([[1.0, 2.0, 4.0, 99.0]]).requires_grad_()
    mask = mask_of("111.")
    (gradient,) = torch.autograd.grad(masked_mean(x, mask), x)
    torch.testing.assert_close(gradient, tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))
    weights = tensor([[1.0, -3.0, 0.5, 7.0]])
    (gradient,) = torch.autograd.grad((weights * masked_whiten(x, mask, eps=0.0)).sum(), x)
    assert gradient.sum().item() == pytest.approx(0.0, abs=1e-12)
    assert (gradient * x).sum().item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: masked_rescale(x, mask), x)
