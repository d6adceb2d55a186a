"""From a command-line name to a reward function; nothing in a name is evaluated."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from lmppo.redaction import scrubbed
from lmppo.rewards import RewardFn

FORMS = "lexicon, classifier:<path or id>, toy:<name>=<number>, package.module:function or path/to/file.py:function"


@scrubbed
def load(spec: str, *, trust_remote_code: bool = False) -> RewardFn:
    """The reward function a name stands for; the forms are listed in :mod:`reward_models`.

    Args:
        spec: The name. ``lexicon``, ``classifier:`` and ``toy:`` win over modules of the same names.
        trust_remote_code: Whether code that comes with a classifier may run.

    Raises:
        UntrustedModelError: A classifier's weights are pickled, or it needs code that is not trusted.
        ValueError: The name has none of the forms, or what it names does not exist; the message lists what does.
        TypeError: What it names cannot be called.
    """
    kind, _, rest = spec.partition(":")
    if spec == "lexicon":
        from reward_models.lexicon import lexicon

        return lexicon
    if kind == "classifier":
        return _classifier(rest, spec, trust_remote_code)
    if kind == "toy":
        from reward_models import toy

        return toy.load(rest)
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise ValueError(f"the reward {spec!r} is none of: {FORMS}.")
    module = _module_of_file(Path(source), spec) if source.endswith(".py") else _imported(source, spec)
    return _function(module, name, spec)


def _classifier(rest: str, spec: str, trust_remote_code: bool) -> RewardFn:
    from lmppo.rewards import ClassifierReward

    model, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = set(options) - {"output", "label", "append_eos"}
    append_eos = {"true": True, "false": False, None: None}
    if not model or unknown or options.get("append_eos") not in append_eos:
        raise ValueError(
            f"the reward {spec!r} must read classifier:<path or id>[?output=...&label=...&append_eos=true or false]."
        )
    shipped = Path(__file__).parent / model
    if not Path(model).exists() and (shipped / "config.json").exists():
        model = str(shipped)
    return ClassifierReward(
        model,
        output=options.get("output", "log_odds"),
        label=options.get("label"),
        append_eos=append_eos[options.get("append_eos")],
        trust_remote_code=trust_remote_code,
    )


def _imported(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # the module is there; something it imports is not
        raise ValueError(
            f"the reward {spec!r} names no module that can be imported ({error.name!r} is not found): install it, or "
            f"give path/to/file.py:function. The forms are: {FORMS}."
        ) from error


def _module_of_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"the reward {spec!r} names the file {str(path)!r}, which does not exist.")
    name = f"reward_file_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and the like look their module up
    found.loader.exec_module(module)
    return module


def _function(module: ModuleType, name: str, spec: str) -> Any:
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        public = ", ".join(sorted(n for n in known if not n.startswith("_"))) or "(none)"
        raise ValueError(f"the reward {spec!r} names no function there: {name!r} is not among {public}.")
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"the reward {spec!r} is a {type(function).__name__}, not a function.")
    return function
