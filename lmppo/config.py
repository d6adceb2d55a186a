"""PPOConfig: all settings of a run in one flat, frozen dataclass."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmppo.setting_rules import KL_FORMS, Contradictions
from lmppo.settings import (
    AdvantageSettings,
    CollectorSettings,
    ControlSettings,
    CriticSettings,
    EncoderSettings,
    EstimatorSettings,
    KLSettings,
    ObjectiveSettings,
    OptimizerSettings,
    PassSettings,
    PromptSettings,
    ReportingSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SamplingSettings,
    ScheduleSettings,
    ShapingSettings,
    StreamSettings,
    TRPOSettings,
    TRPOUpdateSettings,
    TruncationSettings,
    UpdateSettings,
)

__all__ = ["KL_FORMS", "REPLACED", "PPOConfig", "RewardStream"]

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
class PPOConfig(
    EncoderSettings,
    CollectorSettings,
    ShapingSettings,
    EstimatorSettings,
    StreamSettings,
    UpdateSettings,
    TRPOUpdateSettings,
    ControlSettings,
    ScheduleSettings,
    ReportingSettings,
    OptimizerSettings,
    PassSettings,
    CriticSettings,
    TRPOSettings,
    ObjectiveSettings,
    AdvantageSettings,
    TruncationSettings,
    KLSettings,
    RewardSettings,
    SamplingSettings,
    PromptSettings,
    RolloutSettings,
    RunSettings,
):
    """The configuration of a :class:`lmppo.PPOTrainer`; immutable.

    Counts of completions (``rollout_batch_size``, ``minibatch_size``) are global, over all processes;
    ``micro_batch_size`` is per process and changes memory only. One step (``max_steps``, ``save_steps``,
    ``warmup_steps``, ...) is one PPO iteration: a rollout and ``ppo_epochs * rollout_batch_size / minibatch_size``
    optimizer steps, of which the policy takes no more once ``target_kl`` is exceeded. `docs/configuration.md` gives the
    reason for each default.

    Raises:
        TypeError: A value is of the wrong kind, such as text where a number is expected.
        ValueError: A value is out of range, or the sizes do not divide; the message names the setting and the remedy.
    """

    # Replaced; here so that files and flags that still have them get an error which says what to set
    kl_estimator: str | None = field(default=None, repr=False, metadata={"help": argparse.SUPPRESS})
    kl_placement: str | None = field(default=None, repr=False, metadata={"help": argparse.SUPPRESS})

    def __post_init__(self) -> None:
        self._refuse_replaced()
        super().__post_init__()

    def contradictions(self) -> Contradictions:
        """Sizes that do not divide, and objectives that need whole batches."""
        yield (
            self.rollout_batch_size % self.num_generations > 0,
            f"rollout_batch_size={self.rollout_batch_size} must be a multiple of "
            f"num_generations={self.num_generations}: each prompt gets num_generations completions.",
        )
        yield (
            self.rollout_batch_size % self.minibatch_size > 0,
            f"rollout_batch_size={self.rollout_batch_size} must be a multiple of "
            f"minibatch_size={self.minibatch_size}, so that every completion is trained on once per epoch.",
        )
        whole = self.ppo_epochs == 1 and self.minibatch_size == self.rollout_batch_size
        yield (
            self.objective == "policy_gradient" and not whole,
            f"objective='policy_gradient' is valid for one step per rollout only: set ppo_epochs=1 and "
            f"minibatch_size=rollout_batch_size={self.rollout_batch_size}, or objective='importance_sampled'.",
        )

    def _refuse_replaced(self) -> None:
        given = [f"{name}={getattr(self, name)!r}" for name in REPLACED if getattr(self, name) is not None]
        pair = f"{self.kl_estimator or 'k1'}_{self.kl_placement or 'reward'}"  # the defaults they had
        remedy = _DROPPED_PAIRS.get(pair, f"set kl_form to one of {', '.join(KL_FORMS)}")
        if given:
            remedy = f"set kl_form={pair!r}" if pair in KL_FORMS else remedy
            raise ValueError(f"{', '.join(given)}: kl_form has replaced kl_estimator and kl_placement; {remedy}.")

    def check_processes(self, num_processes: int, *, evaluates: bool = True) -> None:
        """Refuse sizes that do not divide evenly over the processes.

        Args:
            num_processes: The number of processes.
            evaluates: Whether ``eval_completions`` is used.

        Raises:
            ValueError: A global count is not a multiple of ``num_processes``.
        """
        names = ["rollout_batch_size", "minibatch_size"] + ["eval_completions"] * evaluates
        for name in names:
            value = getattr(self, name)
            if value % num_processes:
                raise ValueError(
                    f"{name}={value} is a count over all processes and must be a multiple of their number, "
                    f"{num_processes}: try {max(1, value // num_processes) * num_processes}."
                )

    def to_dict(self) -> dict[str, Any]:
        """All settings, as plain Python values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in REPLACED}
