"""Logits in chunks of tokens: a whole batch's never exist at once, whatever the vocabulary.

Whatever is computed of them is a sum over tokens, so each chunk's gradient is taken as soon as its sum is known, down to
the states that the head reads and the head's own weights. The backward pass of the whole then starts from those.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmppo.groups import even_slices, kind_of_device
from lmppo.models.states import States

LOGITS_BYTES = 2**27
"""The most memory of one float32 tensor of logits."""

FEW_BYTES, FEW_TOKENS = {"cpu": 2**23, "accelerator": LOGITS_BYTES}, 512
"""A chunk of either size is small enough: matrix products of fewer tokens take longer for each, and an accelerator waits for
its kernels to be launched."""

Sums = dict[str, Tensor]
"""Numbers by name, each added up over tokens; of names that end in ``_max`` the largest is kept."""

LogitsOf = Callable[[States], Tensor]
"""A language model's head: from states ``(1, n, ...)`` to logits ``(1, n, V)``."""


OfLogits = Callable[[Tensor, slice], tuple[Tensor, Sums]]
"""From the logits ``(1, n, V)`` of some tokens, and which they are, to the sum over them of what is to be differentiated,
and sums that are not."""


def largest_chunk(vocab_size: int, kind: str = "cpu") -> int:
    """The most tokens of a chunk on a :func:`lmppo.groups.kind_of_device`; at least one."""
    row = 4 * vocab_size
    return max(1, min(LOGITS_BYTES // row, max(FEW_BYTES[kind] // row, FEW_TOKENS)))


def chunks_of(states: States, vocab_size: int) -> list[slice]:
    """Slices of about the same size that cover the states; at least one."""
    return even_slices(len(states), largest_chunk(vocab_size, kind_of_device(states.source.device)))


def join_sums(parts: Sequence[Sums]) -> Sums:
    """Sums over several parts as sums over the whole."""
    joined = dict(parts[0])
    for part in parts[1:]:
        for name, value in part.items():
            joined[name] = torch.maximum(joined[name], value) if name.endswith("_max") else joined[name] + value
    return joined


def sum_over_logits(
    states: States,
    logits_of: LogitsOf,
    compute: OfLogits,
    *,
    vocab_size: int,
) -> tuple[Tensor, Sums]:
    """A sum over tokens of what is computed of their logits, differentiable once.

    Args:
        states: Of ``N`` tokens, ``(1, N, ...)``.
        logits_of: The head.
        compute: What is added up.
        vocab_size: ``V``.

    Returns:
        The sum over all tokens, and the other sums.
    """
    whole = states.source
    wanted = torch.is_grad_enabled() and whole.requires_grad
    source_gradient = torch.zeros_like(whole) if wanted else None
    gradients: dict[Tensor, Tensor] = {}
    totals, sums = [], []
    for part in chunks_of(states, vocab_size):
        source = states.cut(part).source.detach().requires_grad_(wanted)
        total, seen = compute(logits_of(states.with_source(source)), part)
        for leaf, gradient in _gradients_of(total).items():
            if leaf is source:
                assert source_gradient is not None
                source_gradient[:, part] = gradient
            else:
                gradients[leaf] = gradients[leaf].add_(gradient) if leaf in gradients else gradient
        totals.append(total.detach())
        sums.append(seen)
    if source_gradient is not None:
        gradients[whole] = source_gradient
    total = torch.stack(totals).sum()
    if gradients:
        total = _WithGradients.apply(total, list(gradients.values()), *gradients)
    return total, join_sums(sums)


class _WithGradients(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("A sum over logits can be differentiated once, and create_graph=True asks for more.")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("A second backward pass through a sum over logits: its gradients have been handed on.")
        return (None, None) + tuple(gradient.mul_(outer) for gradient in gradients)


def _gradients_of(total: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of a number, each in memory of its own: autograd hands the same tensor to both terms of a sum."""
    leaves = leaves_of(total)
    used: set[int] = set()
    own = {}
    for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves) if leaves else (), strict=True):
        place = gradient.untyped_storage().data_ptr()
        own[leaf] = gradient.clone() if place in used or 0 in gradient.stride() else gradient
        used.add(place)
    return own


def leaves_of(total: Tensor) -> list[Tensor]:
    """The tensors that a number is made of and that gradients are wanted of."""
    found, seen, left = [], set(), [total.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [parent for parent, _ in node.next_functions]
    return found
