"""A cache of keys and values that has room for the tokens to come."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32
"""Tokens that there is room for when keys and values are copied to longer tensors."""


def make_cache(config: Any) -> DynamicCache:
    """The cache that transformers makes for a model, its plain layers with room.

    Args:
        config: The model's configuration, which may ask for layers of other kinds.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values ``(B, heads, n, size)`` that are parts of longer tensors: those of a new token are written behind.

    :class:`DynamicLayer` copies all of them for every token.
    """

    keys: Tensor
    values: Tensor
    _whole: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_old = self.get_seq_length()
        n_all = n_old + key_states.shape[2]
        if self._whole is None or self._whole[0].shape[2] < n_all:
            longer = tuple(
                new.new_empty(*new.shape[:2], n_all + ROOM, new.shape[3]) for new in (key_states, value_states)
            )
            if n_old:
                longer[0][:, :, :n_old], longer[1][:, :, :n_old] = self.keys, self.values
            self._whole = longer[0], longer[1]
        keys, values = self._whole
        keys[:, :, n_old:n_all], values[:, :, n_old:n_all] = key_states, value_states
        self.keys, self.values = keys[:, :, :n_all], values[:, :, :n_all]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, and the same room. Rows that keep their places are not copied, unless rows are added."""
        if self._whole is None:
            return
        n_rows, n_all = len(beam_idx), self.get_seq_length()
        keys, values = self._whole
        if n_rows > len(keys):
            keys, values = (whole.index_select(0, beam_idx.to(whole.device)) for whole in self._whole)
        else:
            places = (beam_idx != torch.arange(n_rows, device=beam_idx.device)).nonzero()[:, 0]
            to, of = (rows.to(keys.device) for rows in (places, beam_idx[places]))
            keys, values = (whole.index_copy_(0, to, whole.index_select(0, of))[:n_rows] for whole in self._whole)
        self._whole = keys, values
        self.keys, self.values = keys[:, :, :n_all], values[:, :, :n_all]
