"""Gradient checkpointing: a layer keeps its inputs alone, and computes its activations again in the backward pass.

transformers checkpoints a layer in training mode only, in which layers also drop out, skip themselves or add noise, and a
model drops its cache. Here every layer stays in evaluation mode; it is recomputed where gradients are recorded, which the
sampler does not do.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lmppo.models.actor_critic import ActorCritic
from lmppo.models.exchange import exchanged, exchanges_in
from lmppo.models.inputs import base_of
from lmppo.models.loading import print_once
from lmppo.settings import UpdateSettings


def prepare_recomputation(model: ActorCritic, args: UpdateSettings) -> None:
    """Mark the layers of policy and critic that are recomputed: all with ``gradient_checkpointing``.

    Without it they are those on which the user has called ``gradient_checkpointing_enable()``, and a line says so.

    Raises:
        ValueError: The model's class cannot be checkpointed, or TRPO, which differentiates twice, is to train it.
    """
    for name, part in (("model", model.policy), ("critic", model.critic)):
        if part is not None and args.gradient_checkpointing:
            _mark_layers(base_of(part), name)
        elif part is not None and any(getattr(m, "gradient_checkpointing", False) for m in part.modules()):
            _check_layers(base_of(part), name)
            print_once(f"{name} comes with gradient checkpointing, which is used as gradient_checkpointing=True would.")
    if args.objective == "trpo" and _marked(model.policy):
        raise ValueError(
            "objective='trpo' differentiates twice, which gradient checkpointing does not allow: call "
            "model.gradient_checkpointing_disable(), or choose another objective."
        )


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within it, the marked layers of a model are recomputed in the backward pass of what is computed here."""
    with exchanged({layer: _recomputed(layer) for layer in _marked(model)}):
        yield


def _recomputed(layer: Any) -> Callable[..., Any]:
    """A layer's forward pass that is run again in the backward pass, with its parts as they were."""
    forward, run = layer.forward, layer._gradient_checkpointing_func

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        exchanges = exchanges_in(layer)

        def compute(*args: Any) -> Any:
            with exchanged(exchanges):
                return forward(*args, **kwargs)

        return run(compute, *args, use_reentrant=False)  # the other way needs inputs with gradients

    return call


def _marked(module: Any) -> list[Any]:
    """The outermost layers that are recomputed."""
    if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
        return [module]
    return [layer for child in module.children() for layer in _marked(child)]


def _mark_layers(model: Any, name: str) -> None:
    _check_layers(model, name)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and not layer.gradient_checkpointing:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpoint


def _check_layers(model: Any, name: str) -> None:
    found = any(isinstance(layer, GradientCheckpointingLayer) for layer in model.modules())
    if not (found and getattr(model, "supports_gradient_checkpointing", False)):
        raise ValueError(
            f"{name} is a {type(model).__name__}, which does not support gradient checkpointing: set "
            f"gradient_checkpointing=False (and lower micro_batch_size to save memory)."
        )
