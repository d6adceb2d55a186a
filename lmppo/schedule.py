"""The learning rate as a pure function of the iteration: nothing to save, nothing to step twice."""

import math

from lmppo.config import PPOConfig


def learning_rate_at(iteration: int, base: float, config: PPOConfig) -> float:
    """The learning rate of one PPO iteration.

    It rises linearly over the first ``warmup_steps`` iterations, ``base * (i + 1) / (warmup_steps + 1)``, and then
    stays (``constant``), falls linearly to 0 at ``max_steps`` (``linear``), or as half a cosine (``cosine``).

    Args:
        iteration: From 0.
        base: The rate at its highest.
        config: Gives ``lr_scheduler_type``, ``warmup_steps`` and ``max_steps``.
    """
    if iteration < config.warmup_steps:
        return base * (iteration + 1) / (config.warmup_steps + 1)
    done = (iteration - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return base * max(0.0, 1.0 - done)
    if config.lr_scheduler_type == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return base
