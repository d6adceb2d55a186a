"""The probe: a model is fed as its own numbers want it, or refused by name before any work."""

import pytest
import torch
from builders import EOS, VOCAB, critic_of, gpt2, llama, make_trainer
from test_language_model import randomised
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForTokenClassification,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lmppo.models import ActorCritic, LanguageModel, Positions, Reference, UnsupportedModelError
from lmppo.models.probe import PADDING, STEPS, probe_tokens
from lmppo.prompts import pad_left
from lmppo.sampling import SamplingParams, sample, uniform_noise

ENDS = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {"max_position_embeddings": 40, "initializer_range": 0.3, **SIZES, **ENDS}
BART = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "init_std": 0.3}
OPT = {"ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, **ENDS}


def made(cls, config):
    torch.manual_seed(0)
    return randomised(cls(config))


def roberta():
    return made(RobertaForCausalLM, RobertaConfig(is_decoder=True, **ENCODER))


def lfm2():
    layers = ["conv", "full_attention"]
    return made(Lfm2ForCausalLM, Lfm2Config(num_key_value_heads=1, layer_types=layers, **ENCODER))


def mamba():
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    return made(MambaForCausalLM, MambaConfig(initializer_range=0.3, **sizes, **ENDS))


def opt_350m():
    return made(OPTForCausalLM, OPTConfig(hidden_size=16, word_embed_proj_dim=8, do_layer_norm_before=False, **OPT))


def bart():
    return made(BartForCausalLM, BartConfig(max_position_embeddings=64, **BART, **ENDS))


def single_row(model, ids):
    """Log-probabilities and hidden states of the plain model on one row: nothing but input_ids."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.logits[0].log_softmax(-1), out.hidden_states[-1][0]


@pytest.mark.parametrize("build", [roberta, lfm2, mamba, opt_350m], ids=lambda b: b.__name__)
@torch.no_grad()
def test_padded_rows_are_those_of_the_plain_model(build):
    """Sampled over the cache, rows dropped as they end, and read again in the update's forward pass."""
    model = build()
    actor_critic = ActorCritic(model)
    torch.nn.init.normal_(actor_critic.value_head.weight)
    prompts = [[5], [2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    noise = uniform_noise(4, 0, range(3), 8)
    samples = sample(actor_critic, *pad_left(prompts, 7), noise, SamplingParams(8, (2, 3, 4)))
    logits, again = actor_critic.logits(samples.tokens), actor_critic.values(samples.tokens)
    lengths = samples.completion_mask.sum(dim=1).tolist()
    assert len(set(lengths)) > 1, "a row ends before another"
    for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        completion = samples.tokens.completion_ids[i, :n]
        logprobs, hidden = single_row(model, prompt + completion.tolist())
        states = slice(len(prompt) - 1, len(prompt) - 1 + n)
        expected = logprobs[states].gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(samples.logprobs[i, :n], expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(logits[i, :n].log_softmax(-1), logprobs[states], atol=2e-5, rtol=0)
        if build is not opt_350m:  # its head reads a projection of these
            values = actor_critic.values_of(hidden)[states]
            torch.testing.assert_close(samples.values[i, :n], values, atol=1e-4, rtol=0)
            torch.testing.assert_close(again[i, :n], values, atol=1e-4, rtol=0)


def test_what_the_models_tell_of_themselves():
    assert LanguageModel(gpt2().eval()).positions == Positions(0, packs=True)
    assert LanguageModel(roberta()).positions == Positions(2, padding_id=1)
    assert LanguageModel(mamba()).positions == Positions(None)
    assert LanguageModel(opt_350m()).width == 8, "what its head reads, not config.hidden_size"


class Refused:
    """Models and what is said of them."""

    def no_cache():
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
        return made(OpenAIGPTLMHeadModel, OpenAIGPTConfig(vocab_size=VOCAB, **sizes)), "OpenAIGPTLMHeadModel.* no cache"

    def padding():
        return bart(), "BartForCausalLM, which computes something else with its cache than without"

    def encoder_and_decoder():
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
        model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
        return model, "T5ForConditionalGeneration, an encoder and a decoder: expected a causal language model"

    def bidirectional():
        model = made(RobertaForCausalLM, RobertaConfig(is_decoder=False, **ENCODER))
        return model, "RobertaForCausalLM that reads later tokens.*is_decoder=True"

    def cache_that_forgets():
        class Forgetful(GPT2LMHeadModel):
            def forward(self, input_ids=None, past_key_values=None, **kwargs):
                return super().forward(input_ids=input_ids, past_key_values=None, **kwargs)

        model = randomised(Forgetful(gpt2().config))
        model.transformer.h[0].attn.forward = _without_cache(model.transformer.h[0].attn.forward)
        return model, "Forgetful, which computes something else with its cache than without"

    def batch():
        class Centred(GPT2LMHeadModel):
            def forward(self, **kwargs):
                out = super().forward(**kwargs)
                out.logits = out.logits + out.logits.mean(dim=0)
                return out

        return randomised(Centred(gpt2().config)), "Centred, which computes something else of a row when it is padded"

    def broken():
        model = gpt2()
        model.transformer.ln_f.bias.data[0] = float("nan")
        return model, "GPT2LMHeadModel whose outputs are not finite"

    def raising():
        class Broken(GPT2LMHeadModel):
            def forward(self, **kwargs):
                raise KeyError("pixel_values")

        return randomised(Broken(gpt2().config)), r"Broken, which cannot read a few tokens.*KeyError: 'pixel_values'"


def _without_cache(forward):
    def changed(hidden_states, past_key_values=None, **kwargs):
        return forward(hidden_states, past_key_values=None, **kwargs)

    return changed


@pytest.mark.parametrize("case", [name for name in vars(Refused) if not name.startswith("_")])
def test_what_cannot_be_right_is_refused_by_name(tmp_path, case):
    model, message = getattr(Refused, case)()
    with pytest.raises(UnsupportedModelError, match=message):
        make_trainer(tmp_path, model=model)
    assert not list(tmp_path.iterdir()), "before any work"


def test_a_compiled_model_is_run_as_it_was_before(tmp_path, capsys):
    compiled = torch.compile(gpt2(), backend="eager")
    trainer = make_trainer(tmp_path, model=compiled, ref_model=torch.compile(gpt2(), backend="eager"))
    assert "model is compiled: lmppo runs the model within, uncompiled." in capsys.readouterr().out
    trainer.train()
    plain = make_trainer(tmp_path / "plain", ref_model=gpt2())
    plain.train()
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_reference_is_probed_too():
    """It has no cache: one that cannot be told its positions is read right, as padding is behind its rows."""
    bidirectional = made(RobertaForCausalLM, RobertaConfig(is_decoder=False, **ENCODER))
    with pytest.raises(UnsupportedModelError, match="ref_model is a RobertaForCausalLM that reads later tokens"):
        Reference(gpt2(), bidirectional)
    reference, tokens = Reference(gpt2(), bart()), probe_tokens(bart())
    logits = reference.logits(tokens)
    for i, row in enumerate(tokens.input_ids):
        logprobs, _ = single_row(reference.model, row[tokens.attention_mask[i]].tolist())
        torch.testing.assert_close(logits[i].log_softmax(-1), logprobs[-STEPS - 1 : -1], atol=2e-5, rtol=0)


def test_a_critic_that_reads_later_tokens_is_refused(tmp_path):
    critic = made(BertForTokenClassification, BertConfig(num_labels=1, **ENCODER))
    with pytest.raises(UnsupportedModelError, match="critic is a BertForTokenClassification that reads later tokens"):
        make_trainer(tmp_path, critic=critic)


def test_a_critic_is_probed_whatever_its_head_gives():
    """A new head gives 0 for every state, whether its trunk is causal or not."""
    critic = made(BertForTokenClassification, BertConfig(num_labels=1, **ENCODER))
    torch.nn.init.zeros_(critic.classifier.weight)
    torch.nn.init.zeros_(critic.classifier.bias)
    with pytest.raises(UnsupportedModelError, match="reads later tokens"):
        ActorCritic(gpt2(), critic)
    ActorCritic(gpt2(), critic_of())


def test_a_model_in_16_bits_may_round_more():
    model = llama().eval()
    LanguageModel(model.to(torch.bfloat16))


def test_the_probe_goes_past_a_window():
    """Wrong only beyond the window: a mask that is right for short rows would pass."""

    class Leaking(MistralModel):
        """Beyond the window, what it computes of a row depends on the other rows."""

        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.last_hidden_state[1:, 24:] += 1
            return out

    windowed = MistralConfig(sliding_window=12, num_key_value_heads=1, **ENCODER)
    leaking = made(MistralForCausalLM, windowed)
    leaking.model.__class__ = Leaking
    with pytest.raises(UnsupportedModelError, match="when it is padded"):
        LanguageModel(leaking)
    LanguageModel(made(MistralForCausalLM, windowed))
    leaking.config.sliding_window = None  # shorter rows do not show it
    LanguageModel(leaking)


def test_the_tokens_of_the_probe():
    tokens = probe_tokens(gpt2())
    assert tokens.prompt_mask.sum(dim=1).tolist() == [3, 16, 5]
    assert tokens.completion_ids.shape == (3, STEPS)
    assert not (tokens.input_ids[tokens.attention_mask] == EOS).any(), "no token that ends or pads"
    windowed = MistralConfig(sliding_window=30, **ENCODER | {"max_position_embeddings": 100})
    assert probe_tokens(MistralForCausalLM(windowed)).prompt_ids.shape[1] == 30 + 16 + PADDING
    short = gpt2(n_positions=8)
    assert probe_tokens(short).input_ids.shape[1] == 8
    ActorCritic(short)


def test_the_probe_leaves_no_trace():
    """Neither gradients nor random numbers nor modes."""
    model = gpt2().eval()
    before = torch.get_rng_state()
    LanguageModel(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
