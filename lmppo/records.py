"""The records that flow from the rollout to the update.

Axes: ``B`` completions, ``P`` prompt positions, ``T`` completion positions, ``S = P + T``, ``V`` vocabulary, ``K`` reward
streams.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lmppo.axes import Record, axes
from lmppo.support import Support


@dataclass(frozen=True)
class Tokens(Record):
    """Prompts and completions.

    Attributes:
        prompt_ids: ``(B, P)`` prompt tokens, padded on the left; what pads is arbitrary, the mask decides.
        prompt_mask: ``(B, P)`` True on prompt tokens.
        completion_ids: ``(B, T)`` sampled tokens, padded on the right.
        completion_mask: ``(B, T)`` True on the sampled tokens that count, EOS included.
    """

    prompt_ids: Tensor = axes("B P", torch.long)
    prompt_mask: Tensor = axes("B P", torch.bool)
    completion_ids: Tensor = axes("B T", torch.long)
    completion_mask: Tensor = axes("B T", torch.bool)

    @property
    def input_ids(self) -> Tensor:
        """``(B, S)`` what a model reads."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """``(B, S)`` what a model may attend to: the prompt, and the completion up to its last counted token.

        Gaps within ``completion_mask`` (tokens put there by an environment) are part of the context; padding is not.
        """
        inside = self.completion_mask.flip(1).cummax(1).values.flip(1)
        return torch.cat([self.prompt_mask, inside], dim=1)

    @property
    def lengths(self) -> Tensor:
        """``(B,)`` counted tokens of each completion."""
        return self.completion_mask.sum(dim=1)

    def counted_ids(self) -> list[list[int]]:
        """The counted tokens of each completion."""
        pairs = zip(self.completion_ids.cpu(), self.completion_mask.cpu(), strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]


@dataclass(frozen=True)
class TokenRecord(Record):
    """What is known of some tokens.

    Attributes:
        tokens: The prompts and completions.
        support: The tokens that could be sampled (top-k, top-p, min-p, forbidden tokens).
    """

    tokens: Tokens
    support: Support

    @property
    def completion_mask(self) -> Tensor:
        """``(B, T)`` True on the tokens that count."""
        return self.tokens.completion_mask

    def trim(self) -> Self:
        """The record without the prompt columns and the last completion columns that none of its rows uses."""
        first = int((~self.tokens.prompt_mask.any(dim=0)).long().cumprod(dim=0).sum())
        used = self.completion_mask.any(dim=0).nonzero()
        last = int(used[-1]) + 1 if len(used) else 1
        return self.cut(P=slice(first, None), T=slice(0, last))

    def micro_batches(self, size: int) -> Iterator[tuple[slice, Self]]:
        """``size`` rows at a time: which rows, and their record without unused columns."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield rows, self.rows(rows).trim()

    def per_token(self, compute: Callable[[Self], Tensor], *, micro_batch_size: int) -> Tensor:
        """``(B, T)`` numbers computed from a few rows at a time; 0 where the mask is False.

        Args:
            compute: From a micro-batch of b rows and t columns to ``(b, t)``.
            micro_batch_size: Rows at a time.
        """
        named = self.all_per_token(lambda micro: {"": compute(micro)}, micro_batch_size=micro_batch_size)
        return named[""]

    def all_per_token(
        self, compute: Callable[[Self], dict[str, Tensor]], *, micro_batch_size: int
    ) -> dict[str, Tensor]:
        """Several numbers per token, by name, computed together; else as :meth:`per_token`."""
        mask = self.completion_mask
        results: dict[str, Tensor] = {}
        for rows, micro in self.micro_batches(micro_batch_size):
            for name, numbers in compute(micro).items():
                if name not in results:
                    results[name] = torch.zeros(mask.shape, device=mask.device)
                results[name][rows, : numbers.shape[1]] = torch.where(micro.completion_mask, numbers, 0.0)
        return results


@dataclass(frozen=True)
class Samples(TokenRecord):
    """What was sampled; meanings as in :class:`Rollout`."""

    logprobs: Tensor = axes("B T")
    values: Tensor = axes("B T K")
    ended: Tensor = axes("B", torch.bool)
    max_logit: Tensor = axes("B")


@dataclass(frozen=True)
class Rollout(TokenRecord):
    """What was sampled, and what was measured under the policy that sampled it.

    Attributes:
        tokens: The prompts and completions.
        support: The tokens that could be sampled (top-k, top-p, min-p, forbidden tokens).
        logprobs: ``(B, T)`` of each token under the policy that sampled it.
        ref_logprobs: ``(B, T)`` under the reference, whose distribution is over all tokens, whatever the support.
        ref_support_logprobs: ``(B, T)`` log of the probability that the reference gives to the support; 0 where every
            token could be sampled.
        values: ``(B, T, K)`` the critic's value of the state each token was chosen in.
        scores: ``(B, T, K)`` what the reward functions gave, before any KL penalty: a score for the whole completion
            stands on its last token.
        kl_penalty: ``(B, T)`` the KL to the reference that the rewards pay for, by ``kl_form``; for k1 it is
            ``kl_to_ref``.
        bootstrap_values: ``(B, K)`` the critic's value of the last state of a completion that was cut, with
            ``truncation='bootstrap'``; else 0.
        ended: ``(B,)`` True where the completion ended with EOS, a stop token or a stop string, False where it was cut.
        max_logit: ``(B,)`` the largest |logit| that the tokens of a row were sampled from, -inf left out.
    """

    logprobs: Tensor = axes("B T")
    ref_logprobs: Tensor = axes("B T")
    ref_support_logprobs: Tensor = axes("B T")
    values: Tensor = axes("B T K")
    scores: Tensor = axes("B T K")
    kl_penalty: Tensor = axes("B T")
    bootstrap_values: Tensor = axes("B K")
    ended: Tensor = axes("B", torch.bool)
    max_logit: Tensor = axes("B")

    @property
    def kl_to_ref(self) -> Tensor:
        """``(B, T)`` k1 estimate per token, ``logprobs - ref_logprobs``, 0 where the mask is False."""
        return torch.where(self.completion_mask, self.logprobs - self.ref_logprobs, 0.0)

    @property
    def kl_of_support(self) -> Tensor:
        """``(B, T)`` the part of the KL to the reference that leaving out tokens alone makes, 0 or more.

        It is minus the log of the reference's probability of the support: what is left of ``kl_to_ref`` before the
        first step, where the policy is the reference.
        """
        return torch.where(self.completion_mask, -self.ref_support_logprobs, 0.0)


@dataclass(frozen=True)
class Experience(TokenRecord):
    """All that the update may see; shapes as in :class:`Rollout`.

    Attributes:
        tokens: The prompts and completions; ``completion_mask`` is True on the tokens that are learned from.
        support: The tokens that could be sampled.
        old_logprobs: ``(B, T)`` under the policy that sampled the tokens.
        ref_logprobs: ``(B, T)`` under the reference.
        ref_support_logprobs: ``(B, T)`` log of the probability that the reference gives to the support.
        old_values: ``(B, T, K)`` the critic before the update.
        advantages: ``(B, T)`` weight of each token in the policy's gradient.
        returns: ``(B, T, K)`` the critic's targets.
    """

    old_logprobs: Tensor = axes("B T")
    ref_logprobs: Tensor = axes("B T")
    ref_support_logprobs: Tensor = axes("B T")
    old_values: Tensor = axes("B T K")
    advantages: Tensor = axes("B T")
    returns: Tensor = axes("B T K")

    @classmethod
    def from_rollout(
        cls, rollout: Rollout, advantages: Tensor, returns: Tensor, mask: Tensor | None = None
    ) -> "Experience":
        """The rollout's tokens with what the estimator made of its rewards.

        Args:
            rollout: The rollout.
            advantages: ``(B, T)``.
            returns: ``(B, T, K)``.
            mask: ``(B, T)`` the tokens that are learned from (default: all that count).
        """
        tokens = rollout.tokens if mask is None else replace(rollout.tokens, completion_mask=mask)
        return cls(
            tokens=tokens,
            support=rollout.support,
            old_logprobs=rollout.logprobs,
            ref_logprobs=rollout.ref_logprobs,
            ref_support_logprobs=rollout.ref_support_logprobs,
            old_values=rollout.values,
            advantages=advantages,
            returns=returns,
        )
