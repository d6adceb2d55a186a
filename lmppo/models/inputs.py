"""How tokens are given to a model: position ids, and where they come from.

Position ids always come from the attention mask: GPT-2 counts positions from the left edge otherwise, padding included,
and its log-probabilities are silently wrong.
"""

import inspect
from typing import Any

from torch import Tensor

from lmppo.records import Tokens


def position_ids_of(attention_mask: Tensor, first: int = 0) -> Tensor:
    """``(B, S)`` each token's place among the tokens that are there, counted from ``first``; padding gets ``first``."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0) + first


def inputs_of(tokens: Tokens, first_position: int | None = 0) -> dict[str, Any]:
    """The arguments of a model's forward pass over prompts and completions.

    Args:
        tokens: Prompts and completions.
        first_position: The position of a row's first token; None: the model is told no positions.
    """
    mask = tokens.attention_mask
    inputs = {"input_ids": tokens.input_ids, "attention_mask": mask.long(), "use_cache": False}
    if first_position is not None:
        inputs["position_ids"] = position_ids_of(mask, first_position)
    return inputs


def base_of(model: Any) -> Any:
    """The model within an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward pass has an argument of this name, or hands it on to the class that it extends."""
    for cls in type(base_of(model)).__mro__:
        parameters = inspect.signature(cls.forward).parameters if hasattr(cls, "forward") else {}
        if argument in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def kind_of(model: Any) -> str:
    """The model's class, as messages name it."""
    return type(base_of(model)).__name__
