"""PPOConfig: every knob of a run in one frozen dataclass, with every range and divisibility check in one place."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

ESTIMATORS = ("gae", "rewards_to_go", "total_return", "immediate_rewards")
SCHEDULES = ("constant", "linear", "cosine")


def _knob(default: Any, text: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


# Fields, what must hold of their values, and how to say it; rules that end in "or none" allow None.
_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "max_steps rollout_batch_size num_generations max_completion_length ppo_epochs minibatch_size "
        "micro_batch_size logging_steps eval_completions kl_horizon",
        lambda v: v >= 1,
        "at least 1",
    ),
    ("eval_steps save_steps critic_warmup_epochs", lambda v: v >= 1, "at least 1, or none"),
    ("cpu_threads", lambda v: v >= 0, "0 or more, or none"),
    ("seed top_k warmup_steps critic_warmup_steps log_completions", lambda v: v >= 0, "0 or more"),
    ("kl_coef vf_coef ent_coef weight_decay learning_rate", lambda v: 0 <= v < math.inf, "finite, 0 or more"),
    ("temperature max_grad_norm adam_epsilon", lambda v: 0 < v < math.inf, "finite and above 0"),
    (
        "clip_range_high value_clip_range target_kl kl_target critic_learning_rate step_zero_tolerance",
        lambda v: 0 < v < math.inf,
        "finite and above 0, or none",
    ),
    ("gamma lam min_p", lambda v: 0 <= v <= 1, "within [0, 1]"),
    ("adam_beta1 adam_beta2", lambda v: 0 <= v < 1, "within [0, 1)"),
    ("top_p", lambda v: 0 < v <= 1, "within (0, 1]"),
    ("clip_range", lambda v: 0 < v < 1, "within (0, 1)"),
    ("save_total_limit", lambda v: v >= 2, "at least 2 (the newest may be the damaged one), or none"),
]


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The configuration of a :class:`lmppo.PPOTrainer`, never written to after construction.

    Counts of completions (``rollout_batch_size``, ``minibatch_size``) are global, over all processes;
    ``micro_batch_size`` is per process and changes memory only. One step (``max_steps``, ``save_steps``,
    ``warmup_steps``, ...) is one PPO iteration: a rollout and ``ppo_epochs * rollout_batch_size / minibatch_size``
    optimizer steps. `docs/configuration.md` gives the reason for each default.

    Raises:
        TypeError: A value is of the wrong kind, such as text where a number is expected.
        ValueError: A value is out of range, or the sizes do not divide; the message names the setting and the remedy.
    """

    # Run
    output_dir: str = _knob("lmppo-output", "Run directory: metrics.jsonl, run_config.yaml, checkpoints/, final/.")
    max_steps: int = _knob(100, "PPO iterations to run.")
    seed: int = _knob(42, "Seed of prompt order, sampling noise and minibatch order.")
    resume_from_checkpoint: str | None = _knob(
        None, "'auto': newest valid checkpoint of this run, or start; 'true': newest, or an error; or a directory."
    )
    use_cpu: bool = _knob(False, "Stay on the CPU even if an accelerator is there.")
    cpu_threads: int | None = _knob(
        None,
        "Threads of each process on a CPU; 0: share out all cores (default: as launched; accelerate launch says 1).",
    )
    bf16: bool = _knob(False, "Run the forward passes under bfloat16 autocast (weights stay float32).")

    # Rollout
    rollout_batch_size: int = _knob(64, "Completions sampled per iteration, over all processes.")
    num_generations: int = _knob(1, "Completions per prompt; they count within rollout_batch_size.")
    max_completion_length: int = _knob(48, "Most tokens a completion may have.")
    temperature: float = _knob(1.0, "Softmax temperature of the policy: in sampling, old, new and reference alike.")
    top_k: int = _knob(0, "Sample among the k likeliest tokens only (0: all).")
    top_p: float = _knob(1.0, "Sample within the smallest set of tokens of this probability (1: all).")
    min_p: float = _knob(0.0, "Sample tokens of at least min_p times the likeliest token's probability (0: all).")
    shuffle_dataset: bool = _knob(True, "Visit the prompts in a new random order each epoch.")

    # Rewards
    reward_weights: list[float] | None = _knob(None, "Weight of each reward function (default: 1 each).")
    kl_coef: float = _knob(0.05, "Coefficient of the per-token KL penalty to the reference, within the reward.")
    kl_target: float | None = _knob(None, "Adapt kl_coef to hold kl_to_ref (nats per completion) here.")
    kl_horizon: int = _knob(10000, "Completions over which the adaptive kl_coef reacts.")

    # Advantages
    estimator: str = _knob("gae", f"Advantage estimator: {', '.join(ESTIMATORS)}; the critic is subtracted.")
    gamma: float = _knob(1.0, "Discount per token.")
    lam: float = _knob(0.95, "GAE's lambda.")
    whiten_advantages: bool = _knob(True, "Give the batch's advantages mean 0 and variance 1, over all processes.")

    # Update
    ppo_epochs: int = _knob(4, "Passes over each rollout.")
    minibatch_size: int = _knob(16, "Completions per optimizer step, over all processes.")
    micro_batch_size: int = _knob(16, "Completions per forward pass and process; changes memory only.")
    clip_range: float = _knob(0.2, "Clip of the ratio: 1 - clip_range to 1 + clip_range.")
    clip_range_high: float | None = _knob(None, "Upper clip, if it differs from clip_range.")
    value_clip_range: float | None = _knob(0.2, "Clip of the value's move from its old value ('none': no clip).")
    vf_coef: float = _knob(0.1, "Weight of the value loss.")
    ent_coef: float = _knob(0.0, "Weight of the entropy bonus.")
    target_kl: float | None = _knob(None, "End an iteration's update when approx_kl exceeds 1.5 times this.")
    critic_warmup_steps: int = _knob(0, "First iterations in which only the critic learns; the policy is frozen.")
    critic_warmup_epochs: int | None = _knob(None, "Passes over the rollout in those iterations (default ppo_epochs).")
    step_zero_tolerance: float | None = _knob(
        None, "Largest |log ratio| and |KL| allowed before anything was learned (default: by precision, 2e-5 in fp32)."
    )

    # Optimizer
    learning_rate: float = _knob(1e-5, "AdamW's learning rate for the policy (and the trunk it shares).")
    critic_learning_rate: float | None = _knob(None, "Learning rate of the value head or critic (learning_rate).")
    lr_scheduler_type: str = _knob("constant", f"Schedule over the iterations: {', '.join(SCHEDULES)}.")
    warmup_steps: int = _knob(0, "Iterations over which the learning rate rises from 0.")
    weight_decay: float = _knob(0.0, "AdamW's weight decay.")
    adam_beta1: float = _knob(0.9, "AdamW's beta1.")
    adam_beta2: float = _knob(0.999, "AdamW's beta2.")
    adam_epsilon: float = _knob(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _knob(1.0, "Clip of the global gradient norm, on every optimizer step.")

    # Reporting and saving
    logging_steps: int = _knob(1, "Iterations between rows sent to trackers and printed; metrics.jsonl has them all.")
    eval_steps: int | None = _knob(None, "Iterations between evaluations on eval_dataset (default: none).")
    eval_completions: int = _knob(128, "Completions per evaluation, over all processes.")
    save_steps: int | None = _knob(None, "Iterations between checkpoints (default: only at the end).")
    save_total_limit: int | None = _knob(None, "Checkpoints to keep (at least 2; default: all).")
    log_completions: int = _knob(0, "Completions shown in a table at every logged step.")
    report_to: list[str] = _knob([], "Trackers of accelerate to report to: tensorboard, wandb, trackio, ...")
    run_name: str = _knob("lmppo", "Name of the run in the trackers.")
    disable_tqdm: bool = _knob(False, "No progress bar.")

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(PPOConfig).items():
            self._check_kind(name, kind)
        for names, holds, rule in _RULES:
            for name in names.split():
                value = getattr(self, name)
                if not (value is None and "none" in rule) and not holds(value):
                    raise ValueError(f"{name}={value!r} must be {rule}.")
        self._require_choice("estimator", ESTIMATORS)
        self._require_choice("lr_scheduler_type", SCHEDULES)
        self._check_sizes()

    def _check_kind(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        accepted = {get_origin(k) or k for k in (get_args(kind) if isinstance(kind, UnionType) else (kind,))}
        accepted |= {int} if float in accepted else set()
        accepted |= {bool} if name == "resume_from_checkpoint" else set()  # YAML's true
        if type(value) not in accepted:
            expected = kind.__name__ if type(kind) is type else kind
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected {expected}.")

    def _require_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}.{hint}")

    def _check_sizes(self) -> None:
        if self.rollout_batch_size % self.num_generations:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} must be a multiple of "
                f"num_generations={self.num_generations}: each prompt gets num_generations completions."
            )
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} must be a multiple of "
                f"minibatch_size={self.minibatch_size}, so that every completion is trained on once per epoch."
            )

    def check_processes(self, num_processes: int) -> None:
        """Refuse sizes that do not divide evenly over the processes.

        Raises:
            ValueError: A global count is not a multiple of ``num_processes``.
        """
        for name in ("rollout_batch_size", "minibatch_size", "eval_completions"):
            value = getattr(self, name)
            if value % num_processes:
                raise ValueError(
                    f"{name}={value} is a count over all processes and must be a multiple of their number, "
                    f"{num_processes}: try {max(1, value // num_processes) * num_processes}."
                )

    @property
    def truncates_sampling(self) -> bool:
        """Whether some tokens can never be sampled (top-k, top-p or min-p)."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values."""
        return dataclasses.asdict(self)
