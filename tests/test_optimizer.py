"""The learning rate is a function of the iteration, written out by hand."""

import pytest
import torch
from builders import build_model, make_samples

from lmppo import PPOConfig
from lmppo.control import CriticWarmup
from lmppo.optimizer import HEAD_STEP, learning_rate_at, make_optimizer, set_learning_rates


def rates(**settings):
    config = PPOConfig(**settings)
    return [learning_rate_at(i, 1.0, config) for i in range(config.max_steps)]


def test_constant():
    assert rates(max_steps=4, lr_scheduler_type="constant") == [1.0] * 4


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


# --- each part has its own rate --------------------------------------------------------------------------------------


def rates_of(model, **settings):
    """The first rate of each part, and what is logged."""
    config = PPOConfig(learning_rate=1e-3, max_steps=4, **settings)
    optimizer = make_optimizer(model, config)
    set_learning_rates(optimizer, 0, config)
    first = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    parts = {"policy": model.policy, "critic": model.critic, "head": model.value_head}
    found = {name: {first[p] for p in part.parameters() if p.requires_grad} for name, part in parts.items() if part}
    assert all(len(rates) == 1 for rates in found.values())
    logged = set_learning_rates(optimizer, 2, config)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.5 * group["initial_lr"] for group in optimizer.param_groups]
    ), "linear: half of it is left after 2 of 4 steps"
    return {name: rates.pop() for name, rates in found.items()}, logged


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_given_rate_is_that_of_the_critic_and_of_the_head(family, kind):
    rates, logged = rates_of(build_model(family, kind), critic_learning_rate=0.02)
    assert rates.pop("policy") == 1e-3 and set(rates.values()) == {0.02} and logged == pytest.approx((5e-4, 0.01))


def test_without_one_a_critic_of_its_own_has_the_policys():
    rates, logged = rates_of(build_model("gpt2", "separate"))
    assert rates == {"policy": 1e-3, "critic": 1e-3} and logged == pytest.approx((5e-4, 5e-4))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_without_one_the_first_step_moves_values_by_half_a_unit_of_the_reward(family, scale):
    """Of states of any size. Adam's first step moves each weight by the rate, so a value by up to the rate times the sum
    of a state's absolute values: of real rollouts here, not of the probe's tokens."""
    model = build_model(family, "shared")
    final = model.policy.transformer.ln_f if family == "gpt2" else model.policy.model.norm
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.mul_(scale)
    model = type(model)(model.policy)
    config = PPOConfig(learning_rate=1e-3, lr_scheduler_type="constant")
    optimizer = make_optimizer(model, config)
    assert set_learning_rates(optimizer, 0, config)[0] == 1e-3
    tokens = make_samples(model).tokens
    hidden = model.language_model.read(tokens).hidden[0]
    model.value_head.weight.grad = hidden[:1].clone()  # toward one state's value
    optimizer.step()
    moved = (hidden[:1] @ model.value_head.weight.T).abs().item()
    assert moved == pytest.approx(HEAD_STEP, rel=0.5)
