"""Several kinds of reward, each with its own gamma and its own critic (N8): what each critic's targets mean."""

import pytest
import torch
from problems import KINDS, assert_different, assert_equal, problem, random_numbers

from lmppo.functional import clipped_value_loss, gae, rewards_to_go, td_residuals
from lmppo.functional.exact import expectation, mean_given_state, state_values

kinds = pytest.mark.parametrize("kind", KINDS)
GAMMAS = (1.0, 0.8, 0.3)


def streams(p):
    """Three kinds of reward; each a grid (N, T)."""
    others = [random_numbers(*p.table.shape, seed=s)[p.completions.states, p.completions.ids] for s in (7, 8)]
    return [p.rewards, *(torch.where(p.mask, rewards, 0.0) for rewards in others)]


@kinds
def test_the_targets_of_each_stream_mean_that_streams_true_value(kind):
    """Monte Carlo, TD and everything between, with the true values as critic; not those of another stream's gamma."""
    p = problem(kind)
    for rewards, gamma in zip(streams(p), GAMMAS, strict=True):
        truth = state_values(p.completions, p.logprobs, rewards, gamma=gamma).detach()
        targets = [gae(rewards, truth, p.mask, gamma=gamma, lam=lam)[1] for lam in (0.0, 0.6, 1.0)]
        targets += [
            rewards_to_go(rewards, p.mask, gamma=gamma),
            td_residuals(rewards, truth, p.mask, gamma=gamma) + truth,
        ]
        for target in targets:
            assert_equal(mean_given_state(p.completions, p.logprobs, target), truth)
        other = rewards_to_go(rewards, p.mask, gamma=0.5)
        assert_different(mean_given_state(p.completions, p.logprobs, other), truth)


@kinds
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_each_streams_critic_converges_to_its_true_value(kind, lam):
    """Fitted again and again to its own targets, from random values: after T rounds there is no error left.

    One round is exact for the last state of the longest completions, the next for the state before, and so on; with
    ``lam=1`` the targets do not depend on the critic, and one round is all.
    """
    p = problem(kind)
    for rewards, gamma in zip(streams(p), GAMMAS, strict=True):
        truth = state_values(p.completions, p.logprobs, rewards, gamma=gamma)
        critic = p.of_state(seed=3)
        for t in range(p.mask.shape[1]):
            exact_before = (critic - truth).abs().max() < 1e-12
            assert exact_before == (lam == 1.0 and t > 0)
            targets = gae(rewards, critic, p.mask, gamma=gamma, lam=lam)[1]
            critic = mean_given_state(p.completions, p.logprobs, targets).detach()
        assert_equal(critic, truth.detach())


@kinds
def test_the_error_of_a_target_is_the_critics_later_errors(kind):
    """With ``C = V + e``, targets of lam are off by ``gamma (1 - lam) sum_{k>=1} (gamma lam)^(k-1) E[e_{t+k} | s_t]``."""
    p = problem(kind)
    gamma, lam = 0.8, 0.6
    truth, errors = state_values(p.completions, p.logprobs, p.rewards, gamma=gamma), p.of_state(seed=3)
    targets = gae(p.rewards, truth + errors, p.mask, gamma=gamma, lam=lam)[1]
    later = torch.zeros_like(errors)
    for k in (1, 2):
        later[:, :-k] += gamma * (1 - lam) * (gamma * lam) ** (k - 1) * errors[:, k:]
    assert_equal(
        mean_given_state(p.completions, p.logprobs, targets), truth + mean_given_state(p.completions, p.logprobs, later)
    )


@kinds
def test_the_expected_value_loss_is_least_at_the_true_value(kind):
    """N13: Monte-Carlo targets, squared error: the gradient vanishes at V, and nowhere else."""
    p = problem(kind)
    for rewards, gamma in zip(streams(p), GAMMAS, strict=True):
        truth = state_values(p.completions, p.logprobs, rewards, gamma=gamma).detach()
        for shift, is_least in ((0.0, True), (0.1, False)):
            by_state = torch.zeros(len(p.table)).double()
            by_state[p.completions.states[p.mask]] = truth[p.mask] + shift
            by_state.requires_grad_()
            values = torch.where(p.mask, by_state[p.completions.states], 0.0)
            returns = rewards_to_go(rewards, p.mask, gamma=gamma)
            loss = clipped_value_loss(values, truth, returns, p.mask, clip_range=None)
            expected = expectation(p.logprobs.detach(), loss.sum(dim=1))
            (slope,) = torch.autograd.grad(expected, by_state)
            assert (slope.abs().max() < 1e-12) == is_least


@kinds
def test_advantages_of_streams_add_up(kind):
    """N8: undiscounted, the sum over streams is unbiased for the sum of rewards; with gammas, for each its own part."""
    p = problem(kind)
    rewards = streams(p)
    weights = (1.0, 0.5, 2.0)
    weighted = [w * r for w, r in zip(weights, rewards, strict=True)]
    undiscounted = sum(gae(r, p.of_state(seed=i), p.mask, lam=1.0)[0] for i, r in enumerate(weighted))
    assert_equal(p.estimate(undiscounted), p.true_gradient(sum(weighted)))
    discounted = sum(
        gae(r, state_values(p.completions, p.logprobs, r, gamma=g).detach(), p.mask, gamma=g, lam=0.5)[0]
        for r, g in zip(weighted, GAMMAS, strict=True)
    )
    parts = [p.estimate(rewards_to_go(r, p.mask, gamma=g)) for r, g in zip(weighted, GAMMAS, strict=True)]
    assert_equal(p.estimate(discounted), sum(parts))
    assert_equal(parts[0], p.true_gradient(weighted[0]))
    assert_different(p.estimate(discounted), p.true_gradient(sum(weighted)))
