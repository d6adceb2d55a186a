"""What a constant added to the rewards does, and what dividing does: by the spread of the weights, by a number of tokens.

A constant on every token of a completion of fixed length, or on every completion's score, moves J by a constant: no
unbiased estimate may notice. At variable length a constant per token pays for length. Whitening subtracts the mean of
the weights over the batch, and divides by their spread, which the constant can change.
"""

from dataclasses import replace

import pytest
import torch
from problems import KINDS, assert_different, assert_equal, gradient, problem

from lmppo.functional import (
    gae,
    immediate_rewards,
    kl_shaped_rewards,
    masked_var,
    masked_whiten,
    policy_gradient_loss,
    rewards_to_go,
    token_mean_loss,
    total_return,
)
from lmppo.functional.exact import expectation, state_values

kinds = pytest.mark.parametrize("kind", KINDS)
CONSTANT = 3.0


def per_token(p):
    """The constant on every counted token."""
    return CONSTANT * p.mask.double()


def per_score(p):
    """The constant on every completion: on its last counted token, where scores stand."""
    scores = torch.full(p.mask.shape[:1], CONSTANT, dtype=torch.float64)
    return kl_shaped_rewards(scores, torch.zeros_like(p.rewards), p.mask, kl_coef=0.0)


def length_gradient(p):
    """The gradient of the expected number of tokens."""
    return p.true_gradient(p.mask.double())


def true_critic(p, rewards):
    return state_values(p.completions, p.logprobs, rewards).detach()


ESTIMATORS = {
    "total_return": lambda p, rewards: total_return(rewards, p.mask),
    "rewards_to_go": lambda p, rewards: rewards_to_go(rewards, p.mask),
    "rewards_to_go, gamma .5": lambda p, rewards: rewards_to_go(rewards, p.mask, gamma=0.5),
    "immediate_rewards": lambda p, rewards: immediate_rewards(rewards, p.mask),
    "gae, true critic": lambda p, rewards: gae(rewards, true_critic(p, rewards), p.mask, lam=0.5)[0],
    "gae, any critic": lambda p, rewards: gae(rewards, p.of_state(seed=3), p.mask, lam=0.5)[0],
}
UNBIASED = ("total_return", "rewards_to_go", "gae, true critic")


@pytest.mark.parametrize("constant", [per_token, per_score])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_at_fixed_length_a_constant_changes_nothing(name, constant):
    """N2: for every estimator, biased ones too: what it adds depends on the position alone, which is a baseline."""
    p = problem("fixed")
    estimator = ESTIMATORS[name]
    assert_equal(p.true_gradient(p.rewards + constant(p)), p.true_gradient())
    assert_equal(p.estimate(estimator(p, p.rewards + constant(p))), p.estimate(estimator(p, p.rewards)))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_at_variable_length_a_constant_per_token_pays_for_length(name):
    """The true gradient gains ``c grad E[length]``; unbiased estimates follow, the immediate reward cannot see it."""
    p = problem("eos")
    shift = p.true_gradient(p.rewards + per_token(p)) - p.true_gradient()
    assert_equal(shift, CONSTANT * length_gradient(p))
    assert_different(shift, torch.zeros_like(shift))
    estimator = ESTIMATORS[name]
    seen = p.estimate(estimator(p, p.rewards + per_token(p))) - p.estimate(estimator(p, p.rewards))
    if name in UNBIASED:
        assert_equal(seen, shift)
    elif name == "immediate_rewards":
        assert_equal(seen, torch.zeros_like(seen))
    else:
        assert_different(seen, shift)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_at_variable_length_a_constant_per_score_changes_what_is_biased(name):
    """J moves by c and its gradient stays, so unbiased estimates stay; where the score is discounted they do not.

    To the immediate reward a constant score is a prize for the token that ends the completion, to a discounted
    reward-to-go, and to GAE with a critic that was not told, a prize for ending it soon.
    """
    p = problem("eos")
    assert_equal(p.true_gradient(p.rewards + per_score(p)), p.true_gradient())
    estimator = ESTIMATORS[name]
    seen = p.estimate(estimator(p, p.rewards + per_score(p))) - p.estimate(estimator(p, p.rewards))
    discount = {"rewards_to_go, gamma .5": 0.5, "immediate_rewards": 0.0, "gae, any critic": 0.5}.get(name, 1.0)
    assert_equal(seen, p.estimate(rewards_to_go(per_score(p), p.mask, gamma=discount)))
    if name in UNBIASED:
        assert_equal(seen, torch.zeros_like(seen))
    else:
        assert_different(seen, torch.zeros_like(seen))


# --- whitening ----------------------------------------------------------------------------------------------------------


def whole_population(kind):
    """A uniform policy, and the rows of a batch that holds each completion just as often as that policy writes it."""
    p = problem(kind)
    p = replace(p, table=torch.zeros_like(p.table, requires_grad=True))
    rows = torch.arange(len(p.mask)).repeat_interleave(3 ** (3 - p.mask.sum(dim=1)))
    assert len(rows) == 27
    return p, rows


def batch_estimate(p, rows, weights):
    """The estimate from one batch: the mean over its completions."""
    loss = policy_gradient_loss(p.logprobs[rows], weights, p.mask[rows])
    return -gradient(loss.sum() / len(rows), p.table)


@kinds
@pytest.mark.parametrize("constant", [None, per_token, per_score])
@pytest.mark.parametrize("estimator", [total_return, rewards_to_go])
def test_whitening_divides_the_gradient_by_the_spread_of_the_weights(kind, constant, estimator):
    """In a large batch its mean is a constant baseline, and its spread a constant factor: the direction stays.

    (In a small one both depend on the completion itself, which biases them by O(1 / batch).)
    """
    p, rows = whole_population(kind)
    rewards = p.rewards if constant is None else p.rewards + constant(p)
    weights, mask = estimator(rewards, p.mask)[rows], p.mask[rows]
    spread = (masked_var(weights, mask) + 1e-8).sqrt()
    assert_equal(batch_estimate(p, rows, masked_whiten(weights, mask)), p.true_gradient(rewards) / spread)


@kinds
@pytest.mark.parametrize("estimator", [total_return, rewards_to_go])
def test_whitened_weights_ignore_what_shifts_all_of_them_alike(kind, estimator):
    """In any batch, token by token: a constant per score; and per token, for total returns of a fixed length."""
    p = problem(kind)
    rows = torch.tensor([1, 4, 4, 7, 12])
    mask = p.mask[rows]

    def whitened(rewards):
        return masked_whiten(estimator(rewards, p.mask)[rows], mask)

    assert_equal(whitened(p.rewards + per_score(p)), whitened(p.rewards))
    if kind == "fixed" and estimator is total_return:
        assert_equal(whitened(p.rewards + per_token(p)), whitened(p.rewards))
    else:
        assert_different(whitened(p.rewards + per_token(p)), whitened(p.rewards))


def test_under_whitening_a_constant_per_token_drowns_the_signal_of_rewards_to_go():
    """At fixed length it changes no direction, but the positions' spread it adds shrinks the step: as 1 / c."""
    p, rows = whole_population("fixed")

    def estimate(constant):
        weights = rewards_to_go(p.rewards + constant, p.mask)[rows]
        return batch_estimate(p, rows, masked_whiten(weights, p.mask[rows]))

    plain, large, larger = estimate(0.0), estimate(1e3), estimate(1e4)
    assert torch.cosine_similarity(plain.flatten(), larger.flatten(), dim=0).item() == pytest.approx(1, abs=1e-9)
    assert (large.norm() / plain.norm()).item() < 0.01
    assert (large.norm() / larger.norm()).item() == pytest.approx(10, rel=0.01)
    # With a critic that knows of the constant there is nothing to drown: the advantages are the same.
    advantages = [gae(rewards, true_critic(p, rewards), p.mask, lam=0.5)[0] for rewards in (p.rewards, p.rewards + 1e3)]
    torch.testing.assert_close(*advantages, rtol=0, atol=1e-11)


# --- the mean over tokens -------------------------------------------------------------------------------------------------


def token_mean_estimate(p, size):
    """The expectation of the estimate from ``size`` completions, divided by the number of their tokens."""
    rows = torch.cartesian_prod(*[torch.arange(len(p.mask))] * size).reshape(-1, size)
    chances = p.logprobs.detach().sum(dim=1)[rows].sum(dim=1).exp()
    loss = policy_gradient_loss(p.logprobs, total_return(p.rewards, p.mask), p.mask).sum(dim=1)
    counts = p.mask.sum(dim=1)[rows].sum(dim=1)
    return -gradient((chances * loss[rows].sum(dim=1) / counts).sum(), p.table)


def test_at_fixed_length_the_mean_over_tokens_is_only_a_factor():
    p = problem("fixed")
    for size in (1, 2):
        assert_equal(token_mean_estimate(p, size), p.true_gradient() / 3)


def test_at_variable_length_the_mean_over_tokens_is_right_in_large_batches_only():
    """Of one completion it gives the gradient of the expected return *per token*, of many that of J / E[length]."""
    p = problem("eos")
    lengths = p.mask.sum(dim=1).double()
    mean_length = expectation(p.logprobs.detach(), lengths)
    per_token = gradient(expectation(p.logprobs, p.rewards.sum(dim=1) / lengths), p.table)
    assert_equal(token_mean_estimate(p, 1), per_token)
    by_hand = token_mean_loss(
        policy_gradient_loss(p.logprobs, total_return(p.rewards, p.mask), p.mask)[:1], p.mask[:1], token_count=1
    )
    assert p.mask[0].sum() == 1 and by_hand.item() == pytest.approx(-(p.logprobs[0] * p.rewards[0]).sum().item())
    errors = [(token_mean_estimate(p, n) * mean_length - p.true_gradient()).norm().item() for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.4 * errors[0] and errors[-1] > 1e-3
