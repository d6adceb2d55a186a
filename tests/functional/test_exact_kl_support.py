"""The KL to the reference of a policy that leaves out tokens, by enumeration; the table of test_exact_kl.py with supports.

The policy is renormalized over its support S, as it is sampled; the reference is its softmax over all tokens, at the same
temperature. S is held fixed in gradients.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from problems import KINDS, assert_different, assert_equal, gradient, problem

from lmppo.functional import (
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_rewards,
    policy_gradient_loss,
    rewards_to_go,
    support_logprobs,
)
from lmppo.functional.exact import completion_logprobs, expectation, sequence_kl
from lmppo.functional.kl import ALL_TOKENS

BETA, TEMPERATURE = 0.3, 0.7


def top_k(p, k=2):
    """(S, V): the k likeliest tokens of each state."""
    return p.table >= p.table.sort(dim=-1, descending=True).values[:, k - 1 : k]


def top_p(p, mass=0.7):
    """The fewest tokens of this probability, found one by one."""
    chances = (p.table / TEMPERATURE).softmax(-1).tolist()
    kept = torch.zeros_like(p.table, dtype=torch.bool)
    for state, row in enumerate(chances):
        total = 0.0
        for token in sorted(range(3), key=lambda v: -row[v]):
            kept[state, token] = total < mass
            total += row[token]
    return kept


def min_p(p, share=0.3):
    """The tokens of at least this share of the likeliest one's probability."""
    chances = (p.table / TEMPERATURE).softmax(-1)
    return chances >= share * chances.amax(-1, keepdim=True)


def forbidden(p):
    """Token 1 is never sampled."""
    return (torch.arange(3) != 1).expand_as(p.table)


def minimum_length(p):
    """Token 0, which may end a completion, is not sampled first."""
    return (torch.arange(len(p.table)) > 0)[:, None] | (torch.arange(3) > 0)


SUPPORTS = (top_k, top_p, min_p, forbidden, minimum_length)
cases = pytest.mark.parametrize("support", SUPPORTS, ids=lambda f: f.__name__)
kinds = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class Restricted:
    """All completions that the policy can write, with what is known of their tokens; only ``table`` wants a gradient."""

    table: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    ref_support_logprobs: torch.Tensor
    state_kl: torch.Tensor
    reverse: torch.Tensor  # -sum_{v in S} q_v log p_v of every state, whose gradient is that of KL(q || p) over S

    @property
    def chances(self):
        return self.logprobs.sum(dim=1).exp()

    def mean(self, x):
        """Of completions that are drawn from the policy: no gradient through the drawing."""
        return expectation(self.logprobs.detach(), x)

    @property
    def kl(self):
        """sum_n P_n log(P_n / Q_n), from the whole completions' chances alone."""
        return (self.chances * (self.chances.log() - self.ref_logprobs.sum(dim=1))).sum()


def restricted(kind, support, *, at_reference=False):
    p = problem(kind)
    if at_reference:
        p = replace(p, ref_table=p.table.detach())
    kept = support(p)
    assert kept.any(-1).all() and not kept.all()
    states, ids = p.completions.states, p.completions.ids
    scaled = p.table / TEMPERATURE  # the policy by its definition: exp(z) over the sum of the kept ones
    chances = kept * scaled.exp() / (kept * scaled.exp()).sum(-1, keepdim=True)
    ref = (p.ref_table / TEMPERATURE).exp() / (p.ref_table / TEMPERATURE).exp().sum(-1, keepdim=True)
    rows = ((kept[states, ids] | ~p.mask).all(dim=1)).nonzero()[:, 0]
    assert len(rows) < len(states)
    mask, states, ids = p.mask[rows], states[rows], ids[rows]
    logs = torch.where(kept, chances, 1.0).log()  # 0 outside the support, where nothing is used

    def at(x):
        return torch.where(mask, x, 0.0)

    return Restricted(
        table=p.table,
        mask=mask,
        rewards=p.rewards[rows],
        logprobs=at(logs[states, ids]),
        ref_logprobs=at(ref.log()[states, ids]),
        ref_support_logprobs=at((kept * ref).sum(-1).log()[states]),
        state_kl=at((chances * (logs - ref.log())).sum(-1)[states]),
        reverse=at(-(kept * ref * logs).sum(-1)[states]),
    )


def penalized(p, *, reward=None, loss=None):
    """What ``BETA`` times this KL in the reward and this KL in the loss take from the expected estimate, per BETA."""
    nothing = torch.zeros_like(p.rewards)

    def estimate(in_reward, in_loss):
        shaped = kl_shaped_rewards(p.rewards, in_reward.detach(), p.mask, kl_coef=BETA)
        total = policy_gradient_loss(p.logprobs, rewards_to_go(shaped, p.mask), p.mask) + BETA * in_loss
        return -gradient(p.mean(total.sum(dim=1)), p.table)

    penalty = estimate(nothing if reward is None else reward, nothing if loss is None else loss)
    return (estimate(nothing, nothing) - penalty) / BETA


def forms(p):
    k3 = kl_k3(p.logprobs, p.ref_logprobs, ref_support_logprobs=p.ref_support_logprobs)
    return {
        "k1": kl_k1(p.logprobs, p.ref_logprobs),
        "k2": kl_k2(p.logprobs, p.ref_logprobs),
        "k3": k3,
        "exact": p.state_kl,
    }


@cases
@kinds
def test_the_library_has_these_distributions(kind, support):
    """token_logprobs, support_logprobs and exact_kl against the sums over exponentials."""
    p, whole = restricted(kind, support), problem(kind)
    kept = support(whole)[whole.completions.states]
    logprobs = completion_logprobs(whole.logits, whole.completions, temperature=TEMPERATURE, support=kept)
    ref_logprobs = completion_logprobs(whole.ref_logits, whole.completions, temperature=TEMPERATURE)
    possible = logprobs.isfinite().all(dim=1)
    assert_equal(logprobs[possible], p.logprobs)
    assert_equal(ref_logprobs[possible], p.ref_logprobs)
    of_support = support_logprobs(whole.ref_logits, temperature=TEMPERATURE, support=kept)
    assert_equal(torch.where(whole.mask, of_support, 0.0)[possible], p.ref_support_logprobs)
    state_kl = exact_kl(whole.logits, whole.ref_logits, temperature=TEMPERATURE, support=kept, ref_support=ALL_TOKENS)
    assert_equal(torch.where(whole.mask, state_kl, 0.0)[possible], p.state_kl)
    # The completions that cannot be written add nothing, in the value and in the gradient.
    kl = sequence_kl(logprobs, ref_logprobs)
    assert_equal(kl, p.kl)
    assert_equal(gradient(kl, whole.table), gradient(p.kl, p.table))


@cases
@kinds
def test_k1_k3_and_the_exact_kl_have_the_true_mean(kind, support):
    """The KL of what is sampled to the reference. With 1 in place of q(S), k3 is off by 1 - q(S) of every state."""
    p = restricted(kind, support)
    found = forms(p)
    for name in ("k1", "k3", "exact"):
        assert_equal(p.mean(found[name].sum(dim=1)), p.kl.detach())
    plain = kl_k3(p.logprobs, p.ref_logprobs)
    missing = torch.where(p.mask, 1 - p.ref_support_logprobs.exp(), 0.0)
    assert_equal(p.mean(plain.sum(dim=1)), p.kl.detach() - p.mean(missing.sum(dim=1)))
    assert_different(p.mean(plain.sum(dim=1)), p.kl.detach())
    assert (found["k3"] >= missing).all(), "x - 1 - log x is 0 or more, and what is left is 1 - q(S)"


@cases
@kinds
def test_the_gradient_of_every_form(kind, support):
    """k1_reward, k3_both and exact_both are exact; the losses alone are right for each state, k3's the other way round."""
    p = restricted(kind, support)
    found = forms(p)
    truth, own = gradient(p.kl, p.table), gradient(p.mean(p.state_kl.sum(dim=1)), p.table)
    reverse = gradient(p.mean(p.reverse.sum(dim=1)), p.table)
    assert_equal(penalized(p, reward=found["k1"]), truth)
    assert_equal(penalized(p, reward=found["k3"], loss=found["k3"]), truth)
    assert_equal(penalized(p, reward=found["exact"], loss=found["exact"]), truth)
    assert_equal(penalized(p, reward=found["exact"], loss=found["k2"]), truth)
    assert_equal(penalized(p, loss=found["k2"]), own)
    assert_equal(penalized(p, loss=found["exact"]), own)
    assert_equal(penalized(p, loss=found["k3"]), reverse)
    assert_different(own, truth)
    assert_different(reverse, own)
    if support is not minimum_length:  # which costs something in the first state alone, where no token leads
        plain = kl_k3(p.logprobs, p.ref_logprobs)
        assert_different(penalized(p, reward=plain, loss=plain), truth)


@cases
@kinds
def test_at_the_reference_every_token_costs_the_kept_mass(kind, support):
    """Step zero: minus the log of the probability of the support, the policy's own, and of nothing else."""
    p = restricted(kind, support, at_reference=True)
    cost = -p.ref_support_logprobs
    assert cost.max() > 0.04
    found = forms(p)
    for name in ("k1", "k3", "exact"):
        assert_equal(found[name], cost)
    assert_equal(found["k2"], cost.square() / 2)


def test_a_policy_that_has_collapsed_is_far_away():
    """One token left of three: the KL is minus the log of the reference's chance of it, however it is measured."""
    logits, ref_logits = torch.tensor([9.0, 0.0, 0.0]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    alone = torch.tensor([True, False, False])
    chance = 1 / (1 + math.e + math.e**2)
    zero, ref_logprob = torch.zeros(1, dtype=torch.float64), ref_logits.log_softmax(0)[:1]
    kl = exact_kl(logits, ref_logits, support=alone, ref_support=ALL_TOKENS).item()
    assert kl == pytest.approx(-math.log(chance))
    of_support = support_logprobs(ref_logits, support=alone).reshape(1)
    assert kl_k3(zero, ref_logprob, ref_support_logprobs=of_support).item() == pytest.approx(-math.log(chance))
    assert exact_kl(logits, ref_logits, support=alone).item() == 0.0, "both over the support: old and new policy"
