"""The coefficient of the KL penalty to the reference policy, fixed or adapted to a target."""

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
