"""A run as the outside sees it: it opens a directory, restores, saves, logs, and tells callbacks and trackers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from lmppo.collector import ScoredRollout
from lmppo.config import PPOConfig
from lmppo.launch import describe_environment
from lmppo.metrics import completion_columns
from lmppo.models import ActorCritic
from lmppo.protocols import Stateful, Tokenizer
from lmppo.run import checkpoint as ckpt
from lmppo.run.directory import changed_settings, discard_unsaved, find_resume_point, write_run_config
from lmppo.run.export import plan_export, replace_model
from lmppo.run.metrics_file import MetricsFile
from lmppo.tables import print_completions

Callbacks = Sequence[TrainerCallback | type[TrainerCallback]]


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

    Raises:
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
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.stateful = stateful
        self.settings = config.to_dict() | describe_model(model) | settings
        self.callbacks = make_callbacks(callbacks)
        self.export_plan = plan_export(model, tokenizer)
        self.directory = Path(config.output_dir)
        self.metrics_file = MetricsFile(self.directory / "metrics.jsonl")
        self.completions_file = MetricsFile(self.directory / "completions.jsonl")
        self.control = TrainerControl()
        self.num_tokens = 0
        self.state = TrainerState(
            max_steps=config.max_steps,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done and the model is exported."""
        return self.state.global_step >= self.config.max_steps and (self.directory / "final").exists()

    def open(self, resume: str | bool | None) -> None:
        """Decide where to start, and put the state in place.

        Raises:
            CheckpointError: The run directory cannot be used, or the checkpoint cannot be resumed.
        """
        point = find_resume_point(self.config.output_dir, resume, self.settings)
        self.accelerator.wait_for_everyone()
        if point is not None:
            self._restore(point)
        if self.accelerator.is_main_process:
            write_run_config(self.config.output_dir, self.settings)
            discard_unsaved(self.config.output_dir)
            self.metrics_file.cut_after(self.state.global_step)
            self.completions_file.cut_after(self.state.global_step)
        if self.config.report_to:
            scalars = {k: v for k, v in self.settings.items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers(self.config.run_name, config=scalars)
        self.accelerator.wait_for_everyone()
        self.control = TrainerControl()

    def log(self, row: dict[str, float], scored: ScoredRollout) -> None:
        """Write the row of the step that is done, and tell trackers and callbacks of it."""
        step = self.state.global_step
        self.state.log_history.append(row)
        if self.accelerator.is_main_process:
            self.metrics_file.append(row)
        if step % self.config.logging_steps == 0 or step == self.config.max_steps:
            self.accelerator.log(row, step=step)
            self.fire("on_log", logs=row)
            if self.config.log_completions and self.accelerator.is_main_process:
                self._show_completions(step, scored)

    def save_checkpoint(self, write_more: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint of the present step, and delete the oldest ones beyond ``save_total_limit``.

        Args:
            write_more: Writes further files into the checkpoint's directory.
        """
        if self.accelerator.is_main_process:
            state = {
                "step": self.state.global_step,
                "num_tokens": self.num_tokens,
                **{name: part.state_dict() for name, part in self.stateful.items()},
                "settings": self.settings,
                "environment": describe_environment(self.accelerator),
            }
            path = ckpt.checkpoint_dir(self.config.output_dir, self.state.global_step)
            ckpt.save_checkpoint(path, self.model, self.optimizer.optimizer, state, self.tokenizer, write_more)
            if self.config.save_total_limit is not None:
                ckpt.prune_checkpoints(self.config.output_dir, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()
        self.control.should_save = False
        self.fire("on_save")

    def save_model(self, output_dir: str | Path) -> None:
        """Export the policy, its tokenizer and the critic; see :meth:`lmppo.PPOTrainer.save_model`."""
        if self.accelerator.is_main_process:
            replace_model(self.model, Path(output_dir), self.tokenizer, self.export_plan)
        self.accelerator.wait_for_everyone()

    def fire(self, event: str, **kwargs: Any) -> None:
        """Tell the callbacks, with the arguments transformers' Trainer gives them."""
        kwargs |= {"model": self.model.policy, "processing_class": self.tokenizer, "optimizer": self.optimizer}
        for callback in self.callbacks:
            self.control = getattr(callback, event)(self.config, self.state, self.control, **kwargs) or self.control

    def close(self) -> None:
        """Finish the trackers (end_training() would end the process group too)."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _restore(self, point: Path) -> None:
        saved = ckpt.load_checkpoint(point, self.model, self.optimizer.optimizer)
        for name, (old, new) in changed_settings(saved["settings"], self.settings).items():
            self.accelerator.print(f"Resuming with another {name}: {old!r} before, {new!r} now.")
        for name, new in describe_environment(self.accelerator).items():
            if saved["environment"].get(name) != new:
                old = saved["environment"].get(name)
                self.accelerator.print(f"Resuming is valid but not bit-identical: {name} was {old!r} and is {new!r}.")
        self.state.global_step = saved["step"]
        self.num_tokens = saved["num_tokens"]
        for name, part in self.stateful.items():
            part.load_state_dict(saved[name])
        self.accelerator.print(f"Resumed {point} at step {saved['step']}.")

    def _show_completions(self, step: int, scored: ScoredRollout) -> None:
        columns, rows = completion_columns(scored), self.config.log_completions
        print_completions(f"Step {step}", scored.prompts, scored.completions, columns, rows=rows)
        for i, text in enumerate(scored.completions[:rows]):
            row = {"step": step, "prompt": scored.prompts[i], "completion": text}
            self.completions_file.append(row | {name: column[i] for name, column in columns.items()})


def describe_model(model: ActorCritic) -> dict[str, Any]:
    """What `run_config.yaml` says of the model, so that a run is not continued with another one."""
    settings: dict[str, Any] = {"model_name_or_path": getattr(model.policy.config, "_name_or_path", "")}
    if model.critic is not None:
        settings["critic"] = model.critic.config._name_or_path or type(model.critic).__name__
    if hasattr(model.policy, "peft_config"):
        adapter = model.policy.peft_config[model.policy.active_adapter].to_dict()
        settings["adapter"] = {n: adapter.get(n) for n in ("r", "lora_alpha", "target_modules", "modules_to_save")}
        if isinstance(adapter.get("target_modules"), set | list):
            settings["adapter"]["target_modules"] = sorted(adapter["target_modules"])  # a set has no order to compare
    return settings


def make_callbacks(callbacks: Callbacks | None) -> list[TrainerCallback]:
    """The callbacks, classes made into objects as transformers does.

    Raises:
        TypeError: Something is no callback.
    """
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks={callbacks!r} is a {type(callbacks).__name__}; expected a list of callbacks.")
    made = [callback() if isinstance(callback, type) else callback for callback in callbacks or []]
    for callback in made:
        if not isinstance(callback, TrainerCallback):
            raise TypeError(
                f"callbacks has a {type(callback).__name__}; expected transformers.TrainerCallback objects."
            )
    return made
