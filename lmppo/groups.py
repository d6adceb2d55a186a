"""Rows in groups that a model reads together, with little padding: of similar length, or packed."""

import math
import sys
from itertools import chain

import numpy as np
import torch

GROUP_COST = {"cpu": 128, "accelerator": 4096}
"""What a pass over one more group costs, in tokens: accelerators wait for their kernels to be launched."""

MOST_TOKENS = {"cpu": 1792, "accelerator": sys.maxsize}
"""Of a group, padding included: a CPU reads more at a time no faster, and keeps more of them for the backward pass."""


def kind_of_device(device: torch.device) -> str:
    """``cpu`` or ``accelerator``: what is fast on one is not on the other."""
    return "cpu" if device.type == "cpu" else "accelerator"


def even_slices(n: int, most: int) -> list[slice]:
    """The fewest slices that cover ``n`` things and have ``most`` of them at most, of about the same size; at least one."""
    n_slices = max(1, math.ceil(n / most))
    return [slice(n * i // n_slices, n * (i + 1) // n_slices) for i in range(n_slices)]


def length_groups(lengths: list[int], size: int, group_cost: int) -> list[list[int]]:
    """Rows in groups whose passes cost least: a group costs its rows times its longest, and ``group_cost``.

    Args:
        lengths: Tokens of each row.
        size: How many of the longest rows a group may have; of shorter ones as many as take no more tokens.
        group_cost: In tokens.

    Returns:
        The numbers of each group's rows, in order; the group of the shortest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    widths = np.array([lengths[row] for row in order])
    budget = size * widths[-1]
    best, start = np.zeros(len(order) + 1), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        padded = (end - np.arange(end)) * widths[end - 1]
        costs = np.where(padded <= budget, best[:end] + padded + group_cost, np.inf)
        start[end] = int(costs.argmin())
        best[end] = costs[start[end]]
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[start[end] : end]))
        end = start[end]
    return groups[::-1]


def pack_lines(lengths: list[int], line_length: int) -> list[list[int]]:
    """Rows in lines: each, from the longest on, in the first line that has room.

    Of the rows of some of these lines alone the lines are the same.

    Args:
        lengths: Tokens of each row.
        line_length: The most tokens of a line; that of the longest row or more.

    Returns:
        The rows of each line, in the order in which they stand there.
    """
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        line = next((i for i, left in enumerate(room) if left >= lengths[row]), len(lines))
        if line == len(lines):
            lines.append([])
            room.append(line_length)
        lines[line].append(row)
        room[line] -= lengths[row]
    return lines


def cheapest_groups(
    lengths: list[int], size: int, group_cost: int, *, packs: bool, most_tokens: int = sys.maxsize
) -> tuple[list[list[int]], int]:
    """The groups whose passes cost least, and the length of the lines to pack their rows into; 0: they are not packed.

    Args:
        lengths: Tokens of each row.
        size: How many of the longest rows, or lines, a group may have.
        group_cost: What a pass over one more group costs, in tokens.
        packs: Whether rows can be packed.
        most_tokens: Of a group, padding included, unless one row alone has more.
    """
    longest = max(lengths)
    size = min(size, max(1, most_tokens // longest))
    groups = length_groups(lengths, size, group_cost)
    if not packs:
        return groups, 0
    lines = pack_lines(lengths, longest)
    packed = [sorted(chain(*lines[part])) for part in even_slices(len(lines), size)]
    padded = sum(len(group) * max(lengths[row] for row in group) for group in groups)
    saved = padded - len(lines) * longest + group_cost * (len(groups) - len(packed))
    return (packed, longest) if saved > 0 else (groups, 0)
