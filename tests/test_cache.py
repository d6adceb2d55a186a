"""The cache with room holds what transformers' own cache does."""

import pytest
import torch
from builders import gpt2, llama
from test_probe import ENCODER, lfm2, made
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from lmppo.models.cache import ROOM, RoomyLayer, make_cache

ROWS = {2: [3, 1, 1], 4: [0, 2, 2, 1, 0], 6: [1, 0, 2, 4], 8: [0, 1, 2, 3], ROOM: [0, 3, 2], ROOM + 2: [2, 0]}
"""Which rows go on after some tokens; of the second, more than there were."""

MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "sliding windows": lambda: made(
        MistralForCausalLM, MistralConfig(sliding_window=5, num_key_value_heads=1, **ENCODER)
    ),
    "convolutions": lfm2,
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_over_it_are_those_over_the_plain_cache_while_rows_are_dropped_and_named_again(name):
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(0)
    ours, theirs = make_cache(model.config), DynamicCache(config=model.config)
    ids = torch.randint(2, 11, (4, 3), generator=generator)
    for t in range(ROOM + 5):
        logits = [model(ids, past_key_values=cache, use_cache=True).logits for cache in (ours, theirs)]
        assert torch.equal(*logits) or torch.allclose(*logits, atol=1e-6)
        if t in ROWS:
            rows = torch.tensor(ROWS[t])
            for cache in (ours, theirs):
                cache.reorder_cache(rows)
            ids = ids[rows]
        ids = torch.randint(2, 11, (len(ids), 1), generator=generator)
        assert ours.get_seq_length() == theirs.get_seq_length() == 3 + t


def test_tokens_are_written_behind_the_others_and_copied_only_when_there_is_no_room():
    layer, plain = RoomyLayer(), DynamicLayer()
    places = []
    for _ in range(2 * ROOM):
        new = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 5)
        for ours, theirs in zip(layer.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        places.append(layer.keys.data_ptr())
    assert 2 <= len(set(places)) <= 3, "each time for many tokens"


def test_rows_that_stay_in_their_places_are_not_copied():
    layer = RoomyLayer()
    layer.update(torch.randn(5, 3, 2, 4), torch.randn(5, 3, 2, 4))
    place, expected = layer.keys.data_ptr(), layer.keys[[0, 4, 2, 3]].clone()
    layer.keys[0, 0, 0, 0] = expected[0, 0, 0, 0] = 7
    layer.reorder_cache(torch.tensor([0, 4, 2, 3]))
    assert layer.keys.data_ptr() == place and torch.equal(layer.keys, expected)


def test_layers_of_other_kinds_stay_as_they_are():
    config = MistralConfig(sliding_window=5, **ENCODER)
    assert [type(layer) for layer in make_cache(config).layers] == [type(x) for x in DynamicCache(config=config).layers]
    assert all(type(layer) is RoomyLayer for layer in make_cache(gpt2().config).layers)
