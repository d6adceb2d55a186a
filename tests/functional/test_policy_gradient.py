"""The notes, checked by enumeration: which weights and losses give the gradient of the expected reward.

A policy writes completions of two or three tokens over a vocabulary of two or three, with logits of its own for every
prefix. All completions can be listed, so the expected reward J and its gradient are known exactly, and so is the
expectation of every estimate made from one sampled completion. An estimate is unbiased if and only if they agree.
"""

import itertools

import pytest
import torch
from ragged import tensor

from lmppo.functional import (
    clipped_policy_loss,
    gae,
    immediate_rewards,
    importance_sampled_loss,
    policy_gradient_loss,
    rewards_to_go,
    token_mean_loss,
    total_return,
)

STEPS, VOCABULARY = 3, 2
PREFIXES = [prefix for length in range(STEPS) for prefix in itertools.product(range(VOCABULARY), repeat=length)]
COMPLETIONS = list(itertools.product(range(VOCABULARY), repeat=STEPS))
MASK = torch.ones(len(COMPLETIONS), STEPS, dtype=torch.bool)
STATES = torch.tensor([[PREFIXES.index(completion[:t]) for t in range(STEPS)] for completion in COMPLETIONS])
TOKENS = torch.tensor(COMPLETIONS)


def random_numbers(*shape, seed):
    """Float64, standard normal."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGITS = random_numbers(len(PREFIXES), VOCABULARY, seed=0)  # the policy, a table
REWARDS = random_numbers(len(PREFIXES), VOCABULARY, seed=1)[STATES, TOKENS]  # depend on the token and all before it


def logprobs_of(logits):
    """(completions, steps): log pi of every token of every completion."""
    return logits.log_softmax(-1)[STATES, TOKENS]


def exact_gradient(rewards):
    """The gradient of J = sum over completions of P(completion) * sum of its rewards."""
    logits = LOGITS.clone().requires_grad_()
    chances = logprobs_of(logits).sum(dim=1).exp()
    return torch.autograd.grad((chances * rewards.sum(dim=1)).sum(), logits)[0]


def expected_gradient(weights):
    """E over completions of the policy-gradient estimate, -grad of the loss, with these weights."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logprobs_of(logits)
    chances = logprobs.detach().sum(dim=1, keepdim=True).exp()
    loss = chances * policy_gradient_loss(logprobs, weights, MASK)
    return -torch.autograd.grad(token_mean_loss(loss, MASK, token_count=1), logits)[0]


def true_values(rewards):
    """(completions, steps): the expected reward-to-go from the state before each token, averaged over completions."""
    chances = logprobs_of(LOGITS).sum(dim=1).exp()
    to_go = rewards_to_go(rewards, MASK)
    values = torch.zeros_like(to_go)
    for t in range(STEPS):
        for state in STATES[:, t].unique():
            here = STATES[:, t] == state
            values[here, t] = (chances[here] * to_go[here, t]).sum() / chances[here].sum()
    return values


def assert_unbiased(weights, rewards=REWARDS):
    """The estimate's expectation is the gradient."""
    torch.testing.assert_close(expected_gradient(weights), exact_gradient(rewards))


def assert_biased(weights, rewards=REWARDS):
    """It is not, by far."""
    assert (expected_gradient(weights) - exact_gradient(rewards)).abs().max() > 0.01


def test_a_constant_weight_has_no_gradient():
    """N2, the EGLP lemma: E[grad log pi] = 0."""
    ones = torch.ones_like(REWARDS)
    torch.testing.assert_close(expected_gradient(ones), torch.zeros_like(LOGITS))


def test_the_total_return_is_unbiased():
    """N4."""
    assert_unbiased(total_return(REWARDS, MASK))


def test_rewards_to_go_are_unbiased():
    """N5: a token cannot change what came before it. What came before without what comes after is no use."""
    assert_unbiased(rewards_to_go(REWARDS, MASK))
    assert_biased(total_return(REWARDS, MASK) - rewards_to_go(REWARDS, MASK))


def test_any_function_of_the_state_may_be_subtracted():
    """N10: a baseline, however wrong, leaves the expectation alone; lam = 1 is such a baseline."""
    baseline = random_numbers(len(PREFIXES), seed=2)[STATES]
    assert_unbiased(rewards_to_go(REWARDS, MASK) - baseline)
    assert_unbiased(gae(REWARDS, baseline, MASK, lam=1.0)[0])
    # A function of the token as well is not a baseline.
    assert_biased(rewards_to_go(REWARDS, MASK) - baseline * TOKENS)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_unbiased_with_the_true_critic(lam):
    """N11: with V exact, every lam has the right expectation."""
    assert_unbiased(gae(REWARDS, true_values(REWARDS), MASK, lam=lam)[0])


def test_a_wrong_critic_biases_gae_unless_lam_is_1():
    """N11: the bias that lam trades against variance."""
    wrong = true_values(REWARDS) + random_numbers(len(PREFIXES), seed=3)[STATES]
    gaps = []
    for lam in (0.0, 0.5, 0.9, 1.0):
        estimate = expected_gradient(gae(REWARDS, wrong, MASK, lam=lam)[0])
        gaps.append((estimate - exact_gradient(REWARDS)).norm().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.05 and gaps[-1] < 1e-12


def test_a_critic_cuts_the_variance():
    """N5, N9, N10: same expectation, less and less spread. Not a theorem, but usual where rewards have a mean."""
    rewards = REWARDS + 1.0
    chances = logprobs_of(LOGITS).sum(dim=1).exp()

    def spread(weights):
        """Trace of the covariance of the estimate from one completion."""
        second_moment = 0.0
        for i in range(len(COMPLETIONS)):
            logits = LOGITS.clone().requires_grad_()
            loss = policy_gradient_loss(logprobs_of(logits), weights, MASK)[i].sum()
            second_moment += chances[i].item() * torch.autograd.grad(loss, logits)[0].square().sum().item()
        return second_moment - expected_gradient(weights).square().sum().item()

    total, to_go = total_return(rewards, MASK), rewards_to_go(rewards, MASK)
    with_critic = gae(rewards, true_values(rewards), MASK, lam=1.0)[0]
    for weights in (total, to_go, with_critic):
        assert_unbiased(weights, rewards)
    assert spread(total) > 1.5 * spread(to_go) > 1.5 * 1.5 * spread(with_critic)


def test_immediate_rewards_are_right_for_bandits_only():
    """N6: unbiased if later rewards do not depend on the token; here they do, until each step gets its own table."""
    assert_biased(immediate_rewards(REWARDS, MASK))
    # Independent machines: both the policy's logits and the rewards of a step ignore the tokens before it.
    step_of_state = torch.tensor([len(prefix) for prefix in PREFIXES])
    bandit_rewards = random_numbers(STEPS, VOCABULARY, seed=4)[torch.arange(STEPS), TOKENS]
    bandit_logits = random_numbers(STEPS, VOCABULARY, seed=5)[step_of_state].requires_grad_()
    logprobs = logprobs_of(bandit_logits)
    chances = logprobs.sum(dim=1, keepdim=True).exp()
    (exact,) = torch.autograd.grad((chances * bandit_rewards).sum(), bandit_logits, retain_graph=True)
    loss = chances.detach() * policy_gradient_loss(logprobs, immediate_rewards(bandit_rewards, MASK), MASK)
    (estimate,) = torch.autograd.grad(loss.sum(), bandit_logits)
    # Per step, not per prefix: tying the table is what makes the prefixes one state.
    for step in range(STEPS):
        here = step_of_state == step
        torch.testing.assert_close(-estimate[here].sum(dim=0), exact[here].sum(dim=0))


def test_a_smaller_gamma_is_a_smaller_bias_the_less_the_future_matters():
    """N7."""

    def bias(gamma, later):
        rewards = REWARDS * tensor([1.0, later, later**2])
        return (expected_gradient(rewards_to_go(rewards, MASK, gamma=gamma)) - exact_gradient(rewards)).norm()

    assert bias(1.0, 1.0) < 1e-12
    assert bias(0.0, 1.0) > bias(0.5, 1.0) > bias(0.9, 1.0) > 0.01
    assert bias(0.5, 0.1) < 0.2 * bias(0.5, 1.0)


def test_importance_sampling_corrects_for_an_older_policy():
    """N14: for a bandit, old samples weighted by the ratio give the new policy's gradient; unweighted they do not."""
    arms = 4
    old = random_numbers(1, arms, seed=6).log_softmax(-1)
    logits = random_numbers(1, arms, seed=7).requires_grad_()
    rewards, mask = random_numbers(1, arms, seed=8), torch.ones(1, arms, dtype=torch.bool)
    new = logits.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    exact = gradient((new.exp() * rewards).sum())
    torch.testing.assert_close(-gradient((old.exp() * importance_sampled_loss(new, old, rewards, mask)).sum()), exact)
    unweighted = -gradient((old.exp() * policy_gradient_loss(new, rewards, mask)).sum())
    clipped = -gradient((old.exp() * clipped_policy_loss(new, old, rewards, mask)).sum())
    assert (unweighted - exact).abs().max() > 0.01
    assert (clipped - exact).abs().max() > 0.01  # PPO trades this bias for safety (N17)
