"""The rollout: sample completions, score them, and measure them under the reference.

Every process samples and scores its own rows; the record is then gathered, so that every process holds the whole batch
and the math after it (advantages, whitening, metrics) is the same everywhere and needs no further communication.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState

from lmppo.checks import check_reference
from lmppo.functional import exact_kl, kl_k1, kl_k2, kl_k3, support_logprobs, token_logprobs
from lmppo.functional.kl import ALL_TOKENS
from lmppo.models import ActorCritic, Reader, Reference, compute_precision, measure_logits, score_tokens
from lmppo.processes import raised_together
from lmppo.prompts import PromptBatch, is_conversational, pad_left
from lmppo.protocols import Tokenizer
from lmppo.records import Rollout, Samples, TokenRecord
from lmppo.rewards import RewardSet, Scores
from lmppo.sampling import ROLLOUT, SamplingParams, sample, uniform_noise
from lmppo.settings import CollectorSettings
from lmppo.support import Support
from lmppo.texts import decode_completions


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with what people want to see of it.

    Attributes:
        rollout: The record the math works on.
        prompts: The prompts, one per completion.
        completions: The completions' texts; of chat, the message's content.
        function_names: The names of the F reward functions.
        per_function: ``(B, F)`` each reward function's score, NaN where it did not apply.
        metrics: What reward functions logged with ``log_metric``, averaged over processes.
        extras: Columns that reward functions logged with ``log_extra``.
    """

    rollout: Rollout
    prompts: list
    completions: list[str]
    function_names: list[str]
    per_function: Tensor
    metrics: dict[str, float]
    extras: dict[str, list]


def local_rows(n_rows: int, accelerator: Accelerator) -> range:
    """The rows of a global batch that this process samples."""
    share = n_rows // accelerator.num_processes
    return range(accelerator.process_index * share, (accelerator.process_index + 1) * share)


class Collector:
    """What turns prompts into scored rollouts; made once for a run.

    Args:
        model: Policy and critic, as prepared by the accelerator.
        reference: The reference policy.
        rewards: The reward functions.
        tokenizer: The policy's tokenizer.
        params: The distribution to sample.
        config: Gives ``seed``, ``micro_batch_size``, ``cuda_graphs``, ``kl_form`` and ``truncation``.
        accelerator: Tells the processes apart.
        trainer_state: Handed to the reward functions.

    Raises:
        ValueError: ``cuda_graphs``, and the policy or its device cannot be sampled by one.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        rewards: RewardSet,
        tokenizer: Tokenizer,
        params: SamplingParams,
        config: CollectorSettings,
        accelerator: Accelerator,
        trainer_state: TrainerState | None = None,
    ) -> None:
        self.actor_critic: ActorCritic = accelerator.unwrap_model(model)
        self.reference = reference
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.params = params
        self.config = config
        self.accelerator = accelerator
        self.precision = compute_precision(self.actor_critic.policy, accelerator.mixed_precision)
        self.trainer_state = trainer_state
        if config.cuda_graphs:
            self.actor_critic.check_graphs()
        if not (self.actor_critic.packs and reference.packs):
            accelerator.print(
                "Short completions are padded, not packed: the models cannot tell rows apart by positions."
            )

    def collect(self, prompts: PromptBatch, iteration: int, *, purpose: int = ROLLOUT) -> ScoredRollout:
        """Sample one completion for each prompt of a global batch, score it, and gather the whole record.

        Args:
            prompts: The global batch; this process works on its share.
            iteration: The PPO iteration, which picks the sampling noise.
            purpose: ``ROLLOUT`` or ``EVALUATION``, which picks the sampling noise as well. An evaluation
                reports no ``values`` and ``bootstrap_values``: they are 0; its ``kl_penalty`` is k1.

        Raises:
            RewardError: A reward function raised. Like the errors below, on every process, whichever it happened on.
            ValueError: A reward function returned something unusable.
            NonFiniteError: The policy's logits are not finite, or the KL to the reference is not.
        """
        rows = local_rows(len(prompts), self.accelerator)
        width = max(len(ids) for ids in prompts.input_ids)
        own_prompts = prompts.rows(rows)
        prompt_ids, prompt_mask = (x.to(self.accelerator.device) for x in pad_left(own_prompts.input_ids, width))
        learning = purpose == ROLLOUT
        measure = self.config.kl_measure if learning else "k1"
        with raised_together(self.accelerator, "The rollout"):
            with self.accelerator.autocast():
                samples = self._sample(prompt_ids, prompt_mask, rows, iteration, purpose)
                if self.precision != "no":  # the sampler's matrix shapes round differently
                    samples = replace(samples, logprobs=self._score_tokens(samples))
                under_reference = self._under_reference(samples, measure)
                bootstrap_values = samples.values.new_zeros(len(samples), samples.values.shape[-1])
                if learning:
                    bootstrap_values = self._bootstrap_values(samples)
            texts = completion_texts(self.tokenizer, own_prompts, samples.tokens.counted_ids())
            scores = self._score(own_prompts, samples, texts)
        rollout = Rollout(
            tokens=samples.tokens,
            logprobs=samples.logprobs,
            **under_reference,
            values=samples.values,
            scores=scores.token_scores.to(self.accelerator.device),
            bootstrap_values=bootstrap_values,
            ended=samples.ended,
            max_logit=samples.max_logit,
            support=self._compact(samples),
        )
        rollout = gather_rows(rollout, self.accelerator)
        check_reference(rollout.ref_logprobs, rollout.kl_penalty, rollout.tokens.completion_ids)
        return ScoredRollout(
            rollout=rollout,
            prompts=prompts.prompts,
            completions=gather_object(texts) if self.accelerator.num_processes > 1 else texts,
            function_names=self.rewards.names,
            per_function=self.accelerator.gather(scores.per_function.to(self.accelerator.device)).cpu(),
            metrics=_average([scores.metrics], self.accelerator),
            extras=_join([scores.extras], self.accelerator),
        )

    def _sample(self, prompt_ids: Tensor, prompt_mask: Tensor, rows: range, iteration: int, purpose: int) -> Samples:
        """The process's rows, ``sample_batch_size`` at a time."""
        params, config, parts = self.params, self.config, []
        size = config.sample_batch_size or len(rows)
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            noise = uniform_noise(config.seed, iteration, rows[some], params.max_completion_length, purpose=purpose)
            batch = (self.actor_critic, prompt_ids[some], prompt_mask[some], noise, params)
            how: dict[str, Any] = {"micro_batch_size": config.micro_batch_size, "graphs": config.cuda_graphs}
            parts.append(sample(*batch, values=purpose == ROLLOUT, **how))
        return Samples.joined(parts)

    def _score_tokens(self, samples: Samples) -> Tensor:
        return score_tokens(
            self.actor_critic.language_model, samples, self.params.temperature, self.config.micro_batch_size
        )

    @torch.no_grad()
    def _under_reference(self, samples: Samples, measure: str) -> dict[str, Tensor]:
        """``ref_logprobs``, ``ref_support_logprobs`` and ``kl_penalty`` of a rollout, from one pass of the reference.

        The reference is its softmax over all tokens, at the policy's temperature; only the policy has a support.

        Args:
            samples: What was sampled.
            measure: What ``kl_penalty`` is: ``k1``, ``k2``, ``k3`` or ``exact``.
        """
        temperature, exact = self.params.temperature, measure == "exact"

        def of_logits(some: TokenRecord, ref_logits: Tensor, *logits: Tensor) -> dict[str, Tensor]:
            ids, support = some.tokens.completion_ids, some.support.allowed()
            measured = {
                "ref_logprobs": token_logprobs(ref_logits, ids, temperature=temperature),
                "ref_support_logprobs": support_logprobs(ref_logits, temperature=temperature, support=support),
            }
            if exact:
                whole = {"support": support, "ref_support": ALL_TOKENS}
                measured["kl_penalty"] = exact_kl(logits[0], ref_logits, temperature=temperature, **whole)
            return measured

        readers: list[Reader] = [self.reference]
        if exact:
            readers.append(self.actor_critic.language_model)
        measured = measure_logits(readers, samples, of_logits, micro_batch_size=self.config.micro_batch_size)
        if not exact:
            measured["kl_penalty"] = _sampled_kl(measure, samples, **measured)
        return measured

    @torch.no_grad()
    def _bootstrap_values(self, samples: Samples) -> Tensor:
        """``(B, K)`` values of the last states of the rows that were cut, if asked; one more pass, of those only."""
        result = samples.values.new_zeros(len(samples), samples.values.shape[-1])
        cut = ~samples.ended
        if self.config.truncation == "bootstrap" and cut.any():
            cut_rows = cut.nonzero()[:, 0]
            for rows, micro in samples.rows(cut_rows).micro_batches(self.config.micro_batch_size):
                result[cut_rows[rows]] = self.actor_critic.last_values(micro.tokens)
        return result

    def _compact(self, samples: Samples) -> Support:
        """The support in the form that takes least memory, the same form on every process."""
        largest = self.accelerator.gather(samples.support.largest_lists(samples.completion_mask).unsqueeze(0))
        n_kept, n_dropped = largest.amax(dim=0).tolist()
        return samples.support.compact(n_kept, n_dropped)

    def _score(self, own_prompts: PromptBatch, samples: Samples, texts: list[str]) -> Scores:
        """The scores of this process's rows."""
        completions: list[str | list[dict[str, str]]] = [
            [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
            for prompt, text in zip(own_prompts.prompts, texts, strict=True)
        ]
        return self.rewards.score(
            own_prompts.prompts,
            completions,
            samples.tokens.counted_ids(),
            own_prompts.columns,
            self.trainer_state,
            samples.completion_mask.shape[1],
            samples.ended.tolist(),
        )


def _sampled_kl(measure: str, samples: Samples, ref_logprobs: Tensor, ref_support_logprobs: Tensor) -> Tensor:
    """``(B, T)`` the KL to the reference from the sampled tokens alone: ``k1``, ``k2`` or ``k3``."""
    if measure == "k3":
        kl = kl_k3(samples.logprobs, ref_logprobs, ref_support_logprobs=ref_support_logprobs)
    else:
        kl = {"k1": kl_k1, "k2": kl_k2}[measure](samples.logprobs, ref_logprobs)
    return torch.where(samples.completion_mask, kl, 0.0)


def completion_texts(tokenizer: Tokenizer, prompts: PromptBatch, completion_ids: list[list[int]]) -> list[str]:
    """The completions as people and reward functions read them, without special tokens.

    After text, what the completion adds to it; after chat, the completion decoded alone, as trl does.

    Args:
        tokenizer: The policy's tokenizer.
        prompts: Their prompts.
        completion_ids: The tokens that count.
    """
    rows = list(zip(map(is_conversational, prompts.prompts), prompts.input_ids, completion_ids, strict=True))
    written = [(prompt, completion) for is_chat, prompt, completion in rows if not is_chat]
    texts = iter(decode_completions(tokenizer, [p for p, _ in written], [c for _, c in written]))
    replies = iter(tokenizer.batch_decode([c for is_chat, _, c in rows if is_chat], skip_special_tokens=True))
    return [next(replies if is_chat else texts) for is_chat, _, _ in rows]


def gather_rows(rollout: Rollout, accelerator: Accelerator) -> Rollout:
    """The rows of all processes, in the order of the global batch."""
    if accelerator.num_processes == 1:
        return rollout

    def gather(tensor: Tensor, _: tuple[str, ...]) -> Tensor:
        rows = accelerator.gather(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous())
        return rows.to(tensor.dtype)

    return rollout.map(gather)


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
