"""Metrics: hand-computed, independent of padding, and every logged name documented."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch
from builders import count_a, critic_of, make_trainer, metrics_rows
from test_docs import documented_metrics
from test_records import make_rollout

import lmppo
from lmppo.collector import ScoredRollout
from lmppo.metrics import critic_metrics, distinct_n, rollout_metrics
from lmppo.run.metrics_file import MetricsFile


def mask_of(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def scored(rollout, per_function, metrics=None):
    n_rows = len(rollout.completion_mask)
    names = ["f", "g"][: len(per_function[0])]
    return ScoredRollout(rollout, ["p"] * n_rows, ["c"] * n_rows, names, torch.tensor(per_function), metrics or {}, {})


@pytest.fixture
def rollout():
    rollout = make_rollout(prompt=("11", "01", "11"), completion=("1110", "1000", "1100"))
    scores = torch.tensor([[0, 0, 3.0, 0], [1.0, 0, 0, 0], [0.5, -1.0, 0, 0]])[..., None]
    ids = torch.tensor([[5, 6, 5, 9], [5, 9, 9, 9], [5, 6, 9, 9]])
    tokens = dataclasses.replace(rollout.tokens, completion_ids=ids)
    return dataclasses.replace(rollout, scores=scores, tokens=tokens, ended=torch.tensor([False, True, True]))


def test_rollout_metrics_by_hand(rollout):
    nan = math.nan
    row = rollout_metrics(scored(rollout, [[3.0, nan], [1.0, 2.0], [-0.5, 4.0]]), kl_coef=0.1)
    kl = [(rollout.logprobs - rollout.ref_logprobs)[i, :n].sum().item() for i, n in enumerate((3, 1, 2))]
    tokens = [rollout.logprobs[i, t].item() for i, n in enumerate((3, 1, 2)) for t in range(n)]
    expected = {
        "reward": 3.5 / 3,
        "reward_std": np.std([3.0, 1.0, -0.5]),
        "kl_to_ref": sum(kl) / 3,
        "kl_coef": 0.1,
        "rlhf_reward": 3.5 / 3 - 0.1 * sum(kl) / 3,
        "sampled_entropy": -sum(tokens) / 6,
        "completion_length": 2.0,
        "completion_length/min": 1.0,
        "completion_length/max": 3.0,
        "eos_rate": 2 / 3,
        "distinct_2": 2 / 3,  # (5,6) (6,5) | | (5,6)
        "rewards/f/mean": 3.5 / 3,
        "rewards/f/std": np.std([3.0, 1.0, -0.5]),
        "rewards/g/mean": 3.0,
        "rewards/g/std": 1.0,
    }
    assert row == pytest.approx(expected, abs=1e-5)


def test_a_function_that_applied_nowhere_has_no_mean(rollout):
    row = rollout_metrics(scored(rollout, [[1.0, math.nan]] * 3), kl_coef=0.1)
    assert "rewards/f/mean" in row and "rewards/g/mean" not in row


def test_what_reward_functions_log_is_added_and_replaces_nothing(rollout):
    row = rollout_metrics(scored(rollout, [[1.0]] * 3, {"mine": 4.0, "reward": -99.0}), kl_coef=0.1)
    assert row["mine"] == 4.0
    assert row["reward"] == pytest.approx(3.5 / 3)


def test_critic_metrics_by_hand():
    mask = mask_of("110", "100")
    values = torch.tensor([[1.0, 2.0, 7.0], [3.0, 7.0, 7.0]])[..., None]
    returns = torch.tensor([[2.0, 2.0, 9.0], [6.0, 9.0, 9.0]])[..., None]
    errors, targets = [1.0, 0.0, 3.0], [2.0, 2.0, 6.0]
    expected = {
        "return/mean": np.mean(targets),
        "return/std": np.std(targets),
        "value/mean": 2.0,
        "explained_variance": 1 - np.var(errors) / np.var(targets),
    }
    assert critic_metrics(values, returns, mask, torch.tensor([0, 1])) == pytest.approx(expected)
    # of one prompt: the first tokens' errors, 1 and 3, lie 1 from their mean, and the returns 2 and 6 lie 2 from theirs
    expected["explained_variance_within_prompts"] = 1 - 1**2 / 2**2
    assert critic_metrics(values, returns, mask, torch.tensor([4, 4])) == pytest.approx(expected)


@pytest.mark.parametrize("streams", [1, 2])
def test_within_prompts_a_run_reports_what_its_record_says(tmp_path, streams):
    """Groups of two, and prompts that return within the batch: by text, in plain Python, streams summed."""
    more = {"reward_streams": [{"name": n, "reward_funcs": [count_a]} for n in "ab"]} if streams == 2 else {}
    prompts = [{"prompt": p} for p in ("a", "bcd", "ab")]
    trainer = make_trainer(
        tmp_path, dataset=prompts, critic=critic_of(num_labels=streams), num_generations=2, lam=0.5, max_steps=1,
        rollout_batch_size=16, **more,
    )  # fmt: skip
    row = trainer.step()
    step = trainer.last_step
    rollout, mask = step.scored.rollout, step.scored.rollout.completion_mask
    to_go = step.rewards.sum(dim=-1).flip(1).cumsum(1).flip(1)

    def within(returns):
        places = {}
        for i, prompt in enumerate(step.scored.prompts):
            for t in range(int(mask[i].sum())):
                pair = (returns[i, t].item(), (returns[i, t] - rollout.values[i, t].sum()).item())
                places.setdefault((prompt, t), []).append(pair)
        spreads = [len(pairs) * np.var(pairs, axis=0) for pairs in places.values()]
        total, unexplained = np.sum(spreads, axis=0)
        assert len(places) < mask.sum() and total > 0
        return 1 - unexplained / total

    name = "explained_variance_within_prompts"
    assert row[name] == pytest.approx(within(step.experience.returns.sum(dim=-1)), abs=1e-4)
    assert row[f"critic/{name}"] == pytest.approx(within(to_go), abs=1e-4)
    assert abs(row[name] - row["explained_variance"]) > 1e-3


def test_prompts_that_never_return_have_no_variance_within(tmp_path):
    row = make_trainer(tmp_path, dataset=[{"prompt": p} for p in "abcdefgh"], max_steps=1).step()
    assert "explained_variance" in row and not [name for name in row if name.endswith("within_prompts")]


def test_padding_changes_no_metric(rollout):
    def pad(tensor, axes):
        if len(axes) < 2 or axes[1] not in "PT":
            return tensor
        left = tensor.new_full((3, 2, *tensor.shape[2:]), 1 if tensor.dtype != torch.bool else False)
        right = tensor.new_full((3, 3, *tensor.shape[2:]), 77 if tensor.dtype != torch.bool else False)
        return torch.cat([left, tensor], 1) if axes[1] == "P" else torch.cat([tensor, right], 1)

    wide = rollout.map(pad)
    wide = dataclasses.replace(wide, scores=torch.where(wide.completion_mask[..., None], wide.scores, 0.0))
    functions = [[1.0]] * 3
    narrow_row = rollout_metrics(scored(rollout, functions), kl_coef=0.1)
    assert rollout_metrics(scored(wide, functions), kl_coef=0.1) == pytest.approx(narrow_row)
    returns = torch.randn(3, 4, 1)
    same, wide_same = rollout.tokens.prompt_numbers, wide.tokens.prompt_numbers
    assert torch.equal(same, wide_same)
    narrow_row = critic_metrics(rollout.values, returns, rollout.completion_mask, same)
    wide_row = critic_metrics(wide.values, pad(returns, ("B", "T", "K")), wide.completion_mask, wide_same)
    assert wide_row == pytest.approx(narrow_row, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "rows, n, expected",
    [
        ([[1, 2, 1, 2]], 2, 2 / 3),  # (1,2) (2,1) (1,2)
        ([[1, 2], [1, 2]], 2, 1 / 2),
        ([[1], [2]], 2, 1.0),  # no pair at all
        ([[1, 1, 1, 1]], 1, 1 / 4),
        ([[1, 2, 3]], 3, 1.0),
    ],
)
def test_distinct_n_by_hand(rows, n, expected):
    width = max(map(len, rows))
    ids = torch.tensor([row + [9] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    assert distinct_n(ids, mask, n) == pytest.approx(expected)


def test_every_name_that_is_logged_has_a_meaning_and_every_meaning_a_number(tmp_path):
    row = {}
    for i, settings in enumerate(
        (
            {},
            {"objective": "kl_penalty"},
            {"objective": "trpo"},
            {"baseline": "auto"},
            {"kl_form": "k2_loss"},
            {"critic": critic_of()},
        )
    ):
        make_trainer(tmp_path / str(i), max_steps=1, **settings).train()
        row |= json.loads((tmp_path / str(i) / "metrics.jsonl").read_text())
    documented = {name.format(name="count_a") for name in documented_metrics()}
    assert set(row) == documented
    required = {"step", "reward", "reward_std", "rewards/count_a/mean", "kl_to_ref", "kl_coef", "approx_kl", "clip_frac",
                "entropy", "explained_variance", "policy_loss", "value_loss", "grad_norm", "learning_rate",
                "completion_length", "eos_rate", "tokens_per_second", "time/rollout", "time/update"}  # fmt: skip
    assert required <= set(row)
    assert all(isinstance(value, int | float) for value in row.values())


def test_the_seconds_before_the_first_step_are_in_its_row(tmp_path):
    """The first row of each trainer, a resumed one's too; counted from the import."""
    before = time.perf_counter() - lmppo.IMPORTED
    for steps in (2, 3):
        make_trainer(tmp_path, max_steps=steps, resume_from_checkpoint="auto").train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "time/startup" in row] == [1, 3]
    first, resumed = (row["time/startup"] for row in rows if "time/startup" in row)
    learning = sum(row["time/rollout"] + row["time/update"] for row in rows[:2])
    assert before < first < first + learning < resumed < time.perf_counter() - lmppo.IMPORTED


def test_the_file_holds_what_json_can_hold(tmp_path):
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    file.append({"step": 1, "nan": math.nan, "inf": -math.inf, "numpy": np.float32(0.5), "tensor": torch.tensor([1, 2]),
                 "object": Exception("x"), "text": "ä"})  # fmt: skip
    row = json.loads((tmp_path / "new" / "metrics.jsonl").read_text())
    assert row == {"step": 1, "nan": None, "inf": None, "numpy": 0.5, "tensor": [1, 2], "object": "x", "text": "ä"}


def test_rows_of_later_steps_and_torn_lines_are_dropped(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.cut_after(3)  # nothing there yet
    for step in range(1, 6):
        file.append({"step": step})
    with file.path.open("a") as handle:
        handle.write('{"step": 6, "rew')
    file.cut_after(3)
    assert [row["step"] for row in metrics_rows(tmp_path)] == [1, 2, 3]
    file.append({"step": 4})
    assert [row["step"] for row in metrics_rows(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
