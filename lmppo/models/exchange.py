"""Modules that compute by another function for a while."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def exchanged(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it the modules' forward passes are these functions."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


def exchanges_in(layer: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """What the parts of a layer compute by at this moment, where it is not their class's own."""
    return {part: vars(part)["forward"] for part in layer.modules() if part is not layer and "forward" in vars(part)}
