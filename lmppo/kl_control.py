"""Coefficients of KL penalties, fixed or adapted to a target: to the reference policy, and to the old policy."""

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
        """The configuration decides: a resumed run keeps the coefficient it was started with now."""


@dataclass
class AdaptiveKL:
    """The proportional controller of Ziegler et al., 2019 (arXiv 1909.08593), section 2.2.

    After each batch of ``n`` completions with mean sequence KL ``kl``::

        error = clip(kl / target - 1, -0.2, 0.2)
        coef  = coef * (1 + error * n / horizon)

    Args:
        coef: Starting coefficient.
        target: KL to the reference to hold, in nats per completion.
        horizon: Completions over which a full error changes the coefficient by 20 %.
    """

    coef: float
    target: float
    horizon: int
    lowest: float = 1e-6
    highest: float = 1e3

    def update(self, kl_to_ref: float, n_completions: int) -> None:
        """Raise the coefficient if the policy strayed too far, lower it if it stayed too close.

        Raises:
            ValueError: ``kl_to_ref`` is not finite; the coefficient is left as it was.
        """
        if not math.isfinite(kl_to_ref):
            raise ValueError(f"kl_to_ref={kl_to_ref} is not finite: the policy or the reference has broken down.")
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
    """The price of a nat between old and new policy: Schulman et al. 2017 (arXiv 1707.06347), section 4.

    After each update, with ``kl`` the mean KL(old || new) per token that it caused::

        beta = beta / 2  if kl < target / 1.5
        beta = beta * 2  if kl > target * 1.5

    Args:
        coef: First beta.
        target: KL per update to aim at, in nats per token. None: beta stays.
    """

    coef: float
    target: float | None
    lowest: float = 1e-6
    highest: float = 1e6

    def update(self, kl: float) -> None:
        """Make the next update shorter or longer.

        Raises:
            ValueError: ``kl`` is not finite; beta is left as it was.
        """
        if not math.isfinite(kl):
            raise ValueError(f"KL(old || new)={kl} is not finite: the update has broken the policy.")
        if self.target is None:
            return
        factor = 0.5 if kl < self.target / 1.5 else 2.0 if kl > self.target * 1.5 else 1.0
        self.coef = min(max(self.coef * factor, self.lowest), self.highest)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved beta; a fixed one is what the configuration says now."""
        if self.target is not None:
            self.coef = float(state["coef"])
