"""What the tests of this folder share: random ragged batches, and garbage for the positions that do not count.

Random numbers are sixteenths between -10 and 10. Sums of them are exact in float64, in any order, so a test can ask
for equality where the math says equal.
"""

import torch
from hypothesis import settings
from hypothesis import strategies as st

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30)

# The same examples on every run: a red test is red for everyone.
modest = settings(max_examples=30, derandomize=True, deadline=None)

numbers = st.integers(-160, 160).map(lambda sixteenths: sixteenths / 16)
unit_numbers = st.integers(0, 8).map(lambda eighths: eighths / 8)


def tensor(rows):
    """Plain numbers as float64."""
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(*rows):
    """``mask_of("110", "1.1")``: one string per row, "1" = counts."""
    return torch.tensor([[character == "1" for character in row] for row in rows])


@st.composite
def ragged(draw, count=1, max_rows=3, max_steps=6):
    """(mask, x_1, ..., x_count): a mask with any gaps and any empty rows, and float64 tensors of its shape.

    The mask is hypothesis's, so that a failure shrinks to the simplest one; the numbers come from a seed, which is much
    faster. With the smallest spread most of them are equal.
    """
    rows, steps = draw(st.integers(1, max_rows)), draw(st.integers(1, max_steps))
    counts = draw(st.lists(st.booleans(), min_size=rows * steps, max_size=rows * steps))
    spread = draw(st.sampled_from([160, 16, 1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    sixteenths = torch.randint(-spread, spread + 1, (count, rows, steps), generator=generator)
    return torch.tensor(counts).reshape(rows, steps), *(sixteenths.double() / 16)


def random_batch(seed=0, rows=4, steps=7, count=3, dtype=torch.float64):
    """(mask, x_1, ..., x_count) with a full row, a row with a gap, a short row, and random rest."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, steps, generator=generator) < 0.6
    mask[0] = True
    mask[1] = torch.arange(steps) % 3 != 1
    mask[2] = torch.arange(steps) < 2
    return mask, *(torch.randn(rows, steps, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count))


def compressed(x, mask, row):
    """One row's counted tokens as a batch of one without gaps: shape (1, n)."""
    return x[row][mask[row]].unsqueeze(0)
