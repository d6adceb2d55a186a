"""What every function of this package does to its inputs first: check them, drop what the mask leaves out, widen.

Shapes are written ``(B, T)``: ``B`` sequences, ``T`` completion positions. Every error names the function, what was
given and what was expected.
"""

import math

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged where it is float64: sums of half-precision numbers lose too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` (widened) where the mask is True and 0 elsewhere, in the value and in the gradient.

    ``x * mask`` would let NaN through (NaN * 0 is NaN), and masking only the *result* of a computation would still give
    NaN gradients (0 * NaN in the backward pass). So inputs are masked before anything is computed from them.
    """
    return widen(torch.where(mask, x, 0.0))


def check_float(function: str, **tensors: object) -> None:
    """Refuse anything but tensors of a float dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{function}: {name} must be a float tensor, got {_describe(tensor)}")


def check_dtype(function: str, dtype: torch.dtype, **tensors: object) -> None:
    """Refuse anything but tensors of exactly this dtype, such as masks of integers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            raise TypeError(
                f"{function}: {name} must be a {dtype} tensor, got {_describe(tensor)}; convert it with .to({dtype})"
            )


def check_shape(function: str, expected: tuple[int, ...], reason: str, **tensors: Tensor) -> None:
    """Refuse a shape other than the expected one; ``reason`` says where that one comes from."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(
                f"{function}: {name} must have shape {tuple(expected)} ({reason}), got {tuple(tensor.shape)}; "
                "shapes are never broadcast"
            )


def check_masked(function: str, mask: Tensor, **tensors: Tensor) -> None:
    """A bool mask, and float tensors of exactly its shape."""
    check_dtype(function, torch.bool, mask=mask)
    check_float(function, **tensors)
    check_shape(function, mask.shape, "that of mask", **tensors)


def check_masked_over_time(function: str, mask: Tensor, **tensors: Tensor) -> None:
    """As :func:`check_masked`, and of shape (B, T): the function looks along T."""
    check_masked(function, mask, **tensors)
    if mask.ndim != 2:
        raise ValueError(f"{function}: mask must have shape (B, T), got {tuple(mask.shape)}")


def check_unit_interval(function: str, **scalars: float) -> None:
    """Numbers in [0, 1]."""
    for name, value in scalars.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{function}: {name} must be between 0 and 1, got {value}")


def check_positive(function: str, **scalars: float) -> None:
    """Finite numbers above 0."""
    for name, value in scalars.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{function}: {name} must be positive and finite, got {value}")


def check_not_negative(function: str, **scalars: float) -> None:
    """Finite numbers, 0 or above."""
    for name, value in scalars.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{function}: {name} must be 0 or more and finite, got {value}")


def _describe(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a {given.dtype} tensor of shape {tuple(given.shape)}"
    return f"a {type(given).__name__}"
