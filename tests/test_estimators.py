"""From a rollout to advantages and returns, each against its definition written out with loops."""

import dataclasses

import pytest
import torch
from test_experience import make_rollout

from lmppo import PPOConfig
from lmppo.estimators import estimate, shape_rewards

ROWS = ("11111", "11000", "10000", "11010")  # full, short, one token, a gap
GAMMA, LAM = 0.9, 0.8


@pytest.fixture
def rollout():
    return make_rollout(prompt=("11",) * 4, completion=ROWS)


def config(estimator, **settings):
    return PPOConfig(estimator=estimator, gamma=GAMMA, lam=LAM, **({"whiten_advantages": False} | settings))


def counted(rollout, tensor, row):
    return tensor[row][rollout.completion_mask[row]].flatten().tolist()


def by_definition(estimator, rewards, values):
    """(advantage, target) of each token of one completion."""
    n = len(rewards)
    to_go = [sum(GAMMA ** (u - t) * rewards[u] for u in range(t, n)) for t in range(n)]
    deltas = [rewards[t] + (GAMMA * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    gae = [sum((GAMMA * LAM) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
    return {
        "gae": (gae, [g + v for g, v in zip(gae, values, strict=True)]),
        "rewards_to_go": ([r - v for r, v in zip(to_go, values, strict=True)], to_go),
        "total_return": ([to_go[0] - v for v in values], to_go),
        "immediate_rewards": ([r - v for r, v in zip(rewards, values, strict=True)], rewards),
    }[estimator]


@pytest.mark.parametrize("estimator", ["gae", "rewards_to_go", "total_return", "immediate_rewards"])
def test_each_estimator_is_its_definition(rollout, estimator):
    rewards = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(2))
    advantages, returns = estimate(rollout, rewards, config(estimator))
    for row in range(len(ROWS)):
        expected = by_definition(estimator, counted(rollout, rewards, row), counted(rollout, rollout.values, row))
        assert counted(rollout, advantages, row) == pytest.approx(expected[0], abs=1e-5)
        assert counted(rollout, returns, row) == pytest.approx(expected[1], abs=1e-5)
    assert advantages[~rollout.completion_mask].eq(0).all() and returns[~rollout.completion_mask].eq(0).all()


def test_whitening_is_over_all_counted_tokens_of_the_batch(rollout):
    rewards = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(2))
    plain, returns = estimate(rollout, rewards, config("gae"))
    white, same_returns = estimate(rollout, rewards, config("gae", whiten_advantages=True))
    x = plain[rollout.completion_mask]
    torch.testing.assert_close(white[rollout.completion_mask], (x - x.mean()) / x.std(correction=0))
    assert torch.equal(returns, same_returns), "the critic's targets keep their unit"


def test_padding_never_matters(rollout):
    rewards = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(2))
    poison = rollout.completion_mask[..., None]
    poisoned = dataclasses.replace(rollout, values=torch.where(poison, rollout.values, torch.nan))
    for estimator in ("gae", "rewards_to_go", "total_return", "immediate_rewards"):
        settings = config(estimator, whiten_advantages=True)
        clean = estimate(rollout, rewards, settings)
        dirty = estimate(poisoned, torch.where(poison, rewards, 1e30), settings)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True)), estimator


def test_two_streams_are_two_estimates_that_share_the_policy():
    """Each stream has a critic of its own; the policy gets the sum, and only the first pays for KL."""
    rollout = make_rollout(prompt=("11",) * 4, completion=ROWS, streams=2)
    rewards = shape_rewards(rollout, kl_coef=0.5)
    mask = rollout.completion_mask
    torch.testing.assert_close(rewards[mask][:, 0], rollout.scores[mask][:, 0] - 0.5 * rollout.kl_to_ref[mask])
    torch.testing.assert_close(rewards[mask][:, 1], rollout.scores[mask][:, 1])
    advantages, returns = estimate(rollout, rewards, config("gae"))
    parts = []
    for k in range(2):
        one = dataclasses.replace(rollout, values=rollout.values[..., k : k + 1], scores=rollout.scores[..., k : k + 1])
        parts.append(estimate(one, rewards[..., k : k + 1], config("gae")))
    torch.testing.assert_close(advantages, parts[0][0] + parts[1][0])
    torch.testing.assert_close(returns, torch.cat([parts[0][1], parts[1][1]], dim=-1))


def test_a_score_on_the_last_token_and_a_penalty_on_every_token():
    """Finished, cut, and one-token completions: the score stands on the last counted token, EOS included."""
    rollout = make_rollout(prompt=("11",) * 3, completion=("1111", "1100", "1000"))
    scores = torch.zeros(3, 4, 1)
    for row, last in enumerate((3, 1, 0)):
        scores[row, last] = 10.0 + row
    rewards = shape_rewards(dataclasses.replace(rollout, scores=scores), kl_coef=0.1)[..., 0]
    for row, last in enumerate((3, 1, 0)):
        kl = (rollout.logprobs - rollout.ref_logprobs)[row]
        expected = [-0.1 * kl[t].item() + (10.0 + row if t == last else 0.0) for t in range(last + 1)]
        assert rewards[row, : last + 1].tolist() == pytest.approx(expected, abs=1e-5)
        assert rewards[row, last + 1 :].eq(0).all()
