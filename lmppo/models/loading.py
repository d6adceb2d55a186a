"""Loading the weights of the policy, and of any other model; and what is made of models that are passed."""

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from lmppo.models.adapters import add_adapter, base_of_adapter, check_adapter, load_adapter
from lmppo.models.inputs import base_of
from lmppo.models.names import uncompiled
from lmppo.models.quantized import check_quantized, is_quantized, keep_weights, quantized_layers
from lmppo.pretrained import UntrustedModelError, load_pretrained
from lmppo.redaction import scrub

if TYPE_CHECKING:
    from peft import PeftConfig


def load_weights(
    auto_class: Any, name_or_path: str | None, *, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """A model in float32, with one clear message when it cannot be loaded; see :func:`lmppo.pretrained.load_pretrained`.

    Args:
        auto_class: A class of transformers.
        name_or_path: What to load; None: the ``config`` and ``state_dict`` that are given.
        trust_remote_code: Whether code that comes with the model may run.
        **kwargs: For ``from_pretrained``.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code that is not trusted.
        OSError: The model is neither a directory with safetensors weights nor a reachable Hub id.
    """
    try:
        return load_pretrained(
            auto_class, name_or_path, trust_remote_code=trust_remote_code, dtype=torch.float32, **kwargs
        )
    except UntrustedModelError:
        raise
    except OSError as error:
        raise OSError(
            f"Could not load a model from {name_or_path!r}: it is neither a local directory with config.json and "
            f"safetensors weights nor a Hub id reachable from here. ({str(error).splitlines()[0]})"
        ) from error


def print_once(line: str) -> None:
    """Print on the main process alone."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
        print(scrub(line), flush=True)


def _plain(model: Any, name: str) -> Any:
    """The model that torch.compile has wrapped, and a printed line; any other as it is."""
    inner = uncompiled(model)
    if inner is not model:
        print_once(f"{name} is compiled: lmppo runs the model within, uncompiled.")
    return inner


def as_float32(model: Any, name: str) -> Any:
    """The model itself, uncompiled, if it is in float32; else a float32 copy of it, and a printed line.

    Layers that are quantized stay as they are, and what is around them is in float32. ``model.float()`` is not enough:
    tables that are not saved with the weights (the frequencies of rotary positions, the scale of an embedding) have been
    rounded with them, and are computed anew from the configuration.

    Args:
        model: A model of transformers, plain or with a peft adapter; it stays as it is.
        name: What it was passed as, for the line.

    Raises:
        ValueError: Its class cannot be built from its configuration, or it is quantized in a way that is not supported.
    """
    model = _plain(model, name)
    check_quantized(model, name)
    quantized = {id(layer.weight) for layer in quantized_layers(model)}
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in quantized} - {torch.float32}
    if not dtypes:
        return model
    kind = str(dtypes.pop()).removeprefix("torch.")
    own = _view(model)
    for parameter in own.parameters():
        if id(parameter) not in quantized and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32, copy=True)
    for module in own.modules():
        floating = {key: b for key, b in module._buffers.items() if b is not None and b.is_floating_point()}
        module._buffers |= {key: buffer.float() for key, buffer in floating.items()}
    _compute_tables(own, name, kind)
    what = "a copy whose other parts are float32" if quantized else "a float32 copy of it"
    print_once(f"{name} is in {kind}: {what} is used, and the model that was passed stays as it is.")
    return own


def _compute_tables(own: Any, name: str, kind: str) -> None:
    """Put what a model computes from its configuration in the place of what has been rounded."""
    base = base_of(own)
    try:
        with no_init_weights():  # only the tables are used
            fresh: dict[str, Any] = dict(type(base)(copy.deepcopy(base.config)).named_modules())
    except Exception as error:  # whatever a class needs beside its configuration
        raise ValueError(
            f"{name} is a {type(base).__name__} in {kind}, and cannot be rebuilt in float32 from its configuration "
            f"({error}). Load it with dtype=torch.float32."
        ) from error
    for path, module in base.named_modules():
        source: Any = fresh.get(_WRAPPERS.sub("", path))
        for key in module._non_persistent_buffers_set if source else ():
            if source._buffers.get(key) is not None:
                module._buffers[key] = source._buffers[key].to(module._buffers[key].device)


# What peft puts into the path of a module that it wraps.
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


def frozen_view(model: Any, copied: Collection[nn.Parameter] = ()) -> Any:
    """A model's weights in modules of our own, frozen and in evaluation mode; the one given stays as it is.

    The weights are shared, so this takes no memory. Neither a mode, a flag nor a device that is set on the view reaches
    the model.

    Args:
        model: The model.
        copied: Weights that are not shared: the view has them as they are now.
    """
    return _view(model, copied).requires_grad_(False).eval()


def _view(model: Any, copied: Collection[nn.Parameter] = ()) -> Any:
    cloned = {id(p) for p in copied}
    weights = {p: p.detach().clone() if id(p) in cloned else p.detach() for p in model.parameters()}
    shared: dict[int, Any] = {id(p): nn.Parameter(weight, p.requires_grad) for p, weight in weights.items()}
    for layer in quantized_layers(model):
        parts = (layer.weight, getattr(layer, "quant_state", None), getattr(layer, "state", None))
        shared |= {id(part): part for part in parts if part is not None}
    own = copy.deepcopy(model, shared)
    keep_weights(own)
    return own


def check_not_trained(ref_model: nn.Module, policy: Any) -> None:
    """Refuse a reference that would move with the policy.

    Raises:
        ValueError: They share a weight that is trained.
    """
    trained = {p.data_ptr(): name for name, p in policy.named_parameters() if p.requires_grad and p.numel()}
    shared = next((trained[p.data_ptr()] for p in ref_model.parameters() if p.data_ptr() in trained), None)
    if shared is not None:
        raise ValueError(
            f"ref_model shares {shared} with the policy, which trains it. Leave ref_model out, and the reference is the "
            f"policy as it is now; or give the reference as a model of its own, not the policy itself."
        )


def load_policy(
    model: "str | PreTrainedModel", peft_config: "PeftConfig | None" = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The policy: loaded if named, float32, with a fresh adapter if ``peft_config`` is given.

    The name may be that of an adapter, which is then trained on; with ``peft_config``, it is merged first. A model that
    is passed in another type stays as it is, and a float32 copy of it is the policy. Code that comes with a model runs
    only with ``trust_remote_code``.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code that is not trusted.
        OSError: The model cannot be loaded.
        ValueError: An adapter is asked for on a model that has one, or its method is one that lmppo does not support.
        TypeError: ``model`` is neither a name nor a model that can generate.
    """
    named = isinstance(model, str | Path)
    merge = peft_config is not None
    policy = _load_named(str(model), trust_remote_code, merge=merge) if named else _plain(model, "model")
    if not hasattr(policy, "get_output_embeddings") or policy.get_output_embeddings() is None:
        raise TypeError(f"model is a {type(policy).__name__}: expected a causal language model or the name of one.")
    policy = as_float32(policy, "model")
    if peft_config is not None and is_quantized(policy):
        return _on_quantized(policy, peft_config)
    keep_weights(policy)
    if peft_config is not None:
        return add_adapter(policy, peft_config)
    check_adapter(policy)
    return policy


def _on_quantized(base: Any, peft_config: "PeftConfig") -> Any:
    """A fresh adapter on a view of a quantized base, so that the model that was passed has none in it."""
    policy = add_adapter(frozen_view(base), peft_config)
    for parameter in policy.parameters():
        if parameter.requires_grad:  # of the base's own, such as biases
            parameter.data = parameter.data.clone()
    return policy


def _load_named(name: str, trust_remote_code: bool, *, merge: bool) -> PreTrainedModel:
    """A model, or an adapter on its base; ``merge``: the adapter merged into it, so that a new one can follow."""
    base = base_of_adapter(name, trust_remote_code=trust_remote_code)
    model = load_weights(AutoModelForCausalLM, name if base is None else base, trust_remote_code=trust_remote_code)
    if base is None:
        return model
    if merge and is_quantized(model):
        raise ValueError(
            f"The base {base!r} of the adapter {name!r} is quantized, and merging would round the adapter away. Leave "
            f"peft_config out to go on training this adapter."
        )
    policy = load_adapter(model, name, merge=merge, trust_remote_code=trust_remote_code)
    what = "merged into it, and a new one is trained" if merge else "trained on"
    print_once(f"Adapter: {name!r} on the base model {base!r}, {what}.")
    return policy
