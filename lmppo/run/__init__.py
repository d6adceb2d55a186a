"""A run: its directory, its checkpoints, and what it tells callbacks and trackers."""

from lmppo.run.callbacks import Callbacks
from lmppo.run.run import Run

__all__ = ["Callbacks", "Run"]
