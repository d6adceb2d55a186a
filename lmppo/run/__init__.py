"""A run: its directory, its checkpoints, and what it tells callbacks and trackers."""

from lmppo.run.run import Callbacks, Run

__all__ = ["Callbacks", "Run"]
