"""The lab, fourth part: what each truncation mode estimates of completions that were cut. Nothing is drawn here.

The model stops after five tokens, whether it has ended or not. What a cut completion is worth is a choice, and each
choice is a target: rewards whose expected sum is to rise. An estimate is held against its own target's gradient.
"""

import dataclasses
from dataclasses import asdict
from typing import Any

import torch
from estimators import configure, true_critic, wrong_critic
from grid import Problem
from measure import exactly
from problem import COMPLETIONS, END, MASK, TOKENS, make_model, next_logits, pay
from torch import Tensor

from lmppo.estimators import estimate, shape_rewards

ENDED = (MASK & (COMPLETIONS.ids == END)).any(dim=1)
LAST_OF_CUT = torch.zeros_like(MASK).index_fill(1, torch.tensor([MASK.shape[1] - 1]), True) & ~ENDED.unsqueeze(1)


def truncation(problem: Problem) -> dict[str, dict[str, Any]]:
    """Exact bias of each mode, in units of its target's squared gradient length, and the variance of one completion."""
    after = value_after_the_cut()
    five, penalized = "the pay of five tokens", "that, less 1 where it is cut"
    six, ended = "the pay of six tokens", "the pay of those that end"
    rewards = {
        five: problem.rewards,
        six: problem.rewards + LAST_OF_CUT * after.unsqueeze(1),
        penalized: problem.rewards - LAST_OF_CUT.double(),
        ended: problem.rewards * ENDED.unsqueeze(1),
    }
    targets = {name: dataclasses.replace(problem, rewards=given) for name, given in rewards.items()}
    result = {}

    def add(name: str, target: str, values: Tensor, after: Tensor = after, **settings: Any) -> None:
        config = configure(**settings)
        rollout = dataclasses.replace(problem.rollout(values), ended=ENDED, bootstrap_values=after.unsqueeze(1))
        weights = estimate(rollout, shape_rewards(rollout, config, kl_coef=0.0), config).advantages
        result[name] = {"target": target} | asdict(exactly(targets[target], weights))

    true = {name: true_critic(target) for name, target in targets.items()}
    noise = torch.randn(len(after), dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    wrong_after = torch.where(ENDED, 0.0, after + 0.5 * noise)
    no_critic = {"truncation": "mask", "baseline": "none"}
    add("end, true critic", five, true[five], truncation="end")
    add("end, true critic of five tokens", six, true[five], truncation="end")
    add("bootstrap, true critic", six, true[six], truncation="bootstrap")
    add("bootstrap, wrong critic", six, wrong_critic(targets[six]), wrong_after, truncation="bootstrap")
    add("penalty, true critic", penalized, true[penalized], truncation="penalty")
    add("mask, total_return, none", ended, true[ended], estimator="total_return", **no_critic)
    add("mask, rewards_to_go, none", ended, true[ended], estimator="rewards_to_go", **no_critic)
    add("mask, gae lam 1.0, true critic", ended, true[ended], lam=1.0, truncation="mask")
    return result


@torch.no_grad()
def value_after_the_cut() -> Tensor:
    """``(N,)`` what a sixth token would earn on average; 0 after a completion that ended."""
    cut = COMPLETIONS.ids[~ENDED]
    chances = next_logits(make_model().double(), cut).softmax(dim=1)
    earned = torch.tensor([[pay([*ids, token])[-1] for token in range(len(TOKENS))] for ids in cut.tolist()])
    after = torch.zeros(len(ENDED), dtype=torch.float64)
    after[~ENDED] = (chances * earned).sum(dim=1)
    return after
