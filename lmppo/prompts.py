"""Prompts: turns a data set of text, chat messages or token ids into batches, in an order that resumes exactly.

The order is a pure function of (seed, epoch, position): the only state is the number of prompts drawn so far.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lmppo.pretrained as pretrained
from lmppo.context import usable_context
from lmppo.models import vocab_size_of
from lmppo.protocols import Tokenizer
from lmppo.rewards.protocol import REWARD_ARGUMENTS
from lmppo.settings import SamplingSettings
from lmppo.texts import decode_whole, warn_of_second_bos

Prompt = str | list


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


def pad_left(rows: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Token ids ``(B, width)`` padded on the left with 0, and the mask ``(B, width)`` that is True on tokens."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = True
    return ids, mask


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def check_prompt(prompt: Any, where: str) -> None:
    """Refuse a prompt that is not text, chat messages or token ids.

    Args:
        prompt: A prompt from the data set.
        where: How messages name its row.

    Raises:
        ValueError: It is null or of another type.
    """
    if prompt is None:
        raise ValueError(f"{where}: `prompt` is null. Remove the row, or give it a prompt.")
    if isinstance(prompt, str) or is_conversational(prompt):
        return
    kind = type(prompt).__name__
    if isinstance(prompt, list | tuple):
        wrong = {type(token).__name__ for token in prompt if not (type(token) is int or isinstance(token, np.integer))}
        if not wrong:
            return
        kind += f" holding {', '.join(sorted(wrong))}"
    raise ValueError(
        f"{where}: the prompt is a {kind}; expected text, a list of messages ({{'role': ..., 'content': ...}}), or a "
        f"list of token ids."
    )


class PromptEncoder:
    """Turns the prompt of a data row into tokens, and refuses prompts that cannot be sampled from.

    Args:
        tokenizer: The policy's tokenizer.
        vocab_size: Rows of the policy's embedding.
        max_positions: The shortest context among the models that read prompt and completion, or None for no limit.
        max_completion_length: Positions that the completion needs.
        reader: How messages name the model with that context.
        reason: What limits it, for messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_positions: int | None,
        max_completion_length: int,
        *,
        reader: str = "model",
        reason: str = "",
    ) -> None:
        self.reader = reader
        self.reason = reason
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.max_completion_length = max_completion_length

    def encode(self, row: Any, where: str) -> tuple[Prompt, list[int]]:
        """The prompt as reward functions receive it, and its tokens.

        Args:
            row: A row of the data set.
            where: How messages name it.

        Raises:
            ValueError: The row has no prompt, or one that is empty, too long, or not text, messages or token ids; or
                it has a column with the name of an argument of reward functions.
        """
        if isinstance(row, dict) and "prompt" not in row:
            raise ValueError(
                f"{where} has no `prompt` (found: {', '.join(map(str, row))}). Name the column `prompt`, or cut "
                f"prompts from a `text` column with lmppo.prompts.cut_prompts (--prompt_tokens in the recipes)."
            )
        prompt = row["prompt"] if isinstance(row, dict) else row
        check_prompt(prompt, where)
        clash = [name for name in REWARD_ARGUMENTS if isinstance(row, dict) and name in row]
        if clash:
            raise ValueError(
                f"{where} has a column `{clash[0]}`, a name that reward functions use for an argument from the "
                f"rollout. Rename the column (dataset.rename_column({clash[0]!r}, 'my_{clash[0]}')) or remove it."
            )
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif is_conversational(prompt):
            if not getattr(self.tokenizer, "chat_template", None):
                raise ValueError(
                    f"{where}: the prompt is a list of chat messages, but the tokenizer has no chat template. "
                    f"Set tokenizer.chat_template, or give the prompts as text."
                )
            ids = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        else:
            ids = [int(token) for token in prompt]
            self._check(ids, where)
            return decode_whole(self.tokenizer, [ids])[0], ids
        self._check(ids, where)
        return prompt, list(ids)

    def _check(self, ids: Sequence[int], where: str) -> None:
        if not ids:
            raise ValueError(
                f"{where}: the prompt has no tokens, and a language model needs at least one to continue. Remove "
                f"the row, or give it the beginning-of-text token."
            )
        if max(ids) >= self.vocab_size or min(ids) < 0:
            raise ValueError(
                f"{where}: token id {max(ids) if max(ids) >= self.vocab_size else min(ids)} is outside the "
                f"model's vocabulary of {self.vocab_size}."
            )
        if self.max_positions is not None and len(ids) + self.max_completion_length > self.max_positions:
            reason = f" ({self.reason})" if self.reason else ""
            raise ValueError(
                f"{where}: a prompt of {len(ids)} tokens and max_completion_length="
                f"{self.max_completion_length} exceed the {self.reader}'s context of {self.max_positions}"
                f"{reason}. Shorten the prompt (--prompt_tokens) or lower max_completion_length."
            )


class PromptStream:
    """An endless stream of batches of prompts, in which each epoch visits every row exactly once.

    A map-style data set (anything with a length and integer indexing) is checked completely before training, and visited in
    a new order each epoch. A streaming one is read in its own order and checked row by row.

    Args:
        dataset: Rows of ``{"prompt": ..., other columns}``, or of bare prompts. If it is part of another data set, its
            attribute ``row_numbers``, where present, gives the rows' numbers there, for messages.
        encoder: Turns prompts into tokens.
        seed: Seeds the order.
        shuffle: Whether to shuffle (map-style only).
        name: How messages name the data set.

    Raises:
        ValueError: The data set is empty, or a row's prompt is not usable.
    """

    def __init__(
        self,
        dataset: Any,
        encoder: PromptEncoder,
        *,
        seed: int = 0,
        shuffle: bool = True,
        name: str = "train_dataset",
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.encoder = encoder
        self.seed = seed
        self.shuffle = shuffle
        self.drawn = 0
        self.is_map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if type(dataset).__name__ == "DataFrame":
            raise ValueError(
                f"{name}: the data set is a DataFrame; expected rows. Give datasets.Dataset.from_pandas(...) instead."
            )
        readable = self.is_map_style or isinstance(dataset, Iterable)
        if not readable or isinstance(dataset, str | dict | Iterator):
            raise ValueError(
                f"{name}: the data set is a {type(dataset).__name__}; expected a Dataset (one split of it), a list of "
                f"rows, or an iterable of rows that can be restarted (an iterator or a generator cannot)."
            )
        self._warned = False
        self._iterator: Iterator[Any] | None = None
        self._read = 0
        self._order, self._order_epoch = np.empty(0, dtype=np.int64), -1
        if self.is_map_style:
            if len(dataset) == 0:
                raise ValueError(f"{name}: the data set is empty. Give it at least one row with a `prompt`.")
            self._encoded = [self._encode(dataset[i], i) for i in range(len(dataset))]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the data set's prompts and their order; a streaming data set is identified only as streaming."""
        if not self.is_map_style:
            return "streaming"
        ids = json.dumps([ids for _, ids in self._encoded]).encode()
        return f"{len(self._encoded)} prompts, sha256 {hashlib.sha256(ids).hexdigest()[:16]}"

    def next_batch(self, n_prompts: int, num_generations: int = 1) -> PromptBatch:
        """The next prompts, each ``num_generations`` times in a row."""
        drawn = [self._row(self.drawn + i) for i in range(n_prompts)]
        self.drawn += n_prompts
        return make_batch(drawn, num_generations)

    def state_dict(self) -> dict[str, int]:
        """The number of prompts drawn so far."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the number of prompts in ``state``."""
        self.drawn = int(state["drawn"])
        self._iterator = None

    def _encode(self, row: Any, number: int) -> tuple[Prompt, list[int]]:
        """The row's prompt and its tokens; warns of the data set's first prompt with two BOS tokens."""
        where = self._where(number)
        prompt, ids = self.encoder.encode(row, where)
        self._warned = self._warned or warn_of_second_bos(self.encoder.tokenizer, ids, where)
        return prompt, ids

    def _where(self, row: int) -> str:
        """How messages name a row."""
        numbers = getattr(self.dataset, "row_numbers", None)
        if numbers is None:
            return f"Row {row} of {self.name}"
        return f"Row {numbers[row]} of the original data (row {row} of {self.name})"

    def _row(self, position: int) -> tuple[Any, Prompt, list[int]]:
        if not self.is_map_style:
            return self._stream_row(position)
        epoch, offset = divmod(position, len(self.dataset))
        if self.shuffle and epoch != self._order_epoch:
            philox = np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, 3])  # 0 to 2: sampling and minibatches
            self._order = np.random.Generator(philox).permutation(len(self.dataset))
            self._order_epoch = epoch
        index = int(self._order[offset]) if self.shuffle else offset
        return (self.dataset[index], *self._encoded[index])

    def _stream_row(self, position: int) -> tuple[Any, Prompt, list[int]]:
        if self._iterator is None:
            self._iterator, self._read = iter(self.dataset), 0
            for _ in range(position):
                self._next_row()
        row = self._next_row()
        return (row, *self._encode(row, position))

    def _next_row(self) -> Any:
        assert self._iterator is not None
        row = next(self._iterator, None)
        if row is None:
            self._iterator = iter(self.dataset)
            row = next(self._iterator, None)
        if row is None:
            raise ValueError(
                f"{self.name}: the streaming data set has no row after row {self._read}: it is empty, or did not "
                f"restart at iter()."
            )
        self._read += 1
        return row


def make_batch(drawn: Sequence[tuple[Any, Prompt, list[int]]], num_generations: int = 1) -> PromptBatch:
    """Encoded rows as a batch, each repeated ``num_generations`` times in a row."""
    repeated = [item for item in drawn for _ in range(num_generations)]
    names = [n for n in (drawn[0][0] if isinstance(drawn[0][0], dict) else {}) if n != "prompt"]
    columns = {name: [row.get(name) for row, _, _ in repeated] for name in names}
    return PromptBatch([prompt for _, prompt, _ in repeated], [ids for _, _, ids in repeated], columns)


def cut_prompts(dataset: Any, tokenizer: Tokenizer, prompt_tokens: int) -> Any:
    """Replace a data set's ``text`` column with a ``prompt`` column: the first tokens of each text, as token ids.

    The result's ``row_numbers`` are the rows that were kept.

    Args:
        dataset: A `datasets.Dataset`; texts shorter than ``prompt_tokens`` are left out.
        tokenizer: The policy's tokenizer.
        prompt_tokens: Tokens of each prompt.

    Raises:
        ValueError: There is no ``text`` column, a row of it is not text, or no text is long enough.
    """
    if "text" not in dataset.column_names:
        raise ValueError(f"The data set has neither a `prompt` nor a `text` column (found: {dataset.column_names}).")

    def cut(texts: list[str], rows: list[int]) -> dict[str, list]:
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                kind = "null" if text is None else f"a {type(text).__name__}"
                raise ValueError(f"Row {row}: `text` is {kind}; expected text. Correct the row or remove it.")
        ids = tokenizer(texts, truncation=True, max_length=prompt_tokens)["input_ids"]
        return {"prompt": [row if len(row) == prompt_tokens else None for row in ids]}

    dataset = dataset.map(cut, batched=True, with_indices=True, input_columns="text", remove_columns="text")
    long_enough = [row for row, prompt in enumerate(dataset["prompt"][:]) if prompt is not None]
    if not long_enough:
        raise ValueError(f"No text of the data set has prompt_tokens={prompt_tokens} tokens: lower it.")
    dataset = dataset.select(long_enough)
    dataset.row_numbers = long_enough
    return dataset


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that lies beside a model's weights.

    Raises:
        UntrustedModelError: It needs code of its own, and ``trust_remote_code`` is not set.
        OSError: There is none.
    """
    try:
        return pretrained.load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    except pretrained.UntrustedModelError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer could be loaded from {name_or_path!r}: it must be a directory or a Hub id that holds one. "
            f"For a model without, pass processing_class. ({str(error).splitlines()[0]})"
        ) from error


def make_prompt_encoder(tokenizer: Tokenizer, readers: dict[str, Any], args: SamplingSettings) -> PromptEncoder:
    """The encoder of prompts.

    Args:
        tokenizer: The policy's tokenizer.
        readers: The models that read prompt and completion (None: not there), by their names as arguments; the policy is
            ``"model"``. The shortest context decides how long a prompt may be.
        args: Gives the longest completion.

    Raises:
        ValueError: The tokenizer has tokens that the policy does not know.
    """
    vocab_size = vocab_size_of(readers["model"])
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model's embedding {vocab_size} rows: they do not "
            f"belong together, or the model needs model.resize_token_embeddings({len(tokenizer)})."
        )
    contexts = {name: usable_context(model) for name, model in readers.items() if model is not None}
    limits = [(context.length, name, context.reason) for name, context in contexts.items() if context is not None]
    length, reader, reason = min(limits, key=lambda limit: limit[0], default=(None, "model", ""))
    return PromptEncoder(tokenizer, vocab_size, length, args.max_completion_length, reader=reader, reason=reason)
