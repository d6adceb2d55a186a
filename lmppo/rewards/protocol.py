"""trl's reward-function protocol.

A reward function is called as trl's trainers call it: keyword arguments ``prompts``, ``completions``,
``completion_ids``, every other data column as a list, and ``trainer_state``, ``log_extra``, ``log_metric``. It returns
one number per completion, ``None`` where it does not apply, or, to reward each token, a list of numbers.
"""

from typing import Any, Protocol

# What a reward function is given of a rollout: no data column may have such a name.
TRLS_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
ENDED = "completion_ended"  # lmppo's own: given to functions that name it
REWARD_ARGUMENTS = (*TRLS_ARGUMENTS, ENDED)


class RewardFn(Protocol):
    """A reward function: plain or ``async def``, a callable object or a :func:`functools.partial`; trl's run unchanged.

    Keyword arguments: every data column but the prompt (one value per completion), ``trainer_state`` (its
    ``global_step`` counts the iterations), ``log_extra(column, values)`` and ``log_metric(name, value)``. A function
    that names ``completion_ended`` among its parameters is also told which completions ended by themselves; the others
    were cut at ``max_completion_length``.
    """

    def __call__(self, *, prompts: list, completions: list, completion_ids: list[list[int]], **kwargs: Any) -> Any:
        """Score a batch; returns one number per completion, None where it does not apply, or lists of numbers."""


class RewardError(RuntimeError):
    """A reward function raised an exception, which is the ``__cause__``."""


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion: itself, or the contents of its chat messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)
