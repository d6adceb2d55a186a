"""Numbers of a run that can be wrong unseen, recomputed from what the reward functions were given and from the log."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from builders import EOS, count_a, critic_of, make_trainer, metrics_rows, trained
from fakes import letter_tokenizer
from test_checks import sized

from lmppo.records import Experience
from lmppo.sampling import sample, uniform_noise
from lmppo.update import logprobs_now


class Recorder:
    """The number of tokens as reward, and a record of all that was asked."""

    def __init__(self):
        self.rows = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        scores = [float(len(ids)) for ids in completion_ids]
        self.rows += zip(prompts, completion_ids, scores, strict=True)
        return scores


@torch.no_grad()
def values_along(critic, prompt, completion):
    """The critic's value of the state before each token of one completion, without padding."""
    ids = letter_tokenizer()(prompt)["input_ids"]
    logits = critic.eval()(input_ids=torch.tensor([ids + completion])).logits[0, :, 0]
    return logits[len(ids) - 1 : -1].double()


def explained(pairs):
    """1 - Var[R - V] / Var[R] over the tokens of completions, whose reward-to-go is their score at every token."""
    values = torch.cat([values for values, _ in pairs])
    returns = torch.cat([torch.full_like(values, score) for values, score in pairs])
    return (1 - (returns - values).var() / returns.var()).item()


def test_cut_completions_that_teach_nothing_do_not_count_in_what_the_critic_explains(tmp_path):
    reward, critic = Recorder(), critic_of()
    before = copy.deepcopy(critic)
    trainer = make_trainer(
        tmp_path, reward=reward, critic=critic, truncation="mask", kl_coef=0.0, max_steps=1,
        rollout_batch_size=32, minibatch_size=32,
    )  # fmt: skip
    trainer.train()
    pairs = [(values_along(before, prompt, ids), score) for prompt, ids, score in reward.rows]
    ended = [pair for pair, (_, ids, _) in zip(pairs, reward.rows, strict=True) if ids[-1] == EOS]
    assert len(pairs) == 32 and 4 < len(ended) < 28
    assert abs(explained(ended) - explained(pairs)) > 0.1, "or the two could not be told apart"
    (row,) = metrics_rows(tmp_path)
    assert row["critic/explained_variance"] == pytest.approx(explained(ended), abs=1e-4)


def nothing(completions, **kwargs):
    return [0.0 for _ in completions]


def a_hundred(completions, **kwargs):
    return [100.0 for _ in completions]


@pytest.mark.parametrize(
    "rewards, share",
    [
        ([nothing, a_hundred], 1.0),
        ([a_hundred, nothing], 1.0),
        ([nothing, nothing, a_hundred], 1.0),
        ([a_hundred, a_hundred], 1.0),
        ([nothing, nothing], 0.0),
    ],
)
def test_a_token_counts_as_value_clipped_once_any_of_its_values_moved_too_far(tmp_path, rewards, share):
    """Heads start at 0: the first step sees no move, the second all of the head whose stream pays, and only that."""
    streams = [{"name": f"s{i}", "reward_funcs": [reward]} for i, reward in enumerate(rewards)]
    trained(
        tmp_path, reward_streams=streams, kl_coef=0.0, value_clip_range=1e-4, critic_learning_rate=0.1, max_steps=1,
        ppo_epochs=2, minibatch_size=8,
    )  # fmt: skip
    (row,) = metrics_rows(tmp_path)
    assert row["optimizer_steps"] == 2
    assert row["value_clip_frac"] == pytest.approx((0.0 + share) / 2, abs=1e-6)


def test_beta_does_not_adapt_while_the_policy_is_frozen(tmp_path):
    """A frozen policy moves by a KL of 0, which would halve beta at each step of the warm-up."""
    trained(
        tmp_path, objective="kl_penalty", policy_kl_coef=4.0, policy_kl_target=1e3, critic_warmup_steps=2, max_steps=4
    )
    rows = metrics_rows(tmp_path)
    assert ["policy_loss" in row for row in rows] == [False, False, True, True]
    assert [row.get("policy_kl_coef") for row in rows] == [None, None, 4.0, 2.0]


def fickle(prompts, completions, trainer_state, **kwargs):
    """The length of the prompt, paid at the first step and charged at the next."""
    sign = 1.0 if trainer_state.global_step == 0 else -1.0
    return [sign * len(prompt) for prompt in prompts]


def test_a_warm_up_that_is_over_stays_over_in_a_resumed_run(tmp_path):
    """What the critic explains is enough at the first step and too little at the second, where the run is resumed."""
    settings = {
        "reward": fickle, "critic_warmup_steps": 9, "critic_epochs": 8, "critic_learning_rate": 0.1, "kl_coef": 0.0,
        "value_clip_range": None,
    }  # fmt: skip
    trained(tmp_path / "asked", critic_warmup_explained_variance=-1e9, max_steps=2, **settings)
    first, second = (row["critic/explained_variance"] for row in metrics_rows(tmp_path / "asked"))
    assert first > second + 0.1
    settings["critic_warmup_explained_variance"] = (first + second) / 2

    trained(tmp_path / "whole", max_steps=2, **settings)
    trained(tmp_path / "parts", max_steps=1, **settings)
    trained(tmp_path / "parts", max_steps=2, resume_from_checkpoint="auto", **settings)
    whole, parts = metrics_rows(tmp_path / "whole"), metrics_rows(tmp_path / "parts")
    assert all("policy_loss" in row for row in whole)
    assert parts == whole


@pytest.mark.parametrize("num_generations", [1, 2])
def test_the_kl_controller_counts_each_completion_once(tmp_path, num_generations):
    """Ziegler et al. 2019, section 2.2, from one row of the log to the next."""
    target, horizon = 0.05, 40
    trained(
        tmp_path, reward=count_a, kl_target=target, kl_horizon=horizon, num_generations=num_generations, max_steps=4,
        rollout_batch_size=8,
    )  # fmt: skip
    rows = metrics_rows(tmp_path)
    for row, after in zip(rows, rows[1:], strict=False):
        error = min(max(row["kl_to_ref"] / target - 1, -0.2), 0.2)
        assert error != 0
        assert after["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error * 8 / horizon), rel=1e-6)


@pytest.fixture
def other_precision():
    """accelerate keeps the precision of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_in_mixed_precision_old_logprobs_come_from_the_updates_forward_pass(tmp_path, other_precision):
    """The sampler feeds one token at a time, and bfloat16 rounds other matrix shapes to other numbers."""
    trainer = make_trainer(tmp_path, model=sized("gpt2", 80), bf16=True, max_completion_length=30)
    rollout = trainer.collector.collect(trainer.prompts.next_batch(8), 0).rollout
    nothing = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.values)
    experience = Experience.from_rollout(rollout, *nothing)
    now = logprobs_now(trainer.model, experience, trainer.args, trainer.accelerator)
    assert torch.equal(now, rollout.logprobs)
    tokens = rollout.tokens
    noise = uniform_noise(trainer.args.seed, 0, range(8), tokens.completion_ids.shape[1])
    with trainer.accelerator.autocast():
        samples = sample(trainer.actor_critic, tokens.prompt_ids, tokens.prompt_mask, noise, trainer.collector.params)
    assert samples.tokens.completion_ids.equal(tokens.completion_ids)
    assert (samples.logprobs - rollout.logprobs).abs().max() > 1e-3, "or the test shows nothing"
