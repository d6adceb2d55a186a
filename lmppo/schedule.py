"""The learning rate, a pure function of the iteration, so there is no scheduler state; and the critic's warm-up."""

import math
from dataclasses import dataclass
from typing import Any

from lmppo.config import PPOConfig


def learning_rate_at(iteration: int, base: float, config: PPOConfig) -> float:
    """The learning rate of one PPO iteration.

    It rises linearly over the first ``warmup_steps`` iterations, ``base * (i + 1) / (warmup_steps + 1)``, and then
    stays (``constant``), falls linearly to 0 at ``max_steps`` (``linear``), or as half a cosine (``cosine``).

    Args:
        iteration: From 0.
        base: The peak rate.
        config: Its ``lr_scheduler_type``, ``warmup_steps`` and ``max_steps`` are used.
    """
    if iteration < config.warmup_steps:
        return base * (iteration + 1) / (config.warmup_steps + 1)
    done = (iteration - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return base * max(0.0, 1.0 - done)
    if config.lr_scheduler_type == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return base


def set_learning_rates(optimizer: Any, iteration: int, config: PPOConfig) -> tuple[float, float]:
    """Set the learning rates of the optimizer's two groups, policy and critic, for this iteration, and return them."""
    bases = (config.learning_rate, config.critic_learning_rate or config.learning_rate)
    rates = tuple(learning_rate_at(iteration, base, config) for base in bases)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return rates[0], rates[1]


@dataclass
class CriticWarmup:
    """The initial iterations, which train only the critic, with the policy frozen (VC-PPO, arXiv 2503.01491).

    Args:
        steps: Maximum number of iterations.
        explained_variance: End early once the critic's explained variance of a batch's Monte-Carlo returns reaches
            this value. None: never end early.
    """

    steps: int
    explained_variance: float | None = None
    over: bool = False

    def freezes(self, iteration: int, explained_variance: float) -> bool:
        """Whether the policy is frozen in this iteration, given the critic's explained variance of its batch."""
        enough = self.explained_variance is not None and explained_variance >= self.explained_variance
        self.over = self.over or enough or iteration >= self.steps
        return not self.over

    def state_dict(self) -> dict[str, bool]:
        """What a resumed run needs."""
        return {"over": self.over}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Continue from a saved state."""
        self.over = bool(state["over"])
