"""transformers' own callbacks: what they read is there, what they ask for is done, what they remember survives."""

import ast
import inspect
import json
import os

import pytest
import torch
import transformers
from accelerate.state import PartialState
from builders import PROMPTS, count_a, make_config, make_trainer, metrics_rows, trained, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, integration_utils
from transformers.trainer_callback import DefaultFlowCallback, ExportableState, TrainerState

from lmppo.run import run as run_module
from lmppo.run.arguments import make_arguments
from lmppo.run.checkpoint import CheckpointError, checkpoint_dir, list_checkpoints

HELD_OUT = [{"prompt": p} for p in ("f", "gh", "ijk")]  # none of PROMPTS
EVALUATED = {"eval_dataset": HELD_OUT, "eval_steps": 1, "metric_for_best_model": "reward"}


def judge(values):
    """A reward function that gives the evaluation after each step a chosen value; 0 before the first step."""

    def judged(prompts, completions, trainer_state, **kwargs):
        if prompts[0] in PROMPTS:
            return count_a(prompts, completions)
        return [values[trainer_state.global_step - 1] if trainer_state.global_step else 0.0] * len(completions)

    return judged


# --- what they read --------------------------------------------------------------------------------------------------


def names_read_of_args():
    """What the callbacks in transformers read of a variable ``args`` that is a TrainingArguments."""
    names = set()
    for module in (transformers.trainer_callback, integration_utils):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                names.add(node.attr)
    return names - {"pop", "get", "copy"}  # of other variables of that name: dicts


def test_everything_that_transformers_callbacks_read_of_args_is_there(tmp_path):
    args = make_trainer(tmp_path).run.args
    assert isinstance(args, TrainingArguments)
    names = names_read_of_args() | {"logging_dir", "local_process_index", "n_gpu", "num_train_epochs", "max_steps"}
    assert len(names) > 20
    assert not [name for name in names if not hasattr(args, name)]
    assert args.get_process_log_level() and args.world_size == 1 and args.process_index == args.n_gpu == 0


def test_the_arguments_are_the_configuration(tmp_path):
    settings = {"save_steps": 2, "gradient_checkpointing": True, "bf16": True, "lr_scheduler_type": "cosine"}
    config = make_config("~/somewhere", **settings, eval_steps=1, warmup_steps=1)
    args, config = make_arguments(config, make_trainer(tmp_path).accelerator, num_train_epochs=3), config.to_dict()
    assert {name for name, value in config.items() if value is not None and getattr(args, name) != value} == set()
    assert json.loads(args.to_json_string())["kl_coef"] == config["kl_coef"] == args.to_dict()["kl_coef"]
    assert (args.eval_strategy, args.save_strategy, args.logging_strategy) == ("steps", "steps", "steps")
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size == 4
    plain = make_trainer(tmp_path / "plain").run.args
    assert plain.num_train_epochs == 3, "2 steps of 8 of 6 prompts"
    assert (plain.eval_strategy, plain.save_strategy, plain.load_best_model_at_end) == ("no", "no", False)


def test_the_arguments_leave_processes_and_devices_alone(tmp_path):
    make_trainer(tmp_path / "a")
    before = PartialState._shared_state
    args = make_trainer(tmp_path / "b").run.args
    assert PartialState._shared_state is before and args.distributed_state.__dict__ is before
    assert args.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("metric", "given", "better"),
    [("reward", None, True), ("eval_loss", None, False), ("kl_to_ref", None, True), ("kl_to_ref", False, False)],
)
def test_greater_is_better_defaults_as_in_transformers(tmp_path, metric, given, better):
    settings = {"metric_for_best_model": metric, "greater_is_better": given, "eval_steps": 1}
    args = make_trainer(tmp_path, eval_dataset=HELD_OUT, **settings).run.args
    assert args.greater_is_better is better
    theirs = TrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=given)
    assert theirs.greater_is_better is better


def test_all_of_them_run_together(tmp_path, capsys):
    callbacks = [DefaultFlowCallback, TensorBoardCallback, PrinterCallback, ProgressCallback, EarlyStoppingCallback(9)]
    trainer = trained(tmp_path, callbacks=callbacks, max_steps=3, save_steps=2, **EVALUATED)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    assert "never calls" not in capsys.readouterr().out, "of transformers' own nothing is said"
    assert all("total_flos" not in row and "step" in row for row in trainer.state.log_history)
    (events,) = (tmp_path / "runs").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent)).Reload()
    logged = {e.step: e.value for e in read.Scalars("train/reward")}
    assert logged == pytest.approx({row["step"]: row["reward"] for row in metrics_rows(tmp_path)})
    assert {"args/text_summary", "model_config/text_summary"} <= set(read.Tags()["tensors"])


def test_the_default_flow_changes_no_weight(tmp_path):
    plain, flow = (trained(tmp_path / str(i), callbacks=c) for i, c in enumerate(([], [DefaultFlowCallback])))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(flow).values(), strict=True))


def test_the_state_has_what_transformers_fills(tmp_path):
    trainer = trained(tmp_path, max_steps=3, save_steps=2, logging_steps=2)
    state = trainer.state
    assert (state.max_steps, state.logging_steps, state.save_steps, state.train_batch_size) == (3, 2, 2, 4)
    assert state.num_train_epochs == 4 and state.epoch == 4.0
    drawn = [PROMPTS[i % 6] for i in range(24)]  # each prompt four times, in some order
    assert state.num_input_tokens_seen == trainer.run.num_tokens + sum(map(len, drawn))


def test_events_get_what_there_is(tmp_path):
    seen = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.update(kwargs)

    trainer = trained(tmp_path, callbacks=[Keep], **EVALUATED)
    assert set(seen) == {
        "model",
        "processing_class",
        "optimizer",
        "lr_scheduler",
        "train_dataloader",
        "eval_dataloader",
    }
    assert seen["train_dataloader"].dataset is trainer.prompts.dataset
    assert seen["eval_dataloader"].dataset is HELD_OUT


# --- what they ask for -----------------------------------------------------------------------------------------------


def test_what_is_asked_for_at_a_step_end_is_done_in_that_step(tmp_path):
    class Ask(TrainerCallback):
        done = []

        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = control.should_save = control.should_log = state.global_step == 2
            return control

        def on_evaluate(self, args, state, control, **kwargs):
            self.done.append(("evaluate", state.global_step))

        def on_log(self, args, state, control, **kwargs):
            self.done.append(("log", state.global_step))

        def on_save(self, args, state, control, **kwargs):
            self.done.append(("save", state.global_step))

    trained(tmp_path, callbacks=[Ask], max_steps=4, logging_steps=3, save_steps=3, eval_dataset=HELD_OUT)
    assert Ask.done == [("evaluate", 2), ("log", 2), ("save", 2), ("save", 4)], "the end is always saved"
    assert ["eval_reward" in row for row in metrics_rows(tmp_path)] == [False, True, False, False]


@pytest.mark.parametrize("event", ["on_step_begin", "on_log", "on_evaluate"])
def test_other_events_ask_too(tmp_path, event):
    def ask(self, args, state, control, **kwargs):
        control.should_save = control.should_evaluate = True

    callback = type("Ask", (TrainerCallback,), {event: ask})
    due = {"eval_steps": 2} if event == "on_evaluate" else {}
    trained(tmp_path, callbacks=[callback], max_steps=3, eval_dataset=HELD_OUT, **due)
    steps = [2] if due else [1, 2, 3]
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{s:06d}" for s in sorted({*steps, 3})]
    assert [row["step"] for row in metrics_rows(tmp_path) if "eval_reward" in row] == steps


def test_asking_for_an_evaluation_without_an_evaluation_set_says_so(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = True

    with pytest.raises(ValueError, match="Evaluation needs an eval_dataset"):
        trained(tmp_path, callbacks=[Ask])


def test_the_end_of_an_epoch_is_refused(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    with pytest.raises(ValueError, match=r"Ask\.on_step_end set should_epoch_stop.*set should_training_stop"):
        trained(tmp_path, callbacks=[Ask])


def test_events_that_never_come_are_named(tmp_path, capsys):
    class Mine(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            pass

    make_trainer(tmp_path, callbacks=[Mine])
    assert "Mine has on_epoch_end, which lmppo never calls" in capsys.readouterr().out


# --- what they remember ----------------------------------------------------------------------------------------------

FALLS = [1.0, 3.0, 2.0, 2.5, 1.0, 9.0]  # best at step 2; patience 3 ends after step 5


def test_early_stopping_stops_when_it_should(tmp_path):
    trainer = trained(tmp_path, reward=judge(FALLS), callbacks=[EarlyStoppingCallback(3)], max_steps=6, **EVALUATED)
    assert trainer.state.global_step == 5
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (3.0, 2)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "best")


def test_early_stopping_without_a_metric_is_refused_before_any_step(tmp_path):
    with pytest.raises(AssertionError, match="EarlyStoppingCallback requires metric_for_best_model"):
        trained(tmp_path, callbacks=[EarlyStoppingCallback(3)])
    assert not (tmp_path / "metrics.jsonl").exists()


def die_at(step, event):
    """A callback that ends the process's work, as a kill would, at an event of a step."""

    def die(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    return type("Die", (TrainerCallback,), {event: die})


@pytest.mark.parametrize(
    ("step", "event"), [(3, "on_evaluate"), (4, "on_log"), (4, "on_save"), (4, "on_step_begin"), (5, "on_save")]
)
def test_killed_and_resumed_stops_where_the_undisturbed_run_does(tmp_path, step, event):
    settings = {"reward": judge(FALLS), "max_steps": 6, "save_steps": 2, **EVALUATED}
    whole = trained(tmp_path / "whole", callbacks=[EarlyStoppingCallback(3)], **settings)
    stopper = EarlyStoppingCallback(3)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", callbacks=[EarlyStoppingCallback(3), die_at(step, event)], **settings)
    settings |= {"resume_from_checkpoint": "auto"}
    resumed = trained(tmp_path / "killed", callbacks=[stopper], **settings)
    assert stopper.early_stopping_patience_counter == 3
    state, expected = (json.loads(json.dumps(vars(t.state))) for t in (resumed, whole))
    clock = ("time/rollout", "time/update", "tokens_per_second")
    for rows in (state["log_history"], expected["log_history"]):
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
        for row in rows:
            assert all(row.pop(name) > 0 for name in clock)
            row.pop("time/startup", None)  # in a trainer's first row
    assert state.pop("best_model_checkpoint") == str(tmp_path / "killed" / "best")
    assert expected.pop("best_model_checkpoint") == str(tmp_path / "whole" / "best")
    assert state == expected
    ours, theirs = ((tmp_path / r / "best" / "step.json").read_text() for r in ("killed", "whole"))
    assert ours == theirs == '{"step": 2, "metric": "eval_reward", "value": 3.0}\n'
    for export in ("best", "final"):
        ours, theirs = ((tmp_path / r / export / "model.safetensors").read_bytes() for r in ("killed", "whole"))
        assert ours == theirs, export


def test_a_final_of_an_earlier_end_does_not_hide_that_the_run_was_killed_before_its_own(tmp_path):
    """Ended at step 1, then at step 3, where it was killed before the export."""
    trained(tmp_path, max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, max_steps=3, callbacks=[die_at(3, "on_save")], resume_from_checkpoint="auto")
    assert json.loads((tmp_path / "final" / "step.json").read_text()) == {"step": 1}
    trained(tmp_path, max_steps=3, resume_from_checkpoint="auto")
    assert json.loads((tmp_path / "final" / "step.json").read_text()) == {"step": 3}


class Counter(TrainerCallback, ExportableState):
    """Counts steps from a start."""

    def __init__(self, start=0):
        self.start, self.count = start, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


def test_attributes_come_back_and_arguments_stay_as_given(tmp_path, capsys):
    trained(tmp_path, callbacks=[Counter(1), Counter(2), EarlyStoppingCallback(5)], max_steps=2, **EVALUATED)
    saved = TrainerState.load_from_json(str(checkpoint_dir(tmp_path, 2) / "trainer_state.json")).stateful_callbacks
    assert [one["attributes"]["count"] for one in saved["Counter"]] == [2, 2]
    first, second, third = Counter(7), Counter(8), Counter(9)
    settings = EVALUATED | {"max_steps": 3, "resume_from_checkpoint": "auto"}
    trained(tmp_path, callbacks=[first, second, third], **settings)
    assert [(c.start, c.count) for c in (first, second, third)] == [(7, 3), (8, 3), (9, 1)]
    output = capsys.readouterr().out
    assert "has no state for the callback Counter: it starts anew" in output
    assert "has the state of a callback EarlyStoppingCallback that this run does not have" in output


def test_a_state_that_cannot_be_saved_is_refused_at_the_start(tmp_path):
    class Bad(Counter):
        def state(self):
            return {"args": {}, "attributes": {"count": torch.zeros(1)}}

    with pytest.raises(TypeError, match=r"Bad\.state\(\) cannot be kept in a checkpoint"):
        make_trainer(tmp_path, callbacks=[Bad()])


def test_numbers_that_are_not_finite_survive(tmp_path):
    counter = Counter()
    counter.count = float("-inf")
    trained(tmp_path, callbacks=[counter], max_steps=1)
    counter = Counter()
    trained(tmp_path, callbacks=[counter], max_steps=2, resume_from_checkpoint="auto")
    assert counter.count == float("-inf")


# --- several evaluation sets -----------------------------------------------------------------------------------------


def test_several_evaluation_sets_have_names_of_their_own(tmp_path):
    class Keep(TrainerCallback):
        seen = []

        def on_evaluate(self, args, state, control, metrics, eval_dataloader, **kwargs):
            self.seen.append((metrics, eval_dataloader.dataset))

    sets = {"a": HELD_OUT, "b": ["kj", "c"]}
    settings = {"max_steps": 2, "eval_steps": 2, "metric_for_best_model": "b_reward"}
    trainer = trained(tmp_path, eval_dataset=sets, callbacks=[Keep], **settings)
    alone = {}
    for name, rows in sets.items():
        one = trained(tmp_path / name, eval_dataset=rows, max_steps=2, eval_steps=2)
        metrics = {k: v for k, v in one.state.log_history[-1].items() if k.startswith("eval_")}
        alone |= {f"eval_{name}_{k.removeprefix('eval_')}": value for k, value in metrics.items()}
    row = trainer.state.log_history[-1]
    assert {k: v for k, v in row.items() if k.startswith("eval_")} == alone and "eval_a_reward" in alone
    assert [(set(m) < set(alone), rows) for m, rows in Keep.seen] == [(True, sets["a"]), (True, sets["b"])]
    assert trainer.state.best_metric == alone["eval_b_reward"]
    scored = trainer.sample_eval()
    assert set(scored) == {"a", "b"} and trainer.evaluate(scored) == trainer.evaluate() == alone


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, r"the keys \[\]"),
        ({1: ["a"]}, r"the keys \[1\]"),
        ({"prompt": ["a", "b"]}, "looks like columns"),
        ({"a": []}, r"eval_dataset\['a'\]: the data set is empty"),
        ({"a": "text"}, r"eval_dataset\['a'\]: the data set is a str"),
    ],
)
def test_what_is_no_dict_of_evaluation_sets_is_refused(tmp_path, sets, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, eval_dataset=sets)


# --- the best policy -------------------------------------------------------------------------------------------------


def test_best_is_the_policy_of_its_step(tmp_path):
    """And is not among what save_total_limit deletes."""
    settings = {"save_steps": 1, "save_total_limit": 2, **EVALUATED}
    trainer = trained(tmp_path, reward=judge(FALLS), max_steps=5, **settings)
    assert trainer.state.best_global_step == 2
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    reference = trained(tmp_path / "other", reward=judge(FALLS), max_steps=2, eval_dataset=HELD_OUT, eval_steps=1)
    assert not all(
        torch.equal(a, b) for a, b in zip(weights(trainer).values(), weights(reference).values(), strict=True)
    )
    best = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    expected = reference.actor_critic.policy.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in best.state_dict().items())
    assert {p.name for p in (tmp_path / "best").iterdir()} == {p.name for p in (tmp_path / "final").iterdir()}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_less_is_better_where_it_is_said(tmp_path):
    settings = EVALUATED | {"metric_for_best_model": "eval_reward", "greater_is_better": False}
    trainer = trained(tmp_path, reward=judge([2.0, 1.0, 1.0, 3.0]), max_steps=4, **settings)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1.0, 2), "the first of two that are alike"


def test_a_metric_that_is_nan_is_never_the_best(tmp_path):
    def logs(prompts, completions, log_metric, trainer_state, **kwargs):
        log_metric("mine", [float("nan"), float("nan"), 5.0, float("nan")][trainer_state.global_step])
        return count_a(prompts, completions)

    trainer = trained(tmp_path, reward=logs, max_steps=3, **(EVALUATED | {"metric_for_best_model": "mine"}))
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (5.0, 2)


@pytest.mark.parametrize("metric", ["rewrd", "eval_rewrd"])
def test_a_metric_that_does_not_exist_is_refused_before_any_step(tmp_path, metric):
    settings = EVALUATED | {"metric_for_best_model": metric, "eval_steps": 50}
    with pytest.raises(
        ValueError, match=rf"metric_for_best_model='{metric}' is not among.*Did you mean 'eval_reward'\?"
    ):
        trained(tmp_path, **settings)
    assert not (tmp_path / "metrics.jsonl").exists()


RISES = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("values", "call"), [(RISES, 1), (RISES, 3), ([5.0, 1.0, 6.0, 1.0], 2), ([5.0, 1, 1, 1], 1)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_writing_of_best_leaves_no_trace(tmp_path, monkeypatch, values, call, when):
    """Whatever export it was: a run that goes on has the best that the undisturbed run has, also in between."""
    settings = {"reward": judge(values), "max_steps": 4, "save_steps": 2, **EVALUATED}
    whole = trained(tmp_path / "whole", **settings)
    calls, write = [], run_module.replace_model

    def killed(*args):
        calls.append(args)
        if len(calls) == call and when == "before":
            raise KeyboardInterrupt
        write(*args)
        if len(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "replace_model", killed)
    settings |= {"resume_from_checkpoint": "auto"}
    try:
        trained(tmp_path / "killed", **settings)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    trainer = trained(tmp_path / "killed", **settings)
    assert trainer.state.best_global_step == whole.state.best_global_step
    files = [{p.name: p.read_bytes() for p in (tmp_path / r / "best").iterdir()} for r in ("killed", "whole")]
    assert files[0] == files[1]
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_run_that_starts_from_an_earlier_checkpoint_sets_the_later_best_aside(tmp_path, capsys):
    settings = {"reward": judge(RISES), "max_steps": 4, "save_steps": 1, **EVALUATED}
    trained(tmp_path, **settings)
    falling = settings | {
        "reward": judge([0.0, 0.0, 0.0, 1.0]),
        "resume_from_checkpoint": str(checkpoint_dir(tmp_path, 2)),
    }
    trainer = trained(tmp_path, **falling)
    output = capsys.readouterr().out
    assert "best/ is of step 4" in output and "it is now best-step-000004/" in output
    assert "best/ of step 2 is not here" in output
    assert trainer.state.best_metric == 2.0 and trainer.state.best_model_checkpoint is None
    assert not (tmp_path / "best").exists() and (tmp_path / "best-step-000004" / "model.safetensors").exists()


def test_by_another_metric_no_step_is_the_best_yet(tmp_path):
    trained(tmp_path, reward=judge(RISES), max_steps=2, **EVALUATED)
    settings = EVALUATED | {"metric_for_best_model": "kl_to_ref", "greater_is_better": False}
    trainer = trained(tmp_path, reward=judge(RISES), max_steps=3, resume_from_checkpoint="true", **settings)
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_metric == trainer.state.log_history[-1]["eval_kl_to_ref"]


def test_a_directory_of_the_users_own_stays(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"best is not an export of lmppo, and metric_for_best_model would"):
        trained(tmp_path, **EVALUATED)
    trained(tmp_path)
    assert (tmp_path / "best" / "notes.txt").read_text() == "mine"
