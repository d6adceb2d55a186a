"""Activation functions by the fastest kernel that computes them."""

from torch import nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation


def use_fused_gelu(model: nn.Module) -> None:
    """Compute GPT-2's GELU (``gelu_new``, ``gelu_fast``) by torch's kernel of the same function, in one step.

    transformers writes it out in eight elementwise operations, which keep four tensors for the backward pass. The
    configuration stays as it is.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in (NewGELUActivation, FastGELUActivation):
                setattr(module, name, GELUTanh().train(child.training))
