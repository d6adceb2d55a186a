"""Records of tensors whose axes are declared.

Checking, selecting rows, cutting padding and gathering read the declarations, never a field's name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


def axes(names: str, *dtypes: torch.dtype, optional: bool = False) -> Any:
    """A field that holds a tensor with these axes, such as ``"B T K"``.

    Args:
        names: The axes, the first of them ``B``. An axis has one size throughout a record.
        dtypes: What the tensor may hold; none given: floating-point numbers.
        optional: Whether the field may be None, which is its default then.
    """
    metadata = {"axes": tuple(names.split()), "dtypes": dtypes}
    return field(metadata=metadata, default=None) if optional else field(metadata=metadata)


@dataclass(frozen=True)
class Record:
    """Tensors with declared axes, and records of such tensors.

    Raises:
        ValueError: Tensors disagree on the size of an axis, or one has another number of axes than declared.
        TypeError: A tensor has the wrong dtype.
    """

    def __post_init__(self) -> None:
        self._check(type(self).__name__, {})

    def __len__(self) -> int:
        return self.sizes()["B"]

    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        sizes: dict[str, int] = {}
        self._check(type(self).__name__, sizes)
        return sizes

    def map(self, function: Callable[[Tensor, tuple[str, ...]], Tensor]) -> Self:
        """The record with every tensor replaced by ``function(tensor, axes)``, in the records within it as well."""
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            if isinstance(value, Record):
                changed[f.name] = value.map(function)
            elif "axes" in f.metadata:
                changed[f.name] = function(value, f.metadata["axes"])
        return replace(self, **changed)

    def rows(self, rows: Tensor | slice) -> Self:
        """The record of some rows only (an index tensor, a boolean mask, or a slice)."""
        return self.map(lambda tensor, _: tensor[rows])

    @classmethod
    def joined(cls, records: Sequence[Self]) -> Self:
        """The rows of several records, in order; what is no tensor is the first one's."""
        joined: dict[str, Any] = {}
        for f in fields(records[0]):
            parts = [getattr(record, f.name) for record in records]
            if isinstance(parts[0], Record):
                joined[f.name] = type(parts[0]).joined(parts)
            elif "axes" in f.metadata and parts[0] is not None:
                joined[f.name] = torch.cat(parts)
        return replace(records[0], **joined)

    def cut(self, **kept: slice) -> Self:
        """The record with some axes cut, such as ``T=slice(0, 5)``, wherever they occur."""
        return self.map(lambda tensor, names: tensor[tuple(kept.get(name, slice(None)) for name in names)])

    def _check(self, name: str, sizes: dict[str, int]) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if isinstance(value, Record):
                value._check(f"{name}.{f.name}", sizes)
            elif "axes" in f.metadata:
                _check_tensor(f"{name}.{f.name}", value, f.metadata["axes"], f.metadata["dtypes"], sizes)


def _check_tensor(
    name: str, tensor: Tensor, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], sizes: dict[str, int]
) -> None:
    shape = tuple(tensor.shape)
    expected = tuple(sizes.setdefault(axis, size) for axis, size in zip(names, shape, strict=False))
    if shape != expected or len(shape) != len(names):
        known = ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes else axis for axis in names)
        raise ValueError(f"{name} has shape {shape}; expected ({known}).")
    if tensor.dtype not in dtypes if dtypes else not tensor.is_floating_point():
        kinds = " or ".join(map(str, dtypes)) or "a floating type"
        raise TypeError(f"{name} is {tensor.dtype}; expected {kinds}.")
