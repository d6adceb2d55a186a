"""The stream of prompts: a data set of any kind in batches, in an order that resumes exactly.

The order is a pure function of (seed, epoch, position): the only state is the number of prompts drawn so far.
"""

import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils import data

from lmppo.prompts.batch import PromptBatch, make_batch
from lmppo.prompts.encoder import PromptEncoder
from lmppo.prompts.forms import Prompt
from lmppo.texts import warn_of_second_bos

_AT_ONCE = 1024  # rows that are read and tokenized together
_END = object()


class PromptStream:
    """An endless stream of batches of prompts, in which each epoch visits every row exactly once.

    A map-style data set (anything with a length and integer indexing) is read and tokenized completely before training,
    and visited in a new order each epoch. A streaming one is read in its own order and checked as it is read.

    Every batch has the same columns, None where a row has no such key: those of the whole data set; of a streaming one
    those that it declares, or else all that rows have had so far and those that are needed.

    Args:
        dataset: Rows of ``{"prompt": ..., other columns}``, or of bare prompts. If it is part of another data set, its
            attribute ``row_numbers``, where present, gives the rows' numbers there, for messages.
        encoder: Turns prompts into tokens.
        seed: Seeds the order.
        shuffle: Whether to shuffle (map-style only).
        name: How messages name the data set.
        needed: Columns that something cannot do without, and what that is, for messages.

    Raises:
        ValueError: The data set is empty, a row's prompt is not usable, or no row has a column that is needed.
    """

    def __init__(
        self,
        dataset: Any,
        encoder: PromptEncoder,
        *,
        seed: int = 0,
        shuffle: bool = True,
        name: str = "train_dataset",
        needed: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.encoder = encoder
        self.seed = seed
        self.shuffle = shuffle
        self.drawn = 0
        streams = isinstance(dataset, data.IterableDataset)  # torch's may have a length
        self.is_map_style = not streams and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        self._refuse_other_kinds()
        self._warned = False
        self._iterator: Iterator[Any] | None = None
        self._read = 0
        self._order, self._order_epoch = np.empty(0, dtype=np.int64), -1
        self._encoded: list[tuple[Prompt, list[int]]] = []
        names = None if self.is_map_style else getattr(dataset, "column_names", None)  # of a stream of datasets
        declared = names if isinstance(names, list) else []
        self._columns: dict[str, None] = dict.fromkeys(declared)  # a set that keeps its order
        self._seen: dict[str, None] = {}  # what rows of a stream have had
        if self.is_map_style:
            self._encode_all()
        self._require(needed or {})

    @property
    def columns(self) -> list[str]:
        """The columns of a batch beside the prompt."""
        return [name for name in self._columns | self._seen if name != "prompt"]

    def epochs_of(self, n_prompts: int) -> int:
        """Passes over the data set that so many prompts take; of a stream, as many as transformers counts."""
        return math.ceil(n_prompts / len(self.dataset)) if self.is_map_style else sys.maxsize

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the data set's prompts and their order; a streaming data set is identified only as streaming."""
        if not self.is_map_style:
            return "streaming"
        ids = json.dumps([ids for _, ids in self._encoded]).encode()
        return f"{len(self._encoded)} prompts, sha256 {hashlib.sha256(ids).hexdigest()[:16]}"

    def next_batch(self, n_prompts: int, num_generations: int = 1) -> PromptBatch:
        """The next prompts, each ``num_generations`` times in a row."""
        positions = range(self.drawn, self.drawn + n_prompts)
        if self.is_map_style:
            numbers = [self._index(position) for position in positions]
            rows, encoded = self._rows(numbers), [self._encoded[i] for i in numbers]
        else:
            rows = self._stream_rows(positions)
            encoded = self._encode(rows, positions)
        self.drawn += n_prompts
        return make_batch(rows, encoded, self.columns, num_generations)

    def state_dict(self) -> dict[str, int]:
        """The number of prompts drawn so far."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the number of prompts in ``state``."""
        self.drawn = int(state["drawn"])
        self._iterator, self._seen = None, {}

    def _refuse_other_kinds(self) -> None:
        dataset, name = self.dataset, self.name
        if type(dataset).__name__ == "DataFrame":
            raise ValueError(
                f"{name}: the data set is a DataFrame; expected rows. Give datasets.Dataset.from_pandas(...) instead."
            )
        readable = self.is_map_style or isinstance(dataset, Iterable)
        if not readable or isinstance(dataset, str | Mapping | Iterator):
            splits = f" It has: {', '.join(map(str, dataset))}." if isinstance(dataset, Mapping) else ""
            raise ValueError(
                f"{name}: the data set is a {type(dataset).__name__}; expected a Dataset (one split of it), a list of "
                f"rows, or an iterable of rows that can be restarted (an iterator or a generator cannot).{splits}"
            )
        if self.is_map_style and len(dataset) == 0:
            raise ValueError(f"{name}: the data set is empty. Give it at least one row with a `prompt`.")

    def _encode_all(self) -> None:
        size = len(self.dataset)
        for start in range(0, size, _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, size))
            rows = self._rows(numbers)
            self._columns |= _keys(rows)
            self._encoded += self._encode(rows, numbers)

    def _encode(self, rows: Sequence[Any], numbers: Sequence[int]) -> list[tuple[Prompt, list[int]]]:
        """The rows' prompts and their tokens; warns of the data set's first prompt with two BOS tokens."""
        where = [self._where(number) for number in numbers]
        encoded = self.encoder.encode(rows, where)
        for (_, ids), place in zip(encoded, where, strict=True):
            self._warned = self._warned or warn_of_second_bos(self.encoder.tokenizer, ids, place)
        return encoded

    def _require(self, needed: Mapping[str, str]) -> None:
        """Refuse columns that no row can have; those that rows of a stream may have later are None until then."""
        missing = {column: reader for column, reader in needed.items() if column not in self.columns}
        if missing and (self.is_map_style or self._columns):
            column, reader = next(iter(missing.items()))
            raise ValueError(
                f"{reader} needs the argument `{column}`, and {self.name} has no such column (it has: "
                f"{', '.join(self.columns) or 'the prompt alone'}). Add the column, or give the argument a default."
            )
        self._columns |= dict.fromkeys(missing)

    def _where(self, row: int) -> str:
        """How messages name a row."""
        numbers = getattr(self.dataset, "row_numbers", None)
        if numbers is None:
            return f"Row {row} of {self.name}"
        return f"Row {numbers[row]} of the original data (row {row} of {self.name})"

    def _rows(self, numbers: Sequence[int]) -> list[Any]:
        """Rows of a map-style data set, all at once where it has torch's method for that."""
        at_once = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[i] for i in numbers] if at_once is None else list(at_once(list(numbers)))

    def _index(self, position: int) -> int:
        """The row of a map-style data set that stands at a position of the order."""
        epoch, offset = divmod(position, len(self.dataset))
        if not self.shuffle:
            return offset
        if epoch != self._order_epoch:
            philox = np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, 3])  # 0 to 2: sampling and minibatches
            self._order = np.random.Generator(philox).permutation(len(self.dataset))
            self._order_epoch = epoch
        return int(self._order[offset])

    def _stream_rows(self, positions: range) -> list[Any]:
        """Rows of a streaming data set; after a resume, those before them are read again."""
        if self._iterator is None:
            self._iterator, self._read = iter(self.dataset), 0
            for _ in range(positions.start):
                self._next_row()
        return [self._next_row() for _ in positions]

    def _next_row(self) -> Any:
        assert self._iterator is not None
        row = next(self._iterator, _END)
        if row is _END:
            self._iterator = iter(self.dataset)
            row = next(self._iterator, _END)
        if row is _END:
            raise ValueError(
                f"{self.name}: the streaming data set has no row after row {self._read}: it is empty, or did not "
                f"restart at iter()."
            )
        self._read += 1
        self._seen |= _keys([row])
        return row


def _keys(rows: Sequence[Any]) -> dict[str, None]:
    return dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row)
