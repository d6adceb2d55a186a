"""PPOConfig: every setting of a run in one frozen dataclass, and every check of the settings in one place."""

import argparse
import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

ESTIMATORS = ("gae", "rewards_to_go", "total_return", "immediate_rewards")
BASELINES = ("none", "batch_mean", "leave_one_out", "critic", "auto")
OBJECTIVES = ("clip", "kl_penalty", "importance_sampled", "policy_gradient", "trpo")
TRUNCATIONS = ("end", "bootstrap", "penalty", "mask")
KL_FORMS = ("k1_reward", "k3_both", "exact_both", "k2_loss", "k3_loss", "exact_loss")
SCHEDULES = ("constant", "linear", "cosine")

# Why the gradient of the other forms of the KL penalty is biased (arXiv 2510.01555, 2512.21852; tests prove each).
_KL_BIAS = {
    "k2_loss": "right for each state by itself, but what a token does to the KL of later states is left out",
    "k3_loss": "its gradient is that of KL(reference || policy), the other direction",
    "exact_loss": "what a token does to the KL of later states is left out: use 'exact_both'",
}
# Settings that are gone and what has replaced them; and what to do about the pairs that no kl_form continues.
REPLACED = {"kl_estimator": "kl_form", "kl_placement": "kl_form"}
_DROPPED_PAIRS = {
    "k2_reward": "set kl_form='k1_reward': E[k2] is not the KL, and near the reference it hardly pulls back",
    "k3_reward": "set kl_form='k3_both': the reward alone lacks the gradient by which k3 itself depends on the policy",
    "exact_reward": "set kl_form='exact_both': a state's own KL is only a baseline in the reward, without its own gradient",
    "k1_loss": "set kl_form='k1_reward': the expected gradient of k1 in the loss is 0, so nothing is penalized",
    "k1_both": "set kl_form='k1_reward': k1 in the loss adds only noise",
    "k2_both": "set kl_form='exact_both': k2 in the reward is biased, whatever the loss adds",
}
_CHOICES = {
    "estimator": ESTIMATORS,
    "baseline": BASELINES,
    "objective": OBJECTIVES,
    "truncation": TRUNCATIONS,
    "kl_form": KL_FORMS,
    "lr_scheduler_type": SCHEDULES,
}


def _knob(default: Any, text: str) -> Any:
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
    ("eval_steps save_steps critic_epochs critic_warmup_epochs", lambda v: v >= 1, "at least 1, or none"),
    ("cpu_threads", lambda v: v >= 0, "0 or more, or none"),
    ("seed top_k warmup_steps critic_warmup_steps log_completions save_rollouts", lambda v: v >= 0, "0 or more"),
    (
        "kl_coef vf_coef ent_coef weight_decay learning_rate truncation_penalty policy_kl_coef trpo_damping",
        lambda v: 0 <= v < math.inf,
        "finite, 0 or more",
    ),
    ("temperature max_grad_norm adam_epsilon trpo_max_kl", lambda v: 0 < v < math.inf, "finite and above 0"),
    (
        "clip_range_high value_clip_range target_kl kl_target critic_learning_rate step_zero_tolerance "
        "policy_kl_target adaptive_lam_alpha",
        lambda v: 0 < v < math.inf,
        "finite and above 0, or none",
    ),
    ("gamma lam min_p", lambda v: 0 <= v <= 1, "within [0, 1]"),
    ("critic_lam", lambda v: 0 <= v <= 1, "within [0, 1], or none"),
    ("critic_warmup_explained_variance", lambda v: v < 1, "below 1, or none"),
    ("dual_clip", lambda v: 1 < v < math.inf, "finite and above 1, or none"),
    ("adam_beta1 adam_beta2", lambda v: 0 <= v < 1, "within [0, 1)"),
    ("top_p", lambda v: 0 < v <= 1, "within (0, 1]"),
    ("clip_range", lambda v: 0 < v < 1, "within (0, 1)"),
    ("save_total_limit", lambda v: v >= 2, "at least 2 (the newest may be damaged), or none"),
]


@dataclass(frozen=True)
class RewardStream:
    """One kind of reward, with its own discount and its own output of the critic.

    Args:
        name: The stream's name in the metrics. ``"kl"``, without reward functions: the KL penalty's own stream.
        reward_funcs: The reward functions that are summed in this stream.
        weight: Multiplies the stream's rewards, and so (the estimators are linear) its advantages.
        gamma: Discount of this stream (default: the configuration's).
        lam: GAE's lambda of this stream (default: the configuration's).

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is out of range.
    """

    name: str
    reward_funcs: Sequence[Any] = ()
    weight: float = 1.0
    gamma: float | None = None
    lam: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"the name of a reward stream must be text, got {self.name!r}.")
        if isinstance(self.reward_funcs, str) or not isinstance(self.reward_funcs, Sequence):
            raise TypeError(f"reward stream {self.name!r}: reward_funcs={self.reward_funcs!r} must be a list.")
        for field_name in ("weight", "gamma", "lam"):
            value = getattr(self, field_name)
            kinds = (float, int) if field_name == "weight" else (float, int, type(None))
            if type(value) not in kinds:
                raise TypeError(f"reward stream {self.name!r}: {field_name}={value!r} must be a number.")
        if not math.isfinite(self.weight):
            raise ValueError(f"reward stream {self.name!r}: weight={self.weight!r} must be finite.")
        for field_name in ("gamma", "lam"):
            value = getattr(self, field_name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"reward stream {self.name!r}: {field_name}={value!r} must be within [0, 1].")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The configuration of a :class:`lmppo.PPOTrainer`; immutable.

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
    seed: int = _knob(42, "Seed for the order of prompts, the sampling noise and the order of minibatches.")
    resume_from_checkpoint: str | None = _knob(
        None,
        "'auto': resume this run from its newest valid checkpoint, or start it; 'true': resume from the newest valid "
        "checkpoint, or fail; or a checkpoint's directory.",
    )
    use_cpu: bool = _knob(False, "Use the CPU even if an accelerator is available.")
    cpu_threads: int | None = _knob(
        None,
        "CPU threads per process; 0 divides all cores among the processes (default: what the launcher set; "
        "accelerate launch sets 1).",
    )
    bf16: bool = _knob(False, "Run forward passes in bfloat16 autocast; weights stay float32.")

    # Rollout
    rollout_batch_size: int = _knob(64, "Completions sampled per iteration, over all processes.")
    num_generations: int = _knob(1, "Completions per prompt; rollout_batch_size counts all of them.")
    max_completion_length: int = _knob(48, "Maximum number of tokens in a completion.")
    temperature: float = _knob(
        1.0, "Softmax temperature, used for sampling and for the old, new and reference log-probabilities."
    )
    top_k: int = _knob(0, "Sample only from the k most likely tokens (0: off).")
    top_p: float = _knob(1.0, "Sample only from the smallest set of tokens with this total probability (1: off).")
    min_p: float = _knob(0.0, "Sample only tokens at least min_p times as likely as the most likely one (0: off).")
    shuffle_dataset: bool = _knob(True, "Shuffle the prompts, in a new order each epoch.")

    # Rewards
    reward_weights: list[float] | None = _knob(None, "Weight of each reward function (default: 1 each).")
    kl_coef: float = _knob(0.05, "Coefficient of the per-token KL penalty to the reference.")
    kl_target: float | None = _knob(None, "Adapt kl_coef to hold kl_to_ref (nats per completion) here.")
    kl_horizon: int = _knob(10000, "Completions over which the adaptive kl_coef reacts.")
    kl_form: str = _knob("k1_reward", f"What measures that KL, and where it stands: {', '.join(KL_FORMS)}.")
    truncation: str = _knob("end", f"What becomes of a completion cut without EOS: {', '.join(TRUNCATIONS)}.")
    truncation_penalty: float = _knob(1.0, "Taken from a cut completion's reward, with truncation='penalty'.")

    # Advantages
    estimator: str = _knob("gae", f"Advantage estimator: {', '.join(ESTIMATORS)}.")
    baseline: str = _knob("critic", f"Baseline: {', '.join(BASELINES)} (critic or batch_mean, by explained variance).")
    gamma: float = _knob(1.0, "Discount per token.")
    lam: float = _knob(0.95, "GAE's lambda.")
    critic_lam: float | None = _knob(None, "GAE's lambda for the critic's targets (default: lam).")
    adaptive_lam_alpha: float | None = _knob(
        None, "Length-adaptive GAE: a completion of n tokens uses lambda = max(lam, 1 - 1/(alpha n))."
    )
    whiten_advantages: bool = _knob(True, "Normalize advantages to mean 0 and variance 1 over the whole batch.")

    # Update
    objective: str = _knob("clip", f"Policy objective: {', '.join(OBJECTIVES)}.")
    ppo_epochs: int = _knob(4, "Optimization passes over each rollout.")
    minibatch_size: int = _knob(16, "Completions per optimizer step, over all processes.")
    micro_batch_size: int = _knob(16, "Completions per forward pass on each process; affects memory and speed only.")
    clip_range: float = _knob(0.2, "The probability ratio is clipped to [1 - clip_range, 1 + clip_range].")
    clip_range_high: float | None = _knob(None, "Upper clip range, if different from clip_range.")
    dual_clip: float | None = _knob(
        None, "Bound, in the loss, on the ratio of tokens with a negative advantage (default: none)."
    )
    policy_kl_coef: float = _knob(1.0, "Initial coefficient beta of the KL to the old policy (objective='kl_penalty').")
    policy_kl_target: float | None = _knob(
        0.01, "Halve beta if that KL is below target/1.5 nats per token, double it above 1.5*target ('none': fixed)."
    )
    trpo_max_kl: float = _knob(0.01, "Maximum mean KL to the old policy, in nats per token (objective='trpo').")
    trpo_cg_steps: int = _knob(10, "TRPO: conjugate gradient steps.")
    trpo_damping: float = _knob(0.1, "TRPO: added to the diagonal of the Fisher matrix.")
    trpo_line_search_steps: int = _knob(10, "TRPO: step lengths to try, each 0.8 times the one before.")
    value_clip_range: float | None = _knob(
        0.2, "Clip range of values around their old values, in the value loss ('none': no clipping)."
    )
    vf_coef: float = _knob(0.1, "Weight of the value loss.")
    ent_coef: float = _knob(0.0, "Weight of the entropy bonus.")
    target_kl: float | None = _knob(
        None, "Stop an iteration's update, the critic's included, when approx_kl exceeds 1.5 * target_kl."
    )
    critic_epochs: int | None = _knob(None, "The critic's passes over each rollout (default: ppo_epochs).")
    critic_warmup_steps: int = _knob(0, "Initial iterations that train only the critic, with the policy frozen.")
    critic_warmup_epochs: int | None = _knob(None, "The critic's passes during warm-up (default: critic_epochs).")
    critic_warmup_explained_variance: float | None = _knob(
        None, "End the warm-up early once the critic's explained variance reaches this value."
    )
    step_zero_tolerance: float | None = _knob(
        None, "Largest |log ratio| and |KL| allowed before the first step (default: a bound on rounding errors)."
    )

    # Optimizer
    learning_rate: float = _knob(1e-5, "AdamW's learning rate for the policy, and for a trunk shared with the critic.")
    critic_learning_rate: float | None = _knob(
        None, "Learning rate of the value head or critic (default: learning_rate)."
    )
    lr_scheduler_type: str = _knob("constant", f"Learning rate schedule over the iterations: {', '.join(SCHEDULES)}.")
    warmup_steps: int = _knob(0, "Iterations of linear learning rate warm-up.")
    weight_decay: float = _knob(0.0, "AdamW's weight decay.")
    adam_beta1: float = _knob(0.9, "AdamW's beta1.")
    adam_beta2: float = _knob(0.999, "AdamW's beta2.")
    adam_epsilon: float = _knob(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _knob(1.0, "Maximum global gradient norm; gradients are clipped on every optimizer step.")

    # Reporting and saving
    logging_steps: int = _knob(1, "Report to trackers and print every so many iterations; metrics.jsonl has every one.")
    eval_steps: int | None = _knob(None, "Iterations between evaluations on eval_dataset (default: no evaluation).")
    eval_completions: int = _knob(128, "Completions per evaluation, over all processes.")
    save_steps: int | None = _knob(None, "Iterations between checkpoints (default: only at the end).")
    save_rollouts: int = _knob(0, "Completions saved with each checkpoint, for `lmppo explain`.")
    save_total_limit: int | None = _knob(None, "Maximum number of checkpoints to keep, at least 2 (default: all).")
    log_completions: int = _knob(0, "Completions to print at every logged step, and to write to completions.jsonl.")
    report_to: list[str] = _knob([], "accelerate trackers to report to: tensorboard, wandb, trackio, ...")
    run_name: str = _knob("lmppo", "Name of the run in the trackers.")
    disable_tqdm: bool = _knob(False, "Disable the progress bar.")

    # Replaced; here so that files and flags that still have them get an error which says what to set
    kl_estimator: str | None = field(default=None, repr=False, metadata={"help": argparse.SUPPRESS})
    kl_placement: str | None = field(default=None, repr=False, metadata={"help": argparse.SUPPRESS})

    def __post_init__(self) -> None:
        self._refuse_replaced()
        for name, kind in get_type_hints(PPOConfig).items():
            self._check_kind(name, kind)
        for names, holds, rule in _RULES:
            for name in names.split():
                value = getattr(self, name)
                if not (value is None and "none" in rule) and not holds(value):
                    raise ValueError(f"{name}={value!r} must be {rule}.")
        for name, choices in _CHOICES.items():
            self._require_choice(name, choices)
        self._check_sizes()
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)
        bias = _KL_BIAS.get(self.kl_form)
        if bias and self.kl_coef > 0:
            text = f"kl_form={self.kl_form!r} has a biased gradient: {bias} (arXiv 2510.01555)."
            warnings.warn(f"{text} Unbiased: {', '.join(KL_FORMS[:3])}.", stacklevel=3)

    def _refuse_replaced(self) -> None:
        given = [f"{name}={getattr(self, name)!r}" for name in REPLACED if getattr(self, name) is not None]
        pair = f"{self.kl_estimator or 'k1'}_{self.kl_placement or 'reward'}"  # the defaults they had
        remedy = _DROPPED_PAIRS.get(pair, f"set kl_form to one of {', '.join(KL_FORMS)}")
        if given:
            remedy = f"set kl_form={pair!r}" if pair in KL_FORMS else remedy
            raise ValueError(f"{', '.join(given)}: kl_form has replaced kl_estimator and kl_placement; {remedy}.")

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

    def _contradictions(self) -> list[tuple[bool, str]]:
        """Settings that contradict each other: whether they do here, and the message."""
        whole = self.ppo_epochs == 1 and self.minibatch_size == self.rollout_batch_size
        return [
            (
                self.estimator == "gae" and not self.uses_critic,
                f"estimator='gae' needs a critic: set baseline='critic' or 'auto' (baseline={self.baseline!r}), or "
                f"estimator='rewards_to_go'.",
            ),
            (
                self.baseline == "leave_one_out" and self.num_generations < 2,
                "baseline='leave_one_out' compares completions of one prompt: set num_generations to 2 or more.",
            ),
            (
                self.truncation == "bootstrap" and not self.uses_critic,
                f"truncation='bootstrap' needs a critic: baseline={self.baseline!r} has none.",
            ),
            (
                self.truncation == "bootstrap" and self.estimator not in ("gae", "rewards_to_go"),
                f"truncation='bootstrap' adds a value to later rewards, which estimator={self.estimator!r} does not "
                f"use: set estimator='gae' or 'rewards_to_go'.",
            ),
            (
                not self.uses_critic and (self.critic_warmup_steps > 0 or self.critic_epochs is not None),
                f"critic_warmup_steps and critic_epochs need a critic: baseline={self.baseline!r} has none.",
            ),
            (
                self.estimator != "gae" and (self.critic_lam is not None or self.adaptive_lam_alpha is not None),
                f"critic_lam and adaptive_lam_alpha are GAE's: estimator={self.estimator!r} has no lambda.",
            ),
            (
                self.objective == "policy_gradient" and not whole,
                f"objective='policy_gradient' is valid for one step per rollout only: set ppo_epochs=1 and "
                f"minibatch_size=rollout_batch_size={self.rollout_batch_size}, or objective='importance_sampled'.",
            ),
            (
                self.objective == "trpo" and (self.ent_coef > 0 or self.target_kl is not None or self.kl_in_loss),
                "objective='trpo' takes one step within trpo_max_kl: leave out ent_coef, target_kl and a KL penalty in "
                "the loss.",
            ),
            (
                self.objective == "policy_gradient" and self.target_kl is not None,
                "objective='policy_gradient' takes its one step at KL 0, where target_kl never stops it: leave it out.",
            ),
            (
                self.critic_warmup_steps == 0
                and (self.critic_warmup_epochs is not None or self.critic_warmup_explained_variance is not None),
                "critic_warmup_epochs and critic_warmup_explained_variance need critic_warmup_steps above 0.",
            ),
            (
                self.kl_target is not None and self.kl_coef == 0,
                f"kl_target={self.kl_target} adapts kl_coef by factors, and kl_coef=0 stays 0: start above 0.",
            ),
            (
                self.dual_clip is not None and self.objective != "clip",
                f"dual_clip belongs to objective='clip', not {self.objective!r}.",
            ),
        ]

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
    def uses_critic(self) -> bool:
        """Whether the baseline asks for a critic."""
        return self.baseline in ("critic", "auto")

    @property
    def kl_measure(self) -> str:
        """What measures the KL to the reference: ``k1``, ``k2``, ``k3`` or ``exact``."""
        return self.kl_form.partition("_")[0]

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL to the reference is (also) paid for in the reward; where kl_coef is 0, at no price."""
        return not self.kl_form.endswith("_loss")

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL to the reference is (also) a term of the loss."""
        return not self.kl_form.endswith("_reward") and self.kl_coef > 0

    @property
    def truncates_sampling(self) -> bool:
        """Whether some tokens can never be sampled (top-k, top-p or min-p)."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def to_dict(self) -> dict[str, Any]:
        """All settings, as plain Python values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in REPLACED}
