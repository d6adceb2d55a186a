"""The functions of a run, and their calls: each gets copies of the batch and random states of its own."""

import asyncio
import functools
import inspect
import random
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from lmppo.protocols import Tokenizer
from lmppo.rewards.classifier import ClassifierReward
from lmppo.rewards.protocol import ENDED, REWARD_ARGUMENTS, TRLS_ARGUMENTS, RewardError, RewardFn


@dataclass(frozen=True)
class Function:
    """A function as messages and metrics call it.

    Attributes:
        kind: ``"reward function"`` or ``"watch function"``.
        name: Unique among all functions of a run.
        call: What is called.
        takes_ended: Whether it is to be told which completions ended.
    """

    kind: str
    name: str
    call: RewardFn
    takes_ended: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


class Log:
    """What the reward functions of one call report beside their rewards; the last column of a name stays."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list] = {}

    def extra(self, column: str, values: Sequence) -> None:
        """``log_extra``: a column of one value per completion."""
        if len(values) != self.n_rows:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {self.n_rows} completions.")
        self.extras[column] = list(values)

    def metric(self, name: str, value: float) -> None:
        """``log_metric``: a number, averaged with others of its name."""
        self.metrics.setdefault(name, []).append(float(value))


def make_functions(
    kind: str,
    given: Sequence[Any],
    tokenizers: Sequence[Tokenizer | None],
    device: torch.device | str | None,
    taken: Collection[str] = (),
    *,
    trust_remote_code: bool = False,
) -> list[Function]:
    """Functions with unique names, from callables and from classifiers given by name or as models.

    Args:
        kind: What messages call them.
        given: Callables, names and models.
        tokenizers: The tokenizer of each classifier, ``None`` for the saved one.
        device: Where classifiers given by name or as models score.
        taken: Names that others have.
        trust_remote_code: Whether code that comes with a classifier given by name may run.

    Raises:
        ValueError: A classifier cannot be used.
        TypeError: One cannot be called, or not with the protocol's keyword arguments.
    """
    functions: list[Function] = []
    for one, tokenizer in zip(given, tokenizers, strict=True):
        call = _as_function(kind, one, tokenizer, device, trust_remote_code)
        name = _unique(_name(call), {*taken, *(function.name for function in functions)})
        functions.append(Function(kind, name, call, ENDED in _parameters(call)))
    return functions


def call_all(functions: Sequence[Function], batch: dict[str, list], trainer_state: Any, log: Log) -> list[Any]:
    """What each function returned: first the plain ones, one after the other, then the async ones together.

    Python's, numpy's and torch's random states are the same after the call as before.

    Args:
        functions: The functions.
        batch: The arguments that are lists, ``B`` values each; every function gets copies.
        trainer_state: Passed on; its ``global_step`` is named in errors.
        log: Gets what the functions report.

    Raises:
        RewardError: A function raised an exception.
    """
    reports = {"trainer_state": trainer_state, "log_extra": log.extra, "log_metric": log.metric}
    step = int(getattr(trainer_state, "global_step", 0))
    returned: list[Any] = []
    with _own_randomness(step):
        for function in functions:
            arguments = {key: _copied(value) for key, value in batch.items() if key != ENDED or function.takes_ended}
            try:
                returned.append(function.call(**arguments | reports))
            except Exception as error:
                raise _reward_error(function, step, error) from error
        return _awaited(functions, returned, step)


def _awaited(functions: Sequence[Function], returned: list[Any], step: int) -> list[Any]:
    """What was returned, with the results of async functions, which run together, in their places."""
    waiting = [i for i, value in enumerate(returned) if inspect.isawaitable(value)]
    if not waiting:
        return returned
    results = asyncio.run_coroutine_threadsafe(_gather([returned[i] for i in waiting]), _event_loop()).result()
    for i, result in zip(waiting, results, strict=True):
        if isinstance(result, BaseException):
            raise _reward_error(functions[i], step, result) from result
        returned[i] = result
    return returned


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One event loop in a thread of its own: clients outlive a call, and a notebook's loop is left alone."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lmppo-rewards", daemon=True).start()
    return loop


async def _gather(awaitables: list[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _reward_error(function: Function, step: int, error: BaseException) -> RewardError:
    return RewardError(f"{function} raised {type(error).__name__} at step {step}: {error}")


def _as_function(
    kind: str, given: Any, tokenizer: Tokenizer | None, device: torch.device | str | None, trust_remote_code: bool
) -> RewardFn:
    if isinstance(given, torch.nn.Module):
        given = _of_module(kind, given)
    if isinstance(given, str | Path | torch.nn.Module):
        return ClassifierReward(given, tokenizer, device=device, trust_remote_code=trust_remote_code)
    if not callable(given):
        raise TypeError(f"{kind} {given!r} is a {type(given).__name__}: give a callable, a path or a model.")
    if isinstance(given, type):
        raise TypeError(f"{kind} {given.__name__!r} is a class: give an object of it, {given.__name__}(...).")
    parameters = _parameters(given)
    missing = set(TRLS_ARGUMENTS).difference(parameters)
    if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"{kind} {_name(given)!r} does not accept {', '.join(sorted(missing))}: add **kwargs to its parameters."
        )
    return given


def needed_columns(function: Function) -> list[str]:
    """The data columns that a function cannot do without: its arguments that have no default."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p for p in _parameters(function.call).values() if p.kind in by_name and p.default is p.empty]
    return [p.name for p in needed if p.name not in REWARD_ARGUMENTS]


def _parameters(call: RewardFn) -> Mapping[str, inspect.Parameter]:
    """A callable's parameters; a builtin without a signature may take anything."""
    try:
        return inspect.signature(call).parameters
    except ValueError:
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _of_module(kind: str, given: torch.nn.Module) -> Any:
    """A module by what its forward takes: the protocol's arguments, or tokens as a classifier does.

    Raises:
        TypeError: It is neither.
    """
    from lmppo.models.names import uncompiled  # lmppo.models needs transformers, which rewards do not

    module = uncompiled(given)
    taken, name = inspect.signature(module.forward).parameters, type(module).__name__
    if {"prompts", "completions", "completion_ids"} & set(taken):
        if inspect.iscoroutinefunction(module.forward):
            raise TypeError(f"{kind} {name!r} has an async forward: give an async function that calls the module.")
        return ModuleReward(module)
    if "input_ids" in taken and hasattr(module, "config"):
        has_head = module.base_model is not module or hasattr(module, "num_labels")
        if has_head and not module.can_generate():
            return given
    raise TypeError(
        f"{kind} {name!r} is a torch module whose forward takes ({', '.join(taken)}): expected a sequence classifier of "
        f"transformers, or a module with forward(prompts, completions, **kwargs)."
    )


class ModuleReward:
    """A module whose forward follows the protocol, as a reward function: in evaluation mode and without gradients.

    Args:
        module: The module; each part of it is in its own mode again after a call.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.__name__ = type(module).__name__
        self.__signature__ = inspect.signature(module.forward)

    @torch.no_grad()
    def __call__(self, **arguments: Any) -> Any:
        """What forward returns."""
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            return self.module(**arguments)
        finally:
            for module in training:
                module.training = True


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _unique(name: str, taken: Collection[str]) -> str:
    """The name, or the first of ``name_2``, ``name_3``, ... that is free."""
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def _copied(value: Any) -> Any:
    """A copy of nested lists, dicts, arrays and tensors, so that a function which edits its arguments edits only its own."""
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value.copy() if isinstance(value, numpy.ndarray) else value


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
