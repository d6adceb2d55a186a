"""Checks of what reward functions return; each error names the function, the row and the right form."""

import math
import numbers
from typing import Any

import numpy
from torch import Tensor

from lmppo.rewards.protocol import completion_text

LARGEST = 1e15  # of rewards and their weighted sums: the critic's loss squares them, in float32
RIGHT_FORM = (
    "Return a list with one number per completion (None where the function does not apply), or, for a reward on every "
    "token, a list of lists with one number per completion token"
)


def checked_rows(label: str, returned: Any, lengths: list[int], completions: list) -> list[list[float] | None]:
    """Each row's rewards: its last token's alone, one per token, or ``None``.

    Args:
        label: What messages call the function.
        returned: What it returned for ``B`` completions.
        lengths: ``B`` counts of completion tokens.
        completions: ``B`` completions, for messages.

    Raises:
        TypeError: Something is no number.
        ValueError: The count or the shape is wrong, or a number is NaN, infinite or beyond ``LARGEST``.
    """
    if isinstance(returned, Tensor | numpy.ndarray):
        if returned.ndim != 1:
            raise ValueError(
                f"{label} returned a {type(returned).__name__} of shape {tuple(returned.shape)}; "
                f"expected ({len(lengths)},). {RIGHT_FORM}."
            )
        returned = returned.tolist()
    if not isinstance(returned, list | tuple):
        raise TypeError(f"{label} returned a {type(returned).__name__}. {RIGHT_FORM}.")
    if len(returned) != len(lengths):
        raise ValueError(f"{label} returned {len(returned)} rewards for {len(lengths)} completions. {RIGHT_FORM}.")
    return [
        _checked_row(value, n, f"{label}, row {b} (completion {_excerpt(completion)})")
        for b, (value, n, completion) in enumerate(zip(returned, lengths, completions, strict=True))
    ]


def _checked_row(value: Any, length: int, where: str) -> list[float] | None:
    if value is None:
        return None
    if isinstance(value, Tensor | numpy.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return [_checked_number(value, where)]
    if len(value) != length:
        raise ValueError(f"{where}: {len(value)} numbers for {length} completion tokens. {RIGHT_FORM}.")
    row = [_checked_number(number, where) for number in value]
    _checked_number(math.fsum(row), f"{where}, total")
    return row


def _checked_number(value: Any, where: str) -> float:
    if isinstance(value, numpy.bool_) or (isinstance(value, Tensor | numpy.ndarray) and value.ndim == 0):
        value = value.tolist()
    if not isinstance(value, numbers.Real):  # a bool is one: True counts 1
        raise TypeError(f"{where}: {value!r} is a {type(value).__name__}, not a number. {RIGHT_FORM}.")
    number: Any = value
    if not abs(number) < math.inf:  # true of NaN as well
        raise ValueError(f"{where}: the reward {value!r} is NaN or infinite. Rewards must be finite.")
    if abs(number) > LARGEST:
        raise ValueError(f"{where}: the reward {value!r} is beyond {LARGEST:.0e}: scale the rewards down.")
    return float(number)


def check_totals(tokens: Tensor, totals: Tensor, completions: list) -> None:
    """Refuse rows that no function scores, and weighted sums that are too large.

    Args:
        tokens: ``(B, T, K)`` weighted sums.
        totals: ``(B, F)`` each function's total, NaN where it gave ``None``.
        completions: ``B`` completions, for messages.

    Raises:
        ValueError: There is such a row.
    """
    unscored = totals.isnan().all(dim=1).nonzero().flatten().tolist()
    if unscored:
        raise ValueError(
            f"every reward function returned None for row {unscored[0]} (completion "
            f"{_excerpt(completions[unscored[0]])}): at least one must score each completion."
        )
    beyond = (~(tokens.abs() <= LARGEST)).flatten(1).any(dim=1).nonzero().flatten().tolist()  # of NaN too: inf - inf
    if beyond:
        raise ValueError(
            f"the weighted sum of rewards of row {beyond[0]} is beyond {LARGEST:.0e}: lower reward_weights."
        )


def _excerpt(completion: Any) -> str:
    text = completion_text(completion)
    return repr(text if len(text) <= 50 else text[:50] + "...")
