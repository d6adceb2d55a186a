"""States of a language model: what its trunk has computed, and its head reads.

Axes: ``B`` sequences, ``n`` states of each, ``N`` states of all, ``H`` hidden, ``V`` vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from lmppo.models.inputs import pick


@dataclass(frozen=True)
class States:
    """What a language model has computed of some states, before its head.

    Attributes:
        hidden: ``(B, n, H)`` what the head reads; None where the model does not give it.
        logits: ``(B, n, V)`` where the model cannot be split and has computed them already.
    """

    hidden: Tensor | None
    logits: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """What the logits are made of: the hidden states, or the logits themselves."""
        source = self.hidden if self.logits is None else self.logits
        assert source is not None
        return source

    @property
    def parts(self) -> list[Tensor]:
        """What there is: the hidden states, the logits."""
        return [x for x in (self.hidden, self.logits) if x is not None]

    def __len__(self) -> int:
        return self.source.shape[1]

    def cut(self, part: slice) -> "States":
        """Some of the states of one row, as a tensor of their own: one product of matrices, in a frozen head as well."""
        return self.with_source(self.source[0, part][None])

    def with_source(self, source: Tensor) -> "States":
        """The states whose logits are made of another tensor."""
        return States(source) if self.logits is None else States(None, source)

    def at(self, rows: Tensor, columns: Tensor) -> "States":
        """N states as one row, ``(1, N, ...)``."""
        picked = [None if x is None else pick(x, rows, columns) for x in (self.hidden, self.logits)]
        return States(*picked)
