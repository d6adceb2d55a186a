"""Passwords and tokens: taken out of what a run writes, prints and raises."""

import contextlib
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

MASK = "***"
P = ParamSpec("P")
T = TypeVar("T")

# Names of settings that hold a secret; `eos_token`, `target_token` and their like are of a vocabulary.
_NAME = (
    r"(?:[a-z0-9]+[_-])*(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key|secret(?:[_-]?key)?|passw(?:or)?d|"
    r"passphrase|credentials?|authorization|signature|(?:hub|hf|hugging_?face|access|auth|api|bearer|refresh|session|"
    r"security|secret|git(?:hub|lab)|wandb|trackio|comet|neptune|mlflow|slack|bot|personal|login|write|read)[_-]?token)"
)
_SECRET_NAME = re.compile(rf"{_NAME}|token", re.IGNORECASE)
_SCHEME = r"(?i:\b[a-z][a-z0-9+.-]+:/{1,2})"  # a path has one of the two slashes of a URL
_PATTERNS = [
    # user:password@ of a URL, up to its last @; a password may hold a slash, unlike what follows a port.
    (re.compile(rf"({_SCHEME})[^\s/'\"<>]*@"), rf"\1{MASK}@"),
    (re.compile(rf"({_SCHEME})[^\s/'\"<>@:]*:(?!\d+(?:[/?#\s'\"]|$))[^\s'\"<>]*@"), rf"\1{MASK}@"),
    (re.compile(r"(?<![\w/.])[\w.%+-]+:[^\s/:@'\"]+@(?=\w)"), f"{MASK}@"),  # the same without the scheme
    (re.compile(r"((?i:\bbearer\s+))[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    # name=value, name: value, "--name value", and "'name', 'value'" of a list; "the token: a" is a sentence.
    (
        re.compile(
            rf"((?<![\w-])(?i:{_NAME}(?:['\"]?\s*[=:]\s*|['\"],\s*)|(?:token|key|sig)=|token['\"]\s*:\s*)['\"]?)"
            rf"[^\s'\",;&#)\]}}]+"
        ),
        rf"\1{MASK}",
    ),
    (re.compile(rf"(--(?i:{_NAME}|token)(?:=|\s+|['\"],\s*)['\"]?)[^\s'\",]+"), rf"\1{MASK}"),
    # How the tokens of Hugging Face, GitHub, GitLab, OpenAI, Slack, Google and Amazon begin; JSON web tokens.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|"
            r"sk-(?:[a-z]+-)?[A-Za-z0-9_]{20,}|xox[a-z]-[\w-]{8,}|AIza[\w-]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}|"
            r"eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
        ),
        MASK,
    ),
]
_DESCRIPTIONS = {"config.json", "generation_config.json", "adapter_config.json", "README.md"}


def scrub(value: Any) -> Any:
    """A copy of a text, or of nested lists and mappings, with ``***`` in the place of passwords and tokens.

    Recognized are the user part of URLs, parameters of URLs and settings whose names say what they hold (``password``,
    ``api_key``, ``hub_token``, ...), and the forms in which the usual services issue tokens.
    """
    if isinstance(value, str):
        for pattern, replacement in _PATTERNS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {scrub(key): MASK if _is_secret(key, held) else scrub(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(scrub, value)) if type(value) in (list, tuple) else value
    return value


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(name, str) and value not in (None, "") and bool(_SECRET_NAME.fullmatch(name))


def scrubbed(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with :func:`scrub` done to the messages of what it raises, causes included."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            scrub_error(error)
            raise

    return call


def scrub_error(error: BaseException) -> None:
    """Take passwords and tokens out of an exception's message, and of those of its causes."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        one.args = tuple(scrub(part) for part in one.args)
        for name in ("filename", "filename2", "strerror", "code"):
            if isinstance(getattr(one, name, None), str):
                setattr(one, name, scrub(getattr(one, name)))


@contextlib.contextmanager
def scrubbed_stderr() -> Iterator[None]:
    """Within it, what is printed to stderr appears at the end, scrubbed: a parser prints what it objects to."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        sys.stderr.write(scrub(printed.getvalue()))


def scrub_files(directory: Path) -> None:
    """Take passwords and tokens out of what describes the models in a directory: their configurations and cards."""
    for path in directory.rglob("*"):
        if path.name in _DESCRIPTIONS and path.is_file():
            text = path.read_text(encoding="utf-8")
            clean = json.dumps(scrub(json.loads(text)), indent=2) + "\n" if path.suffix == ".json" else scrub(text)
            if path.suffix != ".json" or json.loads(clean) != json.loads(text):
                path.write_text(clean, encoding="utf-8")
