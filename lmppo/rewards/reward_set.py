"""All reward functions of a run, called and added up as one."""

import asyncio
import functools
import inspect
import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from lmppo.config import RewardStream
from lmppo.rewards.checks import check_totals, checked_rows
from lmppo.rewards.classifier import ClassifierReward
from lmppo.rewards.protocol import REWARD_ARGUMENTS, RewardError, RewardFn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """What the reward functions gave for ``B`` completions.

    Attributes:
        token_scores: ``(B, width, K)`` float32, each stream's weighted sum of its functions: a number for the whole
            completion stands on its last token, rewards per token stand on their tokens.
        per_function: ``(B, F)`` float32, each function's unweighted total per completion, NaN where it gave ``None``.
        metrics: The mean of each metric that functions logged with ``log_metric``.
        extras: The columns that functions logged with ``log_extra``, ``B`` values each.
    """

    token_scores: Tensor
    per_function: Tensor
    metrics: dict[str, float]
    extras: dict[str, list]

    def __post_init__(self) -> None:
        n_rows = self.token_scores.shape[0]
        for name, ndim in (("token_scores", 3), ("per_function", 2)):
            tensor = getattr(self, name)
            if tensor.ndim != ndim or tensor.shape[0] != n_rows or tensor.dtype != torch.float32:
                raise ValueError(
                    f"Scores.{name} is {tensor.dtype} {tuple(tensor.shape)}; expected float32 ({n_rows}, ...)."
                )
        for column, values in self.extras.items():
            if len(values) != n_rows:
                raise ValueError(f"Scores.extras[{column!r}] has {len(values)} values; expected {n_rows}.")


class RewardSet:
    """All reward functions of a run, with their weights and names, called and checked as one.

    Args:
        reward_funcs: One or several of: a function of the :class:`RewardFn` protocol; a directory, Hub id or loaded
            model of a sequence classifier with one label, whose logit is the reward.
        reward_weights: One weight per function (default: 1 each).
        reward_processing_classes: The tokenizer of each classifier, ``None`` for a function (default: the saved ones).
        device: Where classifiers given by name or as models score.
        stream_of: The reward stream of each function (default: all in one).
        n_streams: Number of streams ``K``.

    Raises:
        ValueError: No function is given, the counts do not match, or a classifier cannot be used.
        TypeError: A function is not callable or does not take the protocol's keyword arguments.
    """

    def __init__(
        self,
        reward_funcs: "RewardFn | str | PreTrainedModel | Sequence[RewardFn | str | PreTrainedModel]",
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: "PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None" = None,
        device: torch.device | str | None = None,
        stream_of: Sequence[int] | None = None,
        n_streams: int = 1,
    ) -> None:
        functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not functions:
            raise ValueError("reward_funcs is empty: give at least one reward function.")
        self.weights = [float(w) for w in ([1.0] * len(functions) if reward_weights is None else reward_weights)]
        tokenizers: list[Any] = [None] * len(functions)
        if reward_processing_classes is not None:
            one = not isinstance(reward_processing_classes, list | tuple)
            tokenizers = [reward_processing_classes] if one else list(reward_processing_classes)
        for setting, given in (("reward_weights", self.weights), ("reward_processing_classes", tokenizers)):
            if len(given) != len(functions):
                raise ValueError(
                    f"{setting} has {len(given)} entries for {len(functions)} reward functions: give one for each."
                )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"reward_weights={self.weights} must be finite numbers.")
        self._functions = [_as_function(f, t, device) for f, t in zip(functions, tokenizers, strict=True)]
        self.names = _unique_names(self._functions)
        self.stream_of = list(stream_of) if stream_of is not None else [0] * len(functions)
        self.n_streams = n_streams

    @classmethod
    def from_streams(
        cls,
        streams: Sequence[RewardStream],
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Any = None,
        device: torch.device | str | None = None,
    ) -> "RewardSet":
        """The functions of several streams, one stream after the other; a stream's weight multiplies its functions'.

        Raises:
            ValueError: Two streams share a name, or one (other than ``kl``, which must) has no reward functions.
        """
        names = [stream.name for stream in streams]
        if len(set(names)) < len(names):
            raise ValueError(f"reward streams must have different names, got {', '.join(names)}.")
        for stream in streams:
            if bool(stream.reward_funcs) == (stream.name == "kl"):
                raise ValueError(
                    f"reward stream {stream.name!r} has {len(stream.reward_funcs)} reward_funcs: the stream 'kl' has "
                    f"none (it holds the KL penalty), any other at least one."
                )
            if stream.name == "kl" and stream.weight != 1:
                raise ValueError(f"reward stream 'kl': weight={stream.weight} has no effect; set kl_coef instead.")
        stream_of = [k for k, stream in enumerate(streams) for _ in stream.reward_funcs]
        functions = [function for stream in streams for function in stream.reward_funcs]
        rewards = cls(functions, reward_weights, reward_processing_classes, device, stream_of, len(streams))
        rewards.weights = [w * streams[k].weight for w, k in zip(rewards.weights, stream_of, strict=True)]
        return rewards

    def score(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        trainer_state: Any,
        width: int,
    ) -> Scores:
        """Call every function on copies of the batch, check what it returns, and add it up per token.

            token_scores[b, t, k] = sum_{f in stream k} weight_f * reward_f[b, t]

        A number for the whole completion counts as a reward on its last token, ``None`` as no reward. Python's,
        numpy's and torch's random states are the same after the call as before.

        Args:
            prompts: ``B`` prompts, text or chat messages.
            completions: ``B`` completions, of the same kind.
            completion_ids: ``B`` lists of the sampled tokens that count.
            columns: The other data columns, ``B`` values each; one with the name of another argument is left out.
            trainer_state: Passed on; its ``global_step`` is named in errors.
            width: Positions ``T`` of the result, at least the longest completion.

        Raises:
            RewardError: A function raised an exception.
            TypeError: A function returned something that is no number.
            ValueError: A function returned the wrong count or shape, NaN, infinity or a number beyond ``LARGEST``, or
                no function applies to a row.
        """
        lengths = [len(ids) for ids in completion_ids]
        if not all(0 < n <= width for n in lengths):
            raise ValueError(f"completions of {min(lengths)} to {max(lengths)} tokens do not fit 1 to width={width}.")
        log = _Log(len(completions))
        batch = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        with _own_randomness(_global_step(trainer_state)):
            returned = self._call_all(batch, trainer_state, log)

        rows = [
            checked_rows(name, values, lengths, completions) for name, values in zip(self.names, returned, strict=True)
        ]
        totals = torch.stack([_totals(of_one) for of_one in rows], dim=1)
        per_token = torch.stack([_on_tokens(of_one, lengths, width) for of_one in rows], dim=2)
        tokens = torch.zeros(len(completions), width, self.n_streams, dtype=torch.float64)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        tokens.index_add_(2, torch.tensor(self.stream_of), weights * per_token)  # adds in the functions' order
        check_totals(tokens, totals, completions)
        metrics = {name: math.fsum(values) / len(values) for name, values in log.metrics.items()}
        return Scores(tokens.float(), totals.float(), metrics, log.extras)

    def _call_all(self, batch: dict[str, list], trainer_state: Any, log: "_Log") -> list[Any]:
        """What each function returned: first the plain ones, one after the other, then the async ones together."""
        reports = {"trainer_state": trainer_state, "log_extra": log.extra, "log_metric": log.metric}
        returned = []
        for name, function in zip(self.names, self._functions, strict=True):
            arguments = {key: _copied(value) for key, value in batch.items()}
            try:
                returned.append(function(**arguments | reports))
            except Exception as error:
                raise _reward_error(name, trainer_state, error) from error
        waiting = {i: value for i, value in enumerate(returned) if inspect.isawaitable(value)}
        if waiting:
            results = asyncio.run_coroutine_threadsafe(_gather(list(waiting.values())), self._loop).result()
            for i, result in zip(waiting, results, strict=True):
                if isinstance(result, BaseException):
                    raise _reward_error(self.names[i], trainer_state, result) from result
                returned[i] = result
        return returned

    @functools.cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """One event loop in a thread of its own: clients outlive a call, and a notebook's loop is left alone."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="lmppo-rewards", daemon=True).start()
        return loop


def _totals(rows: list[list[float] | None]) -> Tensor:
    """``(B,)`` the sum of each row, NaN for ``None``."""
    return torch.tensor([math.nan if row is None else math.fsum(row) for row in rows], dtype=torch.float64)


def _on_tokens(rows: list[list[float] | None], lengths: list[int], width: int) -> Tensor:
    """``(B, width)`` the rewards where they stand: those of a row end at its last token, and are 0 elsewhere."""
    tokens = torch.zeros(len(rows), width, dtype=torch.float64)
    for b, row in enumerate(rows):
        if row is not None:
            tokens[b, lengths[b] - len(row) : lengths[b]] = torch.tensor(row, dtype=torch.float64)
    return tokens


def _as_function(given: Any, tokenizer: Any, device: torch.device | str | None) -> Callable[..., Any]:
    if isinstance(given, str | Path | torch.nn.Module):
        return ClassifierReward(given, tokenizer, device=device)
    if not callable(given):
        raise TypeError(f"reward function {given!r} is a {type(given).__name__}: give a callable, a path or a model.")
    try:
        parameters = inspect.signature(given).parameters
    except ValueError:  # a builtin without a signature
        return given
    protocol = set(REWARD_ARGUMENTS)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not protocol <= set(parameters):
        raise TypeError(
            f"reward function {_name(given)!r} does not accept {', '.join(sorted(protocol - set(parameters)))}: "
            "add **kwargs to its parameters."
        )
    return given


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _unique_names(functions: list[Callable[..., Any]]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name, count = _name(function), 1
        while (name if count == 1 else f"{name}_{count}") in names:
            count += 1
        names.append(name if count == 1 else f"{name}_{count}")
    return names


class _Log:
    """What the reward functions of one call report beside their rewards; the last column of a name stays."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list] = {}

    def extra(self, column: str, values: Sequence) -> None:
        if len(values) != self.n_rows:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {self.n_rows} completions.")
        self.extras[column] = list(values)

    def metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))


def _copied(value: Any) -> Any:
    """A copy of nested lists and dicts, so that a function which edits its arguments edits only its own."""
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


@contextmanager
def _own_randomness(step: int) -> Iterator[None]:
    """Random states of their own for reward functions, from torch's seed and the step; the caller's come back after."""
    python, numpys = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            seed = (torch.initial_seed() + step) % 2**32
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numpys)


async def _gather(awaitables: list[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _global_step(trainer_state: Any) -> int:
    return int(getattr(trainer_state, "global_step", 0))


def _reward_error(name: str, trainer_state: Any, error: BaseException) -> RewardError:
    step = _global_step(trainer_state)
    return RewardError(f"reward function {name!r} raised {type(error).__name__} at step {step}: {error}")
