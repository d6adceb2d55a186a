"""Which library computes large matrix products in float32 on the CPU."""

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

# As measured: oneDNN is faster if the right matrix has so many numbers, and not so many rows for one column (the gradient of
# a head's states is a sum over the vocabulary).
_LARGE, _DEEP = 2**19, 8

# oneDNN keeps what it has compiled for so many shapes of products, about a megabyte each (by default 1024). A pass has about
# ten, and to compile one again takes a fifth of a millisecond.
_KEPT_SHAPES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def suits_onednn() -> bool:
    """Whether this is a CPU on which oneDNN was found to be the faster one: AMD's, with AVX-512, where torch uses MKL."""
    mkl, onednn = torch.backends.mkl.is_available(), bool(torch.backends.mkldnn.enabled)
    if sys.platform != "linux" or not (mkl and onednn and torch.backends.mkldnn.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


@functools.cache
def use_onednn() -> Library:
    """From now on, let oneDNN compute large products of float32 matrices on the CPU, forward and backward.

    torch leaves them to MKL, which is slow on AMD's CPUs, most of all where there are few rows, as in sampling. The kernels
    of ``aten::mm`` and ``aten::addmm`` are exchanged, below autograd, so that gradients of any order are what they were, up
    to rounding. Small products and the weights' own gradients stay with MKL, which is as fast there; and so does everything
    while ``torch.backends.mkldnn`` is switched off.

    Returns:
        What holds the registration.
    """
    for name, shapes in _KEPT_SHAPES.items():
        os.environ.setdefault(name, shapes)
    library = Library("aten", "IMPL")
    mm, addmm = (get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm"))

    def mm_or_onednn(keys: Any, left: Tensor, right: Tensor) -> Tensor:
        return _product(left, right) if _suits(left, right) else mm.call_boxed(keys, left, right)

    def addmm_or_onednn(
        keys: Any, bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        if beta == alpha == 1 and _is_bias(bias, right) and _suits(left, right):
            return _product(left, right, bias)
        return addmm.call_boxed(keys, bias, left, right, beta=beta, alpha=alpha)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is exchanged
        library.impl("mm", mm_or_onednn, "CPU", with_keyset=True)
        library.impl("addmm", addmm_or_onednn, "CPU", with_keyset=True)
    return library


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def _suits(left: Tensor, right: Tensor) -> bool:
    """Whether they can be multiplied, and oneDNN is the faster one."""
    return (
        left.dtype is right.dtype is torch.float32
        and left.dim() == right.dim() == 2
        and left.shape[1] == right.shape[0]
        and right.numel() >= _LARGE
        and right.shape[0] <= _DEEP * right.shape[1]
        and left.numel() > 0
        and left.is_contiguous()
        and (right.is_contiguous() or right.t().is_contiguous())
        and bool(torch.backends.mkldnn.enabled)
    )


def _is_bias(bias: Tensor, right: Tensor) -> bool:
    return bias.dtype is torch.float32 and bias.shape == right.shape[1:] and bias.is_contiguous()
