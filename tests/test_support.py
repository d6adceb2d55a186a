"""The compact support: what is stored is what could be sampled, in at most V/8 bytes a position."""

import pytest
import torch

from lmppo.support import Support, pack, unpack


def bools(n_rows, n_time, vocab_size, share, seed=0):
    """Random supports, none of them empty."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(n_rows, n_time, vocab_size, generator=generator) < share
    allowed[..., 1] = True
    return allowed


def stored(allowed):
    n_rows, n_time, vocab_size = allowed.shape
    support = Support.of_bits(n_rows, n_time, vocab_size)
    for t in range(n_time):
        support.entries[:, t] = pack(allowed[:, t])
    return support


@pytest.mark.parametrize("vocab_size", [2, 7, 8, 9, 257, 1000])
def test_bits_come_back(vocab_size):
    allowed = bools(3, 4, vocab_size, 0.5)
    assert pack(allowed).dtype == torch.uint8 and pack(allowed).shape == (3, 4, -(-vocab_size // 8))
    assert unpack(pack(allowed), vocab_size).equal(allowed)
    assert stored(allowed).allowed().equal(allowed)


@pytest.mark.parametrize(
    ("share", "form"), [(0.002, "kept"), (0.998, "dropped"), (0.5, "bits")], ids=["few", "nearly all", "half"]
)
@pytest.mark.parametrize("vocab_size", [1000, 1001])
def test_the_smallest_form_is_taken_and_says_the_same(share, form, vocab_size):
    allowed = bools(3, 4, vocab_size, share)
    mask = torch.ones(3, 4, dtype=torch.bool)
    bits = stored(allowed)
    compact = bits.compact(*bits.largest_lists(mask).tolist())
    assert compact.form == form
    assert compact.allowed().equal(allowed)
    bytes_of = compact.entries.element_size() * compact.entries.shape[-1]
    assert bytes_of <= -(-vocab_size // 8)
    if form != "bits":
        assert bytes_of <= 4 * max(1, int(allowed.sum(-1).max() if form == "kept" else (~allowed).sum(-1).max()))


def test_a_position_that_does_not_count_costs_nothing_and_has_a_support():
    allowed = bools(2, 3, 1000, 0.002)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    bits = Support.of_bits(2, 3, 1000)
    for row, t in mask.nonzero().tolist():
        bits.entries[row, t] = pack(allowed[row, t])
    compact = bits.compact(*bits.largest_lists(mask).tolist())
    assert compact.form == "kept" and compact.entries.shape[-1] == int(allowed[mask].sum(-1).max())
    assert compact.allowed()[mask].equal(allowed[mask])
    assert compact.allowed().any(-1).all()


def test_a_process_with_shorter_lists_takes_the_common_form():
    """What is gathered must have one shape: the counts may come from another process."""
    allowed = bools(2, 3, 1000, 0.002)
    compact = stored(allowed).compact(20, 999)
    assert compact.form == "kept" and compact.entries.shape == (2, 3, 20)
    assert compact.allowed().equal(allowed)


def test_without_truncation_nothing_is_stored():
    support = Support.of_all(4, 5)
    assert support.entries.numel() == 0 and support.allowed() is None
    assert support.compact(*support.largest_lists(torch.ones(4, 5, dtype=torch.bool)).tolist()) is support
    assert support.rows(torch.tensor([0, 2])).cut(T=slice(0, 3)).entries.shape == (2, 3, 0)


def test_what_depends_on_the_position_alone_is_stored_once():
    rules = bools(1, 2, 1000, 0.5)[0]
    support = Support.of_rules(4, rules, torch.tensor([0, 0, 1]))
    assert support.entries.numel() * support.entries.element_size() == 4 * 3, "a byte a position"
    assert support.allowed().equal(rules[[0, 0, 1]].expand(4, 3, 1000))
    assert support.compact(*support.largest_lists(torch.ones(4, 3, dtype=torch.bool)).tolist()) is support
    assert support.rows(torch.tensor([2])).cut(T=slice(1, 3)).allowed().equal(rules[None])


def test_rows_and_columns_are_cut_in_every_form():
    allowed = bools(4, 5, 1000, 0.002)
    bits = stored(allowed)
    for support in (bits, bits.compact(*bits.largest_lists(torch.ones(4, 5, dtype=torch.bool)).tolist())):
        part = support.rows(torch.tensor([3, 1])).cut(T=slice(0, 2))
        assert part.allowed().equal(allowed[[3, 1], :2])
