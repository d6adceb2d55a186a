"""The prompts of one iteration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmppo.prompts.forms import Prompt


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one iteration, over all processes, each repeated ``num_generations`` times in a row.

    Attributes:
        prompts: The prompt of each completion as in the data set (text or messages; token ids are decoded, without
            special tokens).
        input_ids: The prompt's tokens, for each completion.
        columns: The data set's other columns, one value per completion.
    """

    prompts: list[Prompt]
    input_ids: list[list[int]]
    columns: dict[str, list]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: range) -> "PromptBatch":
        """The batch with only these rows."""
        return PromptBatch(
            self.prompts[rows.start : rows.stop],
            self.input_ids[rows.start : rows.stop],
            {name: column[rows.start : rows.stop] for name, column in self.columns.items()},
        )


def make_batch(
    rows: Sequence[Any], encoded: Sequence[tuple[Prompt, list[int]]], columns: Sequence[str], num_generations: int = 1
) -> PromptBatch:
    """Rows of a data set as a batch, each repeated ``num_generations`` times in a row.

    Args:
        rows: The rows.
        encoded: Their prompts, and the prompts' tokens.
        columns: The other columns; None stands where a row has no such key.
        num_generations: Completions per prompt.
    """
    times = range(num_generations)
    values = [row if isinstance(row, Mapping) else {} for row in rows]
    return PromptBatch(
        [prompt for prompt, _ in encoded for _ in times],
        [ids for _, ids in encoded for _ in times],
        {name: [row.get(name) for row in values for _ in times] for name in columns},
    )


def pad_left(rows: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Token ids ``(B, width)`` padded on the left with 0, and the mask ``(B, width)`` that is True on tokens."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = True
    return ids, mask
