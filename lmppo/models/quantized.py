"""Models whose linear layers bitsandbytes has quantized: an adapter on one of them is trained, the base stays as it is.

bitsandbytes is not imported: its layers are known by their parameters.
"""

import logging
from typing import Any

import torch
from torch import nn

_KINDS = ("Params4bit", "Int8Params")


def quantized_layers(model: nn.Module) -> list[Any]:
    """The modules that hold a weight of bitsandbytes."""
    return [m for m in model.modules() if type(m._parameters.get("weight")).__name__ in _KINDS]


def is_quantized(model: Any) -> bool:
    """Whether weights of a model are no plain numbers, so that it cannot be cast or merged into."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "hf_quantizer", None) is not None or bool(quantized_layers(model))


def check_quantized(model: Any, name: str) -> None:
    """Refuse a quantized model whose numbers would be wrong; one that is not quantized passes.

    Args:
        model: The model.
        name: What it was passed as, for the message.

    Raises:
        ValueError: It is quantized by another library, or a row's numbers depend on the rest of the batch.
    """
    layers = quantized_layers(model)
    if is_quantized(model) and not layers:
        method = model.config.quantization_config.quant_method
        raise ValueError(f"{name} is quantized by {getattr(method, 'value', method)}: only bitsandbytes is supported.")
    threshold = max((layer.state.threshold for layer in layers if hasattr(layer, "state")), default=0)
    if threshold > 0:
        raise ValueError(
            f"{name} is in 8 bits with llm_int8_threshold={threshold:g}: which columns are outliers is decided over the "
            f"whole batch, so that a row's numbers depend on its neighbors. Load it with "
            f"BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)."
        )


def check_trainable(policy: Any, objective: str) -> None:
    """Refuse a quantized policy of which nothing can be trained, or not by this objective.

    Args:
        policy: Any policy, with its adapter; one that is not quantized passes.
        objective: What it is to be trained by.

    Raises:
        ValueError: Names what is missing or wrong.
    """
    layers = quantized_layers(policy)
    if layers and not hasattr(policy, "peft_config"):
        raise ValueError(
            "model is quantized, and its weights cannot be trained: give peft_config=LoraConfig(...) to train an adapter."
        )
    if any(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False) for layer in layers):
        raise ValueError(
            "model has been run on this CPU, and bitsandbytes has rewritten its 4-bit weights for passes without "
            "gradients: load it anew, and do not run it before the trainer is built."
        )
    if objective == "trpo" and compute_precision(policy) != "no":
        raise ValueError(
            "objective='trpo' differentiates twice and needs float32, in which the quantized model does not compute: load "
            "it in 4 bits with bnb_4bit_compute_dtype=torch.float32, or choose another objective."
        )


def keep_weights(model: nn.Module) -> None:
    """Let the passes of a quantized model leave its weights as they are, and print nothing.

    On CPUs that compute in bfloat16, bitsandbytes rewrites 4-bit weights in the first pass without gradients: their scales
    are rounded, and later passes have no gradient. On others this changes nothing.
    """
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(
            logging.ERROR
        )  # it warns in every pass of 8 bits


def compute_precision(model: nn.Module, mixed_precision: str = "no") -> str:
    """What a model computes in, as accelerate names precisions: ``no`` (float32), ``bf16``, ``fp16``; ``int4`` or ``int8``.

    Args:
        model: The model. One with weights of 16 bits, or a quantized one, computes in less than float32 by itself; layers
            of 8 bits round what they read to 8 bits, so that the least difference may move it by one step, and layers of 4
            bits that compute in 16 have, on a GPU, different kernels for few rows and for many.
        mixed_precision: That of the accelerator.
    """
    layers = quantized_layers(model)
    quantized = {id(layer.weight) for layer in layers}
    types: set[Any] = {p.dtype for p in model.parameters() if id(p) not in quantized}
    computed_in: set[Any] = {getattr(layer, "compute_dtype", torch.int8) for layer in layers}
    if torch.int8 in computed_in:
        return "int8"
    if computed_in & {torch.bfloat16, torch.float16}:
        return "int4"
    if torch.bfloat16 in types:
        return "bf16"
    return "fp16" if torch.float16 in types else mixed_precision
