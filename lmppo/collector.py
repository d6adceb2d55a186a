"""The rollout: sample completions, score them, and measure them under the reference.

Every process samples and scores its own rows; the record is then gathered, so that every process holds the whole batch
and the math after it (advantages, whitening, metrics) is the same everywhere and needs no further communication.
"""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState

from lmppo.checks import check_reference
from lmppo.functional import exact_kl, kl_k1, kl_k2, kl_k3, support_logprobs, token_logprobs
from lmppo.functional.kl import ALL_TOKENS
from lmppo.models import ActorCritic, Reference, compute_precision, score_tokens
from lmppo.processes import raised_together
from lmppo.prompts import PromptBatch, is_conversational, pad_left
from lmppo.protocols import Tokenizer
from lmppo.records import Rollout, Samples
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
        config: Gives ``seed``, ``micro_batch_size``, ``kl_form`` and ``truncation``.
        accelerator: Tells the processes apart.
        trainer_state: Handed to the reward functions.
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
        noise = uniform_noise(self.config.seed, iteration, rows, self.params.max_completion_length, purpose=purpose)
        learning = purpose == ROLLOUT
        measure = self.config.kl_measure if learning else "k1"
        with raised_together(self.accelerator, "The rollout"):
            with self.accelerator.autocast():
                samples = sample(self.actor_critic, prompt_ids, prompt_mask, noise, self.params, values=learning)
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

    def _score_tokens(self, samples: Samples) -> Tensor:
        return score_tokens(self.actor_critic.logits, samples, self.params.temperature, self.config.micro_batch_size)

    @torch.no_grad()
    def _under_reference(self, samples: Samples, measure: str) -> dict[str, Tensor]:
        """``ref_logprobs``, ``ref_support_logprobs`` and ``kl_penalty`` of a rollout, from one pass of the reference.

        The reference is its softmax over all tokens, at the policy's temperature; only the policy has a support.

        Args:
            samples: What was sampled.
            measure: What ``kl_penalty`` is: ``k1``, ``k2``, ``k3`` or ``exact``.
        """
        temperature = self.params.temperature

        def measured(micro: Samples) -> dict[str, Tensor]:
            ref_logits, support = self.reference.logits(micro.tokens), micro.support.allowed()
            ref_logprobs = token_logprobs(ref_logits, micro.tokens.completion_ids, temperature=temperature)
            of_support = support_logprobs(ref_logits, temperature=temperature, support=support)
            if measure == "exact":
                logits = self.actor_critic.logits(micro.tokens)
                kl = exact_kl(logits, ref_logits, temperature=temperature, support=support, ref_support=ALL_TOKENS)
            elif measure == "k3":
                kl = kl_k3(micro.logprobs, ref_logprobs, ref_support_logprobs=of_support)
            else:
                kl = {"k1": kl_k1, "k2": kl_k2}[measure](micro.logprobs, ref_logprobs)
            return {"ref_logprobs": ref_logprobs, "ref_support_logprobs": of_support, "kl_penalty": kl}

        return samples.all_per_token(measured, micro_batch_size=self.config.micro_batch_size)

    @torch.no_grad()
    def _bootstrap_values(self, samples: Samples) -> Tensor:
        """``(B, K)`` values of the last states of the rows that were cut, if asked; one more pass, of those only."""
        result = samples.values.new_zeros(len(samples), samples.values.shape[-1])
        cut = ~samples.ended
        if self.config.truncation == "bootstrap" and cut.any():
            micros = samples.rows(cut).micro_batches(self.config.micro_batch_size)
            result[cut] = torch.cat([self.actor_critic.last_values(micro.tokens) for _, micro in micros])
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
