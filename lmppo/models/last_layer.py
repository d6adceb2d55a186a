"""The last layer's feed-forward part, run for the tokens whose states are read, and for no others.

Only attention looks at other tokens, and none comes after it: what the part would compute of the prompts is never used. Most
families call it ``mlp``. Where there is none of that name, or the probe finds that a model computes something else so, it
runs for all tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lmppo.models.exchange import exchanged
from lmppo.models.inputs import Aligned, base_of, pick, stack_of
from lmppo.models.probe import Outputs, excess, probe_tokens


class LastLayer:
    """The last layer of a model.

    Args:
        model: It, plain or with an adapter.
        read: What the model computes of the counted tokens of aligned rows, ``(1, N, ...)``.
    """

    def __init__(self, model: Any, read: Callable[[Aligned], Outputs]) -> None:
        stack = stack_of(base_of(model))
        self._part: Any = getattr(stack[-1], "mlp", None) if stack else None
        if self._part is not None and not self._same(model, read):
            self._part = None

    @torch.no_grad()
    def _same(self, model: Any, read: Callable[[Aligned], Outputs]) -> bool:
        """Whether the model computes of some tokens what it computes of them among all."""
        aligned = Aligned.of(probe_tokens(model))
        expected = read(aligned)
        try:
            with self.reading(aligned):
                return not excess(read(aligned), expected, model).too_large
        except Exception:  # whatever it objects to, running for all tokens is right
            return False

    @contextlib.contextmanager
    def reading(self, aligned: Aligned) -> Iterator[None]:
        """Within it, the part runs for the states before the counted tokens, and answers 0 for the others."""
        part, places = self._part, (aligned.lines, aligned.columns)
        if part is None or not len(aligned.lines):
            yield
            return
        forward = part.forward

        def run(*inputs: Tensor) -> Tensor:
            answer = forward(*(pick(x, *places) for x in inputs))
            return answer.new_zeros(*inputs[0].shape[:2], answer.shape[-1]).index_put_(places, answer[0])

        with exchanged({part: run}):
            yield
