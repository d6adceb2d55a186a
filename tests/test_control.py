"""Coefficients of KL penalties: fixed, by the controller of Ziegler et al. 2019, by the rule of Schulman et al. 2017."""

import math

import pytest

from lmppo.control import AdaptiveBeta, AdaptiveKL, FixedKL


def test_a_fixed_coefficient_stays():
    control = FixedKL(0.3)
    control.update(1e9, 64)
    control.load_state_dict({"coef": 5.0})
    assert control.coef == 0.3, "a resumed run uses the coefficient it is configured with now"


@pytest.mark.parametrize(
    "kl, factor",
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 100 / 1000),  # 10 % above
        (5.4, 1 - 0.1 * 100 / 1000),
        (600.0, 1 + 0.2 * 100 / 1000),  # the error is clipped at 20 %
        (0.0, 1 - 0.2 * 100 / 1000),
        (-5.0, 1 - 0.2 * 100 / 1000),  # a k1 estimate may be negative
    ],
)
def test_the_controller_by_hand(kl, factor):
    control = AdaptiveKL(0.2, target=6.0, horizon=1000)
    control.update(kl, 100)
    assert control.coef == pytest.approx(0.2 * factor)


def test_it_holds_a_simulated_policy_at_the_target():
    """A policy whose KL falls with the coefficient, kl = 2 / coef, ends at the target."""
    control = AdaptiveKL(0.01, target=6.0, horizon=1000)
    for _ in range(500):
        control.update(2 / control.coef, 64)
    assert 2 / control.coef == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize("kl", [0.0, 1e30])
def test_it_stays_within_bounds_at_the_extremes(kl):
    control = AdaptiveKL(0.1, target=1.0, horizon=1)
    for _ in range(500):
        control.update(kl, 1000)
    assert control.lowest <= control.coef <= control.highest


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_no_number_is_refused_and_changes_nothing(kl):
    control = AdaptiveKL(0.1, target=1.0, horizon=10)
    with pytest.raises(ValueError, match=r"kl_to_ref=.* is not finite"):
        control.update(kl, 10)
    assert control.coef == 0.1


def test_the_state_is_the_coefficient():
    control = AdaptiveKL(0.1, target=1.0, horizon=10)
    control.update(9.0, 5)
    other = AdaptiveKL(0.7, target=1.0, horizon=10)
    other.load_state_dict(control.state_dict())
    assert other.coef == control.coef != 0.7


def test_beta_follows_schulmans_rule():
    beta = AdaptiveBeta(1.0, target=0.01)
    for kl, expected in ((0.02, 2.0), (0.014, 2.0), (0.007, 2.0), (0.006, 1.0), (0.0, 0.5), (0.0151, 1.0)):
        beta.update(kl)
        assert beta.coef == expected, kl


def test_beta_without_a_target_stays():
    beta = AdaptiveBeta(3.0, target=None)
    beta.update(99.0)
    assert beta.coef == 3.0
    beta.load_state_dict({"coef": 1.0})
    assert beta.coef == 3.0, "a resumed run uses the beta it is configured with now"


def test_beta_is_saved_stays_in_bounds_and_refuses_nan():
    beta = AdaptiveBeta(1.0, target=0.01)
    for _ in range(100):
        beta.update(1.0)
    assert beta.coef == beta.highest
    other = AdaptiveBeta(1.0, target=0.01)
    other.load_state_dict(beta.state_dict())
    assert other.coef == beta.coef
    with pytest.raises(ValueError, match="not finite"):
        other.update(math.nan)
    assert other.coef == beta.coef
