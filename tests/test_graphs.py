"""Sampling by a CUDA graph: on a CPU the same decoder over a cache of fixed length, its rows where a graph would have them.

That graphs are recorded and replayed is in test_accelerator.py.
"""

import pytest
import torch
from builders import PROMPTS, build_model, encode, gpt2, llama, make_config, make_trainer
from test_probe import ENCODER, lfm2, made
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from lmppo.models import ActorCritic
from lmppo.models.decoder import Decoder
from lmppo.models.graphs import FEWER, GraphedDecoder, check_decoding
from lmppo.sampling import SamplingParams, sample, uniform_noise

MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "sliding windows": lambda: made(
        MistralForCausalLM, MistralConfig(sliding_window=5, num_key_value_heads=1, **ENCODER)
    ),
    "biases for distances": lambda: made(
        BloomForCausalLM, BloomConfig(vocab_size=12, hidden_size=16, n_head=2, n_layer=2)
    ),
    "opt": lambda: made(
        OPTForCausalLM, OPTConfig(vocab_size=12, hidden_size=16, ffn_dim=32, num_attention_heads=2, num_hidden_layers=2)
    ),
}


def samples_of(model, graphs, n_time=24, prompts=PROMPTS * 4, **settings):
    ids, mask = encode(*prompts)
    noise = uniform_noise(3, 0, range(len(ids)), n_time)
    return sample(model, ids, mask, noise, SamplingParams(n_time, (0,), **settings), graphs=graphs)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_values_and_log_probabilities_are_those_of_the_plain_decoder(name):
    model = ActorCritic(MODELS[name]())
    torch.nn.init.normal_(model.value_head.weight, std=0.5)
    plain, graphed = (samples_of(model, graphs) for graphs in (False, True))
    ends = plain.completion_mask.sum(dim=1)
    assert ends.min() < 12 < ends.max(), "rows end at different times"
    assert torch.equal(plain.tokens.completion_ids, graphed.tokens.completion_ids)
    for field in ("logprobs", "values", "max_logit"):
        torch.testing.assert_close(getattr(plain, field), getattr(graphed, field), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_critics_groups_and_truncated_distributions(kind):
    model = build_model("llama", kind)
    settings = {"prompts": [p for p in PROMPTS for _ in range(3)], "top_k": 5, "temperature": 0.7}
    plain, graphed = (samples_of(model, graphs, **settings) for graphs in (False, True))
    assert torch.equal(plain.tokens.completion_ids, graphed.tokens.completion_ids)
    assert torch.equal(plain.support.entries, graphed.support.entries)
    torch.testing.assert_close(plain.values, graphed.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [gpt2, llama])
def test_states_of_frozen_layers(family):
    model = ActorCritic(family(), num_layers_unfrozen=1)
    plain, graphed = (samples_of(model, graphs).tokens.below for graphs in (False, True))
    torch.testing.assert_close(plain, graphed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [gpt2, llama])
def test_under_autocast_only_rounding_differs(family):
    model = ActorCritic(family())
    with torch.autocast("cpu", torch.bfloat16):
        plain, graphed = (samples_of(model, graphs) for graphs in (False, True))
    torch.testing.assert_close(plain.logprobs[:, 0], graphed.logprobs[:, 0], rtol=0, atol=5e-2)
    same = (plain.tokens.completion_ids == graphed.tokens.completion_ids) & plain.completion_mask
    assert same.sum() > 0.8 * plain.completion_mask.sum()


def test_rows_that_ended_are_read_along_until_few_go_on():
    model = ActorCritic(llama())
    ids, mask = encode(*["abc"] * 3, *PROMPTS, *["k"] * 3)
    plain, graphed = model.decoder(ids, mask), model.decoder(ids, mask, graphs_for=12)
    assert type(plain) is Decoder and type(graphed) is GraphedDecoder
    generator, widths = torch.Generator().manual_seed(0), []
    for rows in ([*range(12)], [0, 2, 3, 5, 7, 11], [0, 2, 5], [1, 2], [1]):
        rows = torch.tensor(rows)
        for decoder in (plain, graphed):
            decoder.keep(rows)
        for _ in range(2):
            token = torch.randint(1, 12, (len(rows),), generator=generator)
            for decoder in (plain, graphed):
                decoder.feed(token)
            torch.testing.assert_close(plain.logits, graphed.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(plain.hidden, graphed.hidden, rtol=1e-4, atol=1e-5)
        widths.append(len(graphed._inputs["input_ids"]))
    assert widths == [12, 12, 3, 3, 3] and FEWER == 4


def test_what_is_sampled_may_use_the_whole_context():
    model = ActorCritic(gpt2(n_positions=12))
    plain, graphed = (samples_of(model, graphs, n_time=5) for graphs in (False, True))
    assert torch.equal(plain.tokens.completion_ids, graphed.tokens.completion_ids)


def test_the_probe_sees_a_step_that_is_wrong(monkeypatch):
    model = ActorCritic(llama())
    assert check_decoding(model.language_model, True) == ""
    keep = GraphedDecoder.keep
    monkeypatch.setattr(GraphedDecoder, "keep", lambda self, rows: keep(self, rows.flip(0)))
    assert "a difference of" in check_decoding(model.language_model, True)


def test_a_cache_that_holds_more_than_keys_and_values_is_refused():
    assert "keeps more than keys and values" in check_decoding(ActorCritic(lfm2()).language_model, True)


def test_a_device_without_graphs_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"cuda_graphs=True: the policy is on 'cpu', .*Leave cuda_graphs out"):
        make_trainer(tmp_path, cuda_graphs=True)
    assert make_config(tmp_path).cuda_graphs is False
