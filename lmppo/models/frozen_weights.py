"""Weights that are never trained, in half the memory (``frozen_dtype``).

A model computes with them what it would with float32 weights that have been rounded to bfloat16 before, in whatever
precision it computes.
"""

from typing import Any

import torch
from torch import nn

from lmppo.models.held import HeldInBFloat16
from lmppo.models.inputs import base_of
from lmppo.models.language_model import freeze_lower_layers
from lmppo.models.loading import print_once

EXPORTED = "also where they are exported"
"""What follows from rounding for a policy or a critic."""


def place_policy(policy: Any, device: torch.device, *, num_layers_unfrozen: int | None, frozen_dtype: str) -> Any:
    """The policy on its device, with its lower layers frozen, and what is not trained stored as ``frozen_dtype`` says.

    What an adapter leaves frozen is stored so before it reaches the device, which need not hold all of it in float32.

    Args:
        policy: A causal language model, plain or with an adapter.
        device: Where it is to compute.
        num_layers_unfrozen: As in :func:`lmppo.models.language_model.freeze_lower_layers`.
        frozen_dtype: As in :func:`store_frozen`.
    """
    store_frozen(policy, frozen_dtype, "model", EXPORTED)
    policy.to(device)
    freeze_lower_layers(policy, num_layers_unfrozen)
    store_frozen(policy, frozen_dtype, "model", EXPORTED)
    return policy


def store_frozen(model: nn.Module, frozen_dtype: str, name: str, consequence: str) -> bool:
    """Store what of a model is not trained in a type, and say in a line if that rounds it.

    Vectors (biases, scales of norms) stay in float32, as do what transformers keeps in float32 in a model that it loads in
    bfloat16, layers of bitsandbytes, and the originals of modules that an adapter trains whole.

    Args:
        model: Any model.
        frozen_dtype: ``"float32"``, which changes nothing, or ``"bfloat16"``.
        name: How the line names it.
        consequence: What else the line says.

    Returns:
        Whether a weight is rounded: those of models that are published in bfloat16 are not.
    """
    if frozen_dtype == "float32":
        return False
    kept = [".original_module.", *(getattr(base_of(model), "_keep_in_fp32_modules_strict", None) or ())]
    exempt = {id(p) for path, p in model.named_parameters(remove_duplicate=False) if any(part in path for part in kept)}
    stored: dict[int, nn.Parameter] = {}
    n_rounded = 0
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is None or id(weight) in exempt or not _can_be_stored(weight):
                continue
            if id(weight) not in stored:
                held = weight.detach().to(torch.bfloat16)
                n_rounded += not torch.equal(held.float(), weight)
                stored[id(weight)] = nn.Parameter(HeldInBFloat16(held), requires_grad=False)
            module._parameters[key] = stored[id(weight)]
    if n_rounded:
        print_once(f"{name}: {n_rounded} weights that are never trained are rounded to bfloat16, {consequence}.")
    return n_rounded > 0


def _can_be_stored(weight: nn.Parameter) -> bool:
    plain = type(weight) is nn.Parameter and weight.dtype == torch.float32
    return plain and weight.ndim >= 2 and not weight.requires_grad
