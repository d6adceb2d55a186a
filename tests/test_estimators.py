"""From a rollout to advantages and returns, each against its definition written out with loops."""

import dataclasses
import warnings

import pytest
import torch
from test_records import make_rollout

from lmppo import PPOConfig
from lmppo.config import RewardStream
from lmppo.estimators import estimate, shape_rewards
from lmppo.rewards.streams import make_streams


def select_stream(rollout, k):
    """The rollout with one of its streams."""
    return rollout.cut(K=slice(k, k + 1))


ROWS = ("11111", "11000", "10000", "11010")  # full, short, one token, a gap
GAMMA, LAM = 0.9, 0.8


@pytest.fixture
def rollout():
    return make_rollout(prompt=("11",) * 4, completion=ROWS)


def config(estimator, **settings):
    return PPOConfig(estimator=estimator, gamma=GAMMA, lam=LAM, **({"whiten_advantages": False} | settings))


def counted(rollout, tensor, row):
    return tensor[row][rollout.completion_mask[row]].flatten().tolist()


def by_definition(estimator, rewards, values):
    """(advantage, target) of each token of one completion."""
    n = len(rewards)
    to_go = [sum(GAMMA ** (u - t) * rewards[u] for u in range(t, n)) for t in range(n)]
    deltas = [rewards[t] + (GAMMA * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    gae = [sum((GAMMA * LAM) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
    return {
        "gae": (gae, [g + v for g, v in zip(gae, values, strict=True)]),
        "rewards_to_go": ([r - v for r, v in zip(to_go, values, strict=True)], to_go),
        "total_return": ([to_go[0] - v for v in values], to_go),
        "immediate_rewards": ([r - v for r, v in zip(rewards, values, strict=True)], rewards),
    }[estimator]


@pytest.mark.parametrize("estimator", ["gae", "rewards_to_go", "total_return", "immediate_rewards"])
def test_each_estimator_is_its_definition(rollout, estimator):
    rewards = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(2))
    result = estimate(rollout, rewards, config(estimator))
    advantages, returns = result.advantages, result.returns
    for row in range(len(ROWS)):
        expected = by_definition(estimator, counted(rollout, rewards, row), counted(rollout, rollout.values, row))
        assert counted(rollout, advantages, row) == pytest.approx(expected[0], abs=1e-5)
        assert counted(rollout, returns, row) == pytest.approx(expected[1], abs=1e-5)
    assert advantages[~rollout.completion_mask].eq(0).all() and returns[~rollout.completion_mask].eq(0).all()


def test_whitening_is_over_all_counted_tokens_of_the_batch(rollout):
    rewards = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(2))
    plain = estimate(rollout, rewards, config("gae"))
    white = estimate(rollout, rewards, config("gae", whiten_advantages=True))
    x = plain.advantages[rollout.completion_mask]
    torch.testing.assert_close(white.advantages[rollout.completion_mask], (x - x.mean()) / x.std(correction=0))
    assert plain.scale == 1.0 and white.scale == pytest.approx(1 / x.std(correction=0).item(), rel=1e-5)
    assert plain.metrics == white.metrics and plain.metrics["advantage/mean"] == pytest.approx(x.mean().item())
    assert torch.equal(plain.returns, white.returns), "the critic's targets keep their unit"


def test_padding_never_matters(rollout):
    rewards = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(2))
    poison = rollout.completion_mask[..., None]
    poisoned = dataclasses.replace(rollout, values=torch.where(poison, rollout.values, torch.nan))
    for estimator in ("gae", "rewards_to_go", "total_return", "immediate_rewards"):
        settings = config(estimator, whiten_advantages=True)
        clean = estimate(rollout, rewards, settings)
        dirty = estimate(poisoned, torch.where(poison, rewards, 1e30), settings)
        assert torch.equal(clean.advantages, dirty.advantages) and torch.equal(clean.returns, dirty.returns), estimator


def test_two_streams_are_two_estimates_that_share_the_policy():
    """Each stream has a critic of its own; the policy gets the sum, and only the first pays for KL."""
    rollout = make_rollout(prompt=("11",) * 4, completion=ROWS, streams=2)
    rewards = shape_rewards(rollout, config("gae"), kl_coef=0.5)
    mask = rollout.completion_mask
    torch.testing.assert_close(rewards[mask][:, 0], rollout.scores[mask][:, 0] - 0.5 * rollout.kl_penalty[mask])
    torch.testing.assert_close(rewards[mask][:, 1], rollout.scores[mask][:, 1])
    both = estimate(rollout, rewards, config("gae"))
    parts = [estimate(select_stream(rollout, k), rewards[..., k : k + 1], config("gae")) for k in range(2)]
    torch.testing.assert_close(both.advantages, parts[0].advantages + parts[1].advantages)
    torch.testing.assert_close(both.returns, torch.cat([part.returns for part in parts], dim=-1))


def test_a_score_on_the_last_token_and_a_penalty_on_every_token():
    """Finished, cut, and one-token completions: the score stands on the last counted token, EOS included."""
    rollout = make_rollout(prompt=("11",) * 3, completion=("1111", "1100", "1000"))
    scores = torch.zeros(3, 4, 1)
    for row, last in enumerate((3, 1, 0)):
        scores[row, last] = 10.0 + row
    rewards = shape_rewards(dataclasses.replace(rollout, scores=scores), config("gae"), kl_coef=0.1)[..., 0]
    for row, last in enumerate((3, 1, 0)):
        kl = rollout.kl_penalty[row]
        expected = [-0.1 * kl[t].item() + (10.0 + row if t == last else 0.0) for t in range(last + 1)]
        assert rewards[row, : last + 1].tolist() == pytest.approx(expected, abs=1e-5)
        assert rewards[row, last + 1 :].eq(0).all()


# --- baselines, lambdas, truncation ----------------------------------------------------------------------------------

ESTIMATORS = ["rewards_to_go", "total_return", "immediate_rewards"]


@pytest.fixture
def rewards():
    return torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(2))


def unbased(estimator, rollout, rewards):
    """Each row's weights, nothing subtracted, by the definition above with a critic that says 0."""
    rows = range(len(ROWS))
    return [by_definition(estimator, r := counted(rollout, rewards, i), [0.0] * len(r))[0] for i in rows]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_baselines_without_a_critic_are_their_definitions(rollout, rewards, estimator):
    weights = unbased(estimator, rollout, rewards)
    everyone = [w for row in weights for w in row]
    means = [sum(row) / len(row) for row in weights]
    baselines = {
        "none": [0.0] * 4,
        "batch_mean": [sum(everyone) / len(everyone)] * 4,
        "leave_one_out": [means[1], means[0], means[3], means[2]],
    }
    for name, expected in baselines.items():
        got = estimate(rollout, rewards, config(estimator, baseline=name, num_generations=2))
        for i, row in enumerate(weights):
            assert counted(rollout, got.advantages, i) == pytest.approx([w - expected[i] for w in row], abs=1e-5)
        assert "critic/explained_variance" not in got.metrics


def test_auto_is_the_critic_if_it_explains_anything_and_else_rewards_to_go_less_the_batch_mean(rollout, rewards):
    to_go = torch.zeros(4, 5, 1)
    for i, row in enumerate(unbased("rewards_to_go", rollout, rewards)):
        to_go[i][rollout.completion_mask[i]] = torch.tensor(row)[:, None]
    for values, trusted in ((to_go + 0.1 * rewards, True), (-to_go, False)):
        judged = dataclasses.replace(rollout, values=values)
        for estimator in ("gae", "rewards_to_go", "total_return"):
            auto = estimate(judged, rewards, config(estimator, baseline="auto"))
            fallback = "rewards_to_go" if estimator == "gae" else estimator
            other = config(estimator) if trusted else config(fallback, baseline="batch_mean")
            expected = estimate(judged, rewards, other)
            torch.testing.assert_close(auto.advantages, expected.advantages)
            assert auto.metrics["critic/trusted"] == trusted
            torch.testing.assert_close(auto.returns, estimate(judged, rewards, config(estimator)).returns)


def test_each_stream_is_judged_by_itself():
    rollout = make_rollout(prompt=("11",) * 4, completion=ROWS, streams=2)
    rewards = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(2))
    good = estimate(rollout, rewards, config("rewards_to_go")).returns[..., 0]
    rollout = dataclasses.replace(rollout, values=torch.stack([good, -good], dim=-1))
    settings = config("rewards_to_go", baseline="auto")
    both = estimate(rollout, rewards, settings)
    assert both.metrics["critic/trusted"] == 0.5


def test_each_stream_has_its_own_gamma_and_lambda():
    rollout = make_rollout(prompt=("11",) * 4, completion=ROWS, streams=2)
    rewards = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(2))
    streams = [RewardStream("a", gamma=0.3), RewardStream("b", lam=0.1)]
    both = estimate(rollout, rewards, config("gae"), streams)
    first = estimate(
        select_stream(rollout, 0), rewards[..., :1], PPOConfig(gamma=0.3, lam=LAM, whiten_advantages=False)
    )
    second = estimate(
        select_stream(rollout, 1), rewards[..., 1:], PPOConfig(gamma=GAMMA, lam=0.1, whiten_advantages=False)
    )
    torch.testing.assert_close(both.advantages, first.advantages + second.advantages)


def test_the_stream_named_kl_pays_for_the_kl():
    rollout = make_rollout(prompt=("11",) * 4, completion=ROWS, streams=2)
    mask = rollout.completion_mask
    rewards = shape_rewards(rollout, config("gae"), [RewardStream("a"), RewardStream("kl")], kl_coef=0.5)
    torch.testing.assert_close(rewards[mask][:, 0], rollout.scores[mask][:, 0])
    torch.testing.assert_close(rewards[mask][:, 1], rollout.scores[mask][:, 1] - 0.5 * rollout.kl_penalty[mask])


UNDISCOUNTED = {"gamma": 1.0, "lam": 1.0}
AT_THE_END = {
    "nothing is discounted": (UNDISCOUNTED, {}, True),
    "rewards-to-go": ({"estimator": "rewards_to_go", "lam": 0.9}, {}, True),
    "asked for": ({"lam": 0.9, "kl_form": "k1_end"}, {}, True),
    "not asked for": (UNDISCOUNTED | {"kl_form": "k1_reward"}, {}, False),
    "gamma": ({"gamma": 0.9}, {}, False),
    "lambda": ({"lam": 0.9}, {}, False),
    "the bandit case": ({"estimator": "immediate_rewards"}, {}, False),
    "a stream's gamma": (UNDISCOUNTED, {"gamma": 0.9}, False),
    "a stream's lambda": ({"lam": 0.9}, {"lam": 1.0}, True),
    "a value stands for what follows": (UNDISCOUNTED | {"truncation": "bootstrap"}, {}, False),
    "cut completions are left out": (UNDISCOUNTED | {"truncation": "mask"}, {}, False),
    "cut completions are punished": (UNDISCOUNTED | {"truncation": "penalty", "truncation_penalty": 0.0}, {}, True),
    "another form": (UNDISCOUNTED | {"kl_form": "exact_both"}, {}, False),
}


@pytest.mark.parametrize("name", AT_THE_END)
def test_the_kl_is_paid_with_the_last_token_where_nothing_is_discounted(rollout, name):
    settings, of_stream, at_end = AT_THE_END[name]
    stream = RewardStream("a", **of_stream)
    rewards = shape_rewards(rollout, PPOConfig(**settings), [stream], kl_coef=0.5)[..., 0]
    for row, scores in enumerate(rollout.scores[..., 0]):
        mask = rollout.completion_mask[row]
        prices = (0.5 * rollout.kl_penalty[row][mask]).tolist()
        if at_end:
            prices = [0.0] * (len(prices) - 1) + [sum(prices)]
        expected = [s - p for s, p in zip(scores[mask].tolist(), prices, strict=True)]
        assert rewards[row][mask].tolist() == pytest.approx(expected, abs=1e-5)
        assert rewards[row][~mask].eq(0).all()


def test_a_stream_that_discounts_cannot_pay_at_the_end():
    streams = [{"name": "a", "reward_funcs": [len]}, {"name": "kl", "gamma": 0.9}]
    with pytest.raises(
        ValueError, match=r"reward stream 'kl' pays for the KL, and its gamma=0\.9 .*kl_form='k1_reward'"
    ):
        make_streams(None, streams, PPOConfig(kl_form="k1_end"))
    make_streams(None, streams[:1] + [{"name": "kl", "gamma": 1.0}], PPOConfig(kl_form="k1_end"))


def test_a_penalty_in_the_loss_is_not_in_the_reward(rollout):
    rewards = shape_rewards(rollout, config("gae", kl_form="k2_loss"), kl_coef=0.5)
    mask = rollout.completion_mask
    torch.testing.assert_close(rewards[mask], rollout.scores[mask])


def test_the_critics_lambda_is_its_own(rollout, rewards):
    got = estimate(rollout, rewards, config("gae", critic_lam=1.0))
    plain = estimate(rollout, rewards, config("gae"))
    to_go = estimate(rollout, rewards, config("rewards_to_go"))
    assert torch.equal(got.advantages, plain.advantages)
    torch.testing.assert_close(got.returns, to_go.returns)


def test_the_adaptive_lambda_is_each_rows_own(rollout, rewards):
    got = estimate(rollout, rewards, config("gae", adaptive_lam_alpha=2.0))
    for i, row in enumerate(ROWS):
        lam = max(LAM, 1 - 1 / (2.0 * row.count("1")))
        alone = estimate(rollout, rewards, dataclasses.replace(config("gae"), lam=lam))
        torch.testing.assert_close(got.advantages[i], alone.advantages[i])


def test_bootstrapping_goes_on_from_the_value_of_the_last_state(rollout, rewards):
    rollout = dataclasses.replace(rollout, bootstrap_values=torch.tensor([[7.0], [0.0], [0.0], [-3.0]]))
    values = counted(rollout, rollout.values, 0)
    given = counted(rollout, rewards, 0)
    to_go = estimate(rollout, rewards, config("rewards_to_go", truncation="bootstrap", baseline="auto")).returns
    expected = sum(GAMMA**t * r for t, r in enumerate(given)) + GAMMA**5 * 7.0
    assert to_go[0, 0, 0].item() == pytest.approx(expected, abs=1e-5)
    got = estimate(rollout, rewards, config("gae", truncation="bootstrap"))
    assert got.advantages[0, 4].item() == pytest.approx(given[-1] + GAMMA * 7.0 - values[-1], abs=1e-5)
    ended = estimate(rollout, rewards, config("gae"))
    assert torch.equal(got.advantages[1:3], ended.advantages[1:3]) and not torch.equal(got.advantages, ended.advantages)


def test_the_penalty_for_being_cut_stands_on_the_last_token(rollout):
    rollout = dataclasses.replace(rollout, ended=torch.tensor([True, False, False, False]))
    settings = config("gae", truncation="penalty", truncation_penalty=5.0)
    change = shape_rewards(rollout, settings, kl_coef=0.1) - shape_rewards(rollout, config("gae"), kl_coef=0.1)
    expected = torch.zeros(4, 5)
    for row, last in ((1, 1), (2, 0), (3, 3)):
        expected[row, last] = -5.0
    torch.testing.assert_close(change[..., 0], expected)


def test_masked_rows_neither_learn_nor_count_in_the_whitening(rollout, rewards):
    rollout = dataclasses.replace(rollout, ended=torch.tensor([False, True, True, False]))
    got = estimate(rollout, rewards, config("gae", truncation="mask", whiten_advantages=True))
    assert torch.equal(got.mask, rollout.completion_mask & torch.tensor([[False], [True], [True], [False]]))
    x = estimate(rollout, rewards, config("gae")).advantages[got.mask]
    torch.testing.assert_close(got.advantages[got.mask], (x - x.mean()) / x.std(correction=0))
    assert got.advantages[~got.mask].eq(0).all()


def test_masking_every_row_says_what_to_do(rollout, rewards):
    rollout = dataclasses.replace(rollout, ended=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="no completion of this rollout ended with EOS.*max_completion_length"):
        estimate(rollout, rewards, config("gae", truncation="mask"))


def test_rows_that_are_masked_take_no_part_in_the_baselines(rollout, rewards):
    rollout = dataclasses.replace(rollout, ended=torch.tensor([True, True, True, False]))
    weights = unbased("total_return", rollout, rewards)
    kept = [w for row in weights[:3] for w in row]
    expected = {"batch_mean": [sum(kept) / len(kept)] * 3, "leave_one_out": [weights[1][0], weights[0][0], 0.0]}
    for name, baselines in expected.items():
        got = estimate(rollout, rewards, config("total_return", baseline=name, num_generations=2, truncation="mask"))
        for i in range(3):
            assert counted(rollout, got.advantages, i) == pytest.approx(
                [w - baselines[i] for w in weights[i]], abs=1e-5
            )


def test_the_critics_share_is_that_of_the_sum_of_its_streams():
    """A stream of rounding noise, like the KL's before the policy moves, does not drown the others."""
    rollout = make_rollout(prompt=("11",) * 4, completion=ROWS, streams=2)
    rewards = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(2))
    rewards[..., 1] *= 1e-8
    returns = estimate(rollout, rewards, PPOConfig(gamma=GAMMA, lam=1.0)).returns
    rollout = dataclasses.replace(rollout, values=torch.stack([returns[..., 0], torch.full((4, 5), 1e-4)], dim=-1))
    explained = estimate(rollout, rewards, PPOConfig(gamma=GAMMA, lam=1.0)).metrics["critic/explained_variance"]
    assert explained == pytest.approx(1.0, abs=1e-3)


def test_a_critic_of_immediate_rewards_is_judged_by_them(rollout, rewards):
    rollout = dataclasses.replace(rollout, values=rewards)
    metrics = estimate(rollout, rewards, config("immediate_rewards", baseline="auto")).metrics
    assert metrics["critic/explained_variance"] == pytest.approx(1.0) and metrics["critic/trusted"] == 1.0


def test_a_rollout_that_teaches_nothing_says_so():
    """One token that counts: its whitened advantage is 0, whatever the reward."""
    one = make_rollout(prompt=("11",), completion=("1",))
    with pytest.warns(UserWarning, match=r"Every advantage of this rollout is 0 \(tokens that count: 1\)"):
        assert not estimate(one, torch.ones(1, 1, 1), config("rewards_to_go", whiten_advantages=True)).advantages.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate(one, torch.ones(1, 1, 1), config("rewards_to_go")).advantages.any()
