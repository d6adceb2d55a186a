"""Several processes of one run: an error on one of them is raised on all, so that none waits for one that is gone."""

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import gather_object

from lmppo.checks import NonFiniteError
from lmppo.rewards import RewardError

_KINDS = (NonFiniteError, RewardError, TypeError, ValueError)  # as what it is raised on the others; else RuntimeError


@contextlib.contextmanager
def raised_together(accelerator: Accelerator, doing: str) -> Iterator[None]:
    """An error within the block on one process is raised on all of them, at the end of the block.

    Within it, no process may wait for the others.

    Args:
        accelerator: Tells the processes apart.
        doing: What the block does, for the message on the other processes.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = []
    if error is not None:
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
        failures = [(kind, f"process {accelerator.process_index}: {error}")]
    if accelerator.num_processes > 1:
        failures = gather_object(failures)
    if error is not None:
        raise error
    if failures:
        kind, text = failures[0]
        raise kind(f"{doing} failed on another process. {text}")
