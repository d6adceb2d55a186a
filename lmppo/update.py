"""The update: one rollout's experience becomes exactly ``ppo_epochs * rollout_batch_size / minibatch_size`` steps.

(With ``critic_epochs`` the critic's epochs count as well: the steps are those of the longer of the two. A minibatch in
which no token counts has none. TRPO takes its one step without the optimizer, which is left to the critic.)

The loss of a minibatch is the mean over all its counted tokens. Every micro-batch of every process divides its sum by
that same global count, so that the gradient does not depend on how a minibatch is cut up.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lmppo.config import PPOConfig
from lmppo.experience import Experience, select_rows, trim
from lmppo.functional import (
    approx_kl,
    clip_fraction,
    clipped_value_loss,
    masked_mean,
    token_logprobs_and_entropy,
    token_mean_loss,
)
from lmppo.models import score_tokens
from lmppo.objectives import Penalties, policy_loss, reference_kl
from lmppo.sampling import NonFiniteError
from lmppo.step_zero import check_first_ratio
from lmppo.trpo import trpo_step

NO_PENALTIES = Penalties()


def minibatch_rows(n_rows: int, minibatch_size: int, *, seed: int, iteration: int, epoch: int) -> list[Tensor]:
    """A fresh permutation of the rows, cut into minibatches; a pure function of its arguments."""
    generator = np.random.Generator(np.random.Philox(key=[seed, iteration], counter=[0, 0, epoch, 2]))
    order = torch.from_numpy(generator.permutation(n_rows))
    return list(order.split(minibatch_size))


@dataclass(frozen=True)
class Learns:
    """Who learns from a minibatch: the policy, the critic, or both."""

    policy: bool
    critic: bool


BOTH = Learns(policy=True, critic=True)


def epochs_of(config: PPOConfig, *, policy_frozen: bool) -> list[Learns]:
    """Who learns in each pass over the rollout: the policy in its first ``ppo_epochs``, the critic in its own first."""
    policy = 0 if policy_frozen or config.objective == "trpo" else config.ppo_epochs
    critic = 0
    if config.uses_critic:
        critic = config.ppo_epochs if config.critic_epochs is None else config.critic_epochs
        if policy_frozen and config.critic_warmup_epochs is not None:
            critic = config.critic_warmup_epochs
    return [Learns(epoch < policy, epoch < critic) for epoch in range(max(policy, critic))]


def ppo_update(
    model: nn.Module,
    optimizer: Any,
    experience: Experience,
    config: PPOConfig,
    accelerator: Accelerator,
    *,
    iteration: int,
    policy_frozen: bool = False,
    penalties: Penalties = NO_PENALTIES,
    first_ratio_tolerance: float | None = None,
) -> dict[str, float]:
    """Take the optimizer steps of one PPO iteration.

    A minibatch in which no token counts (its completions were all cut, with ``truncation='mask'``) is passed over. With
    ``target_kl``, an optimizer step whose minibatch is already further than 1.5 times that from the old policy is
    not taken and ends the update.

    Args:
        model: Policy and critic, as prepared by the accelerator.
        optimizer: The optimizer, likewise.
        experience: The whole batch, the same on every process; each process trains on its share of every minibatch.
        config: The configuration.
        accelerator: Runs backward passes and reduces over processes.
        iteration: The PPO iteration.
        policy_frozen: Only the critic learns (its warm-up).
        penalties: Prices of the KL to the old and to the reference policy, where they are terms of the loss.
        first_ratio_tolerance: If given, the largest |log ratio| allowed on the first minibatch, where it must be 0.

    Returns:
        Means over the steps taken (of means over each minibatch's counted tokens), ``grad_norm`` (mean before clipping),
        ``optimizer_steps``, and ``first_ratio_error``: the largest |log ratio| on the first minibatch, which rounding
        alone explains.

    Raises:
        NonFiniteError: A loss or a gradient is not finite; the step was not taken.
        StepZeroError: The first minibatch's log-probabilities are not those of the rollout; no step was taken.
    """
    history: list[dict[str, float]] = []
    steps = 0
    if config.objective == "trpo" and not policy_frozen:
        history.append(
            trpo_step(
                model, experience, config, accelerator, iteration=iteration, first_ratio_tolerance=first_ratio_tolerance
            )
        )
    n_rows = len(experience.completion_mask)
    for epoch, learns in enumerate(epochs_of(config, policy_frozen=policy_frozen)):
        schedule = minibatch_rows(n_rows, config.minibatch_size, seed=config.seed, iteration=iteration, epoch=epoch)
        for rows in schedule:
            minibatch = select_rows(experience, rows.to(experience.completion_mask.device))
            if not minibatch.completion_mask.any():
                continue  # a step with a gradient of 0 would still go on with the momentum
            optimizer.zero_grad()
            stats = accumulate_gradients(model, minibatch, config, accelerator, learns, penalties)
            if not history and first_ratio_tolerance is not None:
                check_first_ratio(stats, first_ratio_tolerance)
            if config.target_kl is not None and learns.policy and stats["approx_kl"] > 1.5 * config.target_kl:
                optimizer.zero_grad()
                return _summary(history or [stats], stopped=True, steps=steps)
            stats["grad_norm"] = take_step(model, optimizer, config, accelerator, stats, iteration)
            history.append(stats)
            steps += 1
    return _summary(history, stopped=False, steps=steps)


def accumulate_gradients(
    model: nn.Module,
    minibatch: Experience,
    config: PPOConfig,
    accelerator: Accelerator,
    learns: Learns = BOTH,
    penalties: Penalties = NO_PENALTIES,
) -> dict[str, float]:
    """The gradient of the minibatch's loss, micro-batch by micro-batch, over all processes; and what was seen."""
    n_tokens = int(minibatch.completion_mask.sum())
    mine = select_rows(minibatch, slice(accelerator.process_index, None, accelerator.num_processes))
    totals: dict[str, Tensor] = {}
    micros = list(_micro_batches(mine, config.micro_batch_size))
    for i, micro in enumerate(micros):
        last = i + 1 == len(micros)
        with accelerator.autocast(), accelerator.no_sync(model) if not last else nullcontext():
            loss, sums = ppo_loss(model, micro, config, learns, penalties, token_count=n_tokens)
            # DDP averages over processes; each process's loss is its share of the global mean, so undo that.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in sums.items():
            previous = totals.get(name)
            join = torch.maximum if name.endswith("_max") else torch.add
            totals[name] = value if previous is None else join(previous, value)
    return _reduce(totals, n_tokens, accelerator)


def ppo_loss(
    model: nn.Module,
    micro: Experience,
    config: PPOConfig,
    learns: Learns = BOTH,
    penalties: Penalties = NO_PENALTIES,
    *,
    token_count: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the loss ``policy + kl_coef * kl - ent_coef * entropy + vf_coef * value``.

    Args:
        model: Policy and critic.
        micro: The rows.
        config: Gives the objective, its clips and coefficients.
        learns: The terms of whoever does not learn are left out (and their forward passes, as far as possible).
        penalties: Prices of the KL to the old and to the reference policy.
        token_count: Counted tokens of the whole minibatch.

    Returns:
        The loss, and sums over counted tokens for the metrics.
    """
    mask = micro.completion_mask
    logits, values = model(
        micro.prompt_ids, micro.prompt_mask, micro.completion_ids, mask,
        values_only=not learns.policy, policy_only=not learns.critic,
    )  # fmt: skip
    per_token = torch.zeros_like(micro.advantages)
    sums: dict[str, Tensor] = {}
    if learns.critic:
        value_loss, sums = _value_loss(values, micro, config)
        per_token = per_token + config.vf_coef * value_loss
    if learns.policy:
        policy_terms, policy_sums = _policy_loss(logits, micro, config, penalties)
        per_token, sums = per_token + policy_terms, sums | policy_sums
    return token_mean_loss(per_token, mask, token_count=token_count), sums


def _value_loss(values: Tensor, micro: Experience, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    losses = [
        clipped_value_loss(
            values[..., k],
            micro.old_values[..., k],
            micro.returns[..., k],
            micro.completion_mask,
            clip_range=config.value_clip_range,
        )
        for k in range(values.shape[-1])
    ]
    value_loss = torch.stack(losses).sum(dim=0)
    return value_loss, {"value_loss": value_loss.detach().sum(), **_value_sums(values.detach(), micro, config)}


def _policy_loss(
    logits: Tensor, micro: Experience, config: PPOConfig, penalties: Penalties
) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs, entropy = token_logprobs_and_entropy(
        logits, micro.completion_ids, temperature=config.temperature, support=micro.support
    )
    loss = policy_loss(logprobs, micro, config, penalties)
    entropy = torch.where(micro.completion_mask, entropy, 0.0)
    sums = {"policy_loss": loss.detach().sum(), "entropy": entropy.detach().sum()}
    if config.ent_coef > 0:
        loss = loss - config.ent_coef * entropy
    if penalties.kl_coef > 0:
        kl = reference_kl(logits, logprobs, micro, config, penalties)
        loss = loss + penalties.kl_coef * kl
        sums["kl_loss"] = kl.detach().sum()
    return loss, sums | _ratio_sums(logprobs.detach(), micro, config)


def logprobs_now(model: nn.Module, experience: Experience, config: PPOConfig, accelerator: Accelerator) -> Tensor:
    """``(B, T)`` log-probabilities of the rollout's tokens under the policy as it is now, on every process."""
    share = len(experience.completion_mask) // accelerator.num_processes
    mine = select_rows(experience, slice(accelerator.process_index * share, (accelerator.process_index + 1) * share))
    actor_critic = accelerator.unwrap_model(model)
    with accelerator.autocast():
        logprobs = score_tokens(
            lambda *batch: actor_critic(*batch, policy_only=True)[0], mine, config.temperature, config.micro_batch_size
        )
    return accelerator.gather(logprobs)


def _ratio_sums(logprobs: Tensor, micro: Experience, config: PPOConfig) -> dict[str, Tensor]:
    mask, old = micro.completion_mask, micro.old_logprobs
    log_ratio = torch.where(mask, logprobs - old, 0.0)
    means = {
        "approx_kl": approx_kl(logprobs, old, mask),
        "clip_frac": clip_fraction(
            logprobs, old, mask, clip_range=config.clip_range, clip_range_high=config.clip_range_high
        ),
        "ratio": masked_mean(log_ratio.exp(), mask),
    }
    return {name: mean * mask.sum() for name, mean in means.items()} | {"log_ratio_max": log_ratio.abs().max()}


def _value_sums(values: Tensor, micro: Experience, config: PPOConfig) -> dict[str, Tensor]:
    if config.value_clip_range is None:
        return {"value_clip_frac": values.new_zeros(())}
    moved = (values - micro.old_values).abs() > config.value_clip_range
    return {"value_clip_frac": (moved.any(dim=-1) & micro.completion_mask).float().sum()}


def _micro_batches(experience: Experience, size: int) -> Iterator[Experience]:
    for start in range(0, len(experience.completion_mask), size):
        yield trim(select_rows(experience, slice(start, start + size)))


def _reduce(totals: dict[str, Tensor], n_tokens: int, accelerator: Accelerator) -> dict[str, float]:
    """Sums over all processes, as means over the minibatch's counted tokens (names ending in _max: the largest)."""
    names = [name for name in totals if not name.endswith("_max")]
    sums = accelerator.reduce(torch.stack([totals[n] for n in names]).float(), reduction="sum") / n_tokens
    stats = dict(zip(names, sums.tolist(), strict=True))
    for name in set(totals) - set(names):
        stats[name] = accelerator.gather(totals[name].reshape(1)).max().item()
    return stats


def take_step(
    model: nn.Module,
    optimizer: Any,
    config: PPOConfig,
    accelerator: Accelerator,
    stats: dict[str, float],
    iteration: int,
) -> float:
    """Clip the gradient and step, unless something is not finite.

    Raises:
        NonFiniteError: Names the parameter whose gradient is not finite; nothing was changed.
    """
    accelerator.unscale_gradients()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not (norm.isfinite() and all(np.isfinite(value) for value in stats.values())):
        culprit = next(
            (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()),
            "none: the loss itself",
        )
        raise NonFiniteError(
            f"Iteration {iteration}: the loss or its gradient is not finite (first parameter: {culprit}; "
            f"losses: {stats}). The step was not taken. Lower learning_rate, or look at the rewards of this batch."
        )
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.max_grad_norm, norm)
    optimizer.step()
    return norm.item()


def _summary(history: list[dict[str, float]], *, stopped: bool, steps: int) -> dict[str, float]:
    names = sorted({name for row in history for name in row} - {"log_ratio_max"})
    summary = {name: float(np.mean([row[name] for row in history if name in row])) for name in names}
    summary["first_ratio_error"] = history[0].get("log_ratio_max", 0.0) if history else 0.0
    return summary | {"optimizer_steps": float(steps), "early_stop": float(stopped)}
