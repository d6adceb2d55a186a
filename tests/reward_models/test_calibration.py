"""The measures against their definitions and scikit-learn's; the temperature against softmax(logits / T)."""

import math

import pytest
import torch
from fakes import tiny_gpt2
from sklearn.metrics import log_loss, roc_auc_score
from transformers import GPT2ForSequenceClassification

from reward_models.sentiment import calibration

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, 2, (500,), generator=GENERATOR)
LOG_ODDS = ((2 * LABELS - 1) * 0.8 + torch.randn(500, generator=GENERATOR)).mul(10).round().div(4)  # many ties


def test_measures_by_hand():
    z, y = torch.tensor([math.log(9), math.log(9), -math.log(4), 1e-9]), torch.tensor([1, 0, 0, 0])
    assert calibration.accuracy(z, y) == 0.5
    assert calibration.auc(z, y) == pytest.approx((0.5 + 1 + 1) / 3)
    expected_nll = -(math.log(0.9) + math.log(0.1) + math.log(0.8) + math.log(0.5)) / 4
    assert calibration.negative_log_likelihood(z, y) == pytest.approx(expected_nll)
    # Bins of width 0.5 / 15: .9 and .9 share one (right, wrong), .8 is right, .5 is wrong.
    expected_ece = (abs(2 * 0.9 - 1) + abs(0.8 - 1) + abs(0.5 - 0)) / 4
    assert calibration.expected_calibration_error(z, y) == pytest.approx(expected_ece, abs=1e-6)


def test_measures_against_scikit_learn():
    assert LOG_ODDS.unique().numel() < 100
    assert calibration.auc(LOG_ODDS, LABELS) == pytest.approx(roc_auc_score(LABELS, LOG_ODDS), abs=1e-9)
    assert calibration.negative_log_likelihood(LOG_ODDS, LABELS) == pytest.approx(
        log_loss(LABELS, LOG_ODDS.double().sigmoid()), abs=1e-6
    )


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_from_the_definition(bins):
    groups: dict[int, list[tuple[float, float]]] = {}
    for z, y in zip(LOG_ODDS.double().tolist(), LABELS.tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        confidence, right = max(p, 1 - p), float((p > 0.5) == bool(y))
        groups.setdefault(min(int((confidence - 0.5) * 2 * bins), bins - 1), []).append((confidence, right))
    error = sum(abs(sum(c for c, _ in g) - sum(r for _, r in g)) for g in groups.values()) / len(LABELS)
    assert calibration.expected_calibration_error(LOG_ODDS, LABELS, bins=bins) == pytest.approx(error, abs=1e-9)


def test_a_calibrated_model_has_no_calibration_error():
    p = torch.rand(200_000, generator=GENERATOR, dtype=torch.float64)
    labels = torch.bernoulli(p, generator=GENERATOR).long()
    assert calibration.expected_calibration_error(p.logit(), labels) < 0.01  # sampling noise of 13,000 rows a bin
    assert calibration.expected_calibration_error(3 * p.logit(), labels) > 0.1
    assert calibration.fit_temperature(3 * p.logit(), labels) == pytest.approx(3, rel=0.03)


def test_the_temperature_is_the_best_on_a_grid():
    best = calibration.fit_temperature(LOG_ODDS, LABELS)
    value = calibration.negative_log_likelihood(LOG_ODDS / best, LABELS)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert calibration.negative_log_likelihood(LOG_ODDS / (best * factor), LABELS) > value
    assert calibration.fit_temperature(LOG_ODDS * 7, LABELS) == pytest.approx(7 * best, rel=1e-6)


def test_the_temperature_stays_within_bounds():
    always_right, always_wrong = (2.0 * LABELS - 1), (1 - 2.0 * LABELS)
    assert calibration.fit_temperature(always_right, LABELS) == pytest.approx(0.01)
    assert calibration.fit_temperature(always_wrong, LABELS) == pytest.approx(100)


def test_the_folded_model_gives_softmax_of_logits_over_t():
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(tiny_gpt2(num_labels=2).config).eval()
    ids = torch.randint(1, 257, (5, 9))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        calibration.fold_temperature(model, 2.5)
        folded = model(input_ids=ids).logits
    torch.testing.assert_close(folded.softmax(dim=-1), (logits / 2.5).softmax(dim=-1))
    assert not torch.allclose(folded, logits, atol=1e-3)


def test_report_rounds():
    numbers = calibration.report(LOG_ODDS, LABELS)
    assert list(numbers) == ["accuracy", "auc", "ece", "nll"]
    assert numbers["accuracy"] == round(calibration.accuracy(LOG_ODDS, LABELS), 4)
