"""Returns, temporal differences, generalized advantage estimation, explained variance.

The slow versions here are written from the definitions, as sums over plain Python lists; the shipped ones are
recursions over masked tensors.
"""

import math
import statistics
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import compressed, mask_of, modest, numbers, ragged, random_batch, tensor, unit_numbers

from lmppo.functional import (
    explained_variance,
    explained_variance_within_prompts,
    gae,
    immediate_rewards,
    rewards_to_go,
    td_residuals,
    total_return,
)

# --- By hand: one completion of three tokens. gamma = 1/2, lam = 1/2, rewards 1, 2, 4, values 6, 10, 3.

REWARDS = tensor([[1.0, 2.0, 4.0]])
VALUES = tensor([[6.0, 10.0, 3.0]])
ALL = mask_of("111")


def test_total_return_by_hand():
    """R = 1 + 2/2 + 4/4 = 3, on every token."""
    assert torch.equal(total_return(REWARDS, ALL, gamma=0.5), tensor([[3.0, 3.0, 3.0]]))
    assert torch.equal(total_return(REWARDS, ALL), tensor([[7.0, 7.0, 7.0]]))


def test_rewards_to_go_by_hand():
    """R_2 = 4, R_1 = 2 + 4/2 = 4, R_0 = 1 + 4/2 = 3."""
    assert torch.equal(rewards_to_go(REWARDS, ALL, gamma=0.5), tensor([[3.0, 4.0, 4.0]]))
    assert torch.equal(rewards_to_go(REWARDS, ALL), tensor([[7.0, 6.0, 4.0]]))


def test_td_residuals_by_hand():
    """The step's reward, plus the discounted value it led to, minus the value it started from."""
    # delta_0 = 1 + 10/2 - 6 = 0, delta_1 = 2 + 3/2 - 10 = -6.5, delta_2 = 4 + 0 - 3 = 1
    assert torch.equal(td_residuals(REWARDS, VALUES, ALL, gamma=0.5), tensor([[0.0, -6.5, 1.0]]))
    # gamma = 1: 1 + 10 - 6 = 5, 2 + 3 - 10 = -5, 4 - 3 = 1
    assert torch.equal(td_residuals(REWARDS, VALUES, ALL), tensor([[5.0, -5.0, 1.0]]))


def test_gae_by_hand():
    """Each advantage is its own residual plus gamma * lam = 1/4 of the next advantage."""
    # A_2 = 1, A_1 = -6.5 + 1/4 = -6.25, A_0 = 0 - 6.25/4 = -1.5625; returns add the values 6, 10, 3.
    advantages, returns = gae(REWARDS, VALUES, ALL, gamma=0.5, lam=0.5)
    assert torch.equal(advantages, tensor([[-1.5625, -6.25, 1.0]]))
    assert torch.equal(returns, tensor([[4.4375, 3.75, 4.0]]))


def test_bootstrap_value_by_hand():
    """A completion that was cut goes on: the value of the state after its last token stands for the rest."""
    after = tensor([8.0])
    # R_2 = 4 + 8/2 = 8, R_1 = 2 + 8/2 = 6, R_0 = 1 + 6/2 = 4
    assert torch.equal(rewards_to_go(REWARDS, ALL, gamma=0.5, bootstrap_values=after), tensor([[4.0, 6.0, 8.0]]))
    # only the last residual sees it: 4 + 8/2 - 3 = 5
    deltas = td_residuals(REWARDS, VALUES, ALL, gamma=0.5, bootstrap_values=after)
    assert torch.equal(deltas, tensor([[0.0, -6.5, 5.0]]))
    # A_2 = 5, A_1 = -6.5 + 5/4 = -5.25, A_0 = -5.25/4 = -1.3125
    advantages, returns = gae(REWARDS, VALUES, ALL, gamma=0.5, lam=0.5, bootstrap_values=after)
    assert torch.equal(advantages, tensor([[-1.3125, -5.25, 5.0]]))
    assert torch.equal(returns, tensor([[4.6875, 4.75, 8.0]]))


def test_padding_and_gaps_by_hand():
    """The state after the token before a gap is the one before the first token after it."""
    rewards = tensor([[99.0, 1.0, 99.0, 2.0, 99.0, 4.0, 99.0]])
    values = tensor([[99.0, 6.0, 99.0, 10.0, 99.0, 3.0, 99.0]])
    mask = mask_of(".1.1.1.")
    deltas = td_residuals(rewards, values, mask, gamma=0.5)
    assert torch.equal(deltas, tensor([[0, 0.0, 0, -6.5, 0, 1.0, 0]]))
    # Zeroing what is masked and then running along all columns, as TRL does, bootstraps from 0 at the gaps:
    # 1 - 6 = -5 and 2 - 10 = -8.
    zeroed = td_residuals(rewards * mask, values * mask, torch.ones_like(mask), gamma=0.5)
    assert zeroed[mask].tolist() == [-5.0, -8.0, 1.0]
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert torch.equal(advantages, tensor([[0, -1.5625, 0, -6.25, 0, 1.0, 0]]))
    assert torch.equal(returns, tensor([[0, 4.4375, 0, 3.75, 0, 4.0, 0]]))
    # The exponent of gamma counts counted tokens: 1 + 2/2 + 4/4, not 1/2 + 2/8 + 4/32.
    assert torch.equal(total_return(rewards, mask, gamma=0.5), tensor([[0, 3.0, 0, 3.0, 0, 3.0, 0]]))
    assert torch.equal(rewards_to_go(rewards, mask, gamma=0.5), tensor([[0, 3.0, 0, 4.0, 0, 4.0, 0]]))


def test_defaults():
    """No discount, lam = .95, all completions ended."""
    assert torch.equal(gae(REWARDS, VALUES, ALL)[0], gae(REWARDS, VALUES, ALL, gamma=1.0, lam=0.95)[0])
    ended = tensor([0.0])
    assert torch.equal(gae(REWARDS, VALUES, ALL)[0], gae(REWARDS, VALUES, ALL, bootstrap_values=ended)[0])


# --- From the definitions


def slow_rewards_to_go(rewards, gamma, after):
    """sum_{k >= t} gamma^(k - t) r_k + gamma^(n - t) * after."""
    n = len(rewards)
    return [math.fsum(gamma ** (k - t) * rewards[k] for k in range(t, n)) + gamma ** (n - t) * after for t in range(n)]


def slow_gae(rewards, values, gamma, lam, after):
    """sum_{l >= 0} (gamma lam)^l delta_{t+l}: eq. 16 of the GAE paper, cut off at the end of the completion."""
    n = len(rewards)
    next_values = values[1:] + [after]
    deltas = [rewards[t] + gamma * next_values[t] - values[t] for t in range(n)]
    return [math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def slow_gae_as_an_average(rewards, values, gamma, lam, after):
    """The same as the paper introduces it: the average of all n-step advantages, weights (1 - lam) lam^(k-1)."""
    n = len(rewards)
    states = values + [after]
    result = []
    for t in range(n):
        longest = n - t

        def k_step(k, t=t):
            rewards_seen = math.fsum(gamma**i * rewards[t + i] for i in range(k))
            return rewards_seen + gamma**k * states[t + k] - states[t]

        looks_ahead = [(1 - lam) * lam ** (k - 1) * k_step(k) for k in range(1, longest)]
        # All looks beyond the end are the longest one; their weights sum to lam^(longest - 1).
        result.append(math.fsum(looks_ahead) + lam ** (longest - 1) * k_step(longest))
    return result


@modest
@given(ragged(count=2), unit_numbers, unit_numbers, st.lists(numbers, min_size=3, max_size=3))
def test_everything_equals_its_definition(batch, gamma, lam, after):
    """Row by row, on the counted tokens alone."""
    mask, rewards, values = batch
    bootstrap = tensor(after[: len(mask)])
    got = {
        "total": total_return(rewards, mask, gamma=gamma),
        "to_go": rewards_to_go(rewards, mask, gamma=gamma, bootstrap_values=bootstrap),
        "immediate": immediate_rewards(rewards, mask),
        "gae": gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_values=bootstrap)[0],
        "delta": td_residuals(rewards, values, mask, gamma=gamma, bootstrap_values=bootstrap),
    }
    for row in range(len(mask)):
        r, v = rewards[row][mask[row]].tolist(), values[row][mask[row]].tolist()
        expected = {
            "total": [math.fsum(gamma**k * r[k] for k in range(len(r)))] * len(r),
            "to_go": slow_rewards_to_go(r, gamma, after[row]),
            "immediate": r,
            "gae": slow_gae(r, v, gamma, lam, after[row]),
            "delta": slow_gae(r, v, gamma, 0.0, after[row]),
        }
        for name, tensor_BT in got.items():
            assert tensor_BT[row][mask[row]].tolist() == pytest.approx(expected[name], abs=1e-10), name
            assert not tensor_BT[row][~mask[row]].any(), name
        assert expected["gae"] == pytest.approx(slow_gae_as_an_average(r, v, gamma, lam, after[row]), abs=1e-10)


def test_each_row_may_have_its_own_lambda():
    """As if each row had been estimated alone."""
    mask, rewards, values, _ = random_batch()
    lam = torch.linspace(0.0, 1.0, len(mask), dtype=torch.float64)
    together = gae(rewards, values, mask, gamma=0.9, lam=lam)
    for i in range(len(mask)):
        alone = gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], gamma=0.9, lam=lam[i].item())
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[i : i + 1], b)


@pytest.mark.parametrize("lam", [torch.tensor([0.5, 1.5]), torch.tensor([0.5]), torch.tensor([1, 0])])
def test_a_lambda_per_row_is_checked(lam):
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises((ValueError, TypeError), match="lam"):
        gae(x, x, mask, lam=lam)


# --- Identities

episodes = pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])


@episodes
def test_lam_1_is_rewards_to_go_minus_values(gamma):
    """GAE paper, eq. 18; what the notes call usual for language models (N15). The returns forget the critic."""
    mask, rewards, values, other = random_batch()
    to_go = rewards_to_go(rewards, mask, gamma=gamma, bootstrap_values=other[:, 0])
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0, bootstrap_values=other[:, 0])
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0))
    torch.testing.assert_close(returns, to_go)


@episodes
def test_lam_0_is_the_td_residual(gamma):
    """GAE paper, eq. 17. Equal bit for bit."""
    mask, rewards, values, other = random_batch()
    deltas = td_residuals(rewards, values, mask, gamma=gamma, bootstrap_values=other[:, 0])
    assert torch.equal(gae(rewards, values, mask, gamma=gamma, lam=0.0, bootstrap_values=other[:, 0])[0], deltas)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gamma_0_is_the_immediate_reward(lam):
    """The far end of the compromise (N7): nothing later counts, and neither does lam (N6)."""
    mask, rewards, values, other = random_batch()
    assert torch.equal(rewards_to_go(rewards, mask, gamma=0.0), immediate_rewards(rewards, mask))
    advantages, returns = gae(rewards, values, mask, gamma=0.0, lam=lam, bootstrap_values=other[:, 0])
    assert torch.equal(advantages, torch.where(mask, rewards - values, 0.0))
    torch.testing.assert_close(returns, immediate_rewards(rewards, mask))


@episodes
def test_without_a_critic_gae_is_discounted_by_gamma_lam(gamma):
    """V = 0: lam is only a second discount."""
    mask, rewards, *_ = random_batch()
    advantages, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=0.9)
    torch.testing.assert_close(advantages, rewards_to_go(rewards, mask, gamma=gamma * 0.9))
    assert torch.equal(returns, advantages)


@episodes
def test_a_perfect_critic_leaves_no_advantage(gamma):
    """If V is what really follows, nothing is a surprise, whatever lam is."""
    mask, rewards, _, other = random_batch()
    values = rewards_to_go(rewards, mask, gamma=gamma, bootstrap_values=other[:, 0])
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=0.8, bootstrap_values=other[:, 0])
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    torch.testing.assert_close(returns, values)


def test_total_return_is_the_first_tokens_reward_to_go():
    """On a row's first counted token the two are one number."""
    mask, rewards, *_ = random_batch()
    totals, to_go = total_return(rewards, mask, gamma=0.9), rewards_to_go(rewards, mask, gamma=0.9)
    for row in range(len(mask)):
        first = mask[row].nonzero()[0, 0]
        assert totals[row, first] == to_go[row, first]


def test_a_score_at_the_end_reaches_earlier_tokens_through_lam():
    """Credit of the only reward, V = 0: lam^(distance from the end); lam = 1 gives all tokens the same."""
    rewards = tensor([[0.0, 0.0, 0.0, 16.0, 0.0]])
    mask, nothing = mask_of("1111."), torch.zeros_like(rewards)
    assert torch.equal(gae(rewards, nothing, mask, lam=0.5)[0], tensor([[2.0, 4.0, 8.0, 16.0, 0.0]]))
    assert torch.equal(gae(rewards, nothing, mask, lam=1.0)[0], tensor([[16.0, 16.0, 16.0, 16.0, 0.0]]))
    # The score on the pad after EOS, as in TRL's later trainer, is halved once more for every token.
    on_the_pad = gae(rewards.roll(1), nothing, mask_of("11111"), lam=0.5)[0]
    assert on_the_pad[0, :4].tolist() == [1.0, 2.0, 4.0, 8.0]


# --- Properties


@modest
@given(ragged(count=4), unit_numbers, unit_numbers)
def test_linear_in_rewards_and_values(batch, gamma, lam):
    """gae(x + y) = gae(x) + gae(y), and gae(2x) = 2 gae(x). All numbers here are exact, so this is equality."""
    mask, rewards, values, more_rewards, more_values = batch
    one = gae(rewards, values, mask, gamma=gamma, lam=lam)
    other = gae(more_rewards, more_values, mask, gamma=gamma, lam=lam)
    both = gae(rewards + 2 * more_rewards, values + 2 * more_values, mask, gamma=gamma, lam=lam)
    for x, y, combined in zip(one, other, both, strict=True):
        torch.testing.assert_close(combined, x + 2 * y, rtol=0, atol=1e-10)


@modest
@given(ragged(count=2), unit_numbers, unit_numbers)
def test_a_later_reward_fades_by_gamma_lam_per_counted_token(batch, gamma, lam):
    """Adding c to the last counted reward adds c (gamma lam)^(tokens after t) to A_t."""
    mask, rewards, values = batch
    tokens_after = mask.flip(1).cumsum(1).flip(1) - 1
    bumped = torch.where(mask & (tokens_after == 0), rewards + 3.0, rewards)
    rise = gae(bumped, values, mask, gamma=gamma, lam=lam)[0] - gae(rewards, values, mask, gamma=gamma, lam=lam)[0]
    expected = 3.0 * (gamma * lam) ** tokens_after.double()
    torch.testing.assert_close(rise, torch.where(mask, expected, 0.0), rtol=0, atol=1e-10)


@modest
@given(ragged(count=2), unit_numbers, unit_numbers)
def test_returns_minus_values_are_the_advantages(batch, gamma, lam):
    """So the critic's target never contradicts the policy's weight."""
    mask, rewards, values = batch
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(returns - advantages, torch.where(mask, values, 0.0), rtol=0, atol=1e-10)


def test_a_token_is_not_credited_with_the_past():
    """Rewards, and values, before t do not change A_t (N5); total_return, by design, does not care for order."""
    mask, rewards, values, _ = random_batch()
    changed = rewards.clone()
    changed[:, :3] += 5.0
    before, after = gae(rewards, values, mask)[0], gae(changed, values, mask)[0]
    assert torch.equal(before[:, 3:], after[:, 3:])
    assert not torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(total_return(rewards, mask)[:, 3:], total_return(changed, mask)[:, 3:])


def test_signs():
    """A better outcome raises the advantage, a higher expectation lowers it, a better next state raises it."""
    mask, rewards, values, _ = random_batch()
    rewards.requires_grad_()
    values.requires_grad_()
    advantages = gae(rewards, values, mask, gamma=0.9, lam=0.8)[0]
    to_reward, to_value = torch.autograd.grad(advantages[0, 2], (rewards, values))
    # dA_2/dr_k = (gamma lam)^(k - 2); dA_2/dV_2 = -1; dA_2/dV_k = gamma (1 - lam) (gamma lam)^(k - 3) for k > 2
    torch.testing.assert_close(to_reward[0], tensor([0, 0, 1, 0.72, 0.72**2, 0.72**3, 0.72**4]))
    later = [0.9 * 0.2 * 0.72**k for k in range(4)]
    torch.testing.assert_close(to_value[0], tensor([0, 0, -1, *later]))
    assert not to_reward[1:].any() and not to_value[1:].any()


def test_rows_with_gaps_equal_the_compressed_rows():
    """Bit for bit."""
    mask, rewards, values, other = random_batch()
    full = gae(rewards, values, mask, gamma=0.9, bootstrap_values=other[:, 0])
    for row in range(len(mask)):
        r, v = compressed(rewards, mask, row), compressed(values, mask, row)
        alone = gae(r, v, torch.ones_like(r).bool(), gamma=0.9, bootstrap_values=other[row : row + 1, 0])
        for whole, part in zip(full, alone, strict=True):
            assert torch.equal(compressed(whole, mask, row), part)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_nothing_counted(shape):
    """No rows, no columns, or no tokens: zeros, and a bootstrap value has nothing to follow."""
    x, mask, after = torch.ones(shape), torch.zeros(shape, dtype=torch.bool), torch.full(shape[:1], math.nan)
    for result in (
        total_return(x, mask),
        rewards_to_go(x, mask, bootstrap_values=after),
        immediate_rewards(x, mask),
        td_residuals(x, x, mask, bootstrap_values=after),
        *gae(x, x, mask, bootstrap_values=after),
    ):
        assert torch.equal(result, torch.zeros(shape))


# --- Explained variance


def test_explained_variance_by_hand():
    """1 - Var[returns - values] / Var[returns]."""
    returns = tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 99.0]])
    mask = mask_of("11.", "11.")  # mean 4, variance 5
    assert explained_variance(returns, returns, mask).item() == 1.0
    # a constant error is no error: the variance is about the mean
    assert explained_variance(returns + 8.0, returns, mask).item() == 1.0
    assert explained_variance(torch.full_like(returns, 4.0), returns, mask).item() == 0.0
    # half right: the rest has half the spread, a quarter of the variance
    assert explained_variance(returns / 2, returns, mask).item() == 0.75
    # exactly wrong: twice the spread, 1 - 4
    assert explained_variance(-returns, returns, mask).item() == -3.0


@modest
@given(ragged(count=2))
def test_explained_variance_equals_the_standard_library(batch):
    """Another implementation, and its bound; with constant returns, or no tokens, it is 0."""
    mask, values, returns = batch
    v, r = values[mask].tolist(), returns[mask].tolist()
    got = explained_variance(values, returns, mask).item()
    if len(set(r)) <= 1:
        assert got == 0.0
    else:
        errors = [a - b for a, b in zip(r, v, strict=True)]
        assert got == pytest.approx(1 - statistics.pvariance(errors) / statistics.pvariance(r), abs=1e-9)
        assert got <= 1.0


def test_explained_variance_is_always_finite():
    """Returns that are equal, even inexactly so, or that differ by almost nothing."""
    values, mask = torch.tensor([[1.0, -7.0, 3.0]]), mask_of("111")
    assert explained_variance(values, torch.full((1, 3), 0.1), mask).item() == 0.0
    nearly_equal = torch.tensor([[0.0, 1e-21, 3e-22]])
    assert -math.inf < explained_variance(values, nearly_equal, mask).item() < -1e30
    # but a NaN is not hidden
    assert explained_variance(values, torch.tensor([[0.0, math.nan, 1.0]]), mask).isnan()


def test_explained_variance_within_prompts_by_hand():
    """Two prompts of two completions: deviations from the mean at each position, +-1 and +-3, then +-2; a token alone."""
    mask = mask_of("11.", "11.", "1.1", "1..")  # the second token of the third row stands behind a gap
    returns = tensor([[4.0, 10.0, 99.0], [6.0, 16.0, 99.0], [9.0, 99.0, 70.0], [5.0, 99.0, 99.0]])
    averages = tensor([[5.0, 13.0, 99.0], [5.0, 13.0, 99.0], [7.0, 99.0, -3.0], [7.0, 99.0, 99.0]])
    prompts = torch.tensor([8, 8, -1, -1])

    def explained(values):
        return explained_variance_within_prompts(values, returns, mask, prompts).item()

    assert explained(returns) == 1.0
    assert explained(averages) == 0.0, "prompt and position alone"
    assert explained(torch.full_like(returns, 5.0)) == 0.0
    assert explained((returns + averages) / 2) == 0.75, "half of every deviation"
    assert explained(2 * averages - returns) == -3.0
    foreseen = averages.clone()
    foreseen[:2, 1] = returns[:2, 1]
    assert explained(foreseen) == 1 - 10 / 28, "2 * (1^2 + 2^2) is left of 2 * (1^2 + 3^2 + 2^2)"
    foreseen[2, 2] = 1e6
    assert explained(foreseen) == 1 - 10 / 28, "a token that no other completion can be compared with"


def test_a_critic_of_the_prompts_average_explains_nothing_within_prompts():
    """To the last bit in float32, where means of equal numbers are rounded; more noise, a smaller share."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(7).repeat(9)
    mask = torch.arange(11) < torch.randint(1, 12, (63, 1), generator=generator)
    average = torch.randn(7, generator=generator)[prompts][:, None].expand(63, 11)
    luck = 0.3 * torch.randn(63, 11, generator=generator)
    noise = torch.randn(63, 11, generator=generator)
    returns = average + luck
    assert explained_variance(average, returns, mask) > 0.8
    assert explained_variance_within_prompts(average, returns, mask, prompts).item() == 0.0
    assert explained_variance_within_prompts(returns, returns, mask, prompts).item() == 1.0
    better = [explained_variance_within_prompts(average + share * luck, returns, mask, prompts) for share in (0.3, 0.6)]
    assert better == pytest.approx([1 - 0.7**2, 1 - 0.4**2], abs=1e-4)
    assert explained_variance_within_prompts(average + noise, returns, mask, prompts) < -1
    assert explained_variance_within_prompts(noise, average, mask, prompts).item() == 0.0, "nothing to explain"


@modest
@given(ragged(count=3, max_rows=5), st.integers(1, 3))
def test_explained_variance_within_prompts_equals_brute_force(batch, n_prompts):
    """Token by token in exact fractions; whatever a critic knows of prompt and position changes nothing."""
    mask, values, returns, known = batch
    prompts = torch.arange(len(mask)) * 5 % n_prompts
    places = {}
    for row, keep in enumerate(mask):
        for position, t in enumerate(keep.nonzero()[:, 0].tolist()):
            places.setdefault((prompts[row].item(), position), []).append((row, t))

    def squares(x):
        groups = [[Fraction(x[i, t].item()) for i, t in group] for group in places.values()]
        return sum((y - sum(group) / len(group)) ** 2 for group in groups for y in group)

    got = explained_variance_within_prompts(values, returns, mask, prompts).item()
    if all(len(group) == 1 for group in places.values()):
        assert math.isnan(got)
    elif squares(returns) == 0:
        assert got == 0.0
    else:
        assert got == pytest.approx(float(1 - squares(returns - values) / squares(returns)), abs=1e-9)
        for (prompt, position), group in places.items():
            for row, t in group:
                values[row, t] += known[prompt % len(known), position]
        again = explained_variance_within_prompts(values, returns, mask, prompts).item()
        assert again == pytest.approx(got, abs=1e-9)


def test_one_completion_per_prompt_has_nothing_within_prompts():
    """NaN, and no number that looks like one; the same where no token counts, or where there is no row."""
    x, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    assert explained_variance_within_prompts(x, x, mask, torch.tensor([0, 1, 2])).isnan()
    assert explained_variance_within_prompts(x, x, ~mask, torch.tensor([0, 0, 0])).isnan()
    assert explained_variance_within_prompts(x[:0], x[:0], mask[:0], torch.tensor([0])[:0]).isnan()
    assert explained_variance_within_prompts(x, x, mask, torch.tensor([0, 1, 0])).item() == 1.0


# --- Errors


def test_bad_arguments():
    """Named, before anything is computed; the name is that of the function the user called."""
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="total_return: gamma must be between 0 and 1"):
            total_return(x, mask, gamma=value)
        with pytest.raises(ValueError, match="rewards_to_go: gamma must be between 0 and 1"):
            rewards_to_go(x, mask, gamma=value)
        with pytest.raises(ValueError, match="td_residuals: gamma must be between 0 and 1"):
            td_residuals(x, x, mask, gamma=value)
        with pytest.raises(ValueError, match="gae: gamma must be between 0 and 1"):
            gae(x, x, mask, gamma=value)
        with pytest.raises(ValueError, match="gae: lam must be between 0 and 1"):
            gae(x, x, mask, lam=value)
    for after in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"gae: bootstrap_values must have shape \(2,\) \(one value per row"):
            gae(x, x, mask, bootstrap_values=after)
    with pytest.raises(TypeError, match="rewards_to_go: bootstrap_values must be a float tensor, got a list"):
        rewards_to_go(x, mask, bootstrap_values=[0.0, 0.0])
    with pytest.raises(ValueError, match=r"gae: values must have shape \(2, 3\) \(that of mask\), got \(2, 4\)"):
        gae(x, torch.zeros(2, 4), mask)
    with pytest.raises(ValueError, match=r"gae: mask must have shape \(B, T\), got \(3,\)"):
        gae(x[0], x[0], mask[0])
    for prompts, error in (
        (torch.zeros(2), TypeError(r"prompts must be a torch.int64 tensor, got a torch.float32 tensor")),
        (torch.zeros(3).long(), ValueError(r"prompts must have shape \(2,\) \(one number per row of mask\)")),
    ):
        with pytest.raises(type(error), match=f"explained_variance_within_prompts: {error}"):
            explained_variance_within_prompts(x, x, mask, prompts)
