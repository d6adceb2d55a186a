"""Passages: pieces of reviews of the length a reward scores, in the spellings it meets."""

import re
from random import Random

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, cut after ``.``, ``!`` or ``?`` and the white space behind it."""
    return [sentence for sentence in SENTENCE_END.split(text) if sentence]


def cut_passages(text: str, rng: Random, *, min_words: int, max_words: int) -> list[str]:
    """The text as consecutive passages, each begun at a sentence.

    A passage takes whole sentences until it has a number of words drawn from ``min_words`` to ``max_words``; a
    sentence that would go beyond ``max_words`` is cut there. A last passage shorter than ``min_words`` is dropped.
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
    """The text as Rotten Tomatoes sentences are spelled: lower case, punctuation standing alone."""
    return re.sub(r"\s+", " ", re.sub(r"(\.{3}|[.,!?;:()\"]|--)", r" \1 ", text.lower())).strip()
