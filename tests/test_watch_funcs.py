"""Functions that watch: called, checked and logged like reward functions, and nothing is trained on them."""

import json
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from builders import PROMPTS, assert_same, count_a, make_trainer, metrics_rows, share_of_a, trained, weights
from fakes import tiny_tokenizer
from transformers import GPT2Config, GPT2ForSequenceClassification

from lmppo.rewards import RewardError, RewardSet

STATE = SimpleNamespace(global_step=7)
IDS = [[5, 6, 7], [8, 9]]


def score(reward_funcs, watch_funcs=None, **kwargs):
    rewards = RewardSet(reward_funcs, watch_funcs=watch_funcs, **kwargs)
    return rewards.score(["p", "p"], ["abc", "de"], IDS, {"answer": [3, 4]}, STATE, 4)


def returning(value):
    def watch(completions, **kwargs):
        return value

    return watch


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


async def async_length(completions, **kwargs):
    return length(completions)


def nothing(completions, **kwargs):
    return [None] * len(completions)


def draws():
    return random.random() + np.random.random() + torch.rand(()).item()


# --- one call -----------------------------------------------------------------------------------------------------------


def test_they_are_columns_of_their_own_and_no_part_of_the_reward():
    def answers(completions, answer, **kwargs):
        return [[1.0, 2.0, 4.0], float(answer[1])]

    scores = score([length, returning([1.0, None])], [answers, nothing], reward_weights=[2.0, -1.0])
    assert scores.token_scores[..., 0].tolist() == [[0, 0, 2 * 3 - 1, 0], [0, 2 * 2, 0, 0]]
    columns = [[3, 1, 7, math.nan], [2, math.nan, 4, math.nan]]
    assert torch.equal(scores.per_function.nan_to_num(-9), torch.tensor(columns).nan_to_num(-9))


def test_one_or_several_of_every_form(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(num_labels=1, eos_token_id=0, initializer_range=0.4, **sizes))
    model.save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    judge = str(tmp_path / "judge")
    for one in (length, async_length, partial(length)):
        assert score(nothing_but(1.0), one).per_function.tolist() == [[1, 3], [1, 2]]
    for none in (None, [], ()):
        assert score(nothing_but(1.0), none).per_function.tolist() == [[1], [1]]
    rewarded = score(judge).per_function[:, 0]
    watched = score(nothing_but(1.0), (async_length, judge, length), device="cpu").per_function
    assert watched[:, 1:].tolist() == [[3, rewarded[0].item(), 3], [2, rewarded[1].item(), 2]]
    assert rewarded[0] != rewarded[1]


def nothing_but(number):
    return returning([number, number])


def test_names_are_unique_and_those_of_rewards_do_not_depend_on_them():
    rewards = RewardSet([length, partial(length)], watch_funcs=[length, async_length, partial(length)])
    assert rewards.names == ["length", "length_2", "length_3", "async_length", "length_4"]
    assert rewards.describe() == {
        "reward_funcs": ["length", "length_2"],
        "watch_funcs": ["length_3", "async_length", "length_4"],
    }


def test_weights_and_tokenizers_belong_to_reward_functions():
    for setting, given in (("reward_weights", [1.0, 0.0]), ("reward_processing_classes", [None, None])):
        with pytest.raises(ValueError, match=f"{setting} has 2 entries for 1 reward functions.*none for watch_funcs"):
            RewardSet([length], watch_funcs=[length], **{setting: given})


def test_a_row_needs_a_reward_whatever_is_watched():
    with pytest.raises(ValueError, match="every reward function returned None for row 1"):
        score(returning([1.0, None]), length)


def test_they_report_metrics_and_columns():
    def watch(completions, log_metric, log_extra, **kwargs):
        log_metric("longest", 3)
        log_extra("upper", [text.upper() for text in completions])
        return nothing(completions)

    scores = score(length, watch)
    assert scores.metrics == {"longest": 3.0} and scores.extras == {"upper": ["ABC", "DE"]}


def test_no_reward_depends_on_them():
    """Not by random draws, which async functions make last, nor by editing what they are given."""

    def draw(completions, **kwargs):
        return [draws() for _ in completions]

    async def draw_later(completions, **kwargs):
        return draw(completions)

    def vandal(completions, completion_ids, answer, **kwargs):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        completions[0], completion_ids[0][0], answer[0] = "", 99, 0
        return length(completions)

    alone = score([draw, draw_later, length])
    watched = score([draw, draw_later, length], [vandal, draw])
    assert torch.equal(alone.token_scores, watched.token_scores)
    assert torch.equal(alone.per_function, watched.per_function[:, :3])
    assert torch.equal(score(length, draw).per_function[:, 1], score(draw).per_function[:, 0])


def fail(completions, **kwargs):
    raise KeyError("no such word")


async def fail_async(completions, **kwargs):
    raise KeyError("no such word")


@pytest.mark.parametrize("function", [fail, fail_async])
def test_an_error_names_the_function(function):
    with pytest.raises(RewardError, match=f"^watch function '{function.__name__}' raised KeyError at step 7") as caught:
        score([length, async_length], [length, function, async_length])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], ValueError, "returned 1 rewards for 2 completions"),
        (None, TypeError, "returned a NoneType"),
        ([1.0, "1"], TypeError, r", row 1 \(completion 'de'\): '1' is a str"),
        ([math.nan, 1.0], ValueError, r", row 0 \(completion 'abc'\): the reward nan"),
        ([1.0, 1.1e15], ValueError, ", row 1 .*beyond"),
        ([[1.0], 1.0], ValueError, ", row 0 .*1 numbers for 3 completion tokens"),
    ],
)
def test_what_they_return_is_checked(value, error, message):
    with pytest.raises(error, match=f"^watch function 'watch'.*{message}"):
        score(length, returning(value))


def test_other_forms_are_refused(tmp_path):
    def without_kwargs(prompts, completions): ...

    with pytest.raises(TypeError, match="^watch function 3 is a int: give a callable, a path or a model"):
        make_trainer(tmp_path, watch_funcs=3)
    with pytest.raises(TypeError, match=r"^watch function 'without_kwargs' does not accept .*add \*\*kwargs"):
        make_trainer(tmp_path, watch_funcs=[length, without_kwargs])
    with pytest.raises(ValueError, match="'./lexicon' is not a model directory"):
        make_trainer(tmp_path, watch_funcs="./lexicon")


# --- a run --------------------------------------------------------------------------------------------------------------

STREAMS = [{"name": "share", "reward_funcs": [share_of_a], "gamma": 0.5}, {"name": "kl"}]


@pytest.mark.parametrize("streams", [False, True])
def test_a_run_is_the_same_with_and_without_them(tmp_path, streams):
    settings = {"kl_coef": 0.1, "eval_steps": 1, "eval_dataset": [{"prompt": p} for p in PROMPTS]}
    settings |= {"reward_streams": STREAMS} if streams else {"reward_weights": [0.5]}
    without = trained(tmp_path / "without", **settings)
    watched = trained(tmp_path / "watched", watch_funcs=[length, nothing], **settings)
    assert_same(weights(without), weights(watched))
    rows = metrics_rows(tmp_path / "watched")
    logged = {f"{prefix}rewards/length/{part}" for prefix in ("", "eval_") for part in ("mean", "std")}
    for row, plain in zip(rows, metrics_rows(tmp_path / "without"), strict=True):
        assert set(row) - set(plain) == logged, "and none of a function that never applies"
        assert {name: value for name, value in row.items() if name not in logged} == plain
        # Every token is a letter but EOS, which the text leaves out.
        assert row["rewards/length/mean"] == pytest.approx(row["completion_length"] - row["eos_rate"], rel=1e-6)
    assert len(rows) == 2 and rows[0]["rewards/length/std"] > 0


def test_they_stand_beside_the_completions_that_are_shown(tmp_path, capsys):
    trained(tmp_path, watch_funcs=[length, nothing], log_completions=3, max_steps=1)
    shown = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["length"] for row in shown] == [len(row["completion"]) for row in shown]
    assert [row["count_a"] for row in shown] == count_a([], [row["completion"] for row in shown])
    assert [row["nothing"] for row in shown] == [None] * 3
    table = capsys.readouterr().out
    assert "length" in table and "nothing" in table


def test_an_error_in_one_stops_the_run(tmp_path):
    with pytest.raises(RewardError, match="^watch function 'fail' raised KeyError at step 0"):
        trained(tmp_path, watch_funcs=fail)


def test_they_are_settings_that_may_change_when_a_run_is_continued(tmp_path):
    def settings():
        return yaml.safe_load((tmp_path / "run" / "run_config.yaml").read_text())

    whole = trained(tmp_path / "whole", max_steps=3)
    trained(tmp_path / "run", watch_funcs=[length], max_steps=1)
    assert settings()["watch_funcs"] == ["length"] and settings()["reward_funcs"] == ["count_a"]
    resumed = trained(tmp_path / "run", watch_funcs=[share_of_a, count_a], max_steps=3, resume_from_checkpoint="auto")
    assert settings()["watch_funcs"] == ["share_of_a", "count_a_2"] and settings()["reward_funcs"] == ["count_a"]
    assert_same(weights(whole), weights(resumed))
    rows = metrics_rows(tmp_path / "run")
    assert ["rewards/length/mean" in row for row in rows] == [True, False, False]
    assert [row.get("rewards/count_a_2/mean") for row in rows] == [None, *(r["rewards/count_a/mean"] for r in rows[1:])]
