"""What a run tells others while it goes on: callbacks, evaluation, tables, trackers."""

import json
from collections import Counter

import pytest
from builders import PROMPTS, build_policy_arguments, count_a, make_trainer, metrics_rows, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from lmppo.run.checkpoint import list_checkpoints

# --- callbacks -------------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Every event, with the step it was fired at."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(args, state, control, **kwargs):
            assert kwargs["model"] is not None and kwargs["optimizer"] is not None
            assert kwargs["processing_class"] is not None
            self.events.append((name.removeprefix("on_"), state.global_step))
            self.last = kwargs

        return record


def test_callbacks_are_fired_in_order(tmp_path):
    recorder = Recorder()
    trained(tmp_path, callbacks=[recorder], eval_steps=2, eval_dataset=["a"], save_steps=2, max_steps=3)
    assert recorder.events == [
        ("init_end", 0), ("train_begin", 0),
        ("step_begin", 0), ("step_end", 1), ("log", 1),
        ("step_begin", 1), ("step_end", 2), ("evaluate", 2), ("log", 2), ("save", 2),
        ("step_begin", 2), ("step_end", 3), ("log", 3),
        ("save", 3),
        ("train_end", 3),
    ]  # fmt: skip


def test_a_class_of_callbacks_is_made_into_one(tmp_path):
    assert type(make_trainer(tmp_path, callbacks=[TrainerCallback]).run.callbacks[0]) is TrainerCallback


@pytest.mark.parametrize(
    ("callbacks", "message"), [(TrainerCallback(), "expected a list"), ([print], "has a builtin_")]
)
def test_what_is_no_callback_is_refused(tmp_path, callbacks, message):
    with pytest.raises(TypeError, match=f"callbacks.*{message}"):
        make_trainer(tmp_path, callbacks=callbacks)


def test_callbacks_see_what_is_logged(tmp_path):
    class Keep(TrainerCallback):
        rows = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.rows.append(dict(logs))

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            assert all(name.startswith("eval_") for name in metrics)

    trainer = trained(tmp_path, callbacks=[Keep()], eval_steps=1, eval_dataset=["a"], max_steps=3, logging_steps=2)
    assert [row["step"] for row in Keep.rows] == [2, 3], "every second one, and the last"
    assert len(metrics_rows(tmp_path)) == 3, "the file has them all"
    assert Keep.rows[0] == trainer.state.log_history[1]
    assert "eval_reward" in Keep.rows[0]


def test_a_callback_can_stop_the_training(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            return control

    trainer = trained(tmp_path, callbacks=[Stop()], max_steps=9)
    assert trainer.state.global_step == 2
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002"]
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_a_callback_can_ask_for_one_checkpoint_and_gets_one(tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_save = True

    trained(tmp_path, callbacks=[Save()], max_steps=5)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000005"]


# --- evaluation, tables, trackers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_an_evaluation_computes_only_what_it_reports(tmp_path, monkeypatch, kind):
    settings = {"truncation": "bootstrap", "kl_form": "exact_both", "micro_batch_size": 8}
    trainer = make_trainer(tmp_path, eval_dataset=["a", "bc"], **settings, **build_policy_arguments(kind))
    passes = Counter()
    reads = {"reference": trainer.reference.logits, "policy": trainer.actor_critic.logits}
    for name, read in reads.items():
        owner = trainer.reference if name == "reference" else trainer.actor_critic
        monkeypatch.setattr(owner, "logits", lambda tokens, name=name, read=read: passes.update([name]) or read(tokens))
    head = trainer.actor_critic.value_head if kind == "shared" else trainer.actor_critic.critic
    head.register_forward_hook(lambda *_: passes.update(["values"]))
    trainer.evaluate()
    assert passes == {"reference": 1}
    trainer.collector.collect(trainer.prompts.next_batch(8), 0)
    assert passes["values"] > 0 and passes["policy"] > 0 and passes["reference"] == 2


def test_evaluation_is_the_same_at_every_call_and_follows_the_policy(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=[{"prompt": p} for p in ("kj", "c", "defg")], eval_steps=1)
    before = trainer.evaluate()
    assert trainer.evaluate() == before
    assert {"eval_reward", "eval_kl_to_ref", "eval_completion_length", "eval_eos_rate", "eval_distinct_2"} <= set(
        before
    )
    trainer.train()
    after = trainer.evaluate()
    assert after != before
    assert {name: trainer.state.log_history[-1][name] for name in after} == after


def test_evaluation_uses_the_eval_data_in_order_and_its_columns(tmp_path):
    calls = []

    def reward(prompts, completions, label, **kwargs):
        calls.append((prompts, label))
        return [float(x) for x in label]

    data = [{"prompt": p, "label": i} for i, p in enumerate(("kj", "c", "defg"))]
    trainer = make_trainer(tmp_path, reward=reward, dataset=[{"prompt": "a", "label": 9}], eval_dataset=data,
                           eval_completions=4)  # fmt: skip
    assert trainer.evaluate()["eval_reward"] == pytest.approx((0 + 1 + 2 + 0) / 4)
    assert calls == [(["kj", "c", "defg", "kj"], [0, 1, 2, 0])]


def test_completions_are_shown_and_kept(tmp_path, capsys):
    def reward(prompts, completions, log_extra, **kwargs):
        log_extra("twice", [len(c) * 2 for c in completions])
        return count_a(prompts, completions)

    trained(tmp_path, reward=reward, log_completions=2, logging_steps=2, max_steps=3)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 3, 3]
    for row in rows:
        assert row["reward"] == row["completion"].count("a")
        assert row["twice"] == 2 * len(row["completion"])
        assert row["prompt"] in PROMPTS and "kl" in row
    output = capsys.readouterr().out
    assert "Step 2" in output and "Step 3" in output and "Step 1" not in output


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    """accelerate leaves it out without a word."""
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ModuleNotFoundError, match=r"report_to=\['tensorboard'\]: tensorboard is not installed"):
        make_trainer(tmp_path, report_to=["tensorboard"])


def test_trackers_get_every_logged_row(tmp_path):
    trained(tmp_path, report_to=["tensorboard"], run_name="mine", max_steps=3)
    folders = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    scalars = {}
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        scalars |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    rows = metrics_rows(tmp_path)
    for name in ("reward", "kl_to_ref", "approx_kl", "explained_variance"):
        steps, values = zip(*scalars[name], strict=True)
        assert steps == (1, 2, 3)
        assert values == pytest.approx([row[name] for row in rows], rel=1e-6)


def test_metrics_are_those_of_the_run(tmp_path):
    trainer = trained(tmp_path, max_steps=3, lr_scheduler_type="linear", critic_learning_rate=0.1)
    rows = metrics_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01, 0.02 / 3, 0.01 / 3])
    assert [row["critic_learning_rate"] for row in rows] == pytest.approx([0.1, 0.2 / 3, 0.1 / 3])
    assert rows[-1]["num_tokens"] == sum(round(row["completion_length"] * 8) for row in rows) == trainer.run.num_tokens
    assert [row["epoch"] for row in rows] == pytest.approx([8 / 6, 16 / 6, 24 / 6])
    assert [row["optimizer_steps"] for row in rows] == [4, 4, 4]
