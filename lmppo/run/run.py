"""A run as the outside sees it: it opens a directory, restores, saves, logs, and tells callbacks and trackers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers.trainer_callback import TrainerControl, TrainerState

from lmppo.collector import ScoredRollout
from lmppo.config import PPOConfig
from lmppo.launch import describe_environment
from lmppo.models import ActorCritic
from lmppo.models.lora_critic import LORA
from lmppo.protocols import Stateful, Tokenizer
from lmppo.redaction import scrub
from lmppo.run import checkpoint as ckpt
from lmppo.run.arguments import make_arguments
from lmppo.run.best import (
    best_metric_name,
    check_best_metric,
    forget_kept,
    is_better,
    refuse_foreign,
    set_aside,
    settle_best,
)
from lmppo.run.callbacks import CallbackHandler, Callbacks, make_callbacks
from lmppo.run.completions import CompletionsLog
from lmppo.run.directory import changed_settings, discard_unsaved, find_resume_point, write_run_config
from lmppo.run.export import exported_step, plan_export, replace_model
from lmppo.run.metrics_file import MetricsFile

_TRAINER_STATE = "trainer_state.json"  # as transformers calls it
# What of it a run goes on with; the rest follows from the settings and the processes.
_RESTORED = (
    "epoch", "num_input_tokens_seen", "log_history", "best_metric", "best_global_step", "best_model_checkpoint",
    "stateful_callbacks",
)  # fmt: skip
_METRIC_SETTINGS = {"metric_for_best_model", "greater_is_better"}


class Run:
    """What lies on disk of a run, and who is told of it.

    Args:
        config: The configuration.
        accelerator: Tells the processes apart, and holds the trackers.
        model: Policy and critic.
        optimizer: The optimizer, as prepared by the accelerator.
        tokenizer: The policy's tokenizer, saved beside it.
        stateful: What else a resumed run needs, by name: objects with ``state_dict`` and ``load_state_dict``.
        settings: What this run is, beyond its configuration: a run is not continued with another one.
        callbacks: transformers callbacks, or their classes.
        num_train_epochs: Passes over the prompts that ``max_steps`` make.
        shown_to_callbacks: What events of callbacks get beside the model, the tokenizer and the optimizer.

    Raises:
        TypeError: Something is no callback.
        ValueError: Something cannot be saved.
    """

    def __init__(
        self,
        config: PPOConfig,
        accelerator: Accelerator,
        model: ActorCritic,
        optimizer: AcceleratedOptimizer,
        tokenizer: Tokenizer,
        *,
        stateful: dict[str, Stateful],
        settings: dict[str, Any],
        callbacks: Callbacks | None = None,
        num_train_epochs: int = 1,
        shown_to_callbacks: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.stateful = stateful
        self.settings = scrub(config.to_dict() | describe_model(model) | settings)
        self.export_plan = plan_export(model, tokenizer)
        self.directory = Path(config.output_dir)
        self.best = self.directory / "best"
        self.metrics_file = MetricsFile(self.directory / "metrics.jsonl")
        self.completions = CompletionsLog(self.directory, accelerator, config.log_completions)
        self.num_tokens = 0
        self.args = make_arguments(config, accelerator, num_train_epochs=num_train_epochs)
        self.state = TrainerState(
            max_steps=config.max_steps,
            num_train_epochs=num_train_epochs,
            train_batch_size=self.args.train_batch_size,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )
        self.state.compute_steps(self.args, config.max_steps)
        self.callbacks = make_callbacks(callbacks)
        given = {"model": model.policy, "processing_class": tokenizer, "optimizer": optimizer, "lr_scheduler": None}
        given |= shown_to_callbacks or {}
        self.handler = CallbackHandler(self.callbacks, self.args, self.state, accelerator, **given)
        self.fire = self.handler.fire

    @property
    def control(self) -> TrainerControl:
        """What callbacks ask for."""
        return self.handler.control

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done and the model is exported."""
        return self.state.global_step >= self.config.max_steps and self._is_exported

    @property
    def _is_exported(self) -> bool:
        return exported_step(self.directory / "final") == self.state.global_step

    def open(self, resume: str | bool | None) -> None:
        """Decide where to start, and put the state in place.

        Raises:
            CheckpointError: The run directory cannot be used, or the checkpoint cannot be resumed.
        """
        if self.config.metric_for_best_model is not None:
            refuse_foreign(self.best)
        point = find_resume_point(self.config.output_dir, resume, self.settings)
        self.accelerator.wait_for_everyone()
        if point is not None:
            self._restore(point)
        if self.accelerator.is_main_process:
            self._clean_directory()
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step is not None and exported_step(self.best) != self.state.best_global_step:
            self.accelerator.print(
                f"best/ of step {self.state.best_global_step} is not here; a better one replaces it."
            )
            self.state.best_model_checkpoint = None
        if self._is_exported:  # a callback's stop has been carried out, and resuming goes on from there
            self.control.should_training_stop = False
        if self.config.report_to:
            scalars = {k: v for k, v in self.settings.items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers(scrub(self.config.run_name), config=scalars)
        self.accelerator.wait_for_everyone()

    def _clean_directory(self) -> None:
        """Bring everything in the run directory back to the step that the run starts from."""
        write_run_config(self.config.output_dir, self.settings)
        discard_unsaved(self.config.output_dir)
        self.metrics_file.cut_after(self.state.global_step)
        self.completions.cut_after(self.state.global_step)
        newest = max(map(ckpt.step_of, ckpt.list_checkpoints(self.config.output_dir)), default=0)
        settle_best(self.best, self.state.best_global_step, newest)

    def end_step(self) -> None:
        """Set in ``control`` what is due by the settings, then let callbacks (``on_step_end``) add to it or take from it."""
        step, config = self.state.global_step, self.config
        if _is_due(config.logging_steps, step) or step == config.max_steps:
            self.control.should_log = True
        if _is_due(config.eval_steps, step):
            self.control.should_evaluate = True
        if _is_due(config.save_steps, step):
            self.control.should_save = True
        self.fire("on_step_end")

    def log(self, row: dict[str, float], scored: ScoredRollout) -> None:
        """Keep the row of the step that is done, and tell trackers and callbacks of it if that is asked for."""
        step = self.state.global_step
        self.state.log_history.append(row)
        if self.control.should_log:
            self.accelerator.log(row, step=step)
            self.fire("on_log", logs=dict(row))
            if self.config.log_completions and self.accelerator.is_main_process:
                self.completions.write(step, scored)

    def write_row(self, row: dict[str, float]) -> None:
        """Write the row of the step to ``metrics.jsonl``."""
        if self.accelerator.is_main_process:
            self.metrics_file.append(row)

    def check_best_metric(self, metrics: Mapping[str, float]) -> None:
        """Refuse a ``metric_for_best_model`` that the metrics of an evaluation do not have.

        Raises:
            ValueError: Names it and the metrics there are.
        """
        check_best_metric(self.args, metrics)

    def keep_best(self, metrics: Mapping[str, float]) -> None:
        """Export the policy to ``best/`` if ``metric_for_best_model`` is better than at every evaluation before.

        Raises:
            ValueError: The metrics lack it.
        """
        if self.config.metric_for_best_model is None:
            return
        check_best_metric(self.args, metrics)
        name, state = best_metric_name(self.args), self.state
        if not is_better(self.args, metrics[name], state.best_metric):
            return
        state.best_metric, state.best_global_step = metrics[name], state.global_step
        state.best_model_checkpoint = str(self.best)
        if self.accelerator.is_main_process:
            set_aside(self.best)
        self.save_model(self.best, metric=name, value=metrics[name])

    def save_checkpoint(self, write_more: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint of the present step, and delete the oldest ones beyond ``save_total_limit``.

        Args:
            write_more: Writes further files into the checkpoint's directory.
        """
        self.state.stateful_callbacks = self.handler.states()
        if self.accelerator.is_main_process:
            state = {
                "step": self.state.global_step,
                "num_tokens": self.num_tokens,
                **{name: part.state_dict() for name, part in self.stateful.items()},
                "settings": self.settings,
                "environment": describe_environment(self.accelerator),
            }
            path = ckpt.checkpoint_dir(self.config.output_dir, self.state.global_step)

            def write(directory: Path) -> None:
                self.state.save_to_json(str(directory / _TRAINER_STATE))
                if write_more is not None:
                    write_more(directory)

            ckpt.save_checkpoint(path, self.model, self.optimizer.optimizer, state, self.tokenizer, write)
            forget_kept(self.best)
            if self.config.save_total_limit is not None:
                ckpt.prune_checkpoints(self.config.output_dir, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()
        self.fire("on_save")

    def save_model(self, output_dir: str | Path, **record: Any) -> None:
        """Export the policy, its tokenizer and the critic; see :meth:`lmppo.PPOTrainer.save_model`.

        Args:
            output_dir: Where to.
            **record: What ``step.json`` holds beside the step.
        """
        if self.accelerator.is_main_process:
            record = {"step": self.state.global_step, **record}
            replace_model(self.model, Path(output_dir), self.tokenizer, self.export_plan, record)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Finish the trackers (end_training() would end the process group too)."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _restore(self, point: Path) -> None:
        saved = ckpt.load_checkpoint(point, self.model, self.optimizer.optimizer)
        changed = changed_settings(saved["settings"], self.settings)
        for name, (old, new) in changed.items():
            self.accelerator.print(f"Resuming with another {name}: {old!r} before, {new!r} now.")
        for name, new in describe_environment(self.accelerator).items():
            if saved["environment"].get(name) != new:
                old = saved["environment"].get(name)
                self.accelerator.print(f"Resuming is valid but not bit-identical: {name} was {old!r} and is {new!r}.")
        self.state.global_step = saved["step"]
        self.num_tokens = saved["num_tokens"]
        for name, part in self.stateful.items():
            part.load_state_dict(saved[name])
        self._restore_state(point / _TRAINER_STATE, another_metric=changed.keys() & _METRIC_SETTINGS)
        self.accelerator.print(f"Resumed {point} at step {saved['step']}.")

    def _restore_state(self, path: Path, *, another_metric: Any) -> None:
        """The history, the best step and the callbacks; by another metric no step is the best yet."""
        kept = TrainerState.load_from_json(str(path)) if path.exists() else TrainerState()
        if another_metric:
            kept.best_metric = kept.best_global_step = kept.best_model_checkpoint = None
        if kept.best_model_checkpoint is not None:
            kept.best_model_checkpoint = str(self.best)  # the run may have been moved
        for name in _RESTORED:
            setattr(self.state, name, getattr(kept, name))
        self.handler.restore(kept.stateful_callbacks)


def describe_model(model: ActorCritic) -> dict[str, Any]:
    """What `run_config.yaml` says of the model, so that a run is not continued with another one."""
    settings: dict[str, Any] = {"model_name_or_path": getattr(model.policy.config, "_name_or_path", "")}
    if model.critic is not None:
        name = model.critic.config._name_or_path or type(model.critic).__name__
        settings["critic"] = LORA if hasattr(model.critic, "peft_config") else name
    if hasattr(model.policy, "peft_config"):
        adapter = model.policy.peft_config[model.policy.active_adapter].to_dict()
        settings["adapter"] = {n: adapter.get(n) for n in ("r", "lora_alpha", "target_modules", "modules_to_save")}
        if isinstance(adapter.get("target_modules"), set | list):
            settings["adapter"]["target_modules"] = sorted(adapter["target_modules"])  # a set has no order to compare
    return settings


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
