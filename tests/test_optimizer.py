"""The learning rate is a function of the iteration, written out by hand."""

import pytest

from lmppo import PPOConfig
from lmppo.control import CriticWarmup
from lmppo.optimizer import learning_rate_at


def rates(**settings):
    config = PPOConfig(**settings)
    return [learning_rate_at(i, 1.0, config) for i in range(config.max_steps)]


def test_constant():
    assert rates(max_steps=4) == [1.0] * 4


def test_linear_falls_to_zero_just_after_the_last_iteration():
    assert rates(max_steps=4, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine():
    assert rates(max_steps=4, lr_scheduler_type="cosine") == pytest.approx([1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])


@pytest.mark.parametrize(
    "schedule, after", [("constant", [1, 1, 1]), ("linear", [1, 2 / 3, 1 / 3]), ("cosine", [1, 0.75, 0.25])]
)
def test_warm_up_rises_to_the_base_rate_and_never_wastes_an_iteration_at_zero(schedule, after):
    expected = [1 / 3, 2 / 3, *after]
    assert rates(max_steps=5, warmup_steps=2, lr_scheduler_type=schedule) == pytest.approx(expected)


def test_it_is_proportional_to_the_base_rate():
    config = PPOConfig(max_steps=10, lr_scheduler_type="cosine", warmup_steps=3)
    assert [learning_rate_at(i, 3e-5, config) for i in range(10)] == pytest.approx(
        [3e-5 * learning_rate_at(i, 1.0, config) for i in range(10)]
    )


def test_it_never_becomes_negative_beyond_the_end():
    for schedule in ("linear", "cosine"):
        config = PPOConfig(max_steps=3, lr_scheduler_type=schedule)
        assert [learning_rate_at(i, 1.0, config) for i in (3, 4, 100)] == pytest.approx([0, 0, 0])


def frozen(warmup, *explained):
    """Whether the policy is frozen in each iteration, by how well the critic explained its batch."""
    for i, variance in enumerate(explained):
        warmup.update(i, variance)
        yield not warmup.over


def test_the_warm_up_lasts_its_steps():
    assert list(frozen(CriticWarmup(2), 0.99, 0.99, 0.99, 0.99)) == [True, True, False, False]


def test_the_warm_up_ends_for_good_once_the_critic_explains_enough():
    warmup = CriticWarmup(9, explained_variance=0.5)
    assert list(frozen(warmup, -3.0, 0.49, 0.5, -1.0)) == [True, True, False, False]
    resumed = CriticWarmup(9, explained_variance=0.5)
    resumed.load_state_dict(warmup.state_dict())
    resumed.update(4, -1.0)
    assert resumed.over
