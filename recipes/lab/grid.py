"""Estimates of a policy gradient, drawn batch by batch, and the gradient itself, from the list of all completions.

Every gradient here is ``sum of weights * grad log pi(token | state)``. So the log-probabilities' own gradients are computed
once, for each state and token, and an estimate is the weight that each pair of state and token got, times those.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmppo.config import PPOConfig
from lmppo.estimators import estimate
from lmppo.functional.exact import Completions, completion_logprobs, expected_return, state_logits
from lmppo.records import Rollout, Tokens
from lmppo.support import Support


@dataclass(frozen=True)
class Problem:
    """A policy and rewards on the grid of all completions (N, T).

    Attributes:
        completions: All of them.
        logprobs: (N, T) of every token, float64.
        scores: (S * V, D) gradient of the log-probability of each token in each state.
        rewards: (N, T).
    """

    completions: Completions
    logprobs: Tensor
    scores: Tensor
    rewards: Tensor

    @property
    def chances(self) -> Tensor:
        """(N,) of every completion."""
        return self.logprobs.sum(dim=1).exp()

    @property
    def pairs(self) -> Tensor:
        """(N, T) number of the pair of state and token."""
        return self.completions.states * self.completions.vocab_size + self.completions.ids

    def true_gradient(self) -> Tensor:
        """(D,) of the expected return: by autograd with respect to every pair's log-probability, then the chain rule."""
        by_pair = torch.zeros(len(self.scores), dtype=torch.float64)
        by_pair[self.pairs[self.completions.mask]] = self.logprobs[self.completions.mask]
        by_pair.requires_grad_()
        logprobs = torch.where(self.completions.mask, by_pair[self.pairs], 0.0)
        (slope,) = torch.autograd.grad(expected_return(self.completions, logprobs, self.rewards), by_pair)
        return slope @ self.scores

    def gradients(self, weights: Tensor, rows: Tensor) -> Tensor:
        """(R, D) estimates from R batches: ``weights (R, B, T)`` of the tokens of completions ``rows (R, B)``."""
        batch = torch.arange(len(rows)).view(-1, 1, 1) * len(self.scores)
        total = torch.zeros(len(rows) * len(self.scores), dtype=torch.float64)
        total.index_add_(0, (batch + self.pairs[rows]).flatten(), weights.flatten())  # weights are 0 where masked
        return total.view(len(rows), -1) @ self.scores / rows.shape[1]

    def draw(self, batches: int, size: int, seed: int) -> Tensor:
        """(R, B) rows of completions drawn from the policy."""
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(self.chances, batches * size, True, generator=generator).view(batches, size)

    def rollout(self, values: Tensor) -> Rollout:
        """All completions as one rollout, with these values (N, T) as its critic's."""
        grid, n = self.completions, len(self.rewards)
        return Rollout(
            tokens=Tokens(
                prompt_ids=torch.ones(n, 1, dtype=torch.long),
                prompt_mask=torch.ones(n, 1, dtype=torch.bool),
                completion_ids=grid.ids,
                completion_mask=grid.mask,
            ),
            support=Support.of_all(n, grid.ids.shape[1]),
            logprobs=self.logprobs,
            ref_logprobs=self.logprobs,
            ref_support_logprobs=torch.zeros_like(self.logprobs),
            values=values.unsqueeze(-1),
            scores=self.rewards.unsqueeze(-1),
            kl_penalty=torch.zeros_like(self.logprobs),
            bootstrap_values=torch.zeros(n, 1),
            ended=torch.ones(n, dtype=torch.bool),
            max_logit=torch.zeros(n),
        )

    def weights(self, config: PPOConfig, values: Tensor, rows: Tensor) -> Tensor:
        """(R, B, T) the advantages that the library gives each batch, by its configuration."""
        everything = self.rollout(values)
        together = config.baseline not in ("batch_mean", "auto")  # else each batch is judged by itself
        parts = [rows.flatten()] if together else list(rows)
        rollouts = [everything.rows(part) for part in parts]
        advantages = [estimate(rollout, rollout.scores, config).advantages for rollout in rollouts]
        return torch.cat(advantages).view(*rows.shape, -1)


def make_problem(
    policy: Callable[[Tensor], Tensor], parameters: list[Tensor], completions: Completions, rewards: Tensor
) -> Problem:
    """The problem of a policy, from prefixes (B, t) to logits (B, V), differentiable in its parameters."""
    logits = state_logits(policy, completions).detach()
    slopes = []
    for prefix in (row for level in completions.prefixes for row in level):
        for logprob in policy(prefix.unsqueeze(0))[0].log_softmax(dim=0):
            parts = torch.autograd.grad(logprob, parameters, retain_graph=True, materialize_grads=True)
            slopes.append(torch.cat([part.flatten() for part in parts]))
    scores = torch.stack(slopes)
    if scores.shape[1] > len(scores):  # only lengths and angles matter: as many coordinates as there are pairs will do
        scores = torch.linalg.qr(scores.T)[1].T
    return Problem(completions, completion_logprobs(logits, completions), scores, rewards)
