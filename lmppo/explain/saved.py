"""Rollouts kept with a checkpoint: what the update saw of every token, and what became of it.

``rollouts.safetensors`` holds the numbers, ``rollouts.json`` the texts and the settings. Whatever follows from them (TD
residuals, ratios, what was clipped) is computed again when it is read, by `lmppo.functional`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmppo.collector import ScoredRollout
from lmppo.config import PPOConfig, RewardStream
from lmppo.functional import kl_k1, rewards_to_go, td_residuals
from lmppo.functional.kl import MAX_LOG_RATIO
from lmppo.records import Experience
from lmppo.redaction import scrub
from lmppo.rewards import default_streams
from lmppo.run.checkpoint import CheckpointError
from lmppo.texts import REPLACEMENT, decode_completions, decode_whole

FORMAT_VERSION = 2  # 2 since kl_form
TENSORS, TEXTS = "rollouts.safetensors", "rollouts.json"


@dataclass(frozen=True)
class SavedStream:
    """One reward stream of saved completions, in the shapes that the math takes.

    Attributes:
        name: The stream's name.
        gamma: Its discount.
        lam: GAE's lambda.
        weight: What its reward functions were multiplied by.
        mask: ``(N, T)`` True on the tokens that count.
        rewards: ``(N, T)`` what the estimator got: the scores with the penalties.
        values: ``(N, T)`` the critic before the update, of the state before each token.
        returns: ``(N, T)`` the critic's targets.
        after_last: ``(N,)`` the value of the state after the last token, 0 where the episode ended there.
    """

    name: str
    gamma: float
    lam: float
    weight: float
    mask: Tensor
    rewards: Tensor
    values: Tensor
    returns: Tensor
    after_last: Tensor

    @property
    def td_residuals(self) -> Tensor:
        """``(N, T)`` one-step temporal differences."""
        return td_residuals(self.rewards, self.values, self.mask, gamma=self.gamma, bootstrap_values=self.after_last)

    @property
    def rewards_to_go(self) -> Tensor:
        """``(N, T)`` discounted sums of the rewards from each token on."""
        return rewards_to_go(self.rewards, self.mask, gamma=self.gamma, bootstrap_values=self.after_last)


@dataclass(frozen=True)
class SavedRollouts:
    """Completions as the update saw them, N rows; axes as in :class:`lmppo.records.Rollout`.

    Attributes:
        prompts: The prompts' texts, chat templates included, without special tokens.
        completions: The completions' texts; of chat, the message's content.
        tokens: Each completion's tokens by their names in the vocabulary, up to the last that was sampled.
        texts: What each token adds to the text: nothing, if it is special or a piece of a character that is not whole yet.
        streams: Names of the K reward streams.
        gammas: The discount of each stream.
        lams: GAE's lambda of each stream.
        weights: What each stream's reward functions were multiplied by; ``scores`` holds it already.
        settings: The configuration, with the KL coefficient that was in force.
        completion_ids: ``(N, T)``.
        mask: ``(N, T)`` True on the tokens that count.
        learned: ``(N, T)`` True on those of them that the update learned from.
        ended: ``(N,)`` True where the completion ended with EOS.
        logprobs: ``(N, T)`` under the policy that sampled the tokens.
        new_logprobs: ``(N, T)`` after the update; of use only where the update learned.
        ref_logprobs: ``(N, T)`` under the reference, among all tokens.
        values: ``(N, T, K)`` the critic before the update, of the state before each token.
        scores: ``(N, T, K)`` what the reward functions gave.
        kl_penalty: ``(N, T)`` the KL to the reference that the rewards pay for, by ``kl_form``.
        rewards: ``(N, T, K)`` what the estimator got: the scores with the penalties.
        returns: ``(N, T, K)`` the critic's targets.
        bootstrap_values: ``(N, K)`` the value of the state after the last token, 0 where the episode ended there.
        advantages: ``(N, T)`` as used in the update, so whitened where that was asked for.
    """

    prompts: list[str]
    completions: list[str]
    tokens: list[list[str]]
    texts: list[list[str]]
    streams: list[str]
    gammas: list[float]
    lams: list[float]
    weights: list[float]
    settings: dict[str, Any]
    completion_ids: Tensor
    mask: Tensor
    learned: Tensor
    ended: Tensor
    logprobs: Tensor
    new_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    kl_penalty: Tensor
    rewards: Tensor
    returns: Tensor
    bootstrap_values: Tensor
    advantages: Tensor

    @property
    def kl_to_ref(self) -> Tensor:
        """``(N, T)`` k1 estimate of the KL to the reference."""
        return torch.where(self.mask, kl_k1(self.logprobs, self.ref_logprobs), 0.0)

    @property
    def each_stream(self) -> list[SavedStream]:
        """The K reward streams, one by one."""
        numbers = zip(self.streams, self.gammas, self.lams, self.weights, strict=True)
        return [
            SavedStream(
                *facts,
                mask=self.mask,
                rewards=self.rewards[..., k],
                values=self.values[..., k],
                returns=self.returns[..., k],
                after_last=self.bootstrap_values[:, k],
            )
            for k, facts in enumerate(numbers)
        ]

    @property
    def td_residuals(self) -> Tensor:
        """``(N, T, K)`` one-step temporal differences of each stream."""
        return torch.stack([stream.td_residuals for stream in self.each_stream], dim=-1)

    @property
    def rewards_to_go(self) -> Tensor:
        """``(N, T, K)`` discounted sums of each stream's rewards from each token on."""
        return torch.stack([stream.rewards_to_go for stream in self.each_stream], dim=-1)

    @property
    def ratio(self) -> Tensor:
        """``(N, T)`` probability after the update over probability at sampling; 1 where nothing was learned."""
        log_ratio = torch.where(self.learned, self.new_logprobs - self.logprobs, 0.0)
        return log_ratio.clamp(max=MAX_LOG_RATIO).exp()

    @property
    def outside_band(self) -> Tensor:
        """``(N, T)`` True where the ratio has left the clip's band, as ``clip_frac`` counts it."""
        low, high = self.settings["clip_range"], self.settings["clip_range_high"]
        return (self.ratio < 1 - low) | (self.ratio > 1 + (low if high is None else high))

    @property
    def clipped(self) -> Tensor:
        """``(N, T)`` True where the clipped loss is flat at the new ratio: the token pushes the policy no further."""
        if self.settings["objective"] != "clip":
            return torch.zeros_like(self.learned)
        flat = self.outside_band & self.learned & ((self.ratio - 1) * self.advantages > 0)
        if self.settings["dual_clip"] is not None:
            flat |= (self.advantages < 0) & (self.ratio > self.settings["dual_clip"])
        return flat


def save_rollouts(
    directory: Path,
    scored: ScoredRollout,
    experience: Experience,
    rewards: Tensor,
    new_logprobs: Tensor,
    config: PPOConfig,
    tokenizer: Any,
    *,
    rows: int,
    kl_coef: float | None = None,
    streams: Sequence[RewardStream] | None = None,
) -> None:
    """Write the first rows of a rollout into a checkpoint's directory, before its manifest is made.

    Args:
        directory: The checkpoint's directory, under its temporary name.
        scored: The rollout, ``B`` completions.
        experience: What the update saw of it.
        rewards: ``(B, T, K)`` what the estimator got, KL penalty included.
        new_logprobs: ``(B, T)`` of the sampled tokens after the update; the first ``rows`` rows are enough.
        config: The configuration.
        tokenizer: The policy's tokenizer.
        rows: How many completions to keep; all, if there are fewer.
        kl_coef: The KL coefficient in force, if it is not the configuration's.
        streams: The reward streams, for their names and numbers; None: the configuration's gamma and lam for all.

    Raises:
        ValueError: Shapes do not fit.
    """
    kept, rollout = slice(rows), scored.rollout
    streams = streams or default_streams(rewards.shape[-1])
    tensors = {
        "completion_ids": rollout.tokens.completion_ids,
        "mask": rollout.completion_mask,
        "learned": experience.completion_mask,
        "ended": rollout.ended,
        "logprobs": rollout.logprobs,
        "new_logprobs": new_logprobs,
        "ref_logprobs": rollout.ref_logprobs,
        "values": rollout.values,
        "scores": rollout.scores,
        "kl_penalty": rollout.kl_penalty,
        "rewards": rewards,
        "returns": experience.returns,
        "bootstrap_values": rollout.bootstrap_values,
        "advantages": experience.advantages,
    }
    tensors = {name: tensor[kept].detach().cpu().clone() for name, tensor in tensors.items()}
    for name, like in (("rewards", "values"), ("new_logprobs", "logprobs")):
        if tensors[name].shape != tensors[like].shape:
            raise ValueError(
                f"save_rollouts: {name} has shape {tuple(tensors[name].shape)} in the rows to keep; expected "
                f"{tuple(tensors[like].shape)}, that of {like}."
            )
    lengths = _shown_lengths(tensors["mask"])
    completions = [ids[:n] for ids, n in zip(tensors["completion_ids"].tolist(), lengths, strict=True)]
    tokens = rollout.tokens.rows(kept)
    prompts = [ids[mask].tolist() for ids, mask in zip(tokens.prompt_ids, tokens.prompt_mask, strict=True)]
    texts = {
        "format_version": FORMAT_VERSION,
        "prompts": decode_whole(tokenizer, prompts),
        "completions": scored.completions[kept],
        "tokens": [[str(name) for name in tokenizer.convert_ids_to_tokens(ids)] for ids in completions],
        "texts": [token_texts(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)],
        "streams": [stream.name for stream in streams],
        "gammas": [config.gamma if stream.gamma is None else stream.gamma for stream in streams],
        "lams": [config.lam if stream.lam is None else stream.lam for stream in streams],
        "weights": [stream.weight for stream in streams],
        "settings": scrub(config.to_dict()) | ({} if kl_coef is None else {"kl_coef": kl_coef}),
    }
    save_file(tensors, directory / TENSORS)
    (directory / TEXTS).write_text(json.dumps(texts, indent=2) + "\n")


def load_saved_rollouts(directory: Path) -> SavedRollouts:
    """The rollouts that a checkpoint's directory holds.

    Raises:
        CheckpointError: There are none, they are damaged, or they were made by an earlier or a newer lmppo.
    """
    if not (directory / TEXTS).exists():
        raise CheckpointError(f"{directory} holds no saved rollouts: train with save_rollouts=N to keep N of each.")
    try:
        texts: dict[str, Any] = json.loads((directory / TEXTS).read_text())
        version = texts.pop("format_version")
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{directory}: its rollouts were saved by a newer lmppo (format {version}): upgrade.")
        if version < FORMAT_VERSION:
            raise CheckpointError(
                f"{directory}: its rollouts were saved by an earlier lmppo (format {version}), which this one cannot "
                f"show: use that version, or train again with save_rollouts=N to keep N of each."
            )
        return SavedRollouts(**texts | load_file(directory / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: {TENSORS} and {TEXTS} are damaged or do not belong together.") from error


def token_texts(tokenizer: Any, prompt_ids: list[int], ids: list[int]) -> list[str]:
    """What each token adds to the text before it; together, what the completion adds to its prompt.

    A special token adds nothing. Where a character is made of several tokens, the last of them adds it.

    Args:
        tokenizer: The policy's tokenizer.
        prompt_ids: The prompt, at least one token.
        ids: The completion.
    """
    texts = []
    before, new = list(prompt_ids), []  # the tokens of the last whole text, and those since
    for token in ids:
        new.append(token)
        (text,) = decode_completions(tokenizer, [before], [new])
        texts.append(text)
        if text:
            within = decode_whole(tokenizer, [new])[0][:1] in ("", REPLACEMENT)  # new begins within a character
            before, new = ([*before, *new] if within else new), []
    return texts


def _shown_lengths(mask: Tensor) -> list[int]:
    """The number of positions up to each row's last sampled token."""
    return (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1).tolist()
