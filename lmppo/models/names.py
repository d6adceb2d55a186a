"""Names of weights without what torch.compile puts into them, so that a file fits the model with and without it."""

from typing import Any

from torch import Tensor, nn

from lmppo.models.held import plain

_COMPILED = "_orig_mod"


def uncompiled(model: Any) -> Any:
    """The model that ``torch.compile`` has wrapped, or the model itself."""
    return getattr(model, _COMPILED, model)


def own_name(name: str) -> str:
    """A weight's name without the wrappers in it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their own names."""
    return {own_name(name): parameter for name, parameter in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by the weights' own names; its tensors are the model's."""
    return {own_name(name): tensor for name, tensor in model.state_dict().items()}


def saved_state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is saved: without what is only held in bfloat16, which has no memory that could be written."""
    return {name: plain(tensor) for name, tensor in state_of(model).items()}
