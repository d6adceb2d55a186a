"""Numbers per token from one or several models' logits, a few rows and a few tokens at a time."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lmppo.functional import token_logprobs
from lmppo.models.actor_critic import ActorCritic
from lmppo.models.chunks import chunks_of
from lmppo.models.states import States
from lmppo.records import TokenRecord, Tokens, spread


class Reader(Protocol):
    """A language model in two steps."""

    @property
    def vocab_size(self) -> int:
        """``V``."""

    @property
    def packs(self) -> bool:
        """Whether it can read several rows one behind the other."""

    def read(self, tokens: Tokens) -> States:
        """The states before the N counted tokens, ``(1, N, ...)``."""

    def logits_of(self, states: States) -> Tensor:
        """``(1, n, V)`` the logits of some states."""


@torch.no_grad()
def measure_logits(
    readers: Sequence[Reader],
    record: TokenRecord,
    compute: Callable[..., dict[str, Tensor]],
    *,
    micro_batch_size: int,
) -> dict[str, Tensor]:
    """``(B, T)`` numbers computed from logits, by name; 0 where the mask is False.

    Args:
        readers: The models.
        record: The tokens and their support.
        compute: From the record of some counted tokens, as one row of n, and each model's logits ``(1, n, V)`` of them, to
            numbers ``(1, n)`` by name.
        micro_batch_size: Rows of the greatest length at a time.
    """
    record = TokenRecord(record.tokens, record.support)
    results: dict[str, Tensor] = {}
    for rows, micro in record.micro_batches(micro_batch_size, packs=all(reader.packs for reader in readers)):
        counted, states = micro.counted(), [reader.read(micro.tokens) for reader in readers]
        pieces = [
            compute(
                counted.cut(T=part),
                *(r.logits_of(s.cut(part)) for r, s in zip(readers, states, strict=True)),
            )
            for part in chunks_of(states[0], readers[0].vocab_size)
        ]
        for name in pieces[0]:
            numbers = torch.cat([piece[name] for piece in pieces], dim=1)
            result = results.setdefault(name, numbers.new_zeros(record.completion_mask.shape))
            result[rows] = spread(numbers, micro.completion_mask)
    return results


def score_tokens(reader: Reader, record: TokenRecord, temperature: float, micro_batch_size: int) -> Tensor:
    """``(B, T)`` log-probabilities of sampled tokens under a model; 0 where the mask is False.

    Args:
        reader: The model.
        record: The tokens and their ``support``.
        temperature: Divides the logits.
        micro_batch_size: Rows of the greatest length at a time.
    """

    def score(some: TokenRecord, logits: Tensor) -> dict[str, Tensor]:
        ids, support = some.tokens.completion_ids, some.support.allowed()
        return {"logprobs": token_logprobs(logits, ids, temperature=temperature, support=support)}

    return measure_logits([reader], record, score, micro_batch_size=micro_batch_size)["logprobs"]


@torch.no_grad()
def score_values(model: ActorCritic, record: TokenRecord, micro_batch_size: int) -> Tensor:
    """``(B, T, K)`` the critic's values of the states before the counted tokens; 0 where the mask is False.

    Args:
        model: Policy and critic.
        record: The tokens.
        micro_batch_size: Rows of the greatest length at a time.
    """
    values = torch.zeros(*record.completion_mask.shape, model.n_streams, device=record.completion_mask.device)
    for rows, micro in record.micro_batches(micro_batch_size, packs=model.packs):
        values[rows] = model.values(micro.tokens)
    return values
