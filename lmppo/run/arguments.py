"""The configuration as transformers' callbacks read it: a ``TrainingArguments`` that has all settings of PPOConfig too."""

import math
from copy import deepcopy
from dataclasses import field, fields, make_dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from transformers import TrainingArguments

from lmppo.config import PPOConfig
from lmppo.redaction import scrub

# What TrainingArguments checks against the machine, or rewrites, when it is made: these settings are put in afterwards.
_PUT_IN = ("output_dir", "bf16", "gradient_checkpointing")


def make_arguments(config: PPOConfig, accelerator: Accelerator, *, num_train_epochs: float) -> TrainingArguments:
    """The ``args`` of callbacks; changing them changes nothing of the run.

    Settings that only PPOConfig has are further fields, so that ``to_dict`` and ``to_json_string`` hold everything. The
    devices and processes are the accelerator's: nothing of accelerate or torch.distributed is set up a second time.

    Args:
        config: The configuration.
        accelerator: The run's.
        num_train_epochs: Passes over the prompts that ``max_steps`` make.
    """
    known = scrub(config.to_dict())  # callbacks of trackers send all of it
    settings = {name: value for name, value in known.items() if value is not None}
    standard = {f.name for f in fields(TrainingArguments)}
    own = {name: value for name, value in known.items() if name not in standard}
    own |= {} if "logging_dir" in standard else {"logging_dir": accelerator.logging_dir}
    cpu = accelerator.device.type == "cpu"
    arguments_class = make_dataclass(
        "PPOArguments",
        [(name, Any, field(default_factory=partial(deepcopy, value))) for name, value in own.items()],
        bases=(TrainingArguments,),
        namespace={"device": accelerator.device, "distributed_state": PartialState(), "_n_gpu": 0 if cpu else 1},
    )
    per_process = config.minibatch_size // accelerator.num_processes
    micro = min(config.micro_batch_size, per_process)
    given = {n: v for n, v in settings.items() if n in standard and n not in _PUT_IN} | {
        "use_cpu": cpu,
        "num_train_epochs": num_train_epochs,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": math.ceil(per_process / micro),
        "eval_strategy": "steps" if config.eval_steps else "no",
        "save_strategy": "steps" if config.save_steps else "no",
    }
    arguments = arguments_class(**given)
    for name in _PUT_IN:
        setattr(arguments, name, getattr(config, name))
    return arguments
