"""The objectives of the update, by enumeration: what old samples say about the surrogate, and the surrogate about J."""

import pytest
import torch
from problems import KINDS, assert_different, assert_equal, gradient, problem, random_numbers

from lmppo.functional import (
    clipped_policy_loss,
    exact_kl,
    gae,
    importance_sampled_loss,
    kl_penalized_policy_loss,
    policy_gradient_loss,
    rewards_to_go,
    total_return,
)
from lmppo.functional.exact import (
    action_values,
    completion_logprobs,
    enumerate_completions,
    expectation,
    expected_return,
    state_values,
)

kinds = pytest.mark.parametrize("kind", KINDS)


def moved(p, distance=0.5):
    """A newer policy: (table, its log-probabilities), where ``p`` is the one that sampled."""
    table = (p.table.detach() + distance * random_numbers(*p.table.shape, seed=6)).requires_grad_()
    return table, completion_logprobs(table[p.completions.states], p.completions)


def advantages_of(p):
    """The true advantage under the old policy."""
    q = action_values(p.completions, p.logprobs, p.rewards)
    return (q - state_values(p.completions, p.logprobs, p.rewards)).detach()


def surrogate(p, table):
    """sum_s d_old(s) sum_a pi(a | s) A_old(s, a), state by state: no ratio, no sample."""
    c, old_logprobs = p.completions, p.logprobs.detach()
    advantages = torch.zeros_like(table)
    advantages[c.states[c.mask], c.ids[c.mask]] = advantages_of(p)[c.mask]
    visits = torch.zeros(len(table)).double()
    for t, prefixes in enumerate(c.prefixes):
        for prefix in prefixes:
            through = c.mask[:, t] & (c.ids[:, :t] == prefix).all(dim=1)
            visits[c.states[through, t][0]] = old_logprobs[through].sum(dim=1).exp().sum()
    return (visits.unsqueeze(1) * table.softmax(dim=1) * advantages.detach()).sum()


@kinds
def test_old_samples_give_the_gradient_of_the_surrogate(kind):
    """N14, N16: with the ratio, at any distance, and with any weights whose conditional mean is Q up to a baseline."""
    p = problem(kind)
    table, logprobs = moved(p)
    old = p.logprobs.detach()
    truth = gradient(surrogate(p, table), table)
    critic = state_values(p.completions, old, p.rewards)
    for weights in (
        advantages_of(p),
        rewards_to_go(p.rewards, p.mask),
        total_return(p.rewards, p.mask),
        gae(p.rewards, p.of_state(seed=3), p.mask, lam=1.0)[0],
        gae(p.rewards, critic, p.mask, lam=0.5)[0],
    ):
        loss = importance_sampled_loss(logprobs, old, weights, p.mask)
        assert_equal(-gradient(expectation(old, loss.sum(dim=1)), table), truth)
    # Without the ratio, or with PPO's band around it, old samples say something else.
    for loss in (
        policy_gradient_loss(logprobs, advantages_of(p), p.mask),
        clipped_policy_loss(logprobs, old, advantages_of(p), p.mask),
    ):
        assert_different(-gradient(expectation(old, loss.sum(dim=1)), table), truth)


@kinds
def test_the_ratio_of_whole_completions_gives_the_gradient_of_j(kind):
    """N14: exact at any distance, where the ratio of single tokens, the surrogate, is exact at distance 0 only."""
    p = problem(kind)
    old = p.logprobs.detach()
    for distance in (0.0, 0.5):
        table, logprobs = moved(p, distance)
        truth = gradient(expected_return(p.completions, logprobs, p.rewards), table)
        sums = [x.sum(dim=1, keepdim=True) for x in (logprobs, old, p.rewards)]
        loss = importance_sampled_loss(*sums, torch.ones_like(sums[0], dtype=torch.bool))
        assert_equal(-gradient(expectation(old, loss.sum(dim=1)), table), truth)
        of_surrogate = gradient(surrogate(p, table), table)
        (assert_different if distance else assert_equal)(of_surrogate, truth)


def test_for_a_bandit_the_ratio_of_the_token_is_all():
    """N14: one token, one ratio."""
    completions = enumerate_completions(vocab_size=4, horizon=1)
    table = random_numbers(1, 4, seed=7).requires_grad_()
    old, rewards = random_numbers(4, 1, seed=6).log_softmax(0), random_numbers(4, 1, seed=8)
    logprobs = completion_logprobs(table[completions.states], completions)
    truth = gradient(expected_return(completions, logprobs, rewards), table)
    loss = importance_sampled_loss(logprobs, old, rewards, completions.mask)
    assert_equal(-gradient(expectation(old, loss.sum(dim=1)), table), truth)


@kinds
def test_the_gain_is_the_advantage_under_the_states_of_the_new_policy(kind):
    """N14, N16: J(new) - J(old) = E_new[sum A_old]; the surrogate has the old policy's states there, hence the bound."""
    p = problem(kind)
    old = p.logprobs.detach()
    errors = []
    for distance in (0.5, 0.05):
        table, logprobs = moved(p, distance)
        gain = expected_return(p.completions, logprobs, p.rewards) - expected_return(p.completions, old, p.rewards)
        assert_equal(expectation(logprobs, advantages_of(p).sum(dim=1)), gain)
        errors.append((surrogate(p, table) - gain).abs().item())
    assert 0 < errors[1] < 0.03 * errors[0], "second order in the distance"


@kinds
def test_at_ratio_1_all_objectives_agree(kind):
    """N1, N14, N17: sample by sample, whatever the weights, the first step of an update is the policy gradient."""
    p = problem(kind)
    weights = random_numbers(*p.mask.shape, seed=4)
    old = p.logprobs.detach()
    plain = policy_gradient_loss(p.logprobs, weights, p.mask)
    for loss in (
        importance_sampled_loss(p.logprobs, old, weights, p.mask),
        clipped_policy_loss(p.logprobs, old, weights, p.mask),
        clipped_policy_loss(p.logprobs, old, weights, p.mask, clip_range=0.1, clip_range_high=0.3, dual_clip=3.0),
        kl_penalized_policy_loss(p.logprobs, old, weights, p.mask, beta=2.0),
    ):
        for row in range(len(p.mask)):
            assert_equal(gradient(loss[row].sum(), p.table), gradient(plain[row].sum(), p.table))


@kinds
def test_the_kl_penalty_to_the_old_policy_is_exact_over_old_samples(kind):
    """N17: in expectation it takes beta times the gradient of KL(old || new) of the states that the old policy visits."""
    p = problem(kind)
    table, logprobs = moved(p)
    old, weights = p.logprobs.detach(), rewards_to_go(p.rewards, p.mask)
    loss = kl_penalized_policy_loss(logprobs, old, weights, p.mask, beta=0.7)
    kl = torch.where(p.mask, exact_kl(p.logits.detach(), table[p.completions.states]), 0.0)
    objective = surrogate(p, table) - 0.7 * expectation(old, kl.sum(dim=1))
    assert_equal(-gradient(expectation(old, loss.sum(dim=1)), table), gradient(objective, table))


def test_the_clip_stops_at_its_band():
    """N17: where every token has gone its way beyond the band, old samples push no further; plain ratios do."""
    p = problem("fixed")
    old, advantages = p.logprobs.detach(), advantages_of(p)
    table = p.table.detach().clone()
    best = torch.zeros_like(table)
    best[p.completions.states, p.completions.ids] = advantages
    table = (table + 50 * best).requires_grad_()  # towards the better tokens, far
    logprobs = completion_logprobs(table[p.completions.states], p.completions)
    ratio = (logprobs - old).exp()
    went_its_way = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    clipped = clipped_policy_loss(logprobs, old, advantages, p.mask)
    assert went_its_way.any()
    assert not gradient(clipped[went_its_way].sum(), logprobs).any()
    plain = importance_sampled_loss(logprobs, old, advantages, p.mask)
    assert gradient(plain[went_its_way].sum(), logprobs).any()


@pytest.mark.parametrize("distance", [0.5, 2.0])
def test_plain_ratios_of_whole_completions_lose_to_their_variance(distance):
    """N14, why the distance must be limited: E_old[ratio^2] - 1, the variance of the ratio, grows with it."""
    p = problem("fixed")
    old = p.logprobs.detach()
    _, logprobs = moved(p, distance)
    ratio = (logprobs - old).sum(dim=1).exp()
    assert expectation(old, ratio).item() == pytest.approx(1, abs=1e-12)
    variance = (expectation(old, ratio.square()) - 1).item()
    assert variance < 1.5 if distance == 0.5 else variance > 5
