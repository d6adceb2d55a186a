"""How good and how honest a two-label classifier's log-odds are, and the temperature that makes them honest."""

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel


def negative_log_likelihood(log_odds: Tensor, labels: Tensor) -> float:
    """Mean ``-log p(label)`` in nats: softplus(-s z) with s = 1 for label 1 and -1 for label 0.

    Args:
        log_odds: ``(N,)`` z = log p(1) / p(0).
        labels: ``(N,)`` 0 or 1.
    """
    return softplus(-_margins(log_odds, labels)).mean().item()


def accuracy(log_odds: Tensor, labels: Tensor) -> float:
    """Share of rows whose likelier label is theirs."""
    return ((log_odds > 0) == labels.bool()).double().mean().item()


def auc(log_odds: Tensor, labels: Tensor) -> float:
    """Probability that a row of label 1 has higher log-odds than a row of label 0; a tie counts half."""
    positive, negative = log_odds[labels.bool()], log_odds[~labels.bool()]
    below = torch.searchsorted(negative.sort().values, positive)
    not_above = torch.searchsorted(negative.sort().values, positive, right=True)
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


def expected_calibration_error(log_odds: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Gap between confidence and accuracy, averaged over equal bins of confidence by their share of the rows.

    Confidence is the probability of the likelier label. Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    confidence = log_odds.double().abs().sigmoid()
    gap = confidence - ((log_odds > 0) == labels.bool()).double()
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return torch.zeros(bins, dtype=torch.float64).index_add(0, which, gap).abs().sum().item() / len(labels)


def report(log_odds: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, AUC, expected calibration error and negative log-likelihood, rounded to four digits."""
    measures = {"accuracy": accuracy, "auc": auc, "ece": expected_calibration_error, "nll": negative_log_likelihood}
    return {name: round(measure(log_odds, labels), 4) for name, measure in measures.items()}


def fit_temperature(log_odds: Tensor, labels: Tensor) -> float:
    """The T that minimizes the negative log-likelihood of ``log_odds / T``, from 0.01 to 100.

    In b = 1 / T the likelihood is convex, so its slope, mean(-m sigmoid(-m b)) for margins m = s z, is bisected. Guo
    et al. 2017, arXiv 1706.04599, section 4.2.
    """
    margins = _margins(log_odds, labels)
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        slope = (-margins * (-margins * middle).sigmoid()).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 2 / (low + high)


@torch.no_grad()
def fold_temperature(model: PreTrainedModel, temperature: float) -> None:
    """Divide the classification head by T, so that the model's own logits are the calibrated ``logits / T``."""
    for parameter in model.score.parameters():
        parameter.div_(temperature)


def _margins(log_odds: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels.bool(), log_odds, -log_odds).double()
