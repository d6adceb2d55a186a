"""The records that flow from the rollout to the update.

Axes: ``B`` completions, ``P`` prompt positions, ``T`` completion positions, ``S = P + T``, ``N`` counted tokens of all
completions, ``V`` vocabulary, ``K`` reward streams.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lmppo.axes import Record, axes
from lmppo.groups import GROUP_COST, MOST_TOKENS, cheapest_groups, kind_of_device
from lmppo.support import Support


@dataclass(frozen=True)
class Tokens(Record):
    """Prompts and completions.

    Attributes:
        prompt_ids: ``(B, P)`` prompt tokens, padded on the left; what pads is arbitrary, the mask decides.
        prompt_mask: ``(B, P)`` True on prompt tokens.
        completion_ids: ``(B, T)`` sampled tokens, padded on the right.
        completion_mask: ``(B, T)`` True on the sampled tokens that count, EOS included.
        below: ``(B, W, H)`` what frozen lower layers compute of each row, from its first token to the last but one (which
            are all that is read); None where there are none.
        line_length: The length of the lines in which a model is to read several rows, one behind the other; 0: it reads
            each row as a line.
    """

    prompt_ids: Tensor = axes("B P", torch.long)
    prompt_mask: Tensor = axes("B P", torch.bool)
    completion_ids: Tensor = axes("B T", torch.long)
    completion_mask: Tensor = axes("B T", torch.bool)
    below: Tensor | None = axes("B W H", optional=True)
    line_length: int = 0

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

    @property
    def prompt_numbers(self) -> Tensor:
        """``(B,)`` int64, the same number for rows whose prompts have the same tokens."""
        prompts = torch.where(self.prompt_mask, self.prompt_ids, -1)
        numbers: Tensor = torch.unique(prompts, dim=0, return_inverse=True)[1]
        return numbers

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

    def counted(self) -> Self:
        """The counted tokens of all rows as one row, ``B = 1`` and ``T = N``, without prompts.

        Raises:
            TypeError: The record has numbers for whole rows.
        """
        mask = self.completion_mask

        def pick(tensor: Tensor, names: tuple[str, ...]) -> Tensor:
            if names[:2] == ("B", "T"):
                return tensor[mask].unsqueeze(0)
            if names[:2] not in (("B", "P"), ("B", "W")):
                raise TypeError(f"A {type(self).__name__} has numbers for whole rows, with the axes {names}.")
            return tensor[:1, :0]

        return self.map(pick)

    def micro_batches(self, size: int, *, packs: bool = False) -> Iterator[tuple[Tensor, Self]]:
        """The rows in groups whose passes cost least: which rows, and their record.

        Args:
            size: How many of the longest rows make a group; of shorter rows as many as have no more tokens with padding.
            packs: Whether the models that read them can read several rows one behind the other.
        """
        read = (self.tokens.attention_mask.sum(dim=1) - 1).clamp(min=1)  # the last token is never read
        kind = kind_of_device(read.device)
        groups, line_length = cheapest_groups(
            read.tolist(), size, GROUP_COST[kind], packs=packs, most_tokens=MOST_TOKENS[kind]
        )
        for group in groups:
            rows = torch.tensor(group, device=read.device)
            record = self.rows(rows)
            yield rows, replace(record, tokens=replace(record.tokens, line_length=line_length))


def spread(numbers: Tensor, mask: Tensor) -> Tensor:
    """Numbers of counted tokens ``(1, N, ...)``, row by row, as ``(B, T, ...)``; 0 where ``mask (B, T)`` is False."""
    result = numbers.new_zeros(*mask.shape, *numbers.shape[2:])
    result[mask] = numbers[0]
    return result


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
