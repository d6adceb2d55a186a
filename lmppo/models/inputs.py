"""How tokens are given to a model: position ids, and where they come from.

Position ids always come from the attention mask: GPT-2 counts positions from the left edge otherwise, padding included,
and its log-probabilities are silently wrong.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmppo.records import Tokens


@dataclass(frozen=True)
class Positions:
    """How a model counts positions.

    Attributes:
        first: The position of a row's first token; None: the model is told no positions.
        padding_id: A token that is never counted, wherever it stands, and is at ``first - 1``: the padding of RoBERTa and
            the models after it. None: every token counts.
    """

    first: int | None = 0
    padding_id: int | None = None

    def of(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """``position_ids (B, S)`` as an argument of the model, if it is told any: each token's place among those there.

        Args:
            input_ids: ``(B, S)``.
            attention_mask: ``(B, S)`` which tokens are there.
        """
        if self.first is None:
            return {}
        counted = attention_mask.bool()
        if self.padding_id is not None:
            counted = counted & (input_ids != self.padding_id)
        places = (counted.long().cumsum(dim=1) - 1).clamp(min=0) + self.first
        if self.padding_id is not None:
            places = places.where(counted, self.first - 1)
        return {"position_ids": places}


@dataclass(frozen=True)
class Aligned:
    """Rows of tokens, each from its first token on: all padding is behind them, where a causal model does not look.

    So every row is read as if it were alone, and no mask has to hide anything.

    Attributes:
        ids: ``(B, W)`` the tokens, and behind them whatever.
        rows: ``(N,)`` the row of each counted token, row by row.
        columns: ``(N,)`` the column of the state before it.
        last: ``(B,)`` the column of each row's last token.
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    last: Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> "Aligned":
        """The prompts with their completions up to their last counted tokens."""
        there = tokens.attention_mask
        lengths = there.sum(dim=1)
        order = torch.argsort((~there).to(torch.uint8), dim=1, stable=True)
        ids = tokens.input_ids.gather(1, order)[:, : int(lengths.max())]
        place = there.cumsum(dim=1)[:, tokens.prompt_ids.shape[1] :] - 1
        rows, times = tokens.completion_mask.nonzero(as_tuple=True)
        return cls(ids, rows, place[rows, times] - 1, lengths - 1)


def inputs_of(ids: Tensor, positions: Positions) -> dict[str, Any]:
    """The arguments of a model's forward pass over aligned rows ``(B, W)``.

    The mask hides nothing: without one, some models take tokens of the padding's kind for padding.
    """
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False, **positions.of(ids, mask)}


def base_of(model: Any) -> Any:
    """The model within an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward pass has an argument of this name, or hands it on to the class that it extends."""
    for cls in type(base_of(model)).__mro__:
        parameters = inspect.signature(cls.forward).parameters if hasattr(cls, "forward") else {}
        if argument in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def kind_of(model: Any) -> str:
    """The model's class, as messages name it."""
    return type(base_of(model)).__name__
