"""``truncation: mask`` by enumeration: which rows count depends on their future, so a baseline is no longer free.

Leaving out the completions that were cut aims at ``E[R; ended]``, the return of those that end. Given the state, whether
the completion will end depends on the token: ``E[grad log pi(a_t|s_t) 1[ended] | s_t]`` is not 0, EGLP fails, and
what was earned before a token or is expected in its state does not drop out.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from lmppo import PPOConfig
from lmppo.estimators import estimate
from lmppo.functional.exact import state_values
from lmppo.records import Rollout, Tokens
from lmppo.support import Support

sys.path.insert(0, str(Path(__file__).parent / "functional"))
from problems import assert_equal, problem  # noqa: E402

EOS = 0


@pytest.fixture(scope="module")
def p():
    return problem("eos")


def ended(p):
    return (p.mask & (p.completions.ids == EOS)).any(dim=1)


def rollout(p):
    """All completions, with the true value of every state."""
    n, logprobs = len(p.mask), p.logprobs.detach()
    values = state_values(p.completions, logprobs, p.rewards)
    return Rollout(
        tokens=Tokens(
            prompt_ids=torch.ones(n, 1, dtype=torch.long),
            prompt_mask=torch.ones(n, 1, dtype=torch.bool),
            completion_ids=p.completions.ids,
            completion_mask=p.mask,
        ),
        support=Support.of_all(*p.mask.shape),
        logprobs=logprobs,
        ref_logprobs=logprobs,
        ref_support_logprobs=torch.zeros_like(logprobs),
        values=values.unsqueeze(-1),
        scores=p.rewards.unsqueeze(-1),
        kl_penalty=torch.zeros_like(logprobs),
        bootstrap_values=torch.zeros(n, 1),
        ended=ended(p),
        max_logit=torch.zeros(len(ended(p))),
    )


def error(p, truth, **settings):
    """Length of what the expected estimate is off by, in lengths of the true gradient."""
    config = PPOConfig(whiten_advantages=False, **settings)
    full = rollout(p)
    estimated = p.estimate(estimate(full, full.scores, config).advantages)
    return ((estimated - truth).norm() / truth.norm()).item()


ESTIMATORS = {
    "total_return": {"estimator": "total_return", "baseline": "none"},
    "rewards_to_go": {"estimator": "rewards_to_go", "baseline": "none"},
    "gae, true critic": {"estimator": "gae", "lam": 1.0},
    "total_return, true critic": {"estimator": "total_return"},
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_with_mask_only_the_total_return_without_a_baseline_is_exact(p, name):
    off = error(p, p.true_gradient(p.rewards * ended(p).unsqueeze(1)), truncation="mask", **ESTIMATORS[name])
    assert off < 1e-12 if name == "total_return" else off > 0.3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_with_end_all_of_them_are(p, name):
    assert error(p, p.true_gradient(), truncation="end", **ESTIMATORS[name]) < 1e-12


def test_a_reward_on_the_last_token_makes_rewards_to_go_the_total_return(p):
    """Nothing was earned before; a baseline is as wrong as ever."""
    last = p.mask & (p.mask.flip(1).cumsum(1).flip(1) == 1)
    sparse = dataclasses.replace(p, rewards=torch.where(last, p.rewards.sum(dim=1, keepdim=True), 0.0))
    truth = sparse.true_gradient(sparse.rewards * ended(p).unsqueeze(1))
    assert error(sparse, truth, truncation="mask", **ESTIMATORS["rewards_to_go"]) < 1e-12
    assert error(sparse, truth, truncation="mask", **ESTIMATORS["gae, true critic"]) > 0.3


def test_the_lemma_fails_by_the_chance_to_end(p):
    """With a baseline of 1 in every state the estimate moves by minus the mean of the score of those that end."""
    scored = p.expected_loss_gradient(lambda logprobs: -logprobs * ended(p).unsqueeze(1))
    assert scored.abs().max() > 0.05
    ones = dataclasses.replace(rollout(p), values=p.mask.double().unsqueeze(-1))
    config = PPOConfig(whiten_advantages=False, truncation="mask", estimator="total_return")
    bare = dataclasses.replace(config, baseline="none")
    moved = [p.estimate(estimate(ones, ones.scores, c).advantages) for c in (config, bare)]
    assert_equal(moved[0] - moved[1], -scored)
