"""Who is told of a run while it goes on: transformers' callbacks, and what they ask for."""

import json
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from lmppo.models.loading import print_once
from lmppo.processes import raised_together

Callbacks = Sequence[TrainerCallback | type[TrainerCallback]]

_FLAGS = ("should_training_stop", "should_save", "should_evaluate", "should_log")
_NEVER = (
    "on_epoch_begin", "on_epoch_end", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_predict",
    "on_prediction_step", "on_push_begin",
)  # fmt: skip
_ANSWERED = {"on_log": "should_log", "on_evaluate": "should_evaluate", "on_save": "should_save"}


class CallbackHandler:
    """Tells callbacks of events with the arguments that transformers' Trainer gives them.

    Args:
        callbacks: The callbacks.
        args: What they get as ``args``.
        state: What they get as ``state``.
        accelerator: Tells the processes apart.
        **given: What else every event gets: the model, the tokenizer, ...
    """

    def __init__(
        self,
        callbacks: list[TrainerCallback],
        args: TrainingArguments,
        state: TrainerState,
        accelerator: Accelerator,
        **given: Any,
    ) -> None:
        self.callbacks = callbacks
        self.args = args
        self.state = state
        self.accelerator = accelerator
        self.given = given
        self.control = TrainerControl()

    def fire(self, event: str, **kwargs: Any) -> None:
        """Tell all callbacks, on every process; what is asked for on one process then holds on all of them.

        Raises:
            ValueError: A callback asked for the end of an epoch.
        """
        if event == "on_step_begin":
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        if event in _ANSWERED:
            setattr(self.control, _ANSWERED[event], False)
        with raised_together(self.accelerator, f"A callback's {event}"):
            for callback in self.callbacks:
                answer = getattr(callback, event)(self.args, self.state, self.control, **(self.given | kwargs))
                self.control = answer or self.control
                if self.control.should_epoch_stop:
                    raise ValueError(
                        f"{type(callback).__name__}.{event} set should_epoch_stop, but a run of lmppo has steps and no "
                        f"epochs: set should_training_stop to end it."
                    )
        if self.accelerator.num_processes > 1:
            asked = gather_object([[getattr(self.control, flag) for flag in _FLAGS]])
            for flag, answers in zip(_FLAGS, zip(*asked, strict=True), strict=True):
                setattr(self.control, flag, any(answers))

    def states(self) -> dict[str, Any]:
        """The states of callbacks that have one (transformers' ``ExportableState``) and of the control, by class."""
        return TrainerState(stateful_callbacks=[*_exportable(self.callbacks), self.control]).stateful_callbacks

    def restore(self, saved: dict[str, Any]) -> None:
        """Give callbacks the attributes they were saved with; the arguments they were made with stay as they are now.

        Args:
            saved: What :meth:`states` gave; a line is printed if it has other callbacks than there are.
        """
        self.control = TrainerControl()
        lacking = dict(saved)
        stopped = lacking.pop("TrainerControl", {"args": {"should_training_stop": False}})
        self.control.should_training_stop = stopped["args"]["should_training_stop"]
        lacking = {name: states if isinstance(states, list) else [states] for name, states in lacking.items()}
        for callback in _exportable(self.callbacks):
            name = type(callback).__name__
            if not lacking.get(name):
                self.accelerator.print(f"The checkpoint has no state for the callback {name}: it starts anew.")
                continue
            for attribute, value in lacking[name].pop(0)["attributes"].items():
                setattr(callback, attribute, value)
        for name in [name for name, states in lacking.items() if states]:
            self.accelerator.print(f"The checkpoint has the state of a callback {name} that this run does not have.")


def make_callbacks(callbacks: Callbacks | None) -> list[TrainerCallback]:
    """The callbacks, classes made into objects as transformers does; a line names events that never come.

    Raises:
        TypeError: Something is no callback, or has a state that JSON cannot hold.
    """
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks={callbacks!r} is a {type(callbacks).__name__}; expected a list of callbacks.")
    made = [callback() if isinstance(callback, type) else callback for callback in callbacks or []]
    for callback in made:
        name = type(callback).__name__
        if not isinstance(callback, TrainerCallback):
            raise TypeError(f"callbacks has a {name}; expected transformers.TrainerCallback objects.")
        never = [e for e in _NEVER if getattr(type(callback), e, None) is not getattr(TrainerCallback, e, None)]
        if never and not type(callback).__module__.startswith("transformers."):
            print_once(f"{name} has {', '.join(never)}, which lmppo never calls: one step is a whole PPO iteration.")
    for callback in _exportable(made):
        _check_state(callback)
    return made


def _exportable(callbacks: Sequence[Any]) -> list[Any]:
    return [callback for callback in callbacks if isinstance(callback, ExportableState)]


def _check_state(callback: Any) -> None:
    try:
        state = callback.state()
        json.dumps([state["args"], dict(state["attributes"])])
    except (KeyError, TypeError, ValueError) as error:
        raise TypeError(
            f"{type(callback).__name__}.state() cannot be kept in a checkpoint ({error!r}): return "
            f'{{"args": {{...}}, "attributes": {{...}}}} with values that JSON can hold.'
        ) from error
