"""What of the configuration each part of lmppo may touch: a part that reads another setting does not pass mypy."""

from dataclasses import dataclass

from lmppo.setting_rules import Contradictions
from lmppo.settings.parts import (
    AdvantageSettings,
    CriticSettings,
    KLSettings,
    ObjectiveSettings,
    OptimizerSettings,
    PassSettings,
    PromptSettings,
    RolloutSettings,
    RunSettings,
    SamplingSettings,
    TRPOSettings,
    TruncationSettings,
)


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(SamplingSettings, PromptSettings):
    """What the encoder of prompts may touch."""


@dataclass(frozen=True, kw_only=True)
class CollectorSettings(PassSettings, TruncationSettings, KLSettings, RolloutSettings, RunSettings):
    """What the rollout may touch."""


@dataclass(frozen=True, kw_only=True)
class ShapingSettings(AdvantageSettings, TruncationSettings, KLSettings):
    """What rewards per token may touch."""

    def contradictions(self) -> Contradictions:
        """A price that is paid later than it should be discounted from."""
        discounted = self.gamma != 1 or self.estimator == "immediate_rewards"
        yield (
            self.kl_form == "k1_end" and discounted,
            f"kl_form='k1_end' has the KL of all tokens paid with the last one, which gamma={self.gamma:g} and "
            f"estimator={self.estimator!r} do not count in full: set kl_form='k1_reward'.",
        )
        yield (
            self.kl_form == "k1_end" and self.truncation == "bootstrap",
            "kl_form='k1_end' has the KL paid with the last token, and with truncation='bootstrap' a completion that was cut "
            "has none: set kl_form='k1_reward'.",
        )


@dataclass(frozen=True, kw_only=True)
class EstimatorSettings(AdvantageSettings, TruncationSettings, RolloutSettings):
    """What the estimator may touch."""

    def contradictions(self) -> Contradictions:
        """What belongs to another estimator, baseline or number of completions per prompt."""
        yield (
            self.baseline == "leave_one_out" and self.num_generations < 2,
            "baseline='leave_one_out' compares completions of one prompt: set num_generations to 2 or more.",
        )
        yield (
            self.truncation == "bootstrap" and not self.uses_critic,
            f"truncation='bootstrap' needs a critic: baseline={self.baseline!r} has none.",
        )
        yield (
            self.truncation == "bootstrap" and self.estimator not in ("gae", "rewards_to_go"),
            f"truncation='bootstrap' adds a value to later rewards, which estimator={self.estimator!r} does not "
            f"use: set estimator='gae' or 'rewards_to_go'.",
        )


@dataclass(frozen=True, kw_only=True)
class StreamSettings(AdvantageSettings, KLSettings):
    """What decides whether a setting of a reward stream has an effect."""


@dataclass(frozen=True, kw_only=True)
class LossSettings(CriticSettings, ObjectiveSettings, KLSettings, SamplingSettings):
    """What the loss may touch."""


@dataclass(frozen=True, kw_only=True)
class UpdateSettings(
    PassSettings,
    LossSettings,
    CriticSettings,
    ObjectiveSettings,
    AdvantageSettings,
    KLSettings,
    SamplingSettings,
    RunSettings,
):
    """What the update may touch."""

    def contradictions(self) -> Contradictions:
        """What belongs to another objective, or to a critic."""
        yield (
            not self.uses_critic and (self.critic_warmup_steps > 0 or self.critic_epochs is not None),
            f"critic_warmup_steps and critic_epochs need a critic: baseline={self.baseline!r} has none.",
        )
        yield (
            self.objective == "trpo" and (self.ent_coef > 0 or bool(self.target_kl) or self.kl_in_loss),
            "objective='trpo' takes one step within trpo_max_kl: leave out ent_coef, target_kl and a KL penalty in "
            "the loss.",
        )
        yield (
            self.objective == "trpo" and self.bf16,
            "objective='trpo' measures KLs that are smaller than the rounding of bfloat16: leave bf16 out.",
        )
        yield (
            self.objective == "trpo" and self.gradient_checkpointing,
            "objective='trpo' differentiates twice, which gradient_checkpointing does not allow: leave it out.",
        )
        yield (
            self.objective == "policy_gradient" and bool(self.target_kl),
            "objective='policy_gradient' takes its one step at KL 0, where target_kl never stops it: leave it out.",
        )


@dataclass(frozen=True, kw_only=True)
class TRPOUpdateSettings(PassSettings, TRPOSettings, SamplingSettings):
    """What TRPO's step may touch."""


@dataclass(frozen=True, kw_only=True)
class ControlSettings(CriticSettings, ObjectiveSettings, KLSettings):
    """What the controllers may touch."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(OptimizerSettings, RunSettings):
    """What the learning rate may touch."""
