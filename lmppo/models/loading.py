"""Loading the weights of the policy, and of any other model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmppo.models.adapters import add_adapter, base_of_adapter, check_adapter, load_adapter

if TYPE_CHECKING:
    from peft import PeftConfig


def load_weights(auto_class: Any, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained`` in float32, safetensors only, with one clear message when it fails.

    Raises:
        OSError: The model is neither a directory with safetensors weights nor a reachable Hub id.
    """
    try:
        return auto_class.from_pretrained(name_or_path, dtype=torch.float32, use_safetensors=True, **kwargs)
    except OSError as error:
        path = Path(name_or_path)
        if path.is_dir() and list(path.glob("*.bin")) and not list(path.glob("*.safetensors")):
            raise OSError(
                f"{name_or_path!r} holds pickled weights only (*.bin), which can run code when loaded. Convert them "
                f"once: load the model with transformers and save_pretrained() it again."
            ) from error
        raise OSError(
            f"Could not load a model from {name_or_path!r}: it is neither a local directory with config.json and "
            f"safetensors weights nor a Hub id reachable from here. ({str(error).splitlines()[0]})"
        ) from error


def load_policy(model: "str | PreTrainedModel", peft_config: "PeftConfig | None" = None) -> nn.Module:
    """The policy: loaded if named, float32, with a fresh adapter if ``peft_config`` is given.

    The name may be that of an adapter, which is then trained on; with ``peft_config``, it is merged first.

    Raises:
        OSError: The model cannot be loaded.
        ValueError: An adapter is asked for on a model that has one, or its method is one that lmppo does not support.
        TypeError: ``model`` is neither a name nor a model that can generate.
    """
    policy = _load_named(str(model), merge=peft_config is not None) if isinstance(model, str | Path) else model
    if not hasattr(policy, "get_output_embeddings") or policy.get_output_embeddings() is None:
        raise TypeError(f"model is a {type(policy).__name__}: expected a causal language model or the name of one.")
    policy = policy.float()
    if peft_config is not None:
        return add_adapter(policy, peft_config)
    check_adapter(policy)
    return policy


def _load_named(name: str, *, merge: bool) -> PreTrainedModel:
    """A model, or an adapter on its base; ``merge``: the adapter merged into it, so that a new one can follow."""
    base = base_of_adapter(name)
    if base is None:
        return load_weights(AutoModelForCausalLM, name)
    policy = load_adapter(load_weights(AutoModelForCausalLM, base), name, merge=merge)
    what = "merged into it, and a new one is trained" if merge else "trained on"
    print_once(f"Adapter: {name!r} on the base model {base!r}, {what}.")
    return policy


def print_once(line: str) -> None:
    """Print on the main process alone."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
        print(line, flush=True)
