"""Small problems whose every answer is known: a policy, a reference and rewards, all tables over the states.

``fixed``: three tokens, three steps, 27 completions. ``eos``: the same, but token 0 ends a completion, which makes 15 of
one to three tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmppo.functional import policy_gradient_loss
from lmppo.functional.exact import (
    Completions,
    completion_logprobs,
    enumerate_completions,
    expectation,
    expected_return,
)

KINDS = ("fixed", "eos")


def random_numbers(*shape, seed):
    """Float64, standard normal."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(value, parameters):
    """The gradient, and the graph stays for the next one."""
    return torch.autograd.grad(value, parameters, retain_graph=True)[0]


@dataclass(frozen=True)
class Problem:
    """Everything on the grid of all completions; only the policy's ``table`` wants a gradient."""

    completions: Completions
    table: Tensor
    ref_table: Tensor
    rewards: Tensor

    @property
    def mask(self):
        return self.completions.mask

    @property
    def logits(self):
        return self.table[self.completions.states]

    @property
    def ref_logits(self):
        return self.ref_table[self.completions.states]

    @property
    def logprobs(self):
        return completion_logprobs(self.logits, self.completions)

    @property
    def ref_logprobs(self):
        return completion_logprobs(self.ref_logits, self.completions)

    def of_state(self, seed):
        """Any function of the state: a baseline, a wrong critic, or what is wrong with one."""
        return torch.where(self.mask, random_numbers(len(self.table), seed=seed)[self.completions.states], 0.0)

    def true_gradient(self, rewards=None, **kwargs):
        """Of the expected return, by autograd."""
        rewards = self.rewards if rewards is None else rewards
        return gradient(expected_return(self.completions, self.logprobs, rewards, **kwargs), self.table)

    def expected_loss_gradient(self, loss_of):
        """-E[grad of the loss] of a completion sampled from the policy; ``loss_of`` (logprobs) -> (N, T)."""
        logprobs = self.logprobs
        return -gradient(expectation(logprobs.detach(), loss_of(logprobs).sum(dim=1)), self.table)

    def estimate(self, weights):
        """The expectation of the policy-gradient estimate with these weights: what goes up."""
        return self.expected_loss_gradient(lambda logprobs: policy_gradient_loss(logprobs, weights, self.mask))


def problem(kind):
    """Random tables. The rewards depend on the token and on all before it."""
    completions = enumerate_completions(vocab_size=3, horizon=3, eos=0 if kind == "eos" else None)
    shape = (completions.state_count, 3)
    rewards = random_numbers(*shape, seed=1)[completions.states, completions.ids]
    return Problem(
        completions,
        random_numbers(*shape, seed=0).requires_grad_(),
        random_numbers(*shape, seed=2),
        torch.where(completions.mask, rewards, 0.0),
    )


def assert_equal(estimate, truth):
    """Up to rounding."""
    torch.testing.assert_close(estimate, truth, rtol=1e-10, atol=1e-12)


def assert_different(estimate, truth):
    """By far more than rounding."""
    assert (estimate - truth).abs().max() > 1e-3
