"""What adapts from one iteration to the next: the coefficients of the two KL penalties, and the critic's warm-up."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

from lmppo.settings import ControlSettings


@dataclass
class FixedKL:
    """A coefficient that never changes."""

    coef: float

    def update(self, kl_to_ref: float, n_completions: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Ignored: a resumed run uses the coefficient in its configuration."""


@dataclass
class AdaptiveKL:
    """The proportional controller of Ziegler et al., 2019 (arXiv 1909.08593), section 2.2.

    After each batch of ``n`` completions with mean sequence KL ``kl``::

        error = clip(kl / target - 1, -0.2, 0.2)
        coef  = coef * (1 + error * n / horizon)

    Args:
        coef: Initial coefficient.
        target: Target KL to the reference, in nats per completion.
        horizon: Completions over which a full error changes the coefficient by 20 %.
    """

    coef: float
    target: float
    horizon: int
    lowest: float = 1e-6
    highest: float = 1e3

    def update(self, kl_to_ref: float, n_completions: int) -> None:
        """Raise the coefficient if the KL is above the target, lower it if below.

        Raises:
            ValueError: ``kl_to_ref`` is not finite; the coefficient is left as it was.
        """
        if not math.isfinite(kl_to_ref):
            raise ValueError(f"kl_to_ref={kl_to_ref} is not finite: the policy or the reference has diverged.")
        error = min(max(kl_to_ref / self.target - 1.0, -0.2), 0.2)
        factor = max(1.0 + error * n_completions / self.horizon, 0.1)
        self.coef = min(max(self.coef * factor, self.lowest), self.highest)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved coefficient."""
        self.coef = float(state["coef"])


@dataclass
class AdaptiveBeta:
    """The coefficient beta of the KL between old and new policy: Schulman et al. 2017 (arXiv 1707.06347), section 4.

    After each update, with ``kl`` its mean KL(old || new) per token::

        beta = beta / 2  if kl < target / 1.5
        beta = beta * 2  if kl > target * 1.5

    Args:
        coef: Initial beta.
        target: Target KL of an update, in nats per token. None: beta is fixed.
    """

    coef: float
    target: float | None
    lowest: float = 1e-6
    highest: float = 1e6

    def update(self, kl: float) -> None:
        """Double or halve beta if the KL is off its target.

        Raises:
            ValueError: ``kl`` is not finite; beta is left as it was.
        """
        if not math.isfinite(kl):
            raise ValueError(f"KL(old || new)={kl} is not finite: the policy has diverged.")
        if self.target is None:
            return
        factor = 0.5 if kl < self.target / 1.5 else 2.0 if kl > self.target * 1.5 else 1.0
        self.coef = min(max(self.coef * factor, self.lowest), self.highest)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved beta; a fixed beta comes from the configuration."""
        if self.target is not None:
            self.coef = float(state["coef"])


@dataclass
class CriticWarmup:
    """The first iterations, in which the policy is frozen and only the critic learns (VC-PPO, arXiv 2503.01491).

    Args:
        steps: Iterations it lasts at most.
        explained_variance: It ends once the critic explains this share of a batch's Monte-Carlo returns. None: it lasts
            all its steps.
    """

    steps: int
    explained_variance: float | None = None
    over: bool = False

    def update(self, iteration: int, explained_variance: float) -> None:
        """End the warm-up before the update of this iteration, if its time is up or the critic explained enough."""
        enough = self.explained_variance is not None and explained_variance >= self.explained_variance
        self.over = self.over or enough or iteration >= self.steps

    def state_dict(self) -> dict[str, bool]:
        """What a resumed run needs."""
        return {"over": self.over}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Continue from a saved state."""
        self.over = bool(state["over"])


class Control:
    """All that adapts in a run.

    Attributes:
        kl: The coefficient of the KL to the reference.
        beta: The price of the KL to the old policy, with ``objective='kl_penalty'``.
        warmup: The first iterations, in which only the critic learns.
    """

    def __init__(self, config: ControlSettings) -> None:
        self.kl: FixedKL | AdaptiveKL = FixedKL(config.kl_coef)
        if config.kl_target is not None:
            self.kl = AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
        self.beta = AdaptiveBeta(config.policy_kl_coef, config.policy_kl_target)
        self.warmup = CriticWarmup(config.critic_warmup_steps, config.critic_warmup_explained_variance)

    @property
    def policy_frozen(self) -> bool:
        """Whether only the critic learns now."""
        return not self.warmup.over

    def check_target(self, support_cost: float) -> None:
        """Warn of a ``kl_target`` that is below what leaving out tokens costs before the first step.

        Args:
            support_cost: That part of ``kl_to_ref``, in nats per completion.
        """
        if isinstance(self.kl, AdaptiveKL) and self.kl.target < support_cost:
            warnings.warn(
                f"kl_target={self.kl.target} is below {support_cost:.3g} nats per completion, which leaving out tokens "
                f"(top_k, top_p, min_p, min_new_tokens, suppress_tokens, bad_words_ids) costs before the first step, "
                f"when the policy is still the reference. No kl_coef brings kl_to_ref down to the target, and the "
                f"controller would raise it forever: set kl_target above {support_cost:.3g}, or leave out fewer tokens.",
                stacklevel=2,
            )

    def update(self, row: dict[str, float], n_completions: int) -> None:
        """Adapt to what an iteration measured; beta only where the policy moved and its KL was measured.

        Args:
            row: The iteration's metrics: ``kl_to_ref``, and ``policy_kl`` with ``objective='kl_penalty'``.
            n_completions: Completions of the iteration.

        Raises:
            ValueError: A KL is not finite.
        """
        self.kl.update(row["kl_to_ref"], n_completions)
        if "policy_kl" in row:
            self.beta.update(row["policy_kl"])

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        for name, part in vars(self).items():
            part.load_state_dict(state[name])
