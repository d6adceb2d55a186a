"""Rewards with a known optimum, to see whether a trainer finds it.

PPO with a KL penalty maximizes E[R(y)] - kl_coef * KL(pi || pi_ref). Over any set of outcomes y the optimum is

    pi*(y) = pi_ref(y) exp(R(y) / kl_coef) / Z,        where the objective is        kl_coef * log Z

(Ziegler et al. 2019, arXiv 1909.08593, section 2.1). The outcomes are whole completions, or whatever of them the
reward looks at: their lengths, the count of a token, or, where tokens are independent, a single token.

Background: docs/notes.md, "The immediate reward alone" and "Sparse and dense rewards".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmppo.rewards import RewardFn

Numbers = Tensor | Sequence[float]


def target_token(token_id: int) -> RewardFn:
    """1 for every completion token that is ``token_id``, 0 for every other: a dense reward.

    For completions of a fixed length whose tokens the reference draws independently, the target with probability p,
    the optimum draws it with ``optimal_probability(p, 1, kl_coef=...)``.
    """

    def target_token(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
        return [[float(token == token_id) for token in ids] for ids in completion_ids]

    return target_token


def token_count(token_id: int) -> RewardFn:
    """How often ``token_id`` occurs in the completion: the total and the optimum of :func:`target_token`, paid at once.

    The same problem with the credit left to the advantage estimator.
    """

    def token_count(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(ids.count(token_id)) for ids in completion_ids]

    return token_count


def completion_length(target: int) -> RewardFn:
    """``-|n - target| / target`` for a completion of n tokens.

    If the reference ends a completion after n tokens with probability ref(n), the optimum does so with probability
    ``optimal_distribution(ref, rewards, kl_coef=...)`` of n.
    """

    def completion_length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-abs(len(ids) - target) / target for ids in completion_ids]

    return completion_length


def optimal_distribution(ref_probs: Numbers, rewards: Numbers, *, kl_coef: float) -> Tensor:
    """The best distribution over the outcomes: ``ref_probs * exp(rewards / kl_coef) / Z``.

    Args:
        ref_probs: ``(N,)`` probability of each outcome under the reference.
        rewards: ``(N,)`` total reward of each outcome.
        kl_coef: Coefficient of the KL penalty, above 0.

    Returns:
        ``(N,)`` float64 probabilities.
    """
    return _log_weights(ref_probs, rewards, kl_coef).softmax(dim=0)


def optimal_probability(ref_prob: float, reward: float, *, kl_coef: float) -> float:
    """The best probability of an outcome of probability ``ref_prob`` that pays ``reward``, all others paying 0."""
    return optimal_distribution([ref_prob, 1 - ref_prob], [reward, 0.0], kl_coef=kl_coef)[0].item()


def _log_weights(ref_probs: Numbers, rewards: Numbers, kl_coef: float) -> Tensor:
    if not kl_coef > 0:
        raise ValueError(f"kl_coef={kl_coef} must be above 0: without a penalty the optimum is not unique.")
    ref, reward = (torch.as_tensor(x, dtype=torch.float64) for x in (ref_probs, rewards))
    return ref.log() + reward / kl_coef


LOWEST = {target_token: 0, token_count: 0, completion_length: 1}


def load(name: str) -> RewardFn:
    """The toy reward of a command-line name such as ``target_token=13``.

    Raises:
        ValueError: No toy has that name, or its number is missing or impossible.
    """
    toys = {toy.__name__: toy for toy in LOWEST}
    toy_name, _, number = name.partition("=")
    if toy_name not in toys:
        known = ", ".join(f"toy:{known}=<number>" for known in toys)
        raise ValueError(f"the reward 'toy:{name}' does not exist: choose one of {known}.")
    toy = toys[toy_name]
    if not number.isdecimal() or int(number) < LOWEST[toy]:
        raise ValueError(f"the reward 'toy:{name}' needs a whole number from {LOWEST[toy]}: toy:{toy_name}=13, say.")
    return toy(int(number))
