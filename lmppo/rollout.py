"""The rollout: sample completions, score them, and measure them under the reference.

Every process samples and scores its own rows; the record is then gathered, so that every process holds the whole batch
and the math after it (advantages, whitening, metrics) is the same everywhere and needs no further communication.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from lmppo.config import PPOConfig
from lmppo.experience import Rollout, select_rows, trim
from lmppo.functional import exact_kl, kl_k1, kl_k2, kl_k3
from lmppo.models import ActorCritic, Reference, score_tokens
from lmppo.prompts import PromptBatch, is_conversational, pad_left
from lmppo.rewards import RewardSet, Scores
from lmppo.sampling import ROLLOUT, Samples, SamplingParams, sample, uniform_noise


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with what people want to see of it.

    Attributes:
        rollout: The record the math works on.
        prompts: The prompts, one per completion.
        completions: The completions' texts.
        per_function: ``(B, F)`` each reward function's score, NaN where it did not apply.
        metrics: What reward functions logged with ``log_metric``, averaged over processes.
        extras: Columns that reward functions logged with ``log_extra``.
    """

    rollout: Rollout
    prompts: list
    completions: list[str]
    per_function: Tensor
    metrics: dict[str, float]
    extras: dict[str, list]


def local_rows(n_rows: int, accelerator: Accelerator) -> range:
    """The rows of a global batch that this process samples."""
    share = n_rows // accelerator.num_processes
    return range(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def collect_rollout(
    model: nn.Module,
    reference: Reference,
    rewards: RewardSet,
    prompts: PromptBatch,
    config: PPOConfig,
    *,
    tokenizer: Any,
    params: SamplingParams,
    accelerator: Accelerator,
    iteration: int,
    trainer_state: Any = None,
    purpose: int = ROLLOUT,
) -> ScoredRollout:
    """Sample one completion for each prompt of a global batch, score it, and gather the whole record.

    Args:
        model: Policy and critic, as prepared by the accelerator.
        reference: The reference policy.
        rewards: The reward functions.
        prompts: The global batch; this process works on its share.
        config: Gives ``seed``, ``micro_batch_size``, ``kl_form`` and ``truncation``.
        tokenizer: The policy's tokenizer.
        params: The distribution to sample.
        accelerator: Tells the processes apart.
        iteration: The PPO iteration, which picks the sampling noise.
        trainer_state: Handed to the reward functions.
        purpose: ``ROLLOUT`` or ``EVALUATION``, which picks the sampling noise as well.

    Raises:
        RewardError: A reward function raised; on every process, whichever it happened on.
        ValueError: A reward function returned something unusable; likewise.
        NonFiniteError: The policy's logits are not finite.
    """
    actor_critic: ActorCritic = accelerator.unwrap_model(model)
    rows = local_rows(len(prompts), accelerator)
    width = max(len(ids) for ids in prompts.input_ids)
    mine = prompts.rows(rows)
    prompt_ids, prompt_mask = (x.to(accelerator.device) for x in pad_left(mine.input_ids, width))
    noise = uniform_noise(config.seed, iteration, rows, params.max_completion_length, purpose=purpose)
    with accelerator.autocast():
        samples = sample(actor_critic, prompt_ids, prompt_mask, noise, params)
        ref_logprobs = score_tokens(reference.logits, samples, params.temperature, config.micro_batch_size)
        logprobs = samples.logprobs
        if accelerator.mixed_precision != "no":  # the sampler's matrix shapes round differently from the update's
            logprobs = score_tokens(
                lambda *batch: actor_critic(*batch, policy_only=True)[0],
                samples,
                params.temperature,
                config.micro_batch_size,
            )
        kl_penalty = _kl_penalty(actor_critic, reference, samples, logprobs, ref_logprobs, config)
        bootstrap_values = _bootstrap_values(actor_critic, samples, config)
    scores = _score(rewards, mine, samples, tokenizer, trainer_state, accelerator)
    rollout = Rollout(
        **{f.name: getattr(samples, f.name) for f in fields(samples) if f.name != "logprobs"},
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        scores=scores.token_scores.to(accelerator.device),
        kl_penalty=kl_penalty,
        bootstrap_values=bootstrap_values,
    )
    rollout = gather_rows(rollout, accelerator)
    return ScoredRollout(
        rollout=rollout,
        prompts=prompts.prompts,
        completions=decode_completions(tokenizer, rollout.completion_ids, rollout.completion_mask),
        per_function=accelerator.gather(scores.per_function.to(accelerator.device)).cpu(),
        metrics=_average([scores.metrics], accelerator),
        extras=_join([scores.extras], accelerator),
    )


@torch.no_grad()
def _kl_penalty(
    model: ActorCritic,
    reference: Reference,
    samples: Samples,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    config: PPOConfig,
) -> Tensor:
    """``(B, T)`` the KL to the reference per token, by the configured estimator; the exact one a few rows at a time."""
    if config.kl_measure != "exact":
        estimator = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[config.kl_measure]
        return torch.where(samples.completion_mask, estimator(logprobs, ref_logprobs), 0.0)
    result = torch.zeros_like(logprobs)
    for start in range(0, len(result), config.micro_batch_size):
        rows = slice(start, start + config.micro_batch_size)
        micro = trim(select_rows(samples, rows))
        batch = (micro.prompt_ids, micro.prompt_mask, micro.completion_ids, micro.completion_mask)
        logits, _ = model(*batch, policy_only=True)
        kl = exact_kl(logits, reference.logits(*batch), temperature=config.temperature, support=micro.support)
        result[rows, : kl.shape[1]] = torch.where(micro.completion_mask, kl, 0.0)
    return result


@torch.no_grad()
def _bootstrap_values(model: ActorCritic, samples: Samples, config: PPOConfig) -> Tensor:
    """``(B, K)`` values of the last states of the rows that were cut, if asked; one more forward pass, of those only."""
    result = samples.values.new_zeros(len(samples.ended), samples.values.shape[-1])
    cut = (~samples.ended).nonzero().flatten()
    if config.truncation == "bootstrap" and len(cut):
        for rows in cut.split(config.micro_batch_size):
            micro = trim(select_rows(samples, rows))
            batch = (micro.prompt_ids, micro.prompt_mask, micro.completion_ids, micro.completion_mask)
            result[rows] = model.last_values(*batch)
    return result


def decode_completions(tokenizer: Any, completion_ids: Tensor, completion_mask: Tensor) -> list[str]:
    """The counted tokens as text, special tokens left out."""
    ids = [row[keep].tolist() for row, keep in zip(completion_ids.cpu(), completion_mask.cpu(), strict=True)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def gather_rows(rollout: Rollout, accelerator: Accelerator) -> Rollout:
    """The rows of all processes, in the order of the global batch."""
    if accelerator.num_processes == 1:
        return rollout
    gathered = {}
    for f in fields(rollout):
        tensor = getattr(rollout, f.name)
        rows = accelerator.gather(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous())
        gathered[f.name] = rows.to(tensor.dtype)
    return Rollout(**gathered)


def _score(
    rewards: RewardSet,
    mine: PromptBatch,
    samples: Samples,
    tokenizer: Any,
    trainer_state: Any,
    accelerator: Accelerator,
) -> Scores:
    """Score this process's rows; an error on one process is raised on all, before anyone waits for the others."""
    texts = decode_completions(tokenizer, samples.completion_ids, samples.completion_mask)
    ids = [row[m].tolist() for row, m in zip(samples.completion_ids.cpu(), samples.completion_mask.cpu(), strict=True)]
    completions: list[Any] = [
        [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
        for prompt, text in zip(mine.prompts, texts, strict=True)
    ]
    error: Exception | None = None
    try:
        scores = rewards.score(
            mine.prompts, completions, ids, mine.columns, trainer_state, samples.completion_mask.shape[1]
        )
    except Exception as caught:
        error = caught
    failures = [f"process {accelerator.process_index}: {error}"] if error is not None else []
    if accelerator.num_processes > 1:
        failures = gather_object(failures)
    if error is not None:
        raise error
    if failures:
        raise RuntimeError(f"Scoring failed on another process. {failures[0]}")
    return scores


def _average(metrics: list[dict[str, float]], accelerator: Accelerator) -> dict[str, float]:
    if accelerator.num_processes > 1:
        metrics = gather_object(metrics)
    names = sorted({name for row in metrics for name in row})
    return {n: sum(row[n] for row in metrics if n in row) / sum(n in row for row in metrics) for n in names}


def _join(extras: list[dict[str, list]], accelerator: Accelerator) -> dict[str, list]:
    if accelerator.num_processes > 1:
        extras = gather_object(extras)
    return {
        name: [value for row in extras for value in row[name]] for name in extras[0] if all(name in r for r in extras)
    }
