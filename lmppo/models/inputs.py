"""How tokens are given to a model: position ids, and where they come from.

Position ids always come from the attention mask: GPT-2 counts positions from the left edge otherwise, padding included,
and its log-probabilities are silently wrong.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmppo.groups import pack_lines
from lmppo.records import Tokens


@dataclass(frozen=True)
class Positions:
    """How a model counts positions.

    Attributes:
        first: The position of a row's first token; None: the model is told no positions.
        padding_id: A token that is never counted, wherever it stands, and is at ``first - 1``: the padding of RoBERTa and
            the models after it. None: every token counts.
        packs: Whether several texts may stand in one row, one behind the other, told apart by their positions alone.
    """

    first: int | None = 0
    padding_id: int | None = None
    packs: bool = False

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
class Layout:
    """Where rows stand: each in a line of its own, or packed, several in a line, one behind the other.

    Attributes:
        rows: ``(L, W)`` the row that stands in each place of the lines.
        places: ``(L, W)`` the token of that row; behind a row, whatever.
        line: ``(B,)`` each row's line.
        start: ``(B,)`` the column of its first token.
    """

    rows: Tensor
    places: Tensor
    line: Tensor
    start: Tensor

    @classmethod
    def apart(cls, lengths: Tensor) -> "Layout":
        """Of rows of these lengths ``(B,)``, each in a line of its own."""
        each, columns = (torch.arange(n, device=lengths.device) for n in (len(lengths), int(lengths.max())))
        shape = (len(each), len(columns))
        return cls(each[:, None].expand(shape), columns.expand(shape), each, torch.zeros_like(each))

    @classmethod
    def in_lines(cls, lengths: Tensor, line_length: int) -> "Layout":
        """Of rows of these lengths ``(B,)``, packed into lines of this length, or that of the longest row."""
        sizes = lengths.tolist()
        columns = np.arange(max(line_length, *sizes))
        lines = pack_lines(sizes, len(columns))
        rows, places = np.zeros((2, len(lines), len(columns)), dtype=np.int64)
        line, start = np.zeros((2, len(sizes)), dtype=np.int64)
        for i, members in enumerate(lines):
            at = 0
            for row in members:  # behind the last one its last token again, up to the end of the line
                line[row], start[row] = i, at
                rows[i, at:], places[i, at:] = row, columns[: len(columns) - at].clip(max=sizes[row] - 1)
                at += sizes[row]
        return cls(*(torch.from_numpy(x).to(lengths.device) for x in (rows, places, line, start)))


@dataclass(frozen=True)
class Aligned:
    """Rows of tokens, each from its first token on: all padding is behind them, where a causal model does not look.

    So every row is read as if it were alone, and no mask has to hide anything.

    Attributes:
        ids: ``(L, W)`` the tokens, and behind them whatever.
        layout: Which of the rows' tokens they are.
        lines: ``(N,)`` the line of each counted token, row by row.
        columns: ``(N,)`` the column of the state before it.
        last: ``(B,)`` the column of each row's last token; its line is ``layout.line``.
    """

    ids: Tensor
    layout: Layout
    lines: Tensor
    columns: Tensor
    last: Tensor

    @property
    def packed(self) -> bool:
        """Whether any line has several rows."""
        return len(self.ids) < len(self.last)

    @classmethod
    def of(cls, tokens: Tokens, *, whole: bool = False) -> "Aligned":
        """The prompts with their completions up to their last counted tokens.

        Args:
            tokens: The rows; packed if they have a ``line_length``.
            whole: Whether the last tokens are to be read as well; else the last columns are those of the tokens before.
        """
        there = tokens.attention_mask
        lengths = there.sum(dim=1) if whole else (there.sum(dim=1) - 1).clamp(min=1)
        layout = Layout.in_lines(lengths, tokens.line_length) if tokens.line_length else Layout.apart(lengths)
        order = torch.argsort((~there).to(torch.uint8), dim=1, stable=True)
        ids = tokens.input_ids.gather(1, order)[layout.rows, layout.places]
        place = there.cumsum(dim=1)[:, tokens.prompt_ids.shape[1] :] - 1
        counted, times = tokens.completion_mask.nonzero(as_tuple=True)
        columns = layout.start[counted] + place[counted, times] - 1
        return cls(ids, layout, layout.line[counted], columns, layout.start + lengths - 1)


def pick(numbers: Tensor, lines: Tensor, columns: Tensor) -> Tensor:
    """``(1, N, ...)`` what stands in N places of ``(L, W, ...)``; its backward pass is much faster than that of indexing."""
    return numbers.flatten(0, 1).index_select(0, lines * numbers.shape[1] + columns).unsqueeze(0)


def inputs_of(aligned: Aligned, positions: Positions) -> dict[str, Any]:
    """The arguments of a model's forward pass over aligned rows ``(L, W)``.

    The mask hides nothing: without one, some models take tokens of the padding's kind for padding. Packed rows have none,
    since transformers' models tell them apart by positions that begin anew only then; see :func:`Positions.packs`.
    """
    inputs = {"input_ids": aligned.ids, "use_cache": False}
    if aligned.packed:
        assert positions.packs and positions.first is not None
        return {**inputs, "attention_mask": None, "position_ids": aligned.layout.places + positions.first}
    mask = torch.ones_like(aligned.ids)
    return {**inputs, "attention_mask": mask, **positions.of(aligned.ids, mask)}


def base_of(model: Any) -> Any:
    """The model within an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def stack_of(base: Any) -> nn.ModuleList | None:
    """The list of a model's layers, if it has one."""
    n_layers = getattr(base.config.get_text_config(decoder=True), "num_hidden_layers", None)
    return next((m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)


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
