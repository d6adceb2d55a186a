"""A linear model of words: the classifier to beat."""

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("The bag-of-words model needs scikit-learn: pip install 'lmppo[train]'.") from error


def bag_of_words_log_odds(texts: Sequence[str], labels: Sequence[int], unseen: Sequence[Sequence[str]]) -> list[Tensor]:
    """Log-odds of label 1 for unseen texts, under a logistic model of tf-idf weighted words and word pairs.

    Args:
        texts: Training texts.
        labels: Their labels, 0 or 1.
        unseen: Sets of texts to score.

    Returns:
        ``(N,)`` log-odds for each set.
    """
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    model = LogisticRegression(C=4.0, max_iter=1000).fit(words.fit_transform(texts), labels)
    return [torch.from_numpy(model.decision_function(words.transform(some))) for some in unseen]
