"""All reward functions of a run, called and added up as one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lmppo.config import RewardStream
from lmppo.protocols import Tokenizer
from lmppo.rewards.calling import Log, call_all, make_functions, needed_columns
from lmppo.rewards.checks import check_totals, checked_rows
from lmppo.rewards.protocol import RewardFn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Given: TypeAlias = RewardFn | str | Path | PreTrainedModel  # a function, or a classifier by name or as a model


@dataclass(frozen=True)
class Scores:
    """What the reward functions gave for ``B`` completions.

    Attributes:
        token_scores: ``(B, width, K)`` float32, each stream's weighted sum of its functions: a number for the whole
            completion stands on its last token, rewards per token stand on their tokens.
        per_function: ``(B, F)`` float32, each function's unweighted total per completion, NaN where it gave ``None``; the
            functions that watch are the last columns.
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

    Functions that watch are called, checked and logged like reward functions, and never enter the reward.

    Args:
        reward_funcs: One or several of: a function of the :class:`RewardFn` protocol; a directory, Hub id or loaded
            model of a sequence classifier with one label, whose logit is the reward.
        reward_weights: One weight per function (default: 1 each).
        reward_processing_classes: The tokenizer of each classifier, ``None`` for a function (default: the saved ones).
        device: Where classifiers given by name or as models score.
        stream_of: The reward stream of each function (default: all in one).
        n_streams: Number of streams ``K``.
        watch_funcs: Functions that watch, one or several of the same kinds; a classifier's tokenizer is the saved one.
        trust_remote_code: Whether code that comes with a classifier given by name may run.

    Raises:
        ValueError: No reward function is given, the counts do not match, or a classifier cannot be used.
        TypeError: A function is not callable or does not take the protocol's keyword arguments.
    """

    def __init__(
        self,
        reward_funcs: "Given | Sequence[Given]",
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Tokenizer | Sequence[Tokenizer | None] | None = None,
        device: torch.device | str | None = None,
        stream_of: Sequence[int] | None = None,
        n_streams: int = 1,
        watch_funcs: "Given | Sequence[Given] | None" = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        functions = _as_list(reward_funcs)
        watching = [] if watch_funcs is None else _as_list(watch_funcs)
        if not functions:
            raise ValueError("reward_funcs is empty: give at least one reward function.")
        self.weights = [float(w) for w in ([1.0] * len(functions) if reward_weights is None else reward_weights)]
        tokenizers: list[Tokenizer | None] = [None] * len(functions)
        if reward_processing_classes is not None:
            tokenizers = _as_list(reward_processing_classes)
        for setting, given in (("reward_weights", self.weights), ("reward_processing_classes", tokenizers)):
            if len(given) != len(functions):
                raise ValueError(
                    f"{setting} has {len(given)} entries for {len(functions)} reward functions: give one for each, and "
                    f"none for watch_funcs."
                )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"reward_weights={self.weights} must be finite numbers.")
        make = partial(make_functions, trust_remote_code=trust_remote_code)
        self._rewarding = make("reward function", functions, tokenizers, device)
        taken = [function.name for function in self._rewarding]
        self._watching = make("watch function", watching, [None] * len(watching), device, taken)
        self.stream_of = list(stream_of) if stream_of is not None else [0] * len(functions)
        self.n_streams = n_streams

    @classmethod
    def from_streams(
        cls,
        streams: Sequence[RewardStream],
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Any = None,
        device: torch.device | str | None = None,
        watch_funcs: Any = None,
        *,
        trust_remote_code: bool = False,
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
        rewards = cls(
            functions,
            reward_weights,
            reward_processing_classes,
            device,
            stream_of,
            len(streams),
            watch_funcs,
            trust_remote_code=trust_remote_code,
        )
        rewards.weights = [w * streams[k].weight for w, k in zip(rewards.weights, stream_of, strict=True)]
        return rewards

    @property
    def names(self) -> list[str]:
        """The names of all functions, in the order of ``Scores.per_function``."""
        return [function.name for function in (*self._rewarding, *self._watching)]

    @property
    def needed_columns(self) -> dict[str, str]:
        """The data columns that functions cannot do without, each with the first function that names it."""
        functions = [*reversed(self._watching), *reversed(self._rewarding)]
        return {column: str(function) for function in functions for column in needed_columns(function)}

    def describe(self) -> dict[str, list[str]]:
        """What `run_config.yaml` says of the functions: the names of those that reward and of those that watch."""
        return {
            "reward_funcs": [function.name for function in self._rewarding],
            "watch_funcs": [function.name for function in self._watching],
        }

    def score(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        trainer_state: Any,
        width: int,
        ended: list[bool] | None = None,
    ) -> Scores:
        """Call every function on copies of the batch, check what it returns, and add it up per token.

            token_scores[b, t, k] = sum_{f in stream k} weight_f * reward_f[b, t]

        A number for the whole completion counts as a reward on its last token, ``None`` as no reward. Python's,
        numpy's and torch's random states are the same after the call as before. The functions that watch are called
        after the others and start from the same random states, so that no reward depends on them.

        Args:
            prompts: ``B`` prompts, text or chat messages.
            completions: ``B`` completions, of the same kind.
            completion_ids: ``B`` lists of the sampled tokens that count.
            columns: The other data columns, ``B`` values each; one with the name of another argument is left out.
            trainer_state: Passed on; its ``global_step`` is named in errors.
            width: Positions ``T`` of the result, at least the longest completion.
            ended: Whether each completion ended by itself (default: all did).

        Raises:
            RewardError: A function raised an exception.
            TypeError: A function returned something that is no number.
            ValueError: A function returned the wrong count or shape, NaN, infinity or a number beyond ``LARGEST``, or
                no function applies to a row.
        """
        lengths = [len(ids) for ids in completion_ids]
        if not all(0 < n <= width for n in lengths):
            raise ValueError(f"completions of {min(lengths)} to {max(lengths)} tokens do not fit 1 to width={width}.")
        log = Log(len(completions))
        batch = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        batch["completion_ended"] = [True] * len(completions) if ended is None else ended
        returned = call_all(self._rewarding, batch, trainer_state, log)
        returned += call_all(self._watching, batch, trainer_state, log)
        rows = [
            checked_rows(str(function), values, lengths, completions)
            for function, values in zip((*self._rewarding, *self._watching), returned, strict=True)
        ]
        totals = torch.stack([_totals(of_one) for of_one in rows], dim=1)
        n_rewarding = len(self._rewarding)
        per_token = torch.stack([_on_tokens(of_one, lengths, width) for of_one in rows[:n_rewarding]], dim=2)
        tokens = torch.zeros(len(completions), width, self.n_streams, dtype=torch.float64)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        tokens.index_add_(2, torch.tensor(self.stream_of), weights * per_token)  # adds in the functions' order
        check_totals(tokens, totals[:, :n_rewarding], completions)
        metrics = {name: math.fsum(values) / len(values) for name, values in log.metrics.items()}
        return Scores(tokens.float(), totals.float(), metrics, log.extras)


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


def _as_list(given: Any) -> list:
    return list(given) if isinstance(given, list | tuple) else [given]
