"""Exact answers for a small vocabulary and a short horizon: every completion, the true return, values and divergences.

With V tokens and T steps there are at most V^T completions, so every expectation is a finite sum. What is here is
differentiable in the log-probabilities: the true gradient of an expected return comes by autograd, and an estimator is
unbiased if and only if its expectation, also a sum over all completions, is that gradient::

    completions = enumerate_completions(vocab_size=3, horizon=4, eos=0)
    logprobs = completion_logprobs(state_logits(policy, completions), completions)
    true_return = expected_return(completions, logprobs, rewards)  # its gradient is the policy gradient
    weights = rewards_to_go(rewards, completions.mask)
    loss = policy_gradient_loss(logprobs, weights, completions.mask)
    expected_loss = expectation(logprobs.detach(), loss.sum(dim=1))  # its gradient is the estimate's expectation

Grids are ``(N, T)``, completions by positions, and follow the conventions of this package: 0 where the mask is False.
A state is the prefix before a token. Functions that take ``completions`` need the whole enumeration, in its order. As in
the rest of this package, a wrong dtype is a TypeError, a wrong shape or number a ValueError, and nothing is broadcast.

Background: docs/notes.md, "The lab" and "Q in place of the sample".
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmppo.functional._inputs import check_float, check_masked, check_positive, check_shape, zero_masked
from lmppo.functional.advantages import rewards_to_go, total_return
from lmppo.functional.logprobs import token_logprobs


@dataclass(frozen=True)
class Completions:
    """Every completion there is, each once, in lexicographic order, from :func:`enumerate_completions`.

    Attributes:
        ids: (N, T) int64; after EOS there is EOS again.
        mask: (N, T) bool, True = the token counts, the first EOS included.
        states: (N, T) int64, the number of the state before each token; 0 where the mask is False. A tabular policy is
            a table (S, V) of logits, and ``table[completions.states]`` are its logits on the grid.
        prefixes: T tensors (S_t, t) int64: the states of each length, in the order of their numbers. State 0 is the
            empty prefix; S, the sum of all S_t, is the number of states.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor
    prefixes: tuple[Tensor, ...]

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.ids.max()) + 1

    @property
    def state_count(self) -> int:
        """S."""
        return int(self.states.max()) + 1


def enumerate_completions(
    *, vocab_size: int, horizon: int, eos: int | None = None, max_completions: int = 100_000
) -> Completions:
    """Every completion of at most ``horizon`` tokens that ends at its first EOS, or is cut at the horizon.

    Without an EOS there are ``V^T``, all of T tokens. These are the trajectories, and the prefixes are the states.

    Args:
        vocab_size: V, 1 or more.
        horizon: T, 1 or more.
        eos: The token that ends a completion. None: there is none.
        max_completions: Refuse to list more than so many; counted as ``V^T``, whatever the EOS saves.

    Returns:
        The completions, on the CPU.

    Raises:
        ValueError: A number is out of range, or there are too many completions.
    """
    if vocab_size < 1 or horizon < 1:
        raise ValueError(f"enumerate_completions: vocab_size={vocab_size} and horizon={horizon} must be 1 or more")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"enumerate_completions: eos must be in [0, {vocab_size}), the vocabulary, got {eos}")
    if vocab_size**horizon > max_completions:
        raise ValueError(
            f"enumerate_completions: {vocab_size} tokens and {horizon} steps make {vocab_size**horizon} completions, "
            f"more than max_completions={max_completions}; take fewer tokens or a shorter horizon"
        )
    ids = torch.cartesian_prod(*[torch.arange(vocab_size)] * horizon).reshape(-1, horizon)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if eos is not None:
        ids = torch.unique(torch.where((ids == eos).cummax(dim=1).values, eos, ids), dim=0)
        ends = ids == eos
        mask = ends.cumsum(dim=1) - ends.long() == 0
    # Rows with the same prefix are neighbours: where a prefix differs from the row before, a new state begins.
    begins = torch.ones_like(mask)
    begins[1:, 0] = False
    begins[1:, 1:] = (ids[1:] != ids[:-1]).cummax(dim=1).values[:, :-1]
    begins &= mask
    states = (begins.T.flatten().cumsum(dim=0) - 1).reshape(horizon, -1).T
    prefixes = tuple(ids[begins[:, t], :t] for t in range(horizon))
    return Completions(ids, mask, torch.where(mask, states, 0), prefixes)


def state_logits(policy: Callable[[Tensor], Tensor], completions: Completions) -> Tensor:
    """The logits of a policy in every state, on the grid of the completions.

    ``logits[n, t] = policy(ids[n, :t])``. Those of two policies give the true KL of every state, by
    :func:`~lmppo.functional.kl.exact_kl`. The policy is asked once for every state.

    Args:
        policy: From prefixes (B, t) int64, all of one length t = 0, 1, ..., T - 1, to logits (B, V).
        completions: N completions of T positions.

    Returns:
        (N, T, V), 0 where the mask is False; differentiable in whatever the policy computes its logits from.
    """
    levels = [policy(prefixes) for prefixes in completions.prefixes]
    for prefixes, logits in zip(completions.prefixes, levels, strict=True):
        check_float("state_logits", logits=logits)
        check_shape("state_logits", (len(prefixes), completions.vocab_size), "prefixes by vocabulary", logits=logits)
    return torch.where(completions.mask.unsqueeze(-1), torch.cat(levels)[completions.states], 0.0)


def completion_logprobs(
    logits: Tensor, completions: Completions, *, temperature: float = 1.0, support: Tensor | None = None
) -> Tensor:
    """The log-probability of every token, ``log pi(a_t | s_t)``; a row's sum is that of the completion.

    Args:
        logits: (N, T, V), from :func:`state_logits` or a table.
        completions: N completions of T positions.
        temperature: Logits are divided by it.
        support: Bool, broadcastable to ``logits``; True = the policy can choose that token. None: all tokens.

    Returns:
        (N, T), 0 where the mask is False; -inf for a token that cannot be chosen.
    """
    logprobs = token_logprobs(logits, completions.ids, temperature=temperature, support=support)
    return zero_masked(logprobs, completions.mask)


def expectation(logprobs: Tensor, x: Tensor) -> Tensor:
    """The mean of ``x`` over completions drawn from the policy.

    ``E[x] = sum_n P_n x_n`` with ``P_n = exp(sum_t logprobs[n, t])``, over the completions that the policy can write
    (``P_n > 0``): of the others ``x`` may be anything. Detach ``logprobs`` for the expectation of a
    loss, since a sampled loss sends no gradient through the sampling; attached, the gradient is that of E[x].

    Args:
        logprobs: (N, T), from :func:`completion_logprobs`.
        x: (N, ...), one number or tensor per completion.

    Returns:
        (...).
    """
    check_float("expectation", logprobs=logprobs, x=x)
    check_shape("expectation", (len(logprobs), *x.shape[1:]), "one row per completion", x=x)
    chances = logprobs.sum(dim=1).exp()
    possible = (chances > 0).view(-1, *[1] * (x.ndim - 1))
    return torch.einsum("n,n...->...", chances, zero_masked(x, possible))


def expected_return(completions: Completions, logprobs: Tensor, rewards: Tensor, *, gamma: float = 1.0) -> Tensor:
    """The true objective; its gradient, by autograd, is the true policy gradient.

    ``J = sum_n P_n sum_t gamma^t r_t``

    Args:
        completions: N completions of T positions.
        logprobs: (N, T) of the policy.
        rewards: (N, T) per token. Where they depend on the policy (a KL penalty), leave them attached.
        gamma: Discount, in [0, 1].

    Returns:
        A 0-d tensor.
    """
    return expectation(logprobs, total_return(rewards, completions.mask, gamma=gamma)[:, 0])


def mean_given_state(completions: Completions, logprobs: Tensor, x: Tensor) -> Tensor:
    """``E[x_t | s_t]``: what ``x_t`` is on average, given the state: the best a critic can learn from targets ``x``.

    Args:
        completions: N completions of T positions.
        logprobs: (N, T) of the policy that writes them.
        x: (N, T), one number per token, which may depend on the whole completion.

    Returns:
        (N, T), the same number wherever the state is the same.
    """
    check_masked("mean_given_state", completions.mask, logprobs=logprobs, x=x)
    log_chance = rewards_to_go(logprobs, completions.mask)  # of the rest of the completion, token t included
    return _group_sums(log_chance.exp() * x, completions.states, completions.mask)


def mean_given_action(completions: Completions, logprobs: Tensor, x: Tensor) -> Tensor:
    """``E[x_t | s_t, a_t]``: what ``x_t`` is on average, given the state and token t.

    Args and Returns: as :func:`mean_given_state`.
    """
    check_masked("mean_given_action", completions.mask, logprobs=logprobs, x=x)
    log_chance = rewards_to_go(logprobs, completions.mask) - logprobs  # of what follows token t
    return _group_sums(log_chance.exp() * x, _actions(completions), completions.mask)


def state_values(completions: Completions, logprobs: Tensor, rewards: Tensor, *, gamma: float = 1.0) -> Tensor:
    """The true V of the state before every token: ``V(s_t) = E[sum_{u >= t} gamma^(u - t) r_u | s_t]``.

    With several kinds of reward, call it once for each, with that kind's ``gamma``.

    Args:
        completions: N completions of T positions.
        logprobs: (N, T) of the policy.
        rewards: (N, T) per token.
        gamma: Discount, in [0, 1].

    Returns:
        (N, T).
    """
    return mean_given_state(completions, logprobs, rewards_to_go(rewards, completions.mask, gamma=gamma))


def action_values(completions: Completions, logprobs: Tensor, rewards: Tensor, *, gamma: float = 1.0) -> Tensor:
    """The true Q of every token, :func:`state_values` given the token too; their difference is the true advantage.

    Args and Returns: as :func:`state_values`.
    """
    return mean_given_action(completions, logprobs, rewards_to_go(rewards, completions.mask, gamma=gamma))


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The true KL of whole completions: ``sum_n P_n sum_t (log p_t - log q_t)``.

    It is also the expected sum of the :func:`~lmppo.functional.kl.exact_kl` of the states on the way.

    Args:
        logprobs: (N, T) of the policy.
        ref_logprobs: (N, T) of the reference.

    Returns:
        A 0-d tensor, differentiable in both.
    """
    check_float("sequence_kl", ref_logprobs=ref_logprobs)
    check_shape("sequence_kl", logprobs.shape, "that of logprobs", ref_logprobs=ref_logprobs)
    return expectation(logprobs, (logprobs - ref_logprobs).sum(dim=1))


def optimal_policy(
    completions: Completions, ref_logprobs: Tensor, scores: Tensor, *, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """The policy that is best when each nat of KL to the reference costs ``kl_coef``, and how good it is.

    ``pi* ~ pi_ref exp(R / kl_coef)`` and ``J* = max E[R] - kl_coef * KL = kl_coef * log E_ref[exp(R / kl_coef)]``

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 4.

    Args:
        completions: N completions of T positions.
        ref_logprobs: (N, T) of the reference.
        scores: (N,), the return R of every completion, without the penalty.
        kl_coef: The price of a nat, positive.

    Returns:
        ``(logprobs, best)``: the log-probabilities (N, T) of the optimum, token by token, and J*, 0-d.

    Raises:
        ValueError: ``kl_coef`` is so small that some token's probability cannot be told from 0 in this dtype.
    """
    check_masked("optimal_policy", completions.mask, ref_logprobs=ref_logprobs)
    check_float("optimal_policy", scores=scores)
    check_shape("optimal_policy", completions.mask.shape[:1], "one score per completion", scores=scores)
    check_positive("optimal_policy", kl_coef=kl_coef)
    log_chances = ref_logprobs.sum(dim=1) + scores / kl_coef
    log_total = log_chances.logsumexp(dim=0)
    chances = (log_chances - log_total).exp().unsqueeze(1).expand_as(ref_logprobs)
    of_state = _group_sums(chances, completions.states, completions.mask)
    of_action = _group_sums(chances, _actions(completions), completions.mask)
    if not of_action[completions.mask].all():
        raise ValueError(f"optimal_policy: kl_coef={kl_coef} is too small for these scores; take more, or float64")
    return zero_masked(of_action.log() - of_state.log(), completions.mask), kl_coef * log_total


def _actions(completions: Completions) -> Tensor:
    """(N, T): a number for every pair of state and token."""
    return completions.states * completions.vocab_size + completions.ids


def _group_sums(x: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
    """(N, T): at every counted position, the sum of ``x`` over all counted positions of the same group."""
    sums = x.new_zeros(int(groups.max()) + 1).index_add(0, groups[mask], x[mask])
    return zero_masked(sums[groups], mask)
