"""lmppo: token-level PPO with a critic for causal language models on the Hugging Face stack.

``from lmppo import PPOConfig, PPOTrainer``; the math is in :mod:`lmppo.functional`, which needs torch alone.
"""

import time
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
IMPORTED = time.perf_counter()  # from here on, `time/startup` counts

if TYPE_CHECKING:
    from lmppo.config import PPOConfig, RewardStream
    from lmppo.rewards import ClassifierReward
    from lmppo.trainer import PPOTrainer

__all__ = ["ClassifierReward", "PPOConfig", "PPOTrainer", "RewardStream", "__version__"]

_HOMES = {
    "ClassifierReward": "lmppo.rewards",
    "PPOConfig": "lmppo.config",
    "PPOTrainer": "lmppo.trainer",
    "RewardStream": "lmppo.config",
}


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, so that the math and the configuration stay light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmppo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
