"""The settings of a run, by what they decide. A function takes the part that it may touch; PPOConfig is all of them."""

import warnings
from dataclasses import dataclass
from typing import Any

from lmppo.setting_rules import (
    BASELINES,
    ESTIMATORS,
    KL_FORMS,
    OBJECTIVES,
    SCHEDULES,
    TRUNCATIONS,
    Contradictions,
    Settings,
    knob,
)

# Why the gradient of the other forms of the KL penalty is biased (arXiv 2510.01555, 2512.21852; tests prove each).
_KL_BIAS = {
    "k2_loss": "right for each state by itself, but what a token does to the KL of later states is left out",
    "k3_loss": "its gradient is that of KL(reference || policy), the other direction",
    "exact_loss": "what a token does to the KL of later states is left out: use 'exact_both'",
}


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What a run is as a whole."""

    output_dir: str = knob("lmppo-output", "Run directory: metrics.jsonl, run_config.yaml, checkpoints/, final/.")
    max_steps: int = knob(100, "PPO iterations to run.")
    seed: int = knob(42, "Seed for the order of prompts, the sampling noise and the order of minibatches.")
    resume_from_checkpoint: str | None = knob(
        None,
        "'auto': resume this run from its newest valid checkpoint, or start it; 'true': resume from the newest valid "
        "checkpoint, or fail; or a checkpoint's directory.",
    )
    use_cpu: bool = knob(False, "Use the CPU even if an accelerator is available.")
    cpu_threads: int | None = knob(
        None,
        "CPU threads per process; 0 divides all cores among the processes (default: what the launcher set; "
        "accelerate launch sets 1).",
    )
    bf16: bool = knob(False, "Run forward passes in bfloat16 autocast; weights stay float32.")
    frozen_dtype: str = knob(
        "float32",
        "What weights that are never trained are stored in: float32, or bfloat16 (half the memory); they are computed with "
        "as before.",
    )
    gradient_checkpointing: bool = knob(
        False,
        "Compute the layers' activations again in the backward pass instead of keeping them: less memory, more time.",
    )
    num_layers_unfrozen: int | None = knob(
        None,
        "Train only so many of the policy's top layers and what is above them; what the layers below compute of a rollout "
        "is computed once (default: train all).",
    )
    trust_remote_code: bool = knob(False, "Run code that comes with a model or tokenizer, if loading needs it.")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """Which completions an iteration samples."""

    rollout_batch_size: int = knob(64, "Completions sampled per iteration, over all processes.")
    num_generations: int = knob(1, "Completions per prompt; rollout_batch_size counts all of them.")
    sample_batch_size: int | None = knob(
        None, "Completions sampled at a time on each process; affects memory and speed only (default: all)."
    )
    cuda_graphs: bool = knob(
        False,
        "Sample by replaying a recorded CUDA graph, on GPUs: faster where the model is small for the GPU; takes the memory "
        "of the longest completions.",
    )
    shuffle_dataset: bool = knob(True, "Shuffle the prompts, in a new order each epoch.")


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """How prompts become tokens."""

    chat_template_kwargs: dict[str, Any] | str | None = knob(
        None, "Arguments of the chat template; as JSON on the command line: '{\"enable_thinking\": false}'."
    )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """The distribution that tokens are sampled from."""

    max_completion_length: int = knob(48, "Maximum number of tokens in a completion.")
    temperature: float = knob(
        1.0, "Softmax temperature, used for sampling and for the old, new and reference log-probabilities."
    )
    top_k: int = knob(0, "Sample only from the k most likely tokens (0: off).")
    top_p: float = knob(1.0, "Sample only from the smallest set of tokens with this total probability (1: off).")
    min_p: float = knob(0.0, "Sample only tokens at least min_p times as likely as the most likely one (0: off).")
    min_new_tokens: int | None = knob(None, "Tokens of a completion before which EOS and stop_token_ids are forbidden.")
    suppress_tokens: list[int] | None = knob(None, "Token ids that are never sampled.")
    bad_words_ids: list[list[int]] | None = knob(None, "The same as lists of one token id each, as generate() has it.")
    stop_token_ids: list[int] | None = knob(None, "Token ids that end a completion, in addition to the model's EOS.")
    stop_strings: list[str] | None = knob(None, "Strings that end a completion, with the token that completes one.")

    def contradictions(self) -> Contradictions:
        """What cannot be forbidden, found or reached."""
        words = [word for word in self.bad_words_ids or [] if len(word) != 1]
        yield (
            bool(words),
            f"bad_words_ids has {', '.join(map(str, words))}: each word must be one token id. Whether a longer word is "
            f"forbidden depends on the tokens before, which lmppo does not support: leave it out, or penalize it by a "
            f"reward function.",
        )
        yield (
            "" in (self.stop_strings or []),
            "stop_strings has an empty string, which every text contains: leave it out.",
        )
        yield (
            (self.min_new_tokens or 0) > self.max_completion_length,
            f"min_new_tokens={self.min_new_tokens} is above max_completion_length={self.max_completion_length}: lower "
            f"the one or raise the other.",
        )


@dataclass(frozen=True, kw_only=True)
class RewardSettings(Settings):
    """What the reward functions count."""

    reward_weights: list[float] | None = knob(None, "Weight of each reward function (default: 1 each).")


@dataclass(frozen=True, kw_only=True)
class KLSettings(Settings):
    """The penalty for distance from the reference."""

    kl_coef: float = knob(0.05, "Coefficient of the per-token KL penalty to the reference.")
    kl_target: float | None = knob(None, "Adapt kl_coef to hold kl_to_ref (nats per completion) here.")
    kl_horizon: int = knob(10000, "Completions over which the adaptive kl_coef reacts.")
    kl_form: str | None = knob(
        None,
        f"What measures that KL, and where it stands: {', '.join(KL_FORMS)} (default: k1_end where nothing is discounted, "
        f"gamma 1 and, with gae, lam 1, and cut completions count as they are; else k1_reward).",
    )

    @property
    def kl_measure(self) -> str:
        """What measures the KL to the reference: ``k1``, ``k2``, ``k3`` or ``exact``."""
        return (self.kl_form or "k1_reward").partition("_")[0]

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL to the reference is (also) paid for in the reward; where kl_coef is 0, at no price."""
        return not (self.kl_form or "k1_reward").endswith("_loss")

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL to the reference is (also) a term of the loss."""
        return (self.kl_form or "k1_reward").endswith(("_both", "_loss")) and self.kl_coef > 0

    def contradictions(self) -> Contradictions:
        """Warns of a biased form as well."""
        bias = _KL_BIAS.get(self.kl_form or "k1_reward")
        if bias and self.kl_coef > 0:
            text = f"kl_form={self.kl_form!r} has a biased gradient: {bias} (arXiv 2510.01555)."
            warnings.warn(f"{text} Unbiased: {', '.join(KL_FORMS[:4])}.", stacklevel=6)
        yield (
            self.kl_target is not None and self.kl_coef == 0,
            f"kl_target={self.kl_target} adapts kl_coef by factors, and kl_coef=0 stays 0: start above 0.",
        )


@dataclass(frozen=True, kw_only=True)
class TruncationSettings(Settings):
    """What becomes of completions that were cut."""

    truncation: str = knob(
        "end", f"What becomes of a completion that was cut before its end: {', '.join(TRUNCATIONS)}."
    )
    truncation_penalty: float = knob(1.0, "Taken from a cut completion's reward, with truncation='penalty'.")


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings(Settings):
    """How rewards become advantages and the critic's targets."""

    estimator: str = knob("gae", f"Advantage estimator: {', '.join(ESTIMATORS)}.")
    baseline: str = knob("critic", f"Baseline: {', '.join(BASELINES)} (critic or batch_mean, by explained variance).")
    gamma: float = knob(1.0, "Discount per token.")
    lam: float = knob(1.0, "GAE's lambda.")
    critic_lam: float | None = knob(None, "GAE's lambda for the critic's targets (default: lam).")
    adaptive_lam_alpha: float | None = knob(
        None, "Length-adaptive GAE: a completion of n tokens uses lambda = max(lam, 1 - 1/(alpha n))."
    )
    whiten_advantages: bool = knob(True, "Normalize advantages to mean 0 and variance 1 over the whole batch.")

    @property
    def uses_critic(self) -> bool:
        """Whether the baseline asks for a critic."""
        return self.baseline in ("critic", "auto")

    def contradictions(self) -> Contradictions:
        """What belongs to another estimator or baseline."""
        yield (
            self.estimator == "gae" and not self.uses_critic,
            f"estimator='gae' needs a critic: set baseline='critic' or 'auto' (baseline={self.baseline!r}), or "
            f"estimator='rewards_to_go'.",
        )
        yield (
            self.estimator != "gae" and (self.critic_lam is not None or self.adaptive_lam_alpha is not None),
            f"critic_lam and adaptive_lam_alpha are GAE's: estimator={self.estimator!r} has no lambda.",
        )
        yield (
            self.adaptive_lam_alpha is not None and self.lam == 1,
            f"adaptive_lam_alpha={self.adaptive_lam_alpha} raises lam for long completions, and lam=1 cannot be raised: "
            f"lower it, to 0.95 for instance (the configuration's, even if every stream has its own).",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Settings):
    """The policy's objective."""

    objective: str = knob("clip", f"Policy objective: {', '.join(OBJECTIVES)}.")
    clip_range: float = knob(0.2, "The probability ratio is clipped to [1 - clip_range, 1 + clip_range].")
    clip_range_high: float | None = knob(None, "Upper clip range, if different from clip_range.")
    dual_clip: float | None = knob(
        None, "Bound, in the loss, on the ratio of tokens with a negative advantage (default: none)."
    )
    policy_kl_coef: float = knob(1.0, "Initial coefficient beta of the KL to the old policy (objective='kl_penalty').")
    policy_kl_target: float | None = knob(
        0.01, "Halve beta if that KL is below target/1.5 nats per token, double it above 1.5*target ('none': fixed)."
    )
    ent_coef: float = knob(0.0, "Weight of the entropy bonus.")

    def contradictions(self) -> Contradictions:
        """What belongs to another objective."""
        yield (
            self.dual_clip is not None and self.objective != "clip",
            f"dual_clip belongs to objective='clip', not {self.objective!r}.",
        )


@dataclass(frozen=True, kw_only=True)
class TRPOSettings(Settings):
    """TRPO's step."""

    trpo_max_kl: float = knob(0.01, "Maximum mean KL to the old policy, in nats per token (objective='trpo').")
    trpo_cg_steps: int = knob(10, "TRPO: conjugate gradient steps.")
    trpo_damping: float = knob(0.1, "TRPO: added to the diagonal of the Fisher matrix.")
    trpo_line_search_steps: int = knob(10, "TRPO: step lengths to try, each 0.8 times the one before.")


@dataclass(frozen=True, kw_only=True)
class CriticSettings(Settings):
    """How the critic learns."""

    value_clip_range: float | None = knob(
        None, "Clip range of values around their old values, in the value loss ('none': no clipping)."
    )
    vf_coef: float = knob(0.1, "Weight of the value loss.")
    critic_epochs: int | None = knob(None, "The critic's passes over each rollout (default: ppo_epochs).")
    critic_warmup_steps: int = knob(0, "Initial iterations that train only the critic, with the policy frozen.")
    critic_warmup_epochs: int | None = knob(None, "The critic's passes during warm-up (default: critic_epochs).")
    critic_warmup_explained_variance: float | None = knob(
        None, "End the warm-up early once the critic's explained variance reaches this value."
    )

    def contradictions(self) -> Contradictions:
        """What belongs to a warm-up."""
        yield (
            self.critic_warmup_steps == 0
            and (self.critic_warmup_epochs is not None or self.critic_warmup_explained_variance is not None),
            "critic_warmup_epochs and critic_warmup_explained_variance need critic_warmup_steps above 0.",
        )


@dataclass(frozen=True, kw_only=True)
class PassSettings(Settings):
    """The passes over a rollout."""

    ppo_epochs: int = knob(4, "Optimization passes over each rollout.")
    minibatch_size: int = knob(16, "Completions per optimizer step, over all processes.")
    micro_batch_size: int = knob(
        16,
        "The most completions of the greatest length per forward pass on each process, and more of shorter ones; affects "
        "memory and speed only.",
    )
    target_kl: float | None = knob(
        None,
        "The policy takes no further step of an iteration when approx_kl exceeds 1.5 * target_kl; the critic goes on "
        "(default: 0.01 with objective='clip', else none; 0: no limit).",
    )
    step_zero_tolerance: float | None = knob(
        None, "Largest |log ratio| and |KL| allowed before the first step (default: a bound on rounding errors)."
    )
    max_grad_norm: float = knob(
        1.0, "Maximum gradient norm, of the policy and of a critic of its own each; clipped on every optimizer step."
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """AdamW and its learning rates."""

    learning_rate: float = knob(1e-5, "AdamW's learning rate for the policy, and for a trunk shared with the critic.")
    critic_learning_rate: float | None = knob(
        None,
        "Learning rate of the value head or critic (default: of a value head, what moves a value by half a unit of the "
        "reward a step at most; of a critic of its own, learning_rate).",
    )
    lr_scheduler_type: str = knob("linear", f"Learning rate schedule over the iterations: {', '.join(SCHEDULES)}.")
    warmup_steps: int = knob(0, "Iterations of linear learning rate warm-up.")
    weight_decay: float = knob(0.0, "AdamW's weight decay.")
    adam_beta1: float = knob(0.9, "AdamW's beta1.")
    adam_beta2: float = knob(0.999, "AdamW's beta2.")
    adam_epsilon: float = knob(1e-8, "AdamW's epsilon.")


@dataclass(frozen=True, kw_only=True)
class ReportingSettings(Settings):
    """What is shown and saved."""

    logging_steps: int = knob(1, "Report to trackers and print every so many iterations; metrics.jsonl has every one.")
    eval_steps: int | None = knob(None, "Iterations between evaluations on eval_dataset (default: no evaluation).")
    eval_completions: int = knob(128, "Completions per evaluation and evaluation set, over all processes.")
    metric_for_best_model: str | None = knob(
        None, "Evaluation metric, with or without eval_, by which the best policy is kept in best/ (default: not kept)."
    )
    greater_is_better: bool | None = knob(
        None, "Whether a larger metric_for_best_model is better (default: true, unless its name ends in loss)."
    )
    save_steps: int | None = knob(None, "Iterations between checkpoints (default: only at the end).")
    save_rollouts: int = knob(0, "Completions saved with each checkpoint, for `lmppo explain`.")
    save_total_limit: int | None = knob(None, "Maximum number of checkpoints to keep, at least 2 (default: all).")
    log_completions: int = knob(0, "Completions to show at every logged step: printed, in files and in trackers.")
    report_to: list[str] = knob([], "accelerate trackers to report to: tensorboard, wandb, trackio, ...")
    run_name: str = knob("lmppo", "Name of the run in the trackers.")
    disable_tqdm: bool = knob(False, "Disable the progress bar.")

    def contradictions(self) -> Contradictions:
        """What belongs to an evaluation metric."""
        yield (
            self.metric_for_best_model is not None and self.eval_steps is None,
            f"metric_for_best_model={self.metric_for_best_model!r} needs evaluations: set eval_steps.",
        )
        yield (
            self.greater_is_better is not None and self.metric_for_best_model is None,
            f"greater_is_better={self.greater_is_better} says how to compare a metric: set metric_for_best_model.",
        )
