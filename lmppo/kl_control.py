"""Coefficients of the KL penalties to the reference and to the old policy, fixed or adapted to a target."""

import math
from dataclasses import dataclass


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
