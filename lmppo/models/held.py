"""A float32 tensor whose numbers are held in bfloat16: half the memory for weights that are never trained."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_ROWS = (_aten.embedding.default, _aten.index_select.default, _aten.index.Tensor)  # those that are read are widened


class HeldInBFloat16(torch.Tensor):
    """A float32 tensor, whatever asks it, whose numbers are held in bfloat16.

    Operations get its numbers in float32, for as long as they run: autograd keeps this tensor, or a view of it that is
    held likewise, for the backward pass. Cast to bfloat16, as autocast does, it is what is held. What is written into it
    is rounded.

    Args:
        held: The numbers, in bfloat16.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "HeldInBFloat16":
        """A tensor without memory of its own."""
        layout = (held.shape, held.stride(), held.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, *layout, dtype=torch.float32, device=held.device)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.held!r})"

    def untyped_storage(self) -> Any:
        """Refused: there is no memory with float32 numbers, which is what safetensors asks for.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "This weight is held in bfloat16 (frozen_dtype), and cannot be written as it is: save the model by "
            "PPOTrainer.save_model()."
        )

    storage = untyped_storage

    def __tensor_flatten__(self) -> Any:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> "HeldInBFloat16":
        return cls(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        own, *rest = args or (None,)
        kwargs = dict(kwargs or {})
        if isinstance(own, cls):
            if func is _aten._to_copy.default:
                dtype = kwargs.pop("dtype", None) or torch.float32
                if dtype != torch.float32:
                    return own.held.to(dtype=dtype, device=kwargs.get("device"))
                return cls(func(own.held, **kwargs))
            if func is _aten.clone.default or (func.is_view and func is not _aten.view.dtype):
                return tree_map_only(Tensor, cls, func(own.held, *rest, **kwargs))
            if func in _ROWS:
                return func(own.held, *rest, **kwargs).float()
        elif func._schema.is_mutable and not isinstance(own, Tensor):
            return NotImplemented  # writes into lists, which would be lost
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.held.float(), (args, kwargs))
        result = func(*args, **kwargs)
        if func._schema.is_mutable and isinstance(own, cls):
            own.held.copy_(args[0])
            return own
        return result


def plain(tensor: Tensor) -> Tensor:
    """A tensor as it is, or in float32 if it is held in bfloat16: for what reads its memory, as files are written."""
    return tensor.held.float() if isinstance(tensor, HeldInBFloat16) else tensor
