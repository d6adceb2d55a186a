"""A policy that is fed one token per row at a time by replaying a CUDA graph.

A graph is a recorded series of kernels, which the GPU then starts by itself: of a small model, starting them one by one
from Python takes longer than what they compute. Its tensors stay where they were, so the cache has a fixed length.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from lmppo.models.decoder import Decoder, Step, decode_error
from lmppo.models.inputs import kind_of
from lmppo.models.language_model import LanguageModel
from lmppo.models.probe import STEPS, UnsupportedModelError, one_line

FEWER = 4
"""Ended rows are read along until no more than one in so many goes on: then the graph is recorded anew, for these rows."""


class FixedLayer(StaticLayer):
    """Keys and values of a fixed length, each of its own type: autocast rounds values, and rotated keys not."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for keys and values like these."""
        super().lazy_initialization(key_states, value_states)
        self.values: Tensor = self.values.to(value_states.dtype)


class GraphedDecoder(Decoder):
    """A :class:`Decoder` whose steps are one graph: read in the usual way at first, then recorded, then replayed.

    On a CPU, which has no graphs, every step is read in the usual way.

    Args:
        language_model: The policy.
        prompt_ids: ``(B, P)`` left-padded.
        prompt_mask: ``(B, P)``.
        masks_steps: As in :class:`Decoder`.
        n_new: Most tokens that are fed.

    Raises:
        UnsupportedModelError: The model's cache has no fixed length.
    """

    def __init__(
        self, language_model: LanguageModel, prompt_ids: Tensor, prompt_mask: Tensor, *, masks_steps: bool, n_new: int
    ) -> None:
        self.length = prompt_ids.shape[1] + n_new
        self._slots: Tensor | None = None  # where in the graph's tensors the rows are that go on
        self._record_nothing()
        super().__init__(language_model, prompt_ids, prompt_mask, masks_steps=masks_steps)
        self._slots = torch.arange(len(prompt_ids), device=prompt_ids.device)

    def _record_nothing(self) -> None:
        self._graph: Any = None
        self._inputs: dict[str, Tensor] = {}
        self._recorded: Step | None = None

    def _make_cache(self) -> StaticCache:
        model = self.language_model.model
        cache = StaticCache(config=model.config, max_cache_len=self.length)
        if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
            raise UnsupportedModelError(f"a {kind_of(model)} keeps more than keys and values")
        # A window is hidden by the mask: a layer that drops what is before it would move its tensors.
        cache.layers = [FixedLayer(max_cache_len=self.length) for _ in cache.layers]
        return cache

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, given by their numbers; the others are read along, as long as that is cheaper."""
        if self._slots is None:  # the prompts' rows, before anything is recorded
            return super().keep(rows)
        self.ids, self.mask, self._slots = self.ids[rows], self.mask[rows], self._slots[rows]
        if not self._inputs or FEWER * len(rows) <= len(self._inputs["input_ids"]):
            self.cache.reorder_cache(self._slots)
            self._slots = torch.arange(len(rows), device=rows.device)
            self._record_nothing()

    def _compute(self, inputs: dict[str, Tensor]) -> Step:
        inputs = inputs | {"attention_mask": pad(self.mask, (0, self.length - self.mask.shape[1]))}
        if self._slots is None:
            return super()._compute(inputs)
        if not self._inputs:
            self._inputs = {name: x.clone() for name, x in inputs.items()}
            return super()._compute(self._inputs)
        for name, x in inputs.items():
            self._inputs[name][self._slots] = x
        if self._inputs["input_ids"].device.type == "cuda":
            if self._graph is None:
                self._record()
            self._graph.replay()
        else:
            self._recorded = super()._compute(self._inputs)
        assert self._recorded is not None
        return self._recorded.rows(self._slots)

    def _record(self) -> None:
        """Record a step. Weights that autocast has rounded before are not used: they may be gone at the next replay."""
        kind = "cuda"
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._graph = torch.cuda.CUDAGraph()
        with torch.autocast(kind, dtype, enabled, cache_enabled=False), torch.cuda.graph(self._graph):
            self._recorded = super()._compute(self._inputs)


@torch.no_grad()
def check_graphs(language_model: LanguageModel, masks_steps: bool) -> None:
    """A few tokens that are read by a graph give the logits of each row alone.

    Args:
        language_model: The policy, on its device.
        masks_steps: As in :class:`Decoder`.

    Raises:
        ValueError: The device is no NVIDIA or AMD GPU.
        UnsupportedModelError: The model cannot be recorded, or gives other numbers.
    """
    model = language_model.model
    device = next(iter(model.parameters())).device
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs=True: the policy is on {device.type!r}, which has none. Leave cuda_graphs out.")
    problem = check_decoding(language_model, masks_steps)
    if problem:
        raise UnsupportedModelError(
            f"cuda_graphs=True: a {kind_of(model)} cannot be sampled by a graph: {problem}. Leave cuda_graphs out."
        )


def check_decoding(language_model: LanguageModel, masks_steps: bool) -> str:
    """What is wrong with a few tokens of the :class:`GraphedDecoder`; empty if nothing is."""
    with torch.autocast(next(iter(language_model.model.parameters())).device.type, enabled=False):
        try:
            make = partial(GraphedDecoder, masks_steps=masks_steps, n_new=STEPS)
            difference = decode_error(language_model, make)
        except Exception as error:
            return one_line(error)
    return f"a difference of {difference}" if difference.too_large else ""
