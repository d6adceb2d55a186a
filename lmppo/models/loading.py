"""Loading the weights of the policy, and of any other model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftConfig


def load_weights(auto_class: Any, name_or_path: str | None, **kwargs: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained`` in float32, safetensors only, with one clear message when it fails.

    Args:
        auto_class: A class of transformers.
        name_or_path: What to load; None: the ``config`` and ``state_dict`` that are given.
        **kwargs: For ``from_pretrained``.

    Raises:
        OSError: The model is neither a directory with safetensors weights nor a reachable Hub id.
    """
    try:
        return auto_class.from_pretrained(name_or_path, dtype=torch.float32, use_safetensors=True, **kwargs)
    except OSError as error:
        path = Path(name_or_path or "")
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

    Raises:
        OSError: The model cannot be loaded.
        ValueError: An adapter is asked for on a model that has one, or starts from something other than the identity.
        TypeError: ``model`` is neither a name nor a model that can generate.
    """
    policy = load_weights(AutoModelForCausalLM, str(model)) if isinstance(model, str | Path) else model
    if not hasattr(policy, "get_output_embeddings") or policy.get_output_embeddings() is None:
        raise TypeError(f"model is a {type(policy).__name__}: expected a causal language model or the name of one.")
    policy = policy.float()
    if peft_config is None:
        return policy
    from peft import PeftModel, get_peft_model

    if isinstance(policy, PeftModel):
        raise ValueError("model has an adapter already: leave peft_config out to go on training that one.")
    starts_changed = getattr(peft_config, "init_lora_weights", True) not in (True, "gaussian", "orthogonal")
    if starts_changed:
        raise ValueError(
            f"init_lora_weights={peft_config.init_lora_weights!r} changes the base weights, so the model with its "
            f"adapter off would not be the reference: use True or 'gaussian'."
        )
    return get_peft_model(policy, peft_config, autocast_adapter_dtype=False)
