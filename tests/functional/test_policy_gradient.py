"""The notes, checked by enumeration: which weights of a token's score give the gradient of the expected reward.

All completions can be listed, so the expected reward J and its gradient are known exactly, and so is the expectation of
every estimate made from sampled completions. An estimate is unbiased if and only if they agree; of the others the bias
is predicted, and found.
"""

import pytest
import torch
from problems import KINDS, assert_different, assert_equal, gradient, problem, random_numbers

from lmppo.functional import (
    batch_mean_baseline,
    gae,
    immediate_rewards,
    leave_one_out_baseline,
    length_adaptive_lam,
    policy_gradient_loss,
    rewards_to_go,
    td_residuals,
    total_return,
)
from lmppo.functional.exact import (
    action_values,
    completion_logprobs,
    enumerate_completions,
    expectation,
    expected_return,
    mean_given_action,
    state_logits,
    state_values,
)

kinds = pytest.mark.parametrize("kind", KINDS)


def true_critic(p, **kwargs):
    """V on the grid, a constant."""
    return state_values(p.completions, p.logprobs, p.rewards, **kwargs).detach()


def true_q(p, **kwargs):
    """Q on the grid, a constant."""
    return action_values(p.completions, p.logprobs, p.rewards, **kwargs).detach()


# --- unbiased ---------------------------------------------------------------------------------------------------------


@kinds
def test_what_is_the_same_for_every_token_has_no_gradient(kind):
    """N2, the EGLP lemma: E[grad log pi] = 0, in every state, so any function of the state can weigh it."""
    p = problem(kind)
    nothing = torch.zeros_like(p.table)
    assert_equal(p.estimate(torch.ones_like(p.rewards)), nothing)
    assert_equal(p.estimate(p.of_state(seed=3)), nothing)
    # What came before the token is such a function; the token itself is not.
    assert_equal(p.estimate(total_return(p.rewards, p.mask) - rewards_to_go(p.rewards, p.mask)), nothing)
    assert_different(p.estimate(p.of_state(seed=3) * p.completions.ids), nothing)


@kinds
@pytest.mark.parametrize("estimator", [total_return, rewards_to_go])
def test_returns_are_unbiased_with_any_baseline(kind, estimator):
    """N4, N5, N10: a token cannot change what came before it; a baseline, however wrong, leaves the expectation alone."""
    p = problem(kind)
    weights = estimator(p.rewards, p.mask)
    for baseline in (torch.zeros_like(weights), p.of_state(seed=3), true_critic(p)):
        assert_equal(p.estimate(weights - baseline), p.true_gradient())


@kinds
def test_gae_with_lam_1_is_unbiased_with_any_critic(kind):
    """N11, N15: there the critic is only a baseline."""
    p = problem(kind)
    assert_equal(p.estimate(gae(p.rewards, p.of_state(seed=3), p.mask, lam=1.0)[0]), p.true_gradient())


@kinds
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_with_the_true_critic_is_unbiased_for_any_lam(kind, lam):
    """N11; token by token the conditional mean of the estimate is the true advantage."""
    p = problem(kind)
    advantages = gae(p.rewards, true_critic(p), p.mask, lam=lam)[0]
    assert_equal(mean_given_action(p.completions, p.logprobs, advantages), true_q(p) - true_critic(p))
    assert_equal(p.estimate(advantages), p.true_gradient())


def group_estimate(p, weights_of, size):
    """The expectation of the estimate from ``size`` independent completions.

    ``weights_of`` (rows (M * size,), mask) -> (M * size, T): the weights of all groups there are, one after the other.
    """
    rows = torch.cartesian_prod(*[torch.arange(len(p.mask))] * size)
    chances = p.logprobs.detach().sum(dim=1)[rows].sum(dim=1).exp().repeat_interleave(size)
    rows = rows.flatten()
    loss = policy_gradient_loss(p.logprobs[rows], weights_of(rows, p.mask[rows]), p.mask[rows])
    return -gradient((chances * loss.sum(dim=1)).sum() / size, p.table)


@kinds
@pytest.mark.parametrize("estimator", [total_return, rewards_to_go])
@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_the_other_completions_is_a_baseline(kind, estimator, size):
    """N10, leave-one-out: the others are independent of the token, so the expectation stays."""
    p = problem(kind)
    weights = estimator(p.rewards, p.mask)

    def left_out(rows, mask):
        return weights[rows] - leave_one_out_baseline(weights[rows], mask, group_size=size)

    assert_equal(group_estimate(p, left_out, size), p.true_gradient())


@kinds
@pytest.mark.parametrize("estimator", [total_return, rewards_to_go])
@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_of_all_completions_is_a_baseline_up_to_ones_own_part(kind, estimator, size):
    """N10, N15, batch mean: it contains the token's own completion, and that part is no baseline.

    At a fixed length the bias is ``1 / size`` of the estimate with the completion's own mean as the weight. For total
    returns that makes the gradient ``(1 - 1 / size)`` as long, in the same direction: the number of completions counts,
    not that of tokens.
    """
    p = problem(kind)
    weights = estimator(p.rewards, p.mask)

    def centered(rows, mask):
        batches = [
            w - batch_mean_baseline(w, m) for w, m in zip(weights[rows].split(size), mask.split(size), strict=True)
        ]
        return torch.cat(batches)

    estimate = group_estimate(p, centered, size)
    assert_different(estimate, p.true_gradient())
    if kind == "fixed":
        own = weights.mean(dim=1, keepdim=True).expand_as(weights)
        assert_equal(estimate, p.true_gradient() - p.estimate(own) / size)
        if estimator is total_return:
            assert_equal(estimate, (1 - 1 / size) * p.true_gradient())


# --- variance ---------------------------------------------------------------------------------------------------------


def sampled_gradients(p, weights, parameters=None, logprobs=None):
    """(N, T, parameters): what each token of each completion adds to the estimate."""
    parameters = p.table if parameters is None else parameters
    loss = policy_gradient_loss(p.logprobs if logprobs is None else logprobs, weights, p.mask)
    grads = [-gradient(token, parameters).flatten() for token in loss.flatten()]
    return torch.stack(grads).reshape(*loss.shape, -1)


def covariance(logprobs, grads):
    """Of (N, parameters), one row per completion."""
    centered = grads - expectation(logprobs, grads)
    return expectation(logprobs, centered.unsqueeze(2) * centered.unsqueeze(1))


@kinds
def test_q_has_the_same_expectation_and_no_larger_variance(kind):
    """N9, a theorem for each position: the covariance can only shrink when R is replaced by its mean, given the token.

    It holds for the whole estimate too where every state has parameters of its own, as in a table; see the next test
    for where it does not.
    """
    p = problem(kind)
    logprobs = p.logprobs.detach()
    sampled = sampled_gradients(p, rewards_to_go(p.rewards, p.mask))
    averaged = sampled_gradients(p, true_q(p))
    assert_equal(p.estimate(true_q(p)), p.true_gradient())
    for t in range(p.mask.shape[1]):
        saved = covariance(logprobs, sampled[:, t]) - covariance(logprobs, averaged[:, t])
        assert torch.linalg.eigvalsh(saved).min() > -1e-12
    spread, of_q = (covariance(logprobs, grads.sum(dim=1)).diagonal() for grads in (sampled, averaged))
    assert (of_q <= spread + 1e-12).all() and of_q.sum() < 0.9 * spread.sum()


def test_q_can_add_variance_where_positions_share_parameters():
    """Why N9 is a theorem about one token: over several, the noise of one may cancel that of another, which Q undoes.

    One logit for two coin flips, and a reward for two different sides: heads then tails pushes the logit up and down by
    the same amount, so the estimate with R is 0 for every completion, and with Q it is not.
    """
    completions = enumerate_completions(vocab_size=2, horizon=2)
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    coin = torch.stack([torch.zeros_like(logit), logit], dim=1)
    logprobs = completion_logprobs(
        state_logits(lambda prefixes: coin.expand(len(prefixes), 2), completions), completions
    )
    rewards = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 0]]).double()
    q = action_values(completions, logprobs, rewards).detach()
    variances = []
    for weights in (rewards_to_go(rewards, completions.mask), q):
        loss = policy_gradient_loss(logprobs, weights, completions.mask).sum(dim=1)
        grads = torch.stack([gradient(x, logit) for x in loss])
        assert_equal(expectation(logprobs.detach(), grads), torch.zeros(1).double())
        variances.append(covariance(logprobs.detach(), grads).item())
    assert variances[0] == pytest.approx(0, abs=1e-15) and variances[1] > 0.01


@kinds
def test_a_critic_cuts_the_variance(kind):
    """N5, N9, N10: same expectation, less and less spread. Not a theorem, but usual where rewards have a mean."""
    p = problem(kind)
    rewards = torch.where(p.mask, p.rewards + 1.0, 0.0)
    values = state_values(p.completions, p.logprobs, rewards).detach()
    spreads = []
    for weights in (
        total_return(rewards, p.mask),
        rewards_to_go(rewards, p.mask),
        gae(rewards, values, p.mask, lam=1.0)[0],
        td_residuals(rewards, values, p.mask),
    ):
        assert_equal(p.estimate(weights), p.true_gradient(rewards))
        grads = sampled_gradients(p, weights).sum(dim=1)
        spreads.append(covariance(p.logprobs.detach(), grads).trace().item())
    assert spreads[0] > spreads[1] > 1.2 * spreads[2] > 1.2 * spreads[3]


# --- biased, by the predicted amount ------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
def test_a_wrong_critic_biases_gae_by_its_later_errors(kind, gamma, lam):
    """N11: with ``C = V + e`` the bias is that of the weight ``gamma (1 - lam) sum_{k>=1} (gamma lam)^(k-1) E[e_{t+k}]``.

    The error of the token's own state is a baseline and does no harm; those of later states do, given the token.
    """
    p = problem(kind)
    errors = p.of_state(seed=3)
    estimate = p.estimate(gae(p.rewards, true_critic(p, gamma=gamma) + errors, p.mask, gamma=gamma, lam=lam)[0])
    right = p.estimate(true_q(p, gamma=gamma))
    later = torch.zeros_like(errors)
    for k in range(1, errors.shape[1]):
        later[:, :-k] += gamma * (1 - lam) * (gamma * lam) ** (k - 1) * errors[:, k:]
    later = torch.where(p.mask, later, 0.0)
    bias = p.estimate(mean_given_action(p.completions, p.logprobs, later).detach())
    assert_equal(estimate, right + bias)
    if lam < 1:
        assert_different(estimate, right)


@kinds
def test_the_bias_falls_as_lam_rises(kind):
    """N11: the trade."""
    p = problem(kind)
    critic = true_critic(p) + p.of_state(seed=3)
    biases = [
        (p.estimate(gae(p.rewards, critic, p.mask, lam=lam)[0]) - p.true_gradient()).norm().item()
        for lam in (0.0, 0.5, 0.9, 1.0)
    ]
    assert biases == sorted(biases, reverse=True)
    assert biases[0] > 0.05 and biases[-1] < 1e-12


@kinds
def test_a_lam_that_depends_on_the_length_is_biased_even_with_the_true_critic(kind):
    """N11, VAPO: how long a completion will be is news of the future, so TD residuals no longer vanish in the mean.

    At a fixed length lam is a constant, and all is well. Else the bias is that of the weight
    ``sum_{k>=1} E[lam(length)^k delta_{t+k} | s_t, a_t]``, which is 0 for a constant lam.
    """
    p = problem(kind)
    lam = length_adaptive_lam(p.mask, lam=0.1, alpha=0.6).double()
    assert len(lam.unique()) == (1 if kind == "fixed" else 3)
    estimate = p.estimate(gae(p.rewards, true_critic(p), p.mask, lam=lam)[0])
    deltas = td_residuals(p.rewards, true_critic(p), p.mask)
    later = torch.zeros_like(deltas)
    for k in range(1, deltas.shape[1]):
        later[:, :-k] += lam.unsqueeze(1) ** k * deltas[:, k:]
    bias = p.estimate(mean_given_action(p.completions, p.logprobs, later).detach())
    assert_equal(estimate, p.true_gradient() + bias)
    if kind == "fixed":
        assert_equal(estimate, p.true_gradient())
    else:
        assert_different(estimate, p.true_gradient())


@kinds
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_a_smaller_gamma_is_biased_by_what_it_discounts(kind, gamma):
    """N7: the bias is that of the weight ``-sum_{u>t} (1 - gamma^(u-t)) E[r_u | s_t, a_t]``."""
    p = problem(kind)
    estimate = p.estimate(rewards_to_go(p.rewards, p.mask, gamma=gamma))
    discounted = torch.zeros_like(p.rewards)
    for k in range(1, p.rewards.shape[1]):
        discounted[:, :-k] += (1 - gamma**k) * p.rewards[:, k:]
    discounted = torch.where(p.mask, discounted, 0.0)
    bias = -p.estimate(mean_given_action(p.completions, p.logprobs, discounted).detach())
    assert_equal(estimate, p.true_gradient() + bias)
    assert_different(estimate, p.true_gradient())


@kinds
def test_a_discounted_reward_to_go_is_not_the_gradient_of_the_discounted_return(kind):
    """N7: that would take a further ``gamma^t`` on the token's weight, or the discounted total return; nobody uses it."""
    p = problem(kind)
    truth = p.true_gradient(gamma=0.7)
    to_go = rewards_to_go(p.rewards, p.mask, gamma=0.7)
    positions = torch.arange(to_go.shape[1]).double().expand_as(to_go)
    assert_equal(p.estimate(total_return(p.rewards, p.mask, gamma=0.7)), truth)
    assert_equal(p.estimate(0.7**positions * to_go), truth)
    assert_different(p.estimate(to_go), truth)


@kinds
def test_the_less_the_future_matters_the_smaller_the_bias(kind):
    """N7: where later rewards are small, so is the bias of a small gamma."""

    def bias(gamma, later):
        p = problem(kind)
        rewards = p.rewards * later ** torch.arange(3).double()
        return (p.estimate(rewards_to_go(rewards, p.mask, gamma=gamma)) - p.true_gradient(rewards)).norm()

    assert bias(1.0, 1.0) < 1e-12
    assert bias(0.0, 1.0) > bias(0.5, 1.0) > bias(0.9, 1.0) > 0.01
    assert bias(0.5, 0.1) < 0.2 * bias(0.5, 1.0)


@kinds
def test_the_immediate_reward_is_biased_by_the_future(kind):
    """N6: it lacks ``E[later rewards | s_t, a_t]``, and is the same as ``gamma=0``."""
    p = problem(kind)
    weights = immediate_rewards(p.rewards, p.mask)
    lacking = true_q(p) - mean_given_action(p.completions, p.logprobs, weights).detach()
    assert_equal(p.estimate(weights), p.true_gradient() - p.estimate(lacking))
    assert_equal(weights, rewards_to_go(p.rewards, p.mask, gamma=0.0))
    assert_different(p.estimate(weights), p.true_gradient())


def machines(*, stateful, eos=None):
    """Slot machines, one pull per step, with one distribution over their arms per step; the payout may keep state.

    Returns the completions, the distribution's logits (3, 3), the log-probabilities and the rewards.
    """
    completions = enumerate_completions(vocab_size=3, horizon=3, eos=eos)
    logits = random_numbers(3, 3, seed=5).requires_grad_()
    grid = state_logits(lambda prefixes: logits[prefixes.shape[1]].expand(len(prefixes), 3), completions)
    payouts = random_numbers(3, 3, seed=4)[torch.arange(3), completions.ids]
    if stateful:  # each machine pays the more, the higher the arms that were pulled before
        payouts = payouts * (1 + completions.ids.cumsum(dim=1) - completions.ids)
    return completions, logits, completion_logprobs(grid, completions), torch.where(completions.mask, payouts, 0.0)


def largest_ratio_error(completions, logprobs, rewards):
    """max |P(a_t | s_t, R_u) / pi(a_t | s_t) - 1| over all states, tokens, and rewards of later steps u."""
    chances = logprobs.detach().sum(dim=1).exp()
    errors = []
    for t, u in ((0, 1), (0, 2), (1, 2)):
        for state in completions.states[completions.mask[:, t], t].unique():
            here = completions.mask[:, t] & (completions.states[:, t] == state)
            for reward in rewards[here, u].unique():
                same = here & ((rewards[:, u] - reward).abs() < 1e-12)
                for token in range(3):
                    of_token = completions.ids[:, t] == token
                    posterior = chances[same & of_token].sum() / chances[same].sum()
                    errors.append((posterior / (chances[here & of_token].sum() / chances[here].sum()) - 1).abs())
    return max(errors).item()


@pytest.mark.parametrize("stateful, eos, exact", [(False, None, True), (True, None, False), (False, 0, False)], ids=str)
def test_the_immediate_reward_is_right_where_the_future_tells_nothing_about_the_token(stateful, eos, exact):
    """N6, the notes' condition ``P(a_t | s_t, R_u) / pi(a_t | s_t) = 1`` for later u, and what follows from it.

    A machine without state fulfils it, one whose payout depends on earlier pulls does not; nor does a machine without
    state where one arm ends the game, as EOS does: whether there is a later reward depends on the arm.
    """
    completions, logits, logprobs, rewards = machines(stateful=stateful, eos=eos)
    weights = immediate_rewards(rewards, completions.mask)
    loss = policy_gradient_loss(logprobs, weights, completions.mask).sum(dim=1)
    estimate = -gradient(expectation(logprobs.detach(), loss), logits)
    truth = gradient(expected_return(completions, logprobs, rewards), logits)
    if exact:
        assert largest_ratio_error(completions, logprobs, rewards) < 1e-12
        assert_equal(estimate, truth)
    else:
        assert largest_ratio_error(completions, logprobs, rewards) > 0.1
        assert_different(estimate, truth)
