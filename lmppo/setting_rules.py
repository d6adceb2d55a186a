"""What holds of single settings: their kinds, ranges and choices, and how a part of the settings checks itself."""

import difflib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lmppo.redaction import scrubbed

ESTIMATORS = ("gae", "rewards_to_go", "total_return", "immediate_rewards")
BASELINES = ("none", "batch_mean", "leave_one_out", "critic", "auto")
OBJECTIVES = ("clip", "kl_penalty", "importance_sampled", "policy_gradient", "trpo")
TRUNCATIONS = ("end", "bootstrap", "penalty", "mask")
KL_FORMS = ("k1_reward", "k1_end", "k3_both", "exact_both", "k2_loss", "k3_loss", "exact_loss")
SCHEDULES = ("constant", "linear", "cosine")
FROZEN_DTYPES = ("float32", "bfloat16")

_CHOICES = {
    "estimator": ESTIMATORS,
    "baseline": BASELINES,
    "objective": OBJECTIVES,
    "truncation": TRUNCATIONS,
    "kl_form": KL_FORMS,
    "lr_scheduler_type": SCHEDULES,
    "frozen_dtype": FROZEN_DTYPES,
}

Contradictions = Iterator[tuple[bool, str]]
"""Whether settings that make no sense together are there, and what to do."""


def knob(default: Any, text: str) -> Any:
    """A setting with its default and its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


# Fields, the condition on their values, and the wording for messages; rules that end in "or none" allow None.
_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "max_steps rollout_batch_size num_generations max_completion_length ppo_epochs minibatch_size "
        "micro_batch_size logging_steps eval_completions kl_horizon trpo_cg_steps trpo_line_search_steps",
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        "eval_steps save_steps critic_epochs critic_warmup_epochs sample_batch_size num_layers_unfrozen",
        lambda v: v >= 1,
        "at least 1, or none",
    ),
    ("cpu_threads min_new_tokens", lambda v: v >= 0, "0 or more, or none"),
    ("seed top_k warmup_steps critic_warmup_steps log_completions save_rollouts", lambda v: v >= 0, "0 or more"),
    (
        "kl_coef vf_coef ent_coef weight_decay learning_rate truncation_penalty policy_kl_coef trpo_damping",
        lambda v: 0 <= v < math.inf,
        "finite, 0 or more",
    ),
    ("temperature max_grad_norm adam_epsilon trpo_max_kl", lambda v: 0 < v < math.inf, "finite and above 0"),
    (
        "clip_range_high value_clip_range kl_target critic_learning_rate step_zero_tolerance "
        "policy_kl_target adaptive_lam_alpha",
        lambda v: 0 < v < math.inf,
        "finite and above 0, or none",
    ),
    ("target_kl", lambda v: 0 <= v < math.inf, "finite, 0 or more, or none"),
    ("gamma lam min_p", lambda v: 0 <= v <= 1, "within [0, 1]"),
    ("critic_lam", lambda v: 0 <= v <= 1, "within [0, 1], or none"),
    ("critic_warmup_explained_variance", lambda v: v < 1, "below 1, or none"),
    ("dual_clip", lambda v: 1 < v < math.inf, "finite and above 1, or none"),
    ("adam_beta1 adam_beta2", lambda v: 0 <= v < 1, "within [0, 1)"),
    ("top_p", lambda v: 0 < v <= 1, "within (0, 1]"),
    ("clip_range", lambda v: 0 < v < 1, "within (0, 1)"),
    ("save_total_limit", lambda v: v >= 2, "at least 2 (the newest may be damaged), or none"),
]


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value, with all that a list holds, is of a kind; an int is a float too, a bool is no int."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, k) for k in get_args(kind))
    if get_origin(kind) is list:
        return type(value) is list and all(_is_a(v, get_args(kind)[0]) for v in value)
    return type(value) is (get_origin(kind) or kind) or (kind is float and type(value) is int)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Some settings of a run, never written to after construction.

    Raises:
        TypeError: A value is of the wrong kind, such as text where a number is expected.
        ValueError: A value is out of range, or makes no sense beside another; the message names the setting and the
            remedy.
    """

    @scrubbed
    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        own = {f.name for f in fields(self)}
        for f in fields(self):
            self._check_kind(f.name, kinds[f.name])
        for names, holds, rule in _RULES:
            for name in own.intersection(names.split()):
                value = getattr(self, name)
                if not (value is None and "none" in rule) and not holds(value):
                    raise ValueError(f"{name}={value!r} must be {rule}.")
        for name in own.intersection(_CHOICES):
            self._require_choice(name, _CHOICES[name])
        for part in reversed(type(self).__mro__):
            for wrong, message in vars(part).get("contradictions", lambda _: ())(self):
                if wrong:
                    raise ValueError(message)

    def _check_kind(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, str) and any(get_origin(k) is dict for k in get_args(kind)):
            value = _read_json_object(name, value)
            object.__setattr__(self, name, value)
        yaml_true = name == "resume_from_checkpoint" and type(value) is bool
        if not (_is_a(value, kind) or yaml_true):
            expected = kind.__name__ if type(kind) is type else kind
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected {expected}.")

    def _require_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value == "none" and "none" not in choices and type(None) in get_args(get_type_hints(type(self))[name]):
            object.__setattr__(self, name, None)
        elif value is not None and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}.{hint}")


def _read_json_object(name: str, text: str) -> dict[str, Any]:
    """A setting that is a dict, from the text that it is on a command line."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{name}={text!r} must be a dict, or one in JSON, such as {{"key": true}}.')
    return value
