"""Linear models of words: the classifier to beat, and the teacher that softens the labels of passages."""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from reward_models.calibration import fit_temperature


def bag_of_words_log_odds(texts: Sequence[str], labels: Sequence[int], unseen: Sequence[Sequence[str]]) -> list[Tensor]:
    """Log-odds of label 1 for unseen texts, under a logistic model of tf-idf weighted words and word pairs.

    Args:
        texts: Training texts.
        labels: Their labels, 0 or 1.
        unseen: Sets of texts to score.

    Returns:
        ``(N,)`` log-odds for each set.

    Raises:
        ModuleNotFoundError: The ``train`` extra is not installed.
    """
    vectorizer, regression = _sklearn()
    words = vectorizer(ngram_range=(1, 2), min_df=2)
    model = regression(C=4.0, max_iter=1000).fit(words.fit_transform(texts), labels)
    return [torch.from_numpy(model.decision_function(words.transform(some))) for some in unseen]


def teacher_probabilities(
    texts: Sequence[str], labels: Sequence[int], weights: Sequence[float], n_folds: int = 5
) -> Tensor:
    """How positive each text sounds to linear models that were trained on the other texts.

    A passage carries the label of its whole review, which it may not deserve; a model that has not seen it judges it by
    its words. Two logistic models, of words and of character n-grams, add up their log-odds, calibrated by one
    temperature.

    Args:
        texts: The texts.
        labels: Their labels, 0 or 1.
        weights: How much each text counts in the training of the models.
        n_folds: Parts; each is judged by models trained on all others. Equal texts are in the same part.

    Returns:
        ``(N,)`` probabilities of label 1.

    Raises:
        ModuleNotFoundError: The ``train`` extra is not installed.
    """
    vectorizer, regression = _sklearn()
    fold = torch.tensor([crc32(text.encode()) // 10 % n_folds for text in texts])
    target, weight = torch.tensor(labels), torch.tensor(weights, dtype=torch.float64)
    log_odds = torch.zeros(len(texts), dtype=torch.float64)
    for features in (
        vectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        vectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True, max_features=150_000),
    ):
        x = features.fit_transform(texts)
        for k in range(n_folds):
            theirs, mine = (fold != k).numpy(), (fold == k).numpy()
            model = regression(C=2.0, max_iter=200, solver="liblinear")
            model.fit(x[theirs], target[theirs].numpy(), sample_weight=weight[theirs].numpy())
            log_odds[fold == k] += torch.from_numpy(model.decision_function(x[mine]))
    return (log_odds / fit_temperature(log_odds, target)).sigmoid()


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The bag-of-words model needs scikit-learn: pip install 'lmppo[train]'.") from error
    return TfidfVectorizer, LogisticRegression
