"""AdamW, and the learning rate as a pure function of the iteration: nothing to save, nothing to step twice."""

import math
from typing import Any

import torch
from torch import nn

from lmppo.models import ActorCritic
from lmppo.protocols import Optimizer
from lmppo.settings import OptimizerSettings, ScheduleSettings

HEAD_STEP = 0.5
"""How far one step of AdamW moves a value at most, in units of the reward, if nothing says how fast a value head learns."""


def make_optimizer(model: ActorCritic, args: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with groups of parameters for the policy, a critic of its own and a value head, as far as there are such.

    Each group has its rate as ``initial_lr``, which the schedule starts from.

    Raises:
        ValueError: Every parameter of the policy is frozen.
    """
    policy = model.policy_parameters()
    if not policy:
        raise ValueError(
            "The policy has no trainable parameters. Load an adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True)."
        )
    groups = [_group(policy, args.learning_rate)]
    if model.critic is not None:
        own = [p for p in model.critic.parameters() if p.requires_grad]
        groups.append(_group(own, args.critic_learning_rate or args.learning_rate))
    if model.value_head is not None:
        head = list(model.value_head.parameters())
        groups.append(_group(head, args.critic_learning_rate or model.head_learning_rate(HEAD_STEP)))
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=fused)


def _group(parameters: list[nn.Parameter], rate: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, "initial_lr": rate}


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
    """Set the rates of the optimizer's groups for this iteration; the policy's, and that of the value head or critic."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(iteration, group["initial_lr"], config)
    return optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]
