"""Which tokens could be sampled at each position, where some are left out, in little memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmppo.axes import Record, axes


@dataclass(frozen=True)
class Support(Record):
    """The tokens that could be sampled at each position, in at most V/8 bytes a position (rounded up).

    Attributes:
        entries: ``(B, T, N)`` by ``form``: ``"all"``: nothing, N = 0 (the rule says it all); ``"kept"`` or
            ``"dropped"``: the ids of the tokens that could, or could not, be sampled, filled up with V; ``"bits"``: one
            bit for each token of the vocabulary, eight to a byte, the lowest first; ``"rules"``: N = 1, the row of
            ``rules`` that holds there.
        form: How the support is stored.
        vocab_size: ``V``.
        rules: ``(R, V)`` True on the tokens that could be sampled, where that depends on nothing but the position.
    """

    entries: Tensor = axes("B T N", torch.uint8, torch.int32)
    form: str = "all"
    vocab_size: int = 0
    rules: Tensor | None = None

    @classmethod
    def of_all(cls, n_rows: int, n_time: int, device: torch.device | None = None) -> "Support":
        """Every token could be sampled."""
        return cls(torch.empty(n_rows, n_time, 0, dtype=torch.uint8, device=device))

    @classmethod
    def of_bits(cls, n_rows: int, n_time: int, vocab_size: int, device: torch.device | None = None) -> "Support":
        """A bit for each token, all of them set: to be overwritten position by position with :func:`pack`."""
        size = (n_rows, n_time, -(-vocab_size // 8))
        return cls(torch.full(size, 255, dtype=torch.uint8, device=device), "bits", vocab_size)

    @classmethod
    def of_rules(cls, n_rows: int, rules: Tensor, numbers: Tensor) -> "Support":
        """The same for every row: ``rules (R, V)``, of which ``numbers (T,)`` tells the one at each position."""
        entries = numbers.to(torch.uint8)[None, :, None].repeat(n_rows, 1, 1)
        return cls(entries, "rules", rules.shape[-1], rules)

    def allowed(self) -> Tensor | None:
        """``(B, T, V)`` True on the tokens that could be sampled; None if all could. For a few rows at a time."""
        if self.form == "all":
            return None
        if self.form == "bits":
            return unpack(self.entries, self.vocab_size)
        if self.rules is not None:
            return self.rules[self.entries[..., 0].long()]
        listed = torch.zeros(*self.entries.shape[:2], self.vocab_size + 1, dtype=torch.bool, device=self.entries.device)
        listed = listed.scatter_(2, self.entries.long(), True)[..., :-1]
        return listed if self.form == "kept" else ~listed

    def largest_lists(self, mask: Tensor) -> Tensor:
        """``(2,)`` the most tokens kept, and the most dropped, at a position where ``mask (B, T)`` is True."""
        if self.form != "bits":
            return torch.zeros(2, dtype=torch.long, device=mask.device)
        of_byte = torch.tensor([byte.bit_count() for byte in range(256)], device=mask.device)
        kept = torch.stack([of_byte[row.long()].sum(dim=-1) for row in self.entries])
        counts = torch.stack([kept, self.vocab_size - kept])
        return torch.where(mask, counts, 0).flatten(1).amax(dim=1)

    def compact(self, n_kept: int, n_dropped: int) -> "Support":
        """Bits as lists of ids, where those take less memory.

        Args:
            n_kept: The most tokens kept at a position that counts; see :meth:`largest_lists`.
            n_dropped: The most tokens dropped there.
        """
        n = min(n_kept, n_dropped)
        if self.form != "bits" or 4 * n >= self.entries.shape[-1]:
            return self
        form = "kept" if n_kept <= n_dropped else "dropped"
        lists = []
        for row in self.entries:
            listed = unpack(row, self.vocab_size) == (form == "kept")
            found, ids = listed.to(torch.uint8).topk(n, dim=-1)
            lists.append(ids.masked_fill(found == 0, self.vocab_size).to(torch.int32))
        return Support(torch.stack(lists), form, self.vocab_size)


def pack(allowed: Tensor) -> Tensor:
    """``(..., V)`` bools as ``(..., ceil(V / 8))`` bytes."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % 8))
    eights = padded.reshape(*padded.shape[:-1], -1, 8)
    return (eights * _BITS.to(allowed.device)).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, vocab_size: int) -> Tensor:
    """The bools that :func:`pack` was given."""
    return (packed.unsqueeze(-1) & _BITS.to(packed.device)).bool().flatten(-2)[..., :vocab_size]


_BITS = 2 ** torch.arange(8, dtype=torch.uint8)
