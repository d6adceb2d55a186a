"""Toy rewards, and their optima held against brute force over all completions."""

import itertools
import math

import pytest
import torch

from lmppo.rewards import RewardSet
from reward_models import load
from reward_models.toy import (
    completion_length,
    optimal_distribution,
    optimal_probability,
    target_token,
    token_count,
)

IDS = [[13, 5, 13], [5], [13]]


def rewards_of(function, ids=IDS):
    return function(prompts=[""] * len(ids), completions=[""] * len(ids), completion_ids=ids)


def test_rewards_by_hand():
    assert rewards_of(target_token(13)) == [[1, 0, 1], [0], [1]]
    assert rewards_of(token_count(13)) == [2, 0, 1]
    assert rewards_of(completion_length(2)) == [-0.5, -0.5, -0.5]
    assert rewards_of(completion_length(4), [[1] * 4, [1] * 6, [1]]) == [0, -0.5, -0.75]


def test_the_dense_and_the_sparse_reward_have_one_total():
    scores = RewardSet([target_token(13), token_count(13)]).score([""] * 3, [""] * 3, IDS, {}, None, 3)
    assert torch.equal(scores.per_function[:, 0], scores.per_function[:, 1])
    assert scores.token_scores[..., 0].tolist() == [[1, 0, 3], [0, 0, 0], [2, 0, 0]]


def objective(policy: list[float], ref: list[float], rewards: list[float], kl_coef: float) -> float:
    """E[R] - kl_coef * KL(policy || ref), from the definition."""
    return sum(p * (r - kl_coef * math.log(p / q)) for p, q, r in zip(policy, ref, rewards, strict=True) if p > 0)


@pytest.mark.parametrize("kl_coef", [0.05, 0.5, 3.0])
def test_no_distribution_is_better_than_the_optimum(kl_coef):
    ref, rewards = [0.5, 0.3, 0.15, 0.05], [0.0, -1.0, 0.4, 2.0]
    best = optimal_distribution(ref, rewards, kl_coef=kl_coef)
    assert best.sum().item() == pytest.approx(1, abs=1e-12)
    value = objective(best.tolist(), ref, rewards, kl_coef)
    total = sum(q * math.exp(r / kl_coef) for q, r in zip(ref, rewards, strict=True))
    assert value == pytest.approx(kl_coef * math.log(total), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1.0):
        for _ in range(200):
            noise = scale * torch.randn(4, generator=generator, dtype=torch.float64)
            other = (best.clamp(min=1e-300).log() + noise).softmax(dim=0)
            assert objective(other.tolist(), ref, rewards, kl_coef) <= value + 1e-12


@pytest.mark.parametrize("kl_coef", [0.25, 1.0])
@pytest.mark.parametrize("reward", [target_token(2), token_count(2)])
def test_the_target_token_optimum_by_enumeration(reward, kl_coef):
    """All 3^4 completions of 4 independent tokens: each token of the best distribution over them is the formula."""
    ref, length = [0.6, 0.3, 0.1], 4
    completions = list(itertools.product(range(3), repeat=length))
    ref_probs = [math.prod(ref[token] for token in completion) for completion in completions]
    scores = RewardSet(reward).score([""] * 81, [""] * 81, [list(c) for c in completions], {}, None, length)
    totals = scores.token_scores[..., 0].sum(dim=1).tolist()
    weights = [p * math.exp(r / kl_coef) for p, r in zip(ref_probs, totals, strict=True)]  # straight from the equation
    for position in range(length):
        drawn = sum(w for w, c in zip(weights, completions, strict=True) if c[position] == 2) / sum(weights)
        assert drawn == pytest.approx(optimal_probability(0.1, 1.0, kl_coef=kl_coef), abs=1e-9)


def test_the_length_optimum_by_enumeration():
    """Tokens a, b, EOS with fixed probabilities, at most 5 tokens: only the length counts."""
    ref, kl_coef, longest, target = {"a": 0.5, "b": 0.2, "EOS": 0.3}, 0.3, 5, 3
    weights, by_length = {}, [0.0] * longest
    for n in range(1, longest + 1):
        last = ["EOS"] if n < longest else list(ref)
        for tokens in itertools.product(*[["a", "b"]] * (n - 1), last):
            p = math.prod(ref[token] for token in tokens)
            by_length[n - 1] += p
            weights[tokens] = p * math.exp(-abs(n - target) / target / kl_coef)
    assert sum(by_length) == pytest.approx(1)
    rewards = rewards_of(completion_length(target), [[0] * n for n in range(1, longest + 1)])
    best = optimal_distribution(by_length, rewards, kl_coef=kl_coef)
    for n in range(1, longest + 1):
        share = sum(w for tokens, w in weights.items() if len(tokens) == n) / sum(weights.values())
        assert best[n - 1].item() == pytest.approx(share, abs=1e-12)


def test_the_optimum_at_its_limits():
    assert optimal_probability(0.1, 1.0, kl_coef=1e9) == pytest.approx(0.1, abs=1e-6)
    assert optimal_probability(0.1, 1.0, kl_coef=1e-9) == pytest.approx(1.0)
    assert optimal_probability(0.0, 1.0, kl_coef=0.1) == 0.0  # what the reference never does stays undone
    with pytest.raises(ValueError, match="kl_coef=0 must be above 0"):
        optimal_probability(0.1, 1.0, kl_coef=0)


def test_command_line_names():
    assert rewards_of(load("toy:target_token=13")) == rewards_of(target_token(13))
    assert rewards_of(load("toy:token_count=5")) == rewards_of(token_count(5))
    assert rewards_of(load("toy:completion_length=8")) == rewards_of(completion_length(8))
    assert RewardSet([load("toy:token_count=0"), load("toy:completion_length=1")]).names == [
        "token_count",
        "completion_length",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy:nothing", "'toy:nothing' does not exist: choose one of toy:target_token=<number>, toy:token_count"),
        ("toy:", "does not exist: choose one of"),
        ("toy:target_token", "'toy:target_token' needs a whole number from 0"),
        ("toy:target_token=", "needs a whole number"),
        ("toy:target_token=-1", "needs a whole number"),
        ("toy:target_token=1.5", "needs a whole number"),
        ("toy:target_token=__import__('os')", "needs a whole number"),
        ("toy:completion_length=0", "needs a whole number from 1"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)
