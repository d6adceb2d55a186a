"""The one door by which models, adapters and tokenizers come in: they are checked before a library opens them.

A name becomes a directory; of a Hub id only the files that are read are downloaded, at one commit. Weights must be
safetensors, and code that comes with a model is run only where the caller says so: nothing asks on the terminal. Nothing
else in this repository calls ``from_pretrained``, and a test reads the source for it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lmppo.redaction import scrub

_READ_FROM_HUB = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.vocab", "*.bpe", "*.codes"]
_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz")
_OTHER_WEIGHTS = ("*.gguf", "*.h5", "*.msgpack", "*.ckpt.*", "*.onnx", "*.ot", "*.tflite")
# Keys of adapter_config.json with which peft imports a module, or loads what the adapter names.
_LOADS_MORE = ("megatron_config", "shadow_model", "adapters", "tokenizer_name_or_path")


class UntrustedModelError(OSError, ValueError):
    """What a name leads to would run code or read other files when it is loaded, so it is not loaded."""


@dataclass(frozen=True)
class Source:
    """A model's or a tokenizer's files, checked.

    Attributes:
        name: What they were asked for as.
        directory: Where they are.
        pinned: For ``from_pretrained``: the commit that was checked, for a Hub id.
    """

    name: str
    directory: Path
    pinned: dict[str, str] = field(default_factory=dict)

    @property
    def adapter_base(self) -> str | None:
        """The name of the model that the adapter here is for; None if here is no adapter."""
        config = _read(self.directory / "adapter_config.json")
        return str(config["base_model_name_or_path"]) if config.get("base_model_name_or_path") else None


def find_source(
    name: str | Path, *, trust_remote_code: bool = False, weights: bool = False, may_download: bool = True
) -> Source:
    """The files behind a name, checked.

    Args:
        name: A directory or a Hub id.
        trust_remote_code: Whether code that comes with a model may run.
        weights: Whether weights are to be loaded.
        may_download: Whether the Hub may be asked.

    Raises:
        UntrustedModelError: Loading them would unpickle, run code that is not trusted, or read files elsewhere.
        OSError: There are no such files.
    """
    if Path(name).is_dir():
        source = Source(str(name), Path(name))
    else:
        source = _downloaded(str(name), trust_remote_code, weights, may_download)
    _check_files(source)
    _check_configs(source, trust_remote_code)
    if weights:
        _check_weights(source)
    return source


def load_pretrained(auto_class: Any, name: str | Path | None, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained`` with safetensors weights; of an adapter, its base model with the adapter in it.

    Args:
        auto_class: A model class of transformers.
        name: A directory or a Hub id; None: the ``config`` and ``state_dict`` that are given.
        trust_remote_code: Whether code that comes with the model may run.
        **kwargs: For ``from_pretrained``.

    Raises:
        UntrustedModelError: As in :func:`find_source`; also for the base model of an adapter.
        OSError: It cannot be loaded.
    """
    if name is None:
        return auto_class.from_pretrained(None, **kwargs)
    source = find_source(name, trust_remote_code=trust_remote_code, weights=True)
    if source.adapter_base is None or (not source.pinned and (source.directory / "config.json").exists()):
        return _load(auto_class, source, trust_remote_code, use_safetensors=True, **kwargs)
    base = find_base(source, trust_remote_code=trust_remote_code)
    loaded = _load(auto_class, base, trust_remote_code, use_safetensors=True, **kwargs)
    (loaded[0] if isinstance(loaded, tuple) else loaded).load_adapter(str(source.directory))
    return loaded


def find_base(adapter: Source, *, trust_remote_code: bool = False) -> Source:
    """The base model of an adapter, checked as the adapter was.

    Raises:
        UntrustedModelError: As in :func:`find_source`; or the base is an adapter itself.
        OSError: There is no such model.
    """
    assert adapter.adapter_base is not None
    base = find_source(adapter.adapter_base, trust_remote_code=trust_remote_code, weights=True)
    if base.adapter_base is not None and not (base.directory / "config.json").exists():
        raise UntrustedModelError(
            f"The adapter {scrub(adapter.name)!r} is for {scrub(base.name)!r}, which is an adapter itself: merge that one "
            f"into its base model (merge_and_unload, save_pretrained), and name the result in adapter_config.json."
        )
    return base


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model.

    Raises:
        UntrustedModelError: It needs code that is not trusted.
        OSError: There is none.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, find_source(name, trust_remote_code=trust_remote_code), trust_remote_code)


def load_tokenizer(
    name: str | Path, *, trust_remote_code: bool = False, may_download: bool = True, **kwargs: Any
) -> Any:
    """The tokenizer in a directory or of a Hub id.

    Args:
        name: A directory or a Hub id.
        trust_remote_code: Whether code that comes with the tokenizer may run.
        may_download: Whether the Hub may be asked.
        **kwargs: For ``from_pretrained``.

    Raises:
        UntrustedModelError: It needs code that is not trusted.
        OSError: There is none.
        ValueError: Its files make no tokenizer.
    """
    from transformers import AutoTokenizer

    source = find_source(name, trust_remote_code=trust_remote_code, may_download=may_download)
    return _load(AutoTokenizer, source, trust_remote_code, local_files_only=not may_download, **kwargs)


def find_file(name: str | Path, file: str, *, may_download: bool = True) -> Path | None:
    """A file beside a model, to be looked at and not to be loaded; None if there is none.

    Args:
        name: A directory or a Hub id.
        file: The file's name.
        may_download: Whether the Hub may be asked.

    Raises:
        UntrustedModelError: It is a link that leads out of the directory, or no plain file.
    """
    from transformers.utils import cached_file

    if Path(name).is_dir():
        path = Path(name, file)
        _check_file(Source(str(name), Path(name)), path)
        return path if path.is_file() else None
    try:
        found = cached_file(str(name), file, local_files_only=not may_download)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def load_peft(base: Any, name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A model with an adapter on it, to be trained on, as a ``peft.PeftModel``.

    Raises:
        UntrustedModelError: As in :func:`find_source`.
    """
    from peft import PeftModel

    source = find_source(name, trust_remote_code=trust_remote_code, weights=True)
    return PeftModel.from_pretrained(base, str(source.directory), is_trainable=True)


def load_adapter_weights(directory: Path) -> dict[str, Any]:
    """The weights of the adapter in a directory, by peft's names.

    Raises:
        UntrustedModelError: As in :func:`find_source`.
    """
    from peft import load_peft_weights

    return load_peft_weights(str(find_source(directory, weights=True).directory), device="cpu")


def check_template_path(path: str | None) -> None:
    """Refuse a ``chat_template_path`` of trl's that is no template: trl would load a tokenizer from it, unchecked.

    Raises:
        ValueError: It is not a ``.jinja`` file.
    """
    if path is not None and not (Path(path).is_file() and path.endswith((".jinja", ".j2"))):
        raise ValueError(f"chat_template_path={scrub(path)!r} is not a .jinja file: give the template itself.")


def _load(auto_class: Any, source: Source, trust_remote_code: bool, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.pinned, **kwargs)
    except ValueError as error:  # raised by transformers before it runs any code
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise _code_refused(source, ", ".join(_own_code(source)) or "code of its own") from None
        raise


def _code_refused(source: Source, code: str) -> UntrustedModelError:
    return UntrustedModelError(
        f"{scrub(source.name)!r} wants to run code that comes with it when it is loaded: {code}, in "
        f"{scrub(str(source.directory))}. Read that code; if you trust it, set trust_remote_code=True "
        f"(--trust_remote_code true)."
    )


def _own_code(source: Source) -> list[str]:
    """The classes that the configurations want to be loaded from code outside transformers."""
    found: list[str] = []
    for path in _configs(source.directory):
        named = _read(path).get("auto_map") or {}
        classes = list(named.values()) if isinstance(named, dict) else [named]
        flat = [one for group in classes for one in (group if isinstance(group, list) else [group]) if one is not None]
        found += [f"{one} ({path.name})" for one in flat]
    return found


def _downloaded(name: str, trust_remote_code: bool, weights: bool, may_download: bool) -> Source:
    """What the Hub, or its cache on this machine, has by a name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    def download(patterns: list[str], revision: str | None = None) -> Path:
        try:
            return Path(snapshot_download(
                name, allow_patterns=patterns, revision=revision, local_files_only=not may_download
            ))  # fmt: skip
        except LocalEntryNotFoundError as error:  # without the Hub, what an interrupted download has left is used
            if getattr(error, "snapshot_path", None) is None:
                raise
            return Path(error.snapshot_path)  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError:
        raise OSError(f"{scrub(name)!r} is neither a directory nor the id of a model on the Hub.") from None
    directory = download(_READ_FROM_HUB + ["*.py"] * trust_remote_code)
    source = Source(name, directory, {"revision": directory.name})
    if weights:
        _check_files(source)
        download([*_weights_in(source), _ADAPTER], directory.name)
    return source


def _weights_in(source: Source) -> list[str]:
    """The names of the files that hold a model's weights, as its index gives them; else the usual name."""
    named = [str(config["transformers_weights"]) for config in map(_read, _configs(source.directory))
             if config.get("transformers_weights") is not None]  # fmt: skip
    for name in named:
        _check_name(source, name, "transformers_weights", (".safetensors", ".safetensors.index.json"))
    indices = [n for n in [*named, _INDEX] if n.endswith(".json") and (source.directory / n).is_file()]
    shards = [shard for index in indices for shard in _shards(source, index)]
    return list(dict.fromkeys([*(n for n in named if not n.endswith(".json")), *shards, _WEIGHTS]))


def _shards(source: Source, index: str) -> list[str]:
    """The files that an index of weights names.

    Raises:
        UntrustedModelError: One is no safetensors file within the directory.
    """
    names = _read(source.directory / index).get("weight_map")
    if not isinstance(names, dict):
        raise UntrustedModelError(f"{scrub(source.name)!r}: {index} has no weight_map. Download it again.")
    shards = sorted({*map(str, names.values())})
    for name in shards:
        _check_name(source, name, index, (".safetensors",))
    return shards


def _check_name(source: Source, name: str, where: str, endings: tuple[str, ...]) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or {"\\", ":", "\0"} & set(name) or not name.endswith(endings):
        raise UntrustedModelError(
            f"{scrub(source.name)!r}: {where} names {scrub(name)!r} as weights. Only safetensors files within the "
            f"directory are loaded: pickled weights can run code, and other paths lead out of the model. Load it once "
            f"with transformers where that does no harm, and save_pretrained() it again."
        )


def _check_files(source: Source) -> None:
    """Refuse links that lead out of the directory, and what is no file, before anything is read.

    A link would bring what it leads to, such as a key or another model, into what is trained and exported. The Hub's cache
    consists of links to its own ``blobs``.
    """
    for path in source.directory.iterdir():
        if not path.is_dir():
            _check_file(source, path)
    for path in source.directory.glob("additional_chat_templates/*"):
        _check_file(source, path)
    for name in _weights_in(source):
        _check_file(source, source.directory / name)


def _check_file(source: Source, path: Path) -> None:
    home, target = source.directory.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise UntrustedModelError(
            f"{scrub(source.name)!r}: {path.name} is a link that leads out of the directory, to {scrub(str(target))}. If "
            f"that is meant, put a copy of the file in the place of the link."
        )
    if path.exists() and not path.is_file():
        raise UntrustedModelError(f"{scrub(source.name)!r}: {path.name} is no plain file. Remove it.")


def _check_configs(source: Source, trust_remote_code: bool) -> None:
    """Refuse configurations that have code loaded in other ways than ``auto_map``, which transformers asks about."""
    if trust_remote_code:
        return
    for path in _configs(source.directory):
        config = _read(path)
        code = [f"the kernel {value!r} of the Hub" for key, value in _nested(config) if _names_kernel(key, value)]
        if path.name == "adapter_config.json":
            code += [f"what {key} names" for key in _LOADS_MORE if config.get(key) not in (None, "mirror")]
        if code:
            raise _code_refused(source, f"{', '.join(code)} ({path.name})")


def _nested(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _nested(value)


def _names_kernel(key: str, value: Any) -> bool:
    return "/" in str(value) and key.strip("_").startswith(("attn_implementation", "experts_implementation"))


def _check_weights(source: Source) -> None:
    """Refuse a directory without safetensors weights, and say what it has instead."""
    directory, weights = source.directory, _weights_in(source)
    is_adapter = (directory / "adapter_config.json").exists()
    if is_adapter and not (directory / _ADAPTER).exists():
        _refuse_others(source, "load the adapter with peft and save_pretrained() it again")
    if not is_adapter and not any((directory / name).exists() for name in weights):
        _refuse_others(source, "load the model with transformers and save_pretrained() it again")


def _refuse_others(source: Source, remedy: str) -> None:
    pickled = sorted(path.name for pattern in _PICKLED for path in source.directory.glob(pattern))
    others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in source.directory.glob(pattern))
    if pickled:
        raise UntrustedModelError(
            f"{scrub(source.name)!r} holds pickled weights only ({', '.join(pickled[:3])}), which can run code when "
            f"loaded. Convert them once, where that does no harm: {remedy}."
        )
    if others:
        raise UntrustedModelError(
            f"{scrub(source.name)!r} holds no safetensors weights, only {', '.join(others[:3])}. Convert them once: {remedy}."
        )


def _configs(directory: Path) -> list[Path]:
    """The files that say how to load what is in a directory; config.json may name another config.*.json."""
    names = ("adapter_config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    return [
        *sorted(directory.glob("config*.json")),
        *(directory / name for name in names if (directory / name).exists()),
    ]


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, which transformers and peft report in their own words."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
