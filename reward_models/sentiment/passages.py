"""Passages: pieces of reviews of the length a reward scores, in the spellings it meets."""

import re
from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING
from zlib import crc32

from reward_models.sentiment.reviews import load_reviews

if TYPE_CHECKING:
    from datasets import Dataset

WORD = re.compile(r"[a-z][a-z'-]+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, cut at the white space after ``.``, ``!`` or ``?`` and a closing quote or bracket."""
    return [sentence for sentence in SENTENCE_END.split(text) if sentence]


def cut_passages(text: str, rng: Random, *, min_words: int, max_words: int) -> list[str]:
    """The text as consecutive passages, each begun at a sentence.

    A passage takes whole sentences until it has a number of words drawn from ``min_words`` to ``max_words``; what goes
    beyond ``max_words`` is cut off. A last passage shorter than ``min_words`` is dropped.
    """
    passages: list[str] = []
    words: list[str] = []
    wanted = rng.randint(min_words, max_words)
    for sentence in split_sentences(text):
        words += sentence.split()
        if len(words) >= wanted:
            passages.append(" ".join(words[:max_words]))
            words, wanted = [], rng.randint(min_words, max_words)
    if len(words) >= min_words:
        passages.append(" ".join(words))
    return passages


def plain_spelling(text: str) -> str:
    """The text spelled as Rotten Tomatoes sentences are: lower case, punctuation standing alone."""
    return re.sub(r"\s+", " ", re.sub(r"(\.{3}|[.,!?;:()\"]|--)", r" \1 ", text.lower())).strip()


def remix_sentences(sentences: list[str], rng: Random) -> str:
    """A text no one wrote: the start of one sentence and the end of another, a piece of one, or one that lost words."""
    words = rng.choice(sentences).split()
    match rng.randrange(3):
        case 0:
            other = rng.choice(sentences).split()
            words = words[: rng.randint(1, len(words))] + other[rng.randrange(len(other)) :]
        case 1:
            n_kept = rng.randint(min(3, len(words)), len(words))
            start = rng.randint(0, len(words) - n_kept)
            words = words[start : start + n_kept]
        case 2:
            words = [word for word in words if rng.random() > 0.15] or words
    return " ".join(words)


def repeated_words(texts: Iterable[str]) -> list[str]:
    """The words, in lower case, that stand in two texts or more, in alphabetical order."""
    counts = Counter(word for text in texts for word in set(WORD.findall(text.lower())))
    return sorted(word for word, n in counts.items() if n > 1)


def swap_words(text: str, words: list[str], share: float, rng: Random) -> str:
    """The text with a share of its words replaced by others, each as likely, however rare it is."""
    return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split())


def labeled_passages(split: str, source: str, *, seed: int, min_words: int = 10, max_words: int = 45) -> "Dataset":
    """All passages of one split's reviews, shuffled, each with its review's label.

    Args:
        split: A split of :func:`reward_models.sentiment.reviews.load_reviews`.
        source: ``"imdb"`` or ``"rotten_tomatoes"``; the latter's sentences are passages as they are.
        seed: Decides the lengths and the order.
        min_words: Fewest words of a passage.
        max_words: Most words of a passage.

    Returns:
        A dataset with the columns ``text``, ``label``, ``held_out`` (True for every tenth review, by its hash) and
        ``source``.
    """
    from datasets import Dataset

    rng = Random(seed)
    reviews = load_reviews(split, source)
    rows = []
    for text, label in zip(reviews["text"], reviews["label"], strict=True):
        pieces = cut_passages(text, rng, min_words=min_words, max_words=max_words) if source == "imdb" else [text]
        held_out = crc32(text.encode()) % 10 == 0
        rows += [{"text": piece, "label": label, "held_out": held_out, "source": source} for piece in pieces]
    return Dataset.from_list(rows).shuffle(seed=seed)
