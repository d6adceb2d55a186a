"""A sentiment reward that nothing was trained for: VADER's word list and rules."""

import functools
from typing import Any

from lmppo.rewards import completion_text


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The lexicon reward needs `vaderSentiment`: pip install 'lmppo[data]'.") from error
    return SentimentIntensityAnalyzer()


def lexicon(prompts: list, completions: list, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """VADER's compound sentiment of each completion (the prompt is left out), from -1 to 1.

    Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.

    Raises:
        ModuleNotFoundError: The ``data`` extra is not installed.
    """
    return [_analyzer().polarity_scores(completion_text(completion))["compound"] for completion in completions]
