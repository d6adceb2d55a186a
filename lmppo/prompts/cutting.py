"""Prompts that are the beginnings of texts."""

from typing import Any

from lmppo.protocols import Tokenizer


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
