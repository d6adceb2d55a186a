"""The KL penalty to the reference, by enumeration: which forms of it have the gradient of ``J - beta KL(pi || ref)``.

Three gradients explain all of it. With the KL of the whole completions, ``KL(pi || ref) = E[sum_t KL_t]``,

- ``D``, its gradient: that of the later states' KL, by way of the tokens that lead there, and of each state's own;
- ``O = E[sum_t grad KL_t]``, the own part alone, as if the states were given. ``D - O`` is the later part;
- ``R = E[sum_t grad KL(ref || pi)_t]``, the own part of the reverse KL.

=========  ==============  ===========================  ===========================================
estimator  in the reward   in the loss                  in both
=========  ==============  ===========================  ===========================================
k1         D, exact        0                            D, exact
k1, last   D, exact
k2         E[k2]' - O      O                            E[k2]', the gradient of a different thing
k3         D - R           R                            D, exact
exact      D - O           O                            D, exact
=========  ==============  ===========================  ===========================================

"k1, last" is the k1 of all tokens, paid with the last one: without a discount, what a token's predecessors have paid is a
baseline of its weight.

So a k2 loss is right for each state, and lacks what leads to the later states, as any loss does: together with the
exact KL in the reward, or k1 of later tokens only, it is exact; with one token, or of whole completions, alone.

Sources: Schulman, "Approximating KL Divergence" (2020); arXiv 2510.01555, 2512.21852.
"""

from dataclasses import replace

import pytest
import torch
from problems import KINDS, assert_different, assert_equal, gradient, problem

from lmppo.functional import (
    exact_kl,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_rewards,
    policy_gradient_loss,
    rewards_to_go,
    total_return,
)
from lmppo.functional.exact import enumerate_completions, expectation, sequence_kl, state_values

kinds = pytest.mark.parametrize("kind", KINDS)
BETA = 0.3


def state_kl(p):
    """(N, T): KL(pi || ref) of every state, differentiable."""
    return torch.where(p.mask, exact_kl(p.logits, p.ref_logits), 0.0)


def k1(p):
    return kl_k1(p.logprobs, p.ref_logprobs)


def k1_at_the_end(p):
    """The k1 of a completion's tokens, all at its last one."""
    last = p.mask & (p.mask.flip(1).cumsum(dim=1).flip(1) == 1)
    return torch.where(last, torch.where(p.mask, k1(p), 0.0).sum(dim=1, keepdim=True), 0.0)


def k2(p):
    return kl_k2(p.logprobs, p.ref_logprobs)


def k3(p):
    return kl_k3(p.logprobs, p.ref_logprobs)


FORMS = {"k1": k1, "k2": k2, "k3": k3, "exact": state_kl}


def sequence_gradient(p):
    """D."""
    return gradient(sequence_kl(p.logprobs, p.ref_logprobs), p.table)


def own_gradient(p):
    """O: the chance of being in a state is held fixed."""
    return gradient(expectation(p.logprobs.detach(), state_kl(p).sum(dim=1)), p.table)


def reverse_gradient(p):
    """R."""
    reverse = torch.where(p.mask, exact_kl(p.ref_logits, p.logits), 0.0)
    return gradient(expectation(p.logprobs.detach(), reverse.sum(dim=1)), p.table)


def penalized(p, *, reward=None, loss=None, weight=rewards_to_go):
    """What ``BETA`` times this KL in the reward and this KL in the loss take from the expected estimate, per BETA.

    The estimate is that of the real rewards minus the penalty, so that the two are seen to add up.
    """
    nothing = torch.zeros_like(p.rewards)
    shaped = kl_shaped_rewards(p.rewards, nothing if reward is None else reward(p).detach(), p.mask, kl_coef=BETA)
    policy_loss = policy_gradient_loss(p.logprobs, weight(shaped, p.mask), p.mask)
    total = policy_loss + BETA * (nothing if loss is None else loss(p))
    estimate = -gradient(expectation(p.logprobs.detach(), total.sum(dim=1)), p.table)
    return (p.true_gradient() - estimate) / BETA


@kinds
def test_the_three_gradients_differ(kind):
    """Else the tests below could not tell one from another."""
    p = problem(kind)
    d, own, reverse = sequence_gradient(p), own_gradient(p), reverse_gradient(p)
    assert_different(d, own)
    assert_different(d, reverse)
    assert_different(own, reverse)
    # D is the gradient that finite differences see, O plus the score-weighted later part.
    later = rewards_to_go(state_kl(p).detach(), p.mask) - state_kl(p).detach()
    assert_equal(d, own + p.estimate(later))
    assert torch.autograd.gradcheck(
        lambda table: sequence_kl(replace(p, table=table).logprobs, p.ref_logprobs), p.table
    )


@kinds
@pytest.mark.parametrize("k1", [k1, k1_at_the_end])
def test_k1_in_the_reward_is_exact(kind, k1):
    """With any estimator that is unbiased: total return, reward-to-go, GAE with lam 1 or with the true critic."""
    p = problem(kind)
    assert_equal(penalized(p, reward=k1), sequence_gradient(p))
    assert_equal(penalized(p, reward=k1, weight=total_return), sequence_gradient(p))
    shaped = kl_shaped_rewards(p.rewards, k1(p), p.mask, kl_coef=BETA)
    truth = p.true_gradient() - BETA * sequence_gradient(p)
    assert_equal(p.true_gradient(shaped), truth)  # attached: the k1 of J's own gradient adds E[grad log pi] = 0
    assert_equal(p.estimate(gae(shaped, p.of_state(seed=3), p.mask, lam=1.0)[0]), truth)
    critic = state_values(p.completions, p.logprobs, shaped).detach()
    for lam in (0.0, 0.7):
        assert_equal(p.estimate(gae(shaped, critic, p.mask, lam=lam)[0]), truth)


@kinds
def test_k2_in_the_reward_is_biased(kind):
    """It gives the gradient of E[sum k2], a different quantity, less O, which a reward cannot give."""
    p = problem(kind)
    of_k2 = gradient(expectation(p.logprobs, k2(p).sum(dim=1)), p.table)
    assert_equal(penalized(p, reward=k2), of_k2 - own_gradient(p))
    assert_different(penalized(p, reward=k2), sequence_gradient(p))


@kinds
def test_k3_in_the_reward_is_biased(kind):
    """Its mean is the KL, and yet: it lacks R, the gradient that runs through k3 itself."""
    p = problem(kind)
    assert expectation(p.logprobs, k3(p).sum(dim=1)).item() == pytest.approx(
        sequence_kl(p.logprobs, p.ref_logprobs).item(), abs=1e-12
    )
    assert_equal(penalized(p, reward=k3), sequence_gradient(p) - reverse_gradient(p))
    assert_different(penalized(p, reward=k3), sequence_gradient(p))


@kinds
def test_the_exact_kl_in_the_reward_lacks_each_states_own_gradient(kind):
    """A state's KL does not depend on its token: in the reward it is a baseline there, and counts for earlier tokens."""
    p = problem(kind)
    assert_equal(penalized(p, reward=state_kl), sequence_gradient(p) - own_gradient(p))
    assert_different(penalized(p, reward=state_kl), sequence_gradient(p))


@kinds
def test_the_exact_kl_in_reward_and_loss_is_exact(kind):
    """The later states' part from the reward, the own part from the loss. In the reward, one's own KL does no harm."""
    p = problem(kind)

    def of_later_states(shaped, mask):
        return rewards_to_go(shaped, mask) + BETA * state_kl(p).detach()

    for weight in (rewards_to_go, total_return, of_later_states):
        assert_equal(penalized(p, reward=state_kl, loss=state_kl, weight=weight), sequence_gradient(p))


@kinds
def test_as_losses(kind):
    """k1 has no gradient, k2 and the exact KL that of each state's own KL, k3 that of the reverse KL."""
    p = problem(kind)
    assert_equal(penalized(p, loss=k1), torch.zeros_like(p.table))
    assert_equal(penalized(p, loss=k2), own_gradient(p))
    assert_equal(penalized(p, loss=state_kl), own_gradient(p))
    assert_equal(penalized(p, loss=k3), reverse_gradient(p))
    for form in FORMS.values():
        assert_different(penalized(p, loss=form), sequence_gradient(p))


@kinds
def test_what_makes_a_k2_loss_exact(kind):
    """The later states' part, without one's own: from the exact KL in the reward, or from k1 of the later tokens.

    With all of k1 in the reward, one's own KL is charged twice. Of whole completions, ``(sum_t k1_t)^2 / 2``, the k2
    loss needs nothing else, at the price of the variance of the whole completion's log-ratio on every token.
    """
    p = problem(kind)

    def of_later_tokens(shaped, mask):
        return rewards_to_go(shaped, mask) + BETA * k1(p).detach()

    def of_the_completion(p):
        whole = kl_k2(p.logprobs.sum(dim=1, keepdim=True), p.ref_logprobs.sum(dim=1, keepdim=True))
        return torch.cat([whole, whole.new_zeros(len(whole), p.mask.shape[1] - 1)], dim=1)

    assert_equal(penalized(p, reward=state_kl, loss=k2), sequence_gradient(p))
    assert_equal(penalized(p, reward=k1, loss=k2, weight=of_later_tokens), sequence_gradient(p))
    assert_equal(penalized(p, reward=k1, loss=k2), sequence_gradient(p) + own_gradient(p))
    assert_equal(penalized(p, loss=of_the_completion), sequence_gradient(p))


@kinds
def test_in_reward_and_loss_alike(kind):
    """The product rule: an estimator in both has the gradient of its own mean. For k1, k3 and exact, that is the KL's."""
    p = problem(kind)
    for name, form in FORMS.items():
        of_its_mean = gradient(expectation(p.logprobs, form(p).sum(dim=1)), p.table)
        assert_equal(penalized(p, reward=form, loss=form), of_its_mean)
        if name != "k2":
            assert_equal(of_its_mean, sequence_gradient(p))
        else:
            assert_different(of_its_mean, sequence_gradient(p))


def one_step(distance):
    """Completions of one token, and a policy at this distance from the reference."""
    p = problem("fixed")
    completions = enumerate_completions(vocab_size=3, horizon=1)
    ref_table = p.ref_table[:1]
    table = (ref_table + distance * p.table.detach()[:1]).requires_grad_()
    return replace(p, completions=completions, table=table, ref_table=ref_table, rewards=p.rewards[::9, :1])


def test_with_one_token_there_is_nothing_later():
    """For a bandit a k2 loss is exact, and the exact KL in the reward is nothing but a baseline."""
    p = one_step(1.0)
    assert_equal(own_gradient(p), sequence_gradient(p))
    assert_equal(penalized(p, loss=k2), sequence_gradient(p))
    assert_equal(penalized(p, reward=state_kl), torch.zeros_like(p.table))


@pytest.mark.parametrize("form", [k2, k3])
def test_near_the_reference_k2_and_k3_in_the_reward_hardly_pull_back(form):
    """The KL's gradient is linear in the distance, theirs quadratic: halve the distance, and half the pull is gone."""
    shares = []
    for distance in (0.02, 0.01):
        p = one_step(distance)
        shares.append((penalized(p, reward=form).norm() / sequence_gradient(p).norm()).item())
    assert shares[0] < 0.05
    assert shares[1] / shares[0] == pytest.approx(0.5, rel=0.05)
