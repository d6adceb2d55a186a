"""Several kinds of reward in one run: parsing, scoring, learning and resuming with one critic output for each (N8)."""

import dataclasses

import pytest
import torch
from builders import assert_same, count_a, critic_of, make_trainer, metrics_rows, share_of_a, trained, weights

from lmppo import PPOConfig, RewardStream
from lmppo.rewards import RewardSet, make_streams


def always_two(prompts, completions, **kwargs):
    return [2.0] * len(completions)


def dense(prompts, completions, completion_ids, **kwargs):
    return [[float(t) for t in range(len(ids))] for ids in completion_ids]


STREAMS = [{"name": "letters", "reward_funcs": [count_a, share_of_a], "weight": 0.5},
           {"name": "dense", "reward_funcs": [dense], "gamma": 0.5, "lam": 0.0}, {"name": "kl"}]  # fmt: skip


def test_one_stream_is_the_same_run_as_plain_reward_functions(tmp_path):
    plain = trained(tmp_path / "plain", kl_coef=0.1)
    stream = trained(tmp_path / "stream", kl_coef=0.1, reward_streams=[{"name": "reward", "reward_funcs": [count_a]}])
    assert_same(weights(plain), weights(stream))


def test_scores_stand_in_their_stream_with_its_weight():
    rewards = RewardSet.from_streams(make_streams(None, STREAMS, PPOConfig()), reward_weights=[1.0, 3.0, 1.0])
    scores = rewards.score(["p", "p"], ["aab", "b"], [[3, 3, 4], [4]], {}, None, 4)
    letters = [2 + 3 * 2 / 3, 0.0]
    assert scores.token_scores[..., 0].tolist() == [[0, 0, 0.5 * letters[0], 0], [0, 0, 0, 0]]
    assert scores.token_scores[..., 1].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert not scores.token_scores[..., 2].any()
    assert rewards.names == ["count_a", "share_of_a", "dense"]


def test_sums_are_those_of_the_definition_to_the_last_bit():
    """Functions of one stream are added in their order, in float64, wherever those of other streams stand."""

    def returning(rows):
        return lambda completions, **kwargs: rows

    rows = [[1e15, None, 0.1], [0.3, 0.3, [0.5, 0.25]], [-1e15, 0.7, 0.2], [None, 1 / 3, [0.1, 0.2]], [0.7, 0.1, 3.0]]
    weights, stream_of, lengths, width = [1.0, 0.9, 1.0, -1 / 3, 1e-3], [2, 0, 2, 0, 2], [3, 1, 2], 3
    expected = [[[0.0] * 3 for _ in range(width)] for _ in lengths]
    for given, weight, k in zip(rows, weights, stream_of, strict=True):
        for b, reward in enumerate(given):
            tokens = reward if isinstance(reward, list) else [] if reward is None else [reward]
            for t, number in enumerate(tokens, start=lengths[b] - len(tokens)):
                expected[b][t][k] += weight * number
    assert expected[0][2][2] == 1e15 - 1e15 + 1e-3 * 0.7 != 0.0 and expected[1][0][0] == 0.9 * 0.3 - 1 / 3 * (1 / 3)
    rewards = RewardSet([returning(r) for r in rows], weights, stream_of=stream_of, n_streams=3)
    scores = rewards.score(["p"] * 3, ["c"] * 3, [[1] * n for n in lengths], {}, None, width)
    assert torch.equal(scores.token_scores, torch.tensor(expected, dtype=torch.float64).float())
    assert not scores.token_scores[..., 1].any()


@pytest.mark.parametrize("critic", [None, "separate"])
def test_every_stream_has_an_output_of_the_critic_and_a_run_resumes_with_them(tmp_path, critic):
    def build(directory, **settings):
        arguments = {} if critic is None else {"critic": critic_of(num_labels=3)}
        return make_trainer(tmp_path / directory, reward_streams=STREAMS, kl_coef=0.1, **arguments, **settings)

    whole = build("whole", max_steps=3)
    whole.train()
    assert whole.actor_critic.n_streams == 3
    build("parts", max_steps=2).train()
    parts = build("parts", max_steps=3, resume_from_checkpoint="auto")
    parts.train()
    assert_same(weights(whole), weights(parts))
    row = metrics_rows(tmp_path / "whole")[0]
    assert row["reward"] == pytest.approx(
        0.5 * (row["rewards/count_a/mean"] + row["rewards/share_of_a/mean"]) + row["rewards/dense/mean"], rel=1e-5
    )


def test_another_set_of_streams_is_another_run(tmp_path):
    trained(tmp_path, reward_streams=STREAMS)
    changed = [STREAMS[0] | {"weight": 0.7}, *STREAMS[1:]]
    with pytest.raises(Exception, match="reward_streams"):
        trained(tmp_path, reward_streams=changed, max_steps=3, resume_from_checkpoint="auto")


def test_each_critic_output_learns_its_own_stream(tmp_path):
    """A constant per completion, discounted differently: V is 2 gamma^(steps to the end), here for one-token prompts."""
    streams = [{"name": "plain", "reward_funcs": [always_two]},
               {"name": "discounted", "reward_funcs": [always_two], "gamma": 0.0}]  # fmt: skip
    trainer = trained(
        tmp_path, reward_streams=streams, critic=critic_of(num_labels=2), max_steps=40, critic_warmup_steps=40,
        critic_learning_rate=1e-2, value_clip_range=None, lam=1.0, max_grad_norm=10.0, whiten_advantages=False,
    )  # fmt: skip
    scored = trainer.collector.collect(trainer.prompts.next_batch(8), 99)
    mask, values = scored.rollout.completion_mask, scored.rollout.values
    assert (values[..., 0][mask] - 2.0).abs().mean() < 0.1
    before_last = mask & (mask.flip(1).cumsum(1).flip(1) > 3)
    assert values[..., 1][before_last].abs().mean() < 0.3 < 1.5 < values[..., 0][before_last].mean()


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([{"name": "a", "reward_funcs": [count_a], "gama": 0.5}], "'gama'.*expected a mapping with `name`"),
        ([{"reward_funcs": [count_a]}], "expected a mapping with `name`"),
        ([{"name": "a"}, {"name": "b", "reward_funcs": [count_a]}], "reward stream 'a' has 0 reward_funcs"),
        ([{"name": "kl", "reward_funcs": [count_a]}], "the stream 'kl' has none"),
        ([{"name": "a", "reward_funcs": [count_a]}] * 2, "different names"),
        ([{"name": "a", "reward_funcs": [count_a], "gamma": 1.5}], r"gamma=1.5 must be within \[0, 1\]"),
        ([{"name": "a", "reward_funcs": [count_a], "weight": float("nan")}], "weight=nan must be finite"),
        ([{"name": "kl"}], "no stream with reward_funcs"),
        ([{"name": "kl", "gamma": 0.5}], "no stream with reward_funcs"),
        ([], "no stream with reward_funcs"),
        (["lexicon"], "'lexicon': expected a mapping with `name`"),
        ([{"name": "a", "reward_funcs": [count_a]}, {"name": "kl", "weight": 2.0}], "set kl_coef instead"),
    ],
)
def test_wrong_streams_are_refused(tmp_path, streams, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, reward_streams=streams)


@pytest.mark.parametrize("settings", [{"name": 3}, {"name": "a", "reward_funcs": "lexicon"}, {"name": "a", "lam": "1"}])
def test_wrong_kinds_are_refused(settings):
    with pytest.raises(TypeError, match="reward stream"):
        RewardStream(**settings)


def test_streams_are_a_list():
    with pytest.raises(TypeError, match="reward_streams=.* is a dict; expected a list of streams"):
        make_streams(None, STREAMS[0], PPOConfig())


@pytest.mark.parametrize(
    ("stream", "settings", "message"),
    [
        ({"name": "a", "reward_funcs": [count_a], "lam": 0.5}, {"estimator": "rewards_to_go"}, "lam=0.5 is GAE's"),
        ({"name": "a", "reward_funcs": [count_a], "gamma": 0.5}, {"estimator": "immediate_rewards"}, "gamma=0.5 disc"),
        (
            {"name": "kl"},
            {"kl_form": "k2_loss", "kl_coef": 0.0},
            "kl_form='k2_loss' has none there: leave the stream out",
        ),
    ],
)
def test_settings_of_a_stream_without_effect_are_refused(tmp_path, stream, settings, message):
    streams = [{"name": "letters", "reward_funcs": [share_of_a]}, stream]
    with pytest.raises(ValueError, match=f"reward stream '{stream['name']}'.*{message}"):
        make_trainer(tmp_path, reward_streams=streams, **settings)


def test_either_functions_or_streams():
    for arguments in ((count_a, STREAMS), (None, None)):
        with pytest.raises(ValueError, match="either reward_funcs or reward_streams"):
            make_streams(*arguments, PPOConfig())


def test_a_stream_cannot_be_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RewardStream("a").gamma = 0.5
    assert torch.tensor(RewardStream("a").weight).item() == 1.0
