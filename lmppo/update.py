"""The update: one rollout's experience becomes exactly ``ppo_epochs * rollout_batch_size / minibatch_size`` steps.

(With ``critic_epochs`` the critic's epochs count as well: the steps are those of the longer of the two. A minibatch in
which no token counts has none, nor one that is too far from the old policy; after that the critic learns alone. TRPO takes
its one step without the optimizer, which is left to the critic.)

The loss of a minibatch is the mean over all its counted tokens. Every micro-batch of every process divides its sum by
that same global count, so that the gradient does not depend on how a minibatch is cut up.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lmppo.checks import check_first_ratio, check_gradients
from lmppo.loss import Penalties, ppo_loss
from lmppo.models import HEADS, Sums, join_sums, recomputing, score_tokens
from lmppo.protocols import Optimizer
from lmppo.records import Experience
from lmppo.settings import UpdateSettings


def minibatch_rows(n_rows: int, minibatch_size: int, *, seed: int, iteration: int, epoch: int) -> list[Tensor]:
    """A fresh permutation of the rows, cut into minibatches; a pure function of its arguments."""
    generator = np.random.Generator(np.random.Philox(key=[seed, iteration], counter=[0, 0, epoch, 2]))
    order = torch.from_numpy(generator.permutation(n_rows))
    return list(order.split(minibatch_size))


def ppo_update(
    model: nn.Module,
    optimizer: Optimizer,
    experience: Experience,
    config: UpdateSettings,
    accelerator: Accelerator,
    *,
    iteration: int,
    penalties: Penalties | None = None,
    first_ratio_tolerance: float | None = None,
) -> dict[str, float]:
    """Take the optimizer steps of one PPO iteration: ``ppo_epochs`` passes over the rollout.

    The critic learns in its own first ``critic_epochs`` passes (default: all), beyond the policy's if there are more.
    A minibatch in which no token counts (its completions were all cut, with ``truncation='mask'``) is passed over. An
    optimizer step whose minibatch is already further than 1.5 * ``target_kl`` from the old policy is not taken, and is the
    policy's last of this rollout; the critic learns in the passes that are left.

    Args:
        model: Policy and critic, as prepared by the accelerator.
        optimizer: The optimizer, likewise.
        experience: The whole batch, the same on every process; each process trains on its share of every minibatch.
        config: The configuration.
        accelerator: Runs backward passes and reduces over processes.
        iteration: The PPO iteration.
        penalties: Prices of the KL to the old and to the reference policy, where they are terms of the loss.
        first_ratio_tolerance: If given, the largest |log ratio| allowed on the first minibatch, where it must be 0.

    Returns:
        Means over the steps taken (of means over each minibatch's counted tokens), ``grad_norm`` (over the policy's steps)
        and, of a critic of its own, ``critic/grad_norm``, both before clipping; ``optimizer_steps``, ``policy_steps`` among
        them, and ``first_ratio_error``: the largest |log ratio| on the first minibatch, which rounding alone explains.

    Raises:
        NonFiniteError: A loss or a gradient is not finite; the step was not taken.
        StepZeroError: The first minibatch's log-probabilities are not those of the rollout; no step was taken.
    """
    critic = critic_epochs(config)
    learning = {"logits": config.ppo_epochs, "values": critic}
    passes = [[head for head, epochs in learning.items() if epoch < epochs] for epoch in range(max(learning.values()))]
    penalties = penalties or Penalties()
    return _run_passes(
        model, optimizer, experience, config, accelerator, iteration, passes, penalties, first_ratio_tolerance
    )


def critic_update(
    model: nn.Module,
    optimizer: Optimizer,
    experience: Experience,
    config: UpdateSettings,
    accelerator: Accelerator,
    *,
    iteration: int,
    epochs: int,
) -> dict[str, float]:
    """Passes in which the critic learns alone: its warm-up, and its share of an iteration of TRPO.

    Args:
        model: Policy and critic, as prepared by the accelerator; the policy, and a trunk that is its own, stay as they
            are.
        optimizer: The optimizer, likewise.
        experience: The whole batch.
        config: The configuration.
        accelerator: Runs backward passes and reduces over processes.
        iteration: The PPO iteration.
        epochs: Passes over the rollout.

    Returns:
        As :func:`ppo_update`, without what belongs to the policy.

    Raises:
        NonFiniteError: A loss or a gradient is not finite; the step was not taken.
    """
    passes = [["values"]] * epochs
    return _run_passes(model, optimizer, experience, config, accelerator, iteration, passes, Penalties(), None)


def critic_epochs(config: UpdateSettings, *, warmup: bool = False) -> int:
    """The critic's passes over each rollout, or over each of its warm-up; 0 where there is no critic."""
    if not config.uses_critic:
        return 0
    if warmup and config.critic_warmup_epochs is not None:
        return config.critic_warmup_epochs
    return config.ppo_epochs if config.critic_epochs is None else config.critic_epochs


def kl_limit(config: UpdateSettings) -> float:
    """The approx_kl beyond which the policy takes no further step of an iteration, in nats per token."""
    default = 0.01 if config.objective == "clip" else 0.0
    return 1.5 * (default if config.target_kl is None else config.target_kl) or math.inf


def _run_passes(
    model: nn.Module,
    optimizer: Optimizer,
    experience: Experience,
    config: UpdateSettings,
    accelerator: Accelerator,
    iteration: int,
    passes: Sequence[Sequence[str]],
    penalties: Penalties,
    first_ratio_tolerance: float | None,
) -> dict[str, float]:
    """One pass over the rollout for each entry of ``passes``, the heads that learn in it."""
    history: list[dict[str, float]] = []
    refused: list[dict[str, float]] = []
    limit = kl_limit(config)
    for epoch, heads in enumerate(passes):
        schedule = minibatch_rows(
            len(experience), config.minibatch_size, seed=config.seed, iteration=iteration, epoch=epoch
        )
        for rows in schedule:
            learning = [head for head in heads if head == "values" or not refused]
            minibatch = experience.rows(rows.to(experience.completion_mask.device))
            if not learning or not minibatch.completion_mask.any():
                continue  # a step with a gradient of 0 would still go on with the momentum
            optimizer.zero_grad()
            stats = accumulate_gradients(model, minibatch, config, accelerator, penalties, heads=learning)
            if not history and not refused and first_ratio_tolerance is not None:
                check_first_ratio(stats, first_ratio_tolerance)
            if stats.get("approx_kl", 0.0) > limit:
                optimizer.zero_grad()
                refused.append(stats)
                continue
            norms = take_step(model, optimizer, config, accelerator, stats, iteration)
            history.append(stats | norms)
    return _summary(history, refused)


def accumulate_gradients(
    model: nn.Module,
    minibatch: Experience,
    config: UpdateSettings,
    accelerator: Accelerator,
    penalties: Penalties,
    *,
    heads: Sequence[str] = HEADS,
) -> dict[str, float]:
    """The gradient of the minibatch's loss, micro-batch by micro-batch, over all processes; and what was seen."""
    n_tokens = int(minibatch.completion_mask.sum())
    own_rows = minibatch.rows(slice(accelerator.process_index, None, accelerator.num_processes))
    seen: list[Sums] = []
    packs = accelerator.unwrap_model(model).packs and (penalties.reference is None or penalties.reference.packs)
    micros = [micro for _, micro in own_rows.micro_batches(config.micro_batch_size, packs=packs)]
    for i, micro in enumerate(micros):
        with accelerator.no_sync(model) if i + 1 < len(micros) else nullcontext():
            with accelerator.autocast(), recomputing(model):
                loss, sums = ppo_loss(model, micro, config, penalties, heads=heads, token_count=n_tokens)
            # DDP averages over processes; each process's loss is its share of the global mean, so undo that.
            (loss * accelerator.num_processes).backward()
        seen.append(sums)
    return _reduce(join_sums(seen), n_tokens, accelerator)


def logprobs_now(model: nn.Module, experience: Experience, config: UpdateSettings, accelerator: Accelerator) -> Tensor:
    """``(B, T)`` log-probabilities of the rollout's tokens under the policy as it is now, on every process."""
    share = len(experience) // accelerator.num_processes
    own_rows = experience.rows(slice(accelerator.process_index * share, (accelerator.process_index + 1) * share))
    actor_critic = accelerator.unwrap_model(model)
    with accelerator.autocast():
        logprobs = score_tokens(actor_critic.language_model, own_rows, config.temperature, config.micro_batch_size)
    return accelerator.gather(logprobs)


def _reduce(totals: Sums, n_tokens: int, accelerator: Accelerator) -> dict[str, float]:
    """Sums over all processes, as means over the minibatch's counted tokens (names ending in _max: the largest)."""
    names = [name for name in totals if not name.endswith("_max")]
    sums = accelerator.reduce(torch.stack([totals[n] for n in names]).float(), reduction="sum") / n_tokens
    stats = dict(zip(names, sums.tolist(), strict=True))
    for name in set(totals) - set(names):
        stats[name] = accelerator.gather(totals[name].reshape(1)).max().item()
    return stats


def take_step(
    model: nn.Module,
    optimizer: Optimizer,
    config: UpdateSettings,
    accelerator: Accelerator,
    stats: dict[str, float],
    iteration: int,
) -> dict[str, float]:
    """Clip the gradient and step, unless something is not finite.

    A critic of its own is clipped by itself, so that the size of its errors does not scale the policy's step; a value
    head is clipped together with the trunk that it shares with the policy.

    Returns:
        The norms before clipping, as far as there are gradients: ``grad_norm``, and ``critic/grad_norm`` of a critic of
        its own.

    Raises:
        NonFiniteError: Names the parameter whose gradient is not finite; nothing was changed.
    """
    actor_critic = accelerator.unwrap_model(model)
    groups = {"grad_norm": list(actor_critic.parameters())}
    if actor_critic.critic is not None:
        groups = {"grad_norm": actor_critic.policy_parameters(), "critic/grad_norm": actor_critic.critic_parameters()}
    clipped = {name: [p for p in group if p.grad is not None] for name, group in groups.items()}
    totals = {name: torch.nn.utils.get_total_norm([p.grad for p in part]) for name, part in clipped.items() if part}
    norms = {name: total.item() for name, total in totals.items()}
    check_gradients({name: p.grad for name, p in model.named_parameters()}, norms.values(), stats, iteration)
    for name, norm in norms.items():
        if norm > config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(clipped[name], config.max_grad_norm, totals[name])
    optimizer.step()
    return norms


def _summary(taken: list[dict[str, float]], refused: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps taken; of a policy that took none, what its refused minibatch showed."""
    learned = [row for row in taken if "approx_kl" in row]
    summary = {}
    for name in sorted({name for row in taken + refused for name in row} - {"log_ratio_max"}):
        rows = learned if name == "grad_norm" and learned else taken
        values = [row[name] for row in rows if name in row] or [row[name] for row in refused if name in row]
        summary[name] = float(np.mean(values))
    seen = learned or refused
    if seen:
        summary["policy_steps"] = float(len(learned))
    summary["first_ratio_error"] = seen[0].get("log_ratio_max", 0.0) if seen else 0.0
    return summary | {"optimizer_steps": float(len(taken)), "early_stop": float(bool(refused))}
