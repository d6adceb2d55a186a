"""AdamW, and the learning rate as a pure function of the iteration: nothing to save, nothing to step twice."""

import math

import torch

from lmppo.models import ActorCritic
from lmppo.protocols import Optimizer
from lmppo.settings import OptimizerSettings, ScheduleSettings


def make_optimizer(model: ActorCritic, args: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with the policy's parameters in one group and the critic's own in another.

    Raises:
        ValueError: Every parameter of the policy is frozen.
    """
    groups = [{"params": model.policy_parameters()}, {"params": model.critic_parameters()}]
    if not groups[0]["params"]:
        raise ValueError(
            "The policy has no trainable parameters. Load an adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True)."
        )
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=fused
    )


def learning_rate_at(iteration: int, base: float, config: ScheduleSettings) -> float:
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


def set_learning_rates(optimizer: Optimizer, iteration: int, config: ScheduleSettings) -> tuple[float, float]:
    """Set the learning rates of the optimizer's two groups, policy and critic, for this iteration, and return them."""
    bases = (config.learning_rate, config.critic_learning_rate or config.learning_rate)
    rates = tuple(learning_rate_at(iteration, base, config) for base in bases)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return rates[0], rates[1]
