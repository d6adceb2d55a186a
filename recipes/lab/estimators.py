"""The lab, first part: bias and variance of every estimator, on samples of the language model against its exact gradient."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from grid import Problem, make_problem
from measure import exactly, measure
from problem import COMPLETIONS, make_model, next_logits, on_grid, pay
from torch import Tensor

from lmppo import PPOConfig
from lmppo.functional.exact import action_values, enumerate_completions, mean_given_state, state_values

KNOB = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
Weights = Callable[[Tensor], Tensor]
GROUP = 4
ALPHA = 1.0  # lam of a completion of 1 to 5 tokens: 0, 0.5, 0.67, 0.75, 0.8, or the floor if that is higher


def configure(**settings: Any) -> PPOConfig:
    """A configuration of the trainer, as it stands in a YAML file."""
    return PPOConfig(whiten_advantages=False, num_generations=GROUP, **settings)


def language_model() -> Problem:
    """The GPT-2's problem with its dense rewards, in float64."""
    model = make_model().double()
    return make_problem(lambda ids: next_logits(model, ids), list(model.parameters()), COMPLETIONS, on_grid(pay))


def true_critic(problem: Problem, *, gamma: float = 1.0, immediate: bool = False) -> Tensor:
    """(N, T) what the reward-to-go (or the immediate reward) is on average in each state."""
    if immediate:
        return mean_given_state(problem.completions, problem.logprobs, problem.rewards)
    return state_values(problem.completions, problem.logprobs, problem.rewards, gamma=gamma)


def wrong_critic(problem: Problem, **kwargs: Any) -> Tensor:
    """(N, T) the true values plus an error of its own in each state, of standard deviation 0.5."""
    generator = torch.Generator().manual_seed(9)
    errors = 0.5 * torch.randn(problem.completions.state_count, dtype=torch.float64, generator=generator)
    return true_critic(problem, **kwargs) + torch.where(
        problem.completions.mask, errors[problem.completions.states], 0.0
    )


def estimators(problem: Problem) -> dict[str, Weights]:
    """The weights (R, B, T) of batches of rows (R, B), by every estimator with every baseline it may have."""
    critics = {"true critic": true_critic, "wrong critic": wrong_critic}
    rows = {}

    def add(name: str, values: Tensor, **settings: Any) -> None:
        rows[name] = functools.partial(problem.weights, configure(**settings), values)

    for name in ("total_return", "rewards_to_go", "immediate_rewards"):
        for baseline in ("none", "batch_mean", "leave_one_out"):
            add(f"{name}, {baseline}", torch.zeros_like(problem.rewards), estimator=name, baseline=baseline)
        for critic, values in critics.items():
            add(f"{name}, {critic}", values(problem, immediate=name == "immediate_rewards"), estimator=name)
    q_values = action_values(problem.completions, problem.logprobs, problem.rewards)
    rows["Q, none"] = lambda rows: q_values[rows]
    rows["Q, true critic"] = lambda rows: (q_values - true_critic(problem))[rows]
    for critic, values in critics.items():
        for lam in (0.0, 0.5, 0.95, 1.0):
            add(f"gae lam {lam}, {critic}", values(problem), lam=lam)
        add(f"gae lam 0.5, adaptive, {critic}", values(problem), lam=0.5, adaptive_lam_alpha=ALPHA)
        add(f"gae lam 0.95, auto, {critic}", values(problem), lam=0.95, baseline="auto")
    return rows


def table(problem: Problem, sizes: Sequence[int], batches: int) -> dict[str, dict[str, Any]]:
    """Bias and variance of every estimator by batch size, as measured; and exactly, where no batch is needed."""
    every = torch.arange(len(problem.rewards)).unsqueeze(0)
    result: dict[str, dict[str, Any]] = {}
    for name, weights in estimators(problem).items():
        result[name] = {str(size): asdict(measure(problem, weights, batches=batches, size=size)) for size in sizes}
        if not any(word in name for word in ("batch_mean", "leave_one_out", "auto")):
            result[name]["exact"] = asdict(exactly(problem, weights(every)[0]))
    return result


def curves(problem: Problem, size: int, batches: int) -> dict[str, dict[str, Any]]:
    """Bias and variance over lam (on either critic) and over gamma (on the true critic of that gamma)."""
    every = torch.arange(len(problem.rewards)).unsqueeze(0)
    panels: dict[str, Callable[[float], tuple[PPOConfig, Tensor]]] = {
        "lam, true critic": lambda x: (configure(lam=x), true_critic(problem)),
        "lam, wrong critic": lambda x: (configure(lam=x), wrong_critic(problem)),
        "gamma, true critic": lambda x: (configure(gamma=x, lam=1.0), true_critic(problem, gamma=x)),
    }
    result: dict[str, dict[str, Any]] = {panel: {} for panel in panels}
    for panel, number in ((panel, number) for panel in panels for number in KNOB):
        weights = functools.partial(problem.weights, *panels[panel](number))
        measured = asdict(measure(problem, weights, batches=batches, size=size))
        exact = exactly(problem, weights(every)[0])
        result[panel][str(number)] = measured | {"exact_bias2": exact.bias2, "exact_variance": exact.variance / size}
    return result


def bandits(size: int, batches: int) -> dict[str, dict[str, Any]]:
    """Slot machines that pay by the arm alone, and machines that keep state; one distribution over arms per pull."""
    completions = enumerate_completions(vocab_size=3, horizon=4)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    pay_of_arm = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[completions.ids]
    pulled_before = (completions.ids == 0).cumsum(dim=1) - (completions.ids == 0).long()
    machines = {"stateless": pay_of_arm, "stateful": pay_of_arm * pulled_before}
    result: dict[str, dict[str, Any]] = {}
    for machine, rewards in machines.items():
        problem = make_problem(lambda ids: logits[ids.shape[1]].expand(len(ids), 3), [logits], completions, rewards)
        for name in ("immediate_rewards", "rewards_to_go"):
            weights = functools.partial(problem.weights, configure(estimator=name, baseline="none"), rewards)
            result[f"{machine}, {name}"] = asdict(measure(problem, weights, batches=batches, size=size))
    return result
