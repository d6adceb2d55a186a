"""Any causal model as a critic, by name and loaded, of families with and without a token-classification class."""

import pytest
import torch
from builders import VOCAB, assert_same, critic_of, gpt2, lora, make_trainer, metrics_rows, trained, weights
from fakes import letter_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    MambaConfig,
    OlmoConfig,
    OPTConfig,
    TrOCRConfig,
    TrOCRForCausalLM,
)

from lmppo.models.critics import load_critic
from lmppo.models.token_values import head_of

ENDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "gpt2": lambda **more: GPT2Config(**GPT, **ENDS, **more),
    "gptj": lambda **more: GPTJConfig(rotary_dim=4, **GPT, **ENDS, **more),
    "opt": lambda **more: OPTConfig(word_embed_proj_dim=16, **OPT, **ENDS, **more),
    "olmo": lambda **more: OlmoConfig(**SIZES, **ENDS, **more),
    "gemma3": lambda **more: Gemma3TextConfig(head_dim=8, num_key_value_heads=1, **SIZES, **ENDS, **more),
}
NO_REWARD_MODELS = {
    "mamba": lambda: MambaConfig(hidden_size=16, num_hidden_layers=1, **ENDS),
    "opt of two widths": lambda: OPTConfig(word_embed_proj_dim=8, do_layer_norm_before=False, **OPT, **ENDS),
}


def reward_model(family, num_labels=1):
    torch.manual_seed(3)
    config = FAMILIES[family](num_labels=num_labels, initializer_range=0.3) if family != "opt" else None
    config = config or FAMILIES["opt"](num_labels=num_labels, init_std=0.3)
    return AutoModelForSequenceClassification.from_config(config).eval()


def language_model(config):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).eval()


def given(model, way, path):
    """A model as it is, or the directory that it is saved in."""
    if way == "loaded":
        return model
    model.save_pretrained(path)
    return str(path)


IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.mark.parametrize("way", ["loaded", "name"])
@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_values_of_a_reward_model_are_its_rewards_of_the_prefixes(tmp_path, family, num_labels, way):
    model = reward_model(family, num_labels)
    critic = load_critic(given(model, way, tmp_path), gpt2()).eval()
    values = critic(input_ids=IDS).logits
    assert values.shape == (1, 5, 1) and values.std() > 1e-3
    for t in range(5):
        reward = model(input_ids=IDS[:, : t + 1]).logits
        expected = reward[:, -1] - reward[:, 0] if num_labels == 2 else reward[:, 0]
        torch.testing.assert_close(values[:, t, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["loaded", "name"])
@pytest.mark.parametrize("family", [*FAMILIES, *NO_REWARD_MODELS])
@pytest.mark.parametrize("bare", [False, True])
@torch.no_grad()
def test_a_language_model_gives_its_trunk_and_values_of_zero(tmp_path, family, way, bare):
    model = language_model((FAMILIES | NO_REWARD_MODELS)[family]())
    states = model.base_model(input_ids=IDS).last_hidden_state
    critic = load_critic(given(model.base_model if bare else model, way, tmp_path), gpt2(), n_streams=3).eval()
    assert torch.equal(critic(input_ids=IDS).logits, torch.zeros(1, 5, 3))
    assert torch.equal(critic.base_model(input_ids=IDS).last_hidden_state, states)
    assert head_of(critic).in_features == states.shape[-1]


@pytest.mark.parametrize("family", [*FAMILIES, *NO_REWARD_MODELS])
@torch.no_grad()
def test_a_critic_comes_back_from_its_directory(tmp_path, family):
    critic = load_critic(language_model((FAMILIES | NO_REWARD_MODELS)[family]()), gpt2()).eval()
    torch.nn.init.normal_(head_of(critic).weight)
    critic.save_pretrained(tmp_path)
    again = load_critic(str(tmp_path), gpt2()).eval()
    assert type(again).__name__ == type(critic).__name__
    assert_same(again.state_dict(), critic.state_dict())
    torch.testing.assert_close(again(input_ids=IDS).logits, critic(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="has 1 labels; expected 2"):
        load_critic(str(tmp_path), gpt2(), n_streams=2)


@pytest.mark.parametrize("kind", ["reward model", "language model", "critic"])
def test_a_loaded_critic_stays_as_it_is_and_a_copy_learns(tmp_path, kind):
    model = {"reward model": lambda: reward_model("opt"), "language model": lambda: language_model(FAMILIES["opt"]()),
             "critic": critic_of}[kind]()  # fmt: skip
    model = model.train().bfloat16()
    before, config = {n: t.clone() for n, t in model.state_dict().items()}, model.config.to_dict()
    trainer = trained(tmp_path, critic=model)
    assert_same(model.state_dict(), before)
    assert model.training and model.config.to_dict() == config
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    critic = trainer.actor_critic.critic
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert not torch.equal(head_of(critic).weight, torch.zeros_like(head_of(critic).weight))


@pytest.mark.parametrize("family", ["opt", "gptj"])
def test_a_run_resumes_with_a_critic_of_a_family_without_a_class(tmp_path, family):
    model = reward_model(family)
    model.save_pretrained(tmp_path / "reward")
    letter_tokenizer().save_pretrained(tmp_path / "reward")
    critic = "auto:" + str(tmp_path / "reward")
    whole = trained(tmp_path / "whole", critic=critic, max_steps=2, save_steps=1)
    trained(tmp_path / "halves", critic=critic, max_steps=1)
    halves = make_trainer(tmp_path / "halves", critic=critic, max_steps=2)
    halves.train("true")
    assert metrics_rows(tmp_path / "halves") == metrics_rows(tmp_path / "whole")
    assert_same(weights(halves), weights(whole))
    again = load_critic(str(tmp_path / "whole" / "final" / "critic"), gpt2())
    assert_same(again.state_dict(), whole.actor_critic.critic.state_dict())


def test_what_cannot_be_a_critic_is_refused():
    with pytest.raises(ValueError, match=r"critic has an adapter: pass model\.merge_and_unload\(\)"):
        load_critic(get_peft_model(critic_of(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)), gpt2())
    with pytest.raises(ValueError, match="critic has an adapter"):
        load_critic(get_peft_model(gpt2(), lora()), gpt2())
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    with pytest.raises(ValueError, match="critic has a TrOCRConfig, and no model class that AutoModel knows"):
        load_critic(TrOCRForCausalLM(TrOCRConfig(max_position_embeddings=64, **sizes, **ENDS)), gpt2())


@pytest.mark.parametrize("num_labels", [1, 2])
def test_weights_that_are_missing_or_of_another_shape_are_no_random_critic(tmp_path, num_labels):
    from safetensors.torch import load_file, save_file

    critic_of(num_labels=num_labels).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, .*\(transformer\.ln_f\.weight\)"):
        load_critic(str(tmp_path), gpt2(), n_streams=num_labels)
    tensors["transformer.ln_f.weight"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, .*\(transformer\.ln_f\.weight\)"):
        load_critic(str(tmp_path), gpt2(), n_streams=num_labels)
