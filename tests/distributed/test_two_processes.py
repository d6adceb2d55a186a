"""Two processes over gloo sample the same tokens, log the same numbers and end with the same weights as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import metrics_rows, weights
from safetensors.torch import load_file
from worker import RUNS, SHARES, build, gradients, train

from lmppo.run.checkpoint import checkpoint_dir, verify_checkpoint

HERE = Path(__file__).parent
# Sums in another order, made larger by Adam: weights of order 0.1 after a few steps of 0.01.
ROUNDING = {"atol": 5e-5, "rtol": 1e-4}


def launch(folder, scenario):
    """`accelerate launch` on two CPU processes, as the documentation has it."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(HERE / "worker.py"), str(folder), scenario]  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same runs by one process (this one) and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    finished = launch(two, "train")
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name in RUNS:
        train(one, name)
    return one, two


def read(folder, name, rank):
    return load_file(folder / f"{name}-{rank}.safetensors"), json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_hold_the_same_record_and_the_same_weights(folders, name):
    (first, first_notes), (second, second_notes) = (read(folders[1], name, rank) for rank in (0, 1))
    assert first_notes["processes"] == second_notes["processes"] == 2
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n].nan_to_num(77.0), second[n].nan_to_num(77.0))] == []
    assert first_notes["texts"] == second_notes["texts"]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_sample_and_score_what_one_does(folders, name):
    (one, one_notes), (two, two_notes) = (read(folder, name, 0) for folder in folders)
    assert one_notes["processes"] == 1 and one.keys() == two.keys()
    for field in [n for n in one if n.startswith("rollout")]:
        left, right = one[field].nan_to_num(77.0), two[field].nan_to_num(77.0)
        if left.is_floating_point():
            torch.testing.assert_close(right, left, **ROUNDING, msg=lambda m, field=field: f"{field}: {m}")
        else:
            assert right.equal(left), field
    for ours, theirs in zip(one_notes["texts"], two_notes["texts"], strict=True):
        for kind in ("prompts", "completions", "extras"):
            assert ours[kind] == theirs[kind], "in the order of the global batch"
        assert theirs["metrics"] == pytest.approx(ours["metrics"])
    lengths = one["rollout0/completion_mask"].sum(1)
    assert lengths[:8].sum() != lengths[8:].sum(), "the processes have different numbers of tokens"


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(folders, name):
    (one, _), (two, _) = (read(folder, name, 0) for folder in folders)
    start = weights(build(folders[0] / "untrained", name))
    moved = 0.0
    for n, tensor in start.items():
        torch.testing.assert_close(two[f"weights/{n}"], one[f"weights/{n}"], **ROUNDING, msg=lambda m, n=n: f"{n}: {m}")
        moved = max(moved, (one[f"weights/{n}"] - tensor).abs().max().item())
    assert moved > 100 * ROUNDING["atol"], "the tolerance is small against what was learned"


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_log_what_one_does(folders, name):
    ours, theirs = (metrics_rows(folder / name) for folder in folders)
    assert [row["step"] for row in theirs] == [1, 2], "one process writes the file"
    for left, right in zip(ours, theirs, strict=True):
        exact = {"first_ratio_error"}  # the rounding error itself
        assert right.keys() == left.keys()
        assert {k: v for k, v in right.items() if k not in exact} == pytest.approx(
            {k: v for k, v in left.items() if k not in exact}, abs=2e-4, rel=1e-3
        )
        assert right["first_ratio_error"] < 2e-5 if right["step"] == 1 else True


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_goes_on_after_training(folders, name):
    ours, theirs = (read(folder, name, 0)[1]["after"] for folder in folders)
    assert theirs == pytest.approx(ours, abs=2e-4, rel=1e-3)
    row = metrics_rows(folders[1] / name)[-1]
    assert {n: row[n] for n in theirs} == theirs, "the last step was evaluated too"


@pytest.fixture(scope="module")
def gradient_folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    finished = launch(two, "gradients")
    assert finished.returncode == 0, finished.stderr[-3000:]
    gradients(one)
    return one, two


@pytest.mark.parametrize("name", ["shared", "separate", "untied", "head"])
@pytest.mark.parametrize("share", SHARES)
def test_the_gradient_is_that_of_one_process_however_unequal_the_shares(gradient_folders, name, share):
    """Each process goes backward through its own groups, and through its own part of the logits, once."""
    whole, parts = gradient_folders
    one, notes = read(whole, f"{name}-{share}", 0)
    (first, first_notes), (second, second_notes) = (read(parts, f"{name}-{share}", rank) for rank in (0, 1))
    assert first_notes["groups"] != second_notes["groups"]
    assert (min(first_notes["tokens"], second_notes["tokens"]) == 0) == ("nothing" in share)
    heads = {n for n in one if "lm_head" in n}
    assert bool(heads) == (name in ("untied", "head")) and all(one[n].any() for n in heads)
    assert one.keys() == first.keys() == second.keys()
    for n, gradient in one.items():
        assert torch.equal(first[n], second[n]), n
        torch.testing.assert_close(first[n], gradient, atol=2e-6, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")
    assert first_notes["stats"] == second_notes["stats"] == pytest.approx(notes["stats"], abs=1e-5, rel=1e-5)


def test_in_the_warm_up_the_policy_stays_on_two_processes_too(folders):
    """With weight decay, which would move it."""
    start = weights(build(folders[0] / "untrained-2", "warm-up"))
    saved = load_file(checkpoint_dir(folders[1] / "warm-up", 1) / "policy" / "model.safetensors")
    assert all(torch.equal(tensor, start[f"policy.{name}"]) for name, tensor in saved.items())


def test_a_checkpoint_of_two_processes_is_resumed_by_one(folders, capsys):
    _, two = folders
    verify_checkpoint(checkpoint_dir(two / "shared", 1))
    trainer = build(two / "shared", "shared")
    trainer.train(resume_from_checkpoint=str(checkpoint_dir(two / "shared", 1)))
    assert "not bit-identical: num_processes was 2 and is 1" in capsys.readouterr().out
    expected, _ = read(two, "shared", 0)
    for name, tensor in weights(trainer).items():
        torch.testing.assert_close(tensor, expected[f"weights/{name}"], **ROUNDING)


def test_an_error_on_one_process_ends_both_and_shows_its_cause(tmp_path):
    finished = launch(tmp_path, "fail")
    assert finished.returncode != 0
    output = finished.stdout + finished.stderr
    assert "'flaky' raised ValueError at step 1: the second process is unwell" in output
    assert "The rollout failed on another process. process 1: reward function 'flaky' raised ValueError" in output
    assert len(metrics_rows(tmp_path / "fail")) == 1


def test_what_one_process_asks_for_both_do(tmp_path):
    """And none waits for the other; one process writes."""
    finished = launch(tmp_path, "ask")
    assert finished.returncode == 0, finished.stderr[-3000:]
    notes = [json.loads((tmp_path / f"ask-{rank}.json").read_text()) for rank in (0, 1)]
    for note in notes:
        assert note["done"] == ["evaluate 2", "evaluate 2", "log 2", "save 2", "save 3"]
        assert note["step"] == 3 and note["best"][0] == 2
    assert notes[0]["best"] == notes[1]["best"]
    assert [note["world"][:3] for note in notes] == [[2, 0, True], [2, 1, False]]
    assert notes[0]["world"][3] == "ParallelMode.DISTRIBUTED"
    folder = tmp_path / "ask"
    assert json.loads((folder / "best" / "step.json").read_text())["value"] == notes[0]["best"][1]
    assert [p.name for p in (folder / "completions").iterdir()] == ["completions_00002.parquet"]
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 2
    verify_checkpoint(checkpoint_dir(folder, 3))


def test_the_process_group_ends_before_python_does(folders):
    """Else a thread of the group can abort a process whose run has finished."""
    assert [(folders[1] / f"group-{rank}").read_text() for rank in (0, 1)] == ["ended", "ended"]


def test_an_error_in_a_callback_of_one_process_ends_both(tmp_path):
    finished = launch(tmp_path, "fail_in_callback")
    assert finished.returncode != 0
    output = finished.stdout + finished.stderr
    assert "A callback's on_step_end failed on another process. process 1: the callback is unwell" in output


@pytest.mark.parametrize("name", ["stopped", "separate, stopped"])
def test_two_processes_stop_the_policy_at_the_same_step_and_the_critic_goes_on(folders, name):
    rows = metrics_rows(folders[1] / name)
    assert [(row["early_stop"], row["optimizer_steps"]) for row in rows] == [(1, 4 * 2 - 1)] * 2
