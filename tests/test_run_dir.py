"""Resuming: nothing is lost, nothing is invented, and another run's directory is left alone."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders import (
    assert_same,
    build_policy_arguments,
    count_a,
    gpt2,
    llama,
    lora,
    make_trainer,
    metrics_rows,
    optimizer_state,
    weights,
)
from killable_run import SETTINGS, run
from safetensors.torch import load_file
from transformers import TrainerCallback

from lmppo.control import AdaptiveKL
from lmppo.prompts import PromptStream
from lmppo.rewards import RewardError
from lmppo.run import checkpoint as ckpt
from lmppo.run.checkpoint import CheckpointError, FormatError, checkpoint_dir, list_checkpoints
from lmppo.run.directory import discard_unsaved, find_resume_point, read_run_config

TESTS = Path(__file__).parent


def tree(folder):
    """Every file's hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def crash_at(call):
    """A reward function that raises once, at its n-th call."""
    calls = 0

    def count_a_or_die(prompts, completions, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("the power went out")
        return count_a(prompts, completions)

    return count_a_or_die


def crashing_trainer(output_dir, kind="shared", call=0, **settings):
    return make_trainer(output_dir, reward=crash_at(call), **(build_policy_arguments(kind) | SETTINGS | settings))


def crash(output_dir, kind="shared", call=4, **settings):
    """A run that broke in step ``call``; checkpoints are written at every second one."""
    trainer = crashing_trainer(output_dir, kind, call, **settings)
    with pytest.raises(RewardError, match="the power went out"):
        trainer.train()


def resumed(output_dir, kind="shared", **settings):
    trainer = crashing_trainer(output_dir, kind, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs that were never disturbed, by kind."""
    runs = {}

    def get(kind):
        if kind not in runs:
            runs[kind] = resumed(tmp_path_factory.mktemp(kind), kind)
        return runs[kind]

    return get


def assert_same_run(trainer, reference):
    assert_same(weights(trainer), weights(reference))
    assert_same(optimizer_state(trainer), optimizer_state(reference))
    assert metrics_rows(trainer.args.output_dir) == metrics_rows(reference.args.output_dir)
    assert trainer.control.kl.coef == reference.control.kl.coef
    assert trainer.prompts.drawn == reference.prompts.drawn
    assert trainer.run.num_tokens == reference.run.num_tokens
    ours, theirs = (tree(Path(t.args.output_dir) / "final") for t in (trainer, reference))
    assert ours == theirs


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "separate", "lora", "lora critic"])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path, uninterrupted, kind):
    """Weights, optimizer, KL coefficient, prompt order and metrics, bit for bit; step 3 is logged once."""
    reference = uninterrupted(kind)
    crash(tmp_path, kind)
    assert [row["step"] for row in metrics_rows(tmp_path)] == [1, 2, 3], "the third step was not saved"
    trainer = resumed(tmp_path, kind)
    assert [row["step"] for row in metrics_rows(tmp_path)] == [1, 2, 3, 4]
    assert_same_run(trainer, reference)
    coefficients = [row["kl_coef"] for row in metrics_rows(tmp_path)]
    assert len(set(coefficients)) == 4, "the adaptive coefficient is part of what is tested"


def no_optimizer(monkeypatch):
    monkeypatch.setattr(ckpt, "restore_optimizer", lambda *args: None)


def no_value_head(monkeypatch):
    load = ckpt._load_model

    def forget(model, directory):
        before = {name: tensor.clone() for name, tensor in model.value_head.state_dict().items()}
        load(model, directory)
        model.value_head.load_state_dict(before)

    monkeypatch.setattr(ckpt, "_load_model", forget)


def no_policy(monkeypatch):
    monkeypatch.setattr(ckpt, "_load_into", lambda *args: None)


def no_kl_coefficient(monkeypatch):
    monkeypatch.setattr(AdaptiveKL, "load_state_dict", lambda *args: None)


def no_prompt_cursor(monkeypatch):
    monkeypatch.setattr(PromptStream, "load_state_dict", lambda *args: None)


@pytest.mark.parametrize("forget", [no_optimizer, no_value_head, no_policy, no_kl_coefficient, no_prompt_cursor])
def test_each_part_of_the_state_matters(tmp_path, uninterrupted, monkeypatch, forget):
    """The test above can fail: a resume that forgets one part ends elsewhere."""
    reference = uninterrupted("shared")
    crash(tmp_path)
    forget(monkeypatch)
    trainer = resumed(tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(trainer, reference)


def test_a_run_killed_without_warning_goes_on_as_if_nothing_had_happened(tmp_path, uninterrupted):
    """SIGKILL in the middle of a rollout, in a process of its own; resumed in another."""
    reference = uninterrupted("shared")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}

    def launch(kill_at):
        command = [sys.executable, str(TESTS / "killable_run.py"), str(tmp_path / "run"), "shared", str(kill_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    killed = launch(4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run" / "final").exists()
    finished = launch(0)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "step-000002 at step 2" in finished.stdout
    assert metrics_rows(tmp_path / "run") == metrics_rows(reference.args.output_dir)
    for name in ("policy/model.safetensors", "value_head.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            load_file(checkpoint_dir(folder, 4) / name) for folder in (tmp_path / "run", reference.args.output_dir)
        )
        assert_same(ours, theirs)


def test_a_run_that_broke_before_its_first_checkpoint_starts_over(tmp_path, uninterrupted):
    crash(tmp_path, call=2)
    trainer = resumed(tmp_path)
    assert_same_run(trainer, uninterrupted("shared"))


def test_torn_files_of_a_killed_run_do_not_matter(tmp_path, uninterrupted):
    """A half-written row, half-written checkpoints and exports."""
    crash(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')
    for leftover in (tmp_path / ".tmp-final", tmp_path / "checkpoints" / ".tmp-step-000004"):
        leftover.mkdir()
        (leftover / "half").write_text("")
    (tmp_path / ".tmp-mine").mkdir()
    assert_same_run(resumed(tmp_path), uninterrupted("shared"))
    assert not (tmp_path / ".tmp-final").exists() and not list((tmp_path / "checkpoints").glob(".tmp-*"))
    assert (tmp_path / ".tmp-mine").exists(), "not ours"


def test_shown_completions_are_not_shown_twice(tmp_path):
    crash(tmp_path, log_completions=1)
    resumed(tmp_path, log_completions=1)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def damage(folder, step):
    path = checkpoint_dir(folder, step) / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_passed_over_and_replaced(tmp_path, uninterrupted, capsys):
    crash(tmp_path, save_steps=1)
    damage(tmp_path, 3)
    trainer = resumed(tmp_path, save_steps=1)
    output = capsys.readouterr().out
    assert "Skipped a damaged checkpoint" in output and "step-000003: optimizer.safetensors is not" in output
    assert "at step 2" in output
    assert_same(weights(trainer), weights(uninterrupted("shared")))
    assert metrics_rows(tmp_path) == metrics_rows(uninterrupted("shared").args.output_dir)
    ckpt.verify_checkpoint(checkpoint_dir(tmp_path, 3))


def test_if_all_are_damaged_the_run_does_not_silently_start_over(tmp_path):
    crash(tmp_path, save_steps=1)
    for step in (1, 2, 3):
        damage(tmp_path, step)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, save_steps=1)
    assert all(f"step-{step:06d}: optimizer.safetensors is not" in str(caught.value) for step in (1, 2, 3))
    assert tree(tmp_path) == before


# --- which run may go on where ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder, "shared")
    return folder


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("resume", ["auto", "true", True])
def test_resuming_a_finished_run_does_nothing(finished, capsys, resume):
    before = tree(finished)
    trainer = resumed(finished, resume_from_checkpoint=resume)
    assert "Nothing to do" in capsys.readouterr().out
    assert {k: v for k, v in tree(finished).items() if k != "run_config.yaml"} == {
        k: v for k, v in before.items() if k != "run_config.yaml"
    }
    assert trainer.state.global_step == 4


def test_a_run_killed_between_its_last_checkpoint_and_its_export_exports(copy_of_finished, finished):
    shutil.rmtree(copy_of_finished / "final")
    resumed(copy_of_finished)
    assert tree(copy_of_finished / "final") == tree(finished / "final")
    assert metrics_rows(copy_of_finished) == metrics_rows(finished)


def of_format(folder, version, *, run=True, checkpoints=True):
    """The run directory as a lmppo of this format leaves it; the first wrote no version into run_config.yaml."""
    if run:
        settings = yaml.safe_load((folder / "run_config.yaml").read_text())
        assert next(iter(settings)) == "format_version" and settings.pop("format_version") == 2
        named = {} if version == 1 else {"format_version": version}
        (folder / "run_config.yaml").write_text(yaml.safe_dump(named | settings, sort_keys=False))
    for path in list_checkpoints(folder) if checkpoints else ():
        manifest = json.loads((path / "MANIFEST.json").read_text()) | {"format_version": version}
        (path / "MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def test_the_version_is_of_the_file_not_of_the_settings(finished):
    assert yaml.safe_load((finished / "run_config.yaml").read_text())["format_version"] == 2
    assert "format_version" not in read_run_config(finished)


EARLIER = (
    r"was made by an earlier lmppo \(format 1\), which this one cannot continue: choose another output_dir, and start a "
    r"new run there\.$"
)


@pytest.mark.parametrize("resume", ["auto", "true", True, None, "path"])
def test_a_run_of_an_earlier_lmppo_is_refused_in_one_sentence(copy_of_finished, resume, capsys):
    before = tree(of_format(copy_of_finished, 1))
    asked = str(checkpoint_dir(copy_of_finished, 4)) if resume == "path" else resume
    with pytest.raises(FormatError, match=EARLIER) as caught:
        resumed(copy_of_finished, resume_from_checkpoint=asked, max_steps=5)
    assert str(caught.value).startswith(f"{copy_of_finished} was made")
    assert tree(copy_of_finished) == before and "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_nor_are_its_checkpoints_alone_continued(copy_of_finished, resume, capsys):
    of_format(copy_of_finished, 1, run=False)
    with pytest.raises(FormatError, match=rf"step-000004 {EARLIER}"):
        resumed(copy_of_finished, resume_from_checkpoint=resume, max_steps=5)
    assert "damaged" not in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_lmppo_starts_no_run_elsewhere(copy_of_finished, tmp_path):
    old = checkpoint_dir(of_format(copy_of_finished, 1), 4)
    with pytest.raises(FormatError, match=rf"step-000004 {EARLIER}"):
        resumed(tmp_path / "new", resume_from_checkpoint=str(old))
    assert not (tmp_path / "new").exists()


def test_the_directory_of_an_earlier_run_takes_no_new_checkpoint(copy_of_finished, finished):
    of_format(copy_of_finished, 1)
    with pytest.raises(FormatError, match=EARLIER):
        resumed(copy_of_finished, resume_from_checkpoint=str(checkpoint_dir(finished, 4)))


def test_a_run_of_a_newer_lmppo_asks_for_an_upgrade(copy_of_finished):
    of_format(copy_of_finished, 3, checkpoints=False)
    with pytest.raises(FormatError, match=r"was made by a newer lmppo \(format 3\): upgrade lmppo to resume it\.$"):
        resumed(copy_of_finished)


@pytest.mark.parametrize("content", ["format_version: 2\nreport_to: ['a", "- 1", "text", "format_version: x"])
def test_a_damaged_run_config_is_named_and_can_be_done_without(copy_of_finished, content):
    (copy_of_finished / "run_config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=r"run_config.yaml is damaged: delete it, and pass --resume_from_chec"):
        resumed(copy_of_finished)
    (copy_of_finished / "run_config.yaml").unlink()
    assert resumed(copy_of_finished, max_steps=5, resume_from_checkpoint="true").state.global_step == 5


def test_what_is_asked_of_train_wins_over_the_configuration(finished):
    with pytest.raises(CheckpointError, match="already holds a run"):
        crashing_trainer(finished, resume_from_checkpoint="auto").train(resume_from_checkpoint=False)


@pytest.mark.parametrize("resume", [None, False])
def test_without_asking_nothing_is_continued_or_overwritten(finished, resume):
    before = tree(finished)
    trainer = crashing_trainer(finished, resume_from_checkpoint=None)
    with pytest.raises(CheckpointError, match=r"already holds a run.*--resume_from_checkpoint auto.*--output_dir"):
        trainer.train(resume_from_checkpoint=resume)
    assert tree(finished) == before


@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 3e-3}, r"learning_rate: was 0.01, now 0.003"),
        ({"seed": 1}, "seed: was 42, now 1"),
        ({"rollout_batch_size": 4}, "rollout_batch_size: was 8, now 4"),
        ({"estimator": "rewards_to_go"}, "estimator: was 'gae', now 'rewards_to_go'"),
        ({"dataset": [{"prompt": "a"}] * 6}, "train_dataset: was '6 prompts, sha256 [0-9a-f]+', now '6 prompts"),
        ({"run_settings": {"data": "b"}}, "run_settings: was {}, now {'data': 'b'}"),
    ],
)
def test_another_configuration_is_refused_under_auto(finished, change, named):
    before = tree(finished)
    with pytest.raises(CheckpointError, match=rf"a run with other settings \(.*{named}"):
        resumed(finished, **change)
    assert tree(finished) == before


def test_another_critic_or_adapter_is_another_run(finished):
    for kind, named in (("separate", "critic: was None"), ("lora", "adapter: was None")):
        with pytest.raises(CheckpointError, match=named):
            resumed(finished, kind)


def test_another_rank_is_another_run(tmp_path):
    crash(tmp_path, "lora")
    config = lora()
    config.r = 4
    with pytest.raises(CheckpointError, match=r"adapter: was .*'r': 2.*, now .*'r': 4"):
        resumed(tmp_path, "shared", peft_config=config)


def test_what_changes_only_the_display_may_differ(copy_of_finished):
    resumed(copy_of_finished, max_steps=5, logging_steps=2, save_steps=1, disable_tqdm=True, micro_batch_size=2)
    assert [row["step"] for row in metrics_rows(copy_of_finished)] == [1, 2, 3, 4, 5]


def test_true_goes_on_with_new_settings_and_says_so(copy_of_finished, capsys):
    resumed(copy_of_finished, max_steps=5, learning_rate=1e-4, resume_from_checkpoint="true")
    assert "Resuming with another learning_rate: 0.01 before, 0.0001 now" in capsys.readouterr().out
    assert metrics_rows(copy_of_finished)[-1]["learning_rate"] == 1e-4


def test_true_needs_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be resumed: there is none"):
        resumed(tmp_path, resume_from_checkpoint="true")


def test_auto_starts_where_there_is_nothing(tmp_path):
    assert resumed(tmp_path / "new" / "place", max_steps=1).state.global_step == 1


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.tex").write_text("important")
    with pytest.raises(CheckpointError, match="has no run_config.yaml: choose another one"):
        resumed(tmp_path)
    assert (tmp_path / "final" / "thesis.tex").read_text() == "important"


def test_a_named_checkpoint(copy_of_finished):
    trainer = resumed(copy_of_finished, resume_from_checkpoint=str(checkpoint_dir(copy_of_finished, 2)))
    assert [row["step"] for row in metrics_rows(copy_of_finished)] == [1, 2, 3, 4]
    assert trainer.state.global_step == 4


def test_a_named_checkpoint_with_new_settings_saves_its_own_end(copy_of_finished, finished):
    """The old checkpoint of the same step belongs to another course of the run and is replaced."""
    arguments = {"learning_rate": 0.03, "save_steps": None, "resume_from_checkpoint": str(checkpoint_dir(finished, 2))}
    trainer = resumed(copy_of_finished, **arguments)
    saved = load_file(checkpoint_dir(copy_of_finished, 4) / "value_head.safetensors")
    assert torch.equal(saved["weight"], trainer.actor_critic.value_head.weight)


def test_a_missing_checkpoint_names_those_there_are(finished):
    with pytest.raises(CheckpointError, match=r"step-000007' is not a directory.*step-000002, step-000004"):
        resumed(finished, resume_from_checkpoint=str(checkpoint_dir(finished, 7)))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resumed(finished, resume_from_checkpoint=str(finished / "final"))


def test_looking_for_a_checkpoint_changes_nothing(finished):
    before = tree(finished)
    settings = resumed(finished).run.settings
    before = tree(finished)
    for resume in ("auto", "true", True):
        assert find_resume_point(finished, resume, settings).name == "step-000004"
    assert tree(finished) == before


def test_a_model_of_another_family_cannot_go_on(finished):
    with pytest.raises(CheckpointError, match="does not fit this model"):
        resumed(finished, model=llama(), resume_from_checkpoint="true")


def test_other_threads_are_reported(copy_of_finished, capsys):
    torch.set_num_threads(2)
    try:
        resumed(copy_of_finished, max_steps=5)
    finally:
        torch.set_num_threads(1)
    assert "not bit-identical: num_threads was 1 and is 2" in capsys.readouterr().out


def test_a_stopped_run_saves_and_goes_on(tmp_path, uninterrupted):
    """A callback stops after step 3, where no checkpoint was due."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    resumed(tmp_path, callbacks=[Stop()])
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert (tmp_path / "final" / "model.safetensors").exists()
    trainer = resumed(tmp_path)
    assert_same(weights(trainer), weights(uninterrupted("shared")))
    assert metrics_rows(tmp_path) == metrics_rows(uninterrupted("shared").args.output_dir)


def test_leftovers_are_only_ours(tmp_path):
    for name in (".tmp-other", "checkpoints/.tmp-step-000001", "checkpoints/step-000001", ".tmp-final"):
        (tmp_path / name).mkdir(parents=True)
    discard_unsaved(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        ".tmp-other", "checkpoints", "checkpoints/step-000001"
    ]  # fmt: skip


def test_the_model_itself_is_resumed_not_only_its_settings(finished):
    """A trainer built on other weights of the same shapes ends up with the saved ones."""
    trainer = resumed(finished, model=gpt2(seed=5), resume_from_checkpoint="true")
    saved = load_file(checkpoint_dir(finished, 4) / "policy" / "model.safetensors")
    assert torch.equal(trainer.actor_critic.policy.transformer.wte.weight, saved["transformer.wte.weight"])
