"""Trunk and head apart give what the model's own forward gives, to the bit, whatever a family puts between them."""

import pytest
import torch
from builders import EOS, VOCAB, critic_of, encode, gpt2, llama
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_checks import sized
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lmppo.functional import token_logprobs
from lmppo.models import ActorCritic, LanguageModel, Reference, UnsupportedModelError
from lmppo.records import Tokens

ROUNDING = {"atol": 5e-6, "rtol": 1e-5}  # float32, other matrix shapes
ENDS = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"max_position_embeddings": 64, "initializer_range": 0.2, **SIZES, **ENDS}
OPT = {"ffn_dim": 32, "max_position_embeddings": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **ENDS}

FAMILIES = {
    "gpt2": gpt2,
    "llama": llama,
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "gptj, a bias in the head": lambda: GPTJForCausalLM(
        GPTJConfig(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=64, **ENDS)
    ),
    "gemma2, a soft-cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(head_dim=8, num_key_value_heads=1, final_logit_softcapping=3.0, **WIDE)
    ),
    "cohere, a scale": lambda: CohereForCausalLM(CohereConfig(num_key_value_heads=1, logit_scale=0.25, **WIDE)),
    "granite, a divisor": lambda: GraniteForCausalLM(GraniteConfig(num_key_value_heads=1, logits_scaling=4.0, **WIDE)),
    "opt, a projection": lambda: OPTForCausalLM(OPTConfig(hidden_size=16, word_embed_proj_dim=8, **OPT)),
}
LORA = {
    "attention": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "all-linear": {"target_modules": "all-linear"},
    "the head": {"target_modules": ["c_attn", "lm_head"]},
}


def randomised(model):
    """Biases too: a bias of 0 that is left out would not be noticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch():
    """Prompts and completions of several lengths."""
    prompt_ids, prompt_mask = encode("a", "deadbeef", "kj")
    ids = torch.tensor([[3, 4, 5, 6], [7, 0, 0, 0], [1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    return Tokens(prompt_ids, prompt_mask, ids, mask)


def own_forward(model, tokens):
    """``(B, T, V)`` the logits of the states before the counted tokens, each row alone by the model's own forward."""
    logits = torch.zeros(*tokens.completion_ids.shape, VOCAB)
    for row, (mask, n) in enumerate(zip(tokens.prompt_mask, tokens.lengths.tolist(), strict=True)):
        ids = torch.cat([tokens.prompt_ids[row, mask], tokens.completion_ids[row, : n - 1]])
        logits[row, :n] = model(input_ids=ids[None]).logits[0, -n:]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_models_own_logits_to_the_bit(family):
    torch.manual_seed(0)
    model = randomised(FAMILIES[family]())
    language_model, tokens = LanguageModel(model), batch()
    assert language_model.trunk is not None, "it can be split"
    ids = torch.randint(1, VOCAB, (3, 9))
    with torch.no_grad():
        states = language_model.forward(last=9, input_ids=ids)
        assert states.logits is None, "no logits before they are asked for"
        assert torch.equal(language_model.logits_of(states), model(input_ids=ids).logits)
        torch.testing.assert_close(language_model.logits(tokens), own_forward(model, tokens), **ROUNDING)


@pytest.mark.parametrize("target", LORA)
def test_adapters_are_part_of_trunk_and_head(target):
    torch.manual_seed(0)
    model = get_peft_model(gpt2(tie_word_embeddings=False), LoraConfig(r=2, **LORA[target]))
    reference = Reference(model)
    model, tokens = randomised(model), batch()
    with torch.no_grad():
        adapted = own_forward(model, tokens)
        with model.disable_adapter():
            base = own_forward(model, tokens)
        assert (adapted - base).abs().max() > 1e-4
        torch.testing.assert_close(ActorCritic(model).logits(tokens), adapted, **ROUNDING)
        torch.testing.assert_close(reference.logits(tokens), base, **ROUNDING)
        torch.testing.assert_close(
            ActorCritic(model).logits(tokens), adapted, **ROUNDING, msg="the adapter is on again"
        )


def test_what_cannot_be_split_keeps_its_own_forward():
    """A model that scales its logits by what its trunk alone knows; nor what an adapter puts before the tokens."""

    class Odd(type(gpt2())):
        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = out.logits * (1 + input_ids[:, -out.logits.shape[1] :, None])
            return out

    odd = randomised(Odd(gpt2().config))
    assert LanguageModel(odd).trunk is None
    tokens = batch()
    tuned = get_peft_model(gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert LanguageModel(tuned).trunk is None
    with torch.no_grad():
        torch.testing.assert_close(ActorCritic(odd).logits(tokens), own_forward(odd, tokens), **ROUNDING)
        torch.testing.assert_close(Reference(gpt2(), tuned).logits(tokens), own_forward(tuned, tokens), **ROUNDING)
    with pytest.raises(UnsupportedModelError, match="computes something else with its cache"):
        ActorCritic(tuned, critic_of())  # its prompts are padded between its tokens and theirs


def test_a_trunk_is_itself_again_after_its_head_was_asked():
    model = gpt2().eval()
    actor_critic, tokens = ActorCritic(model), batch()
    before = own_forward(model, tokens).detach()
    actor_critic.logits(tokens)
    assert "forward" not in vars(model.transformer)
    own = model.transformer.forward
    model.transformer.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate's hooks do
    ActorCritic(model).logits(tokens)
    assert "forward" in vars(model.transformer)
    assert torch.equal(own_forward(model, tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_head_and_trunk_as_through_the_models_own_forward(family):
    torch.manual_seed(0)
    model = randomised(FAMILIES[family]())
    tokens = batch()
    weights = torch.randn(3, 4, VOCAB)
    gradients = []
    for logits_of in (ActorCritic(model).logits, lambda tokens: own_forward(model, tokens)):
        model.zero_grad()
        (logits_of(tokens) * weights).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_under_autocast_the_head_is_float32_at_logits_of_real_size(family):
    """bfloat16 keeps 8 bits: a logit of 80 is off by up to 0.25, and so is its log-probability."""
    model = sized(family, 80).eval()
    tokens = batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        states = LanguageModel(model).read(tokens)
        logits = LanguageModel(model).logits_of(states)[0]
        coarse = own_forward(model, tokens)[tokens.completion_mask]
    with torch.no_grad():
        exact = model.get_output_embeddings()(states.hidden.float())[0]
    assert exact.abs().max() > 60 and logits.dtype == torch.float32
    ids = tokens.completion_ids[tokens.completion_mask]
    torch.testing.assert_close(token_logprobs(logits, ids), token_logprobs(exact, ids), atol=1e-4, rtol=0)
    assert (token_logprobs(coarse, ids) - token_logprobs(exact, ids)).abs().max() > 0.02, "or the test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_states_of_several_rows_are_one_product_in_the_head(family):
    """Of rows that lie apart in memory torch makes a product for each, where the head's weights are frozen."""
    model = LanguageModel(randomised(FAMILIES[family]()).requires_grad_(False))
    ids = torch.arange(15).view(3, 5) % VOCAB
    whole, last = (model.forward(last=n, input_ids=ids) for n in (5, 1))
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits = model.logits_of(last)
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(logits, model.logits_of(whole)[:, -1:], **ROUNDING)
