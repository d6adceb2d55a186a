"""Baselines without a critic, against their definitions; that they are unbiased is proved in test_exact_*.py."""

import pytest
import torch

from lmppo.functional import batch_mean_baseline, leave_one_out_baseline, length_adaptive_lam

WEIGHTS = torch.tensor([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0], [5.0, 6.0, 7.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False], [True, False, True], [False, False, False]])


def test_the_batch_mean_is_over_tokens_not_rows():
    expected = (1 + 3 + 4 + 5 + 7) / 5
    assert torch.equal(batch_mean_baseline(WEIGHTS, MASK), torch.where(MASK, expected, 0.0).double())


def test_leave_one_out_by_hand():
    baseline = leave_one_out_baseline(WEIGHTS, MASK, group_size=2)
    # The first two answer one prompt: row 0 gets row 1's mean (4), row 1 gets row 0's (2). Row 3 has no token, so that
    # row 2 is alone, with nothing to compare to.
    assert baseline.tolist() == [[4, 4, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_leave_one_out_over_a_larger_group_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 4, generator=generator) < 0.7
    mask[:, 0] = True
    means = [weights[i][mask[i]].mean().item() for i in range(6)]
    baseline = leave_one_out_baseline(weights, mask, group_size=3)
    for i in range(6):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        expected = sum(means[j] for j in group if j != i) / 2
        assert baseline[i][mask[i]].tolist() == pytest.approx([expected] * int(mask[i].sum()))


def test_with_one_score_per_completion_it_is_rloo():
    """Ahmadian et al., eq. 6: r_i - mean of the others = k / (k - 1) * (r_i - mean of all)."""
    scores = torch.tensor([1.0, 5.0, 2.0, 8.0], dtype=torch.float64)
    mask = torch.ones(4, 3, dtype=torch.bool)
    weights = scores[:, None].expand(4, 3)
    advantage = weights - leave_one_out_baseline(weights, mask, group_size=4)
    torch.testing.assert_close(advantage, (4 / 3 * (scores - scores.mean()))[:, None].expand(4, 3))


@pytest.mark.parametrize("group_size", [0, 1, 3])
def test_groups_that_do_not_fit_are_refused(group_size):
    with pytest.raises(
        ValueError, match=f"group_size must be 2 or more and divide the number of rows, 4; got {group_size}"
    ):
        leave_one_out_baseline(WEIGHTS, MASK, group_size=group_size)


@pytest.mark.parametrize("baseline", [batch_mean_baseline, lambda w, m: leave_one_out_baseline(w, m, group_size=2)])
def test_what_does_not_count_never_matters(baseline):
    poisoned = torch.where(MASK, WEIGHTS, torch.nan)
    assert torch.equal(baseline(poisoned, MASK), baseline(WEIGHTS, MASK))


def test_the_adaptive_lambda_grows_with_the_length_and_has_a_floor():
    mask = torch.arange(100)[None] < torch.tensor([1, 20, 40, 100])[:, None]
    expected = [0.5, 0.5, 1 - 1 / (0.05 * 40), 1 - 1 / (0.05 * 100)]
    assert length_adaptive_lam(mask, lam=0.5, alpha=0.05).tolist() == pytest.approx(expected)


def test_the_adaptive_lambda_counts_tokens_not_columns():
    mask = torch.tensor([[True, False, True, False], [True, True, True, True], [False] * 4])
    assert length_adaptive_lam(mask, lam=0.0, alpha=1.0).tolist() == pytest.approx([0.5, 0.75, 0.0])


@pytest.mark.parametrize(
    ("settings", "culprit"), [({"lam": 1.5, "alpha": 1.0}, "lam"), ({"lam": 0.5, "alpha": 0.0}, "alpha")]
)
def test_impossible_lambdas_are_refused(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        length_adaptive_lam(MASK, **settings)
