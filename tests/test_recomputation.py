"""Gradient checkpointing: layers run again in the backward pass, and not a gradient changes."""

from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from builders import (
    EOS,
    MODELS,
    VOCAB,
    assert_same,
    build_model,
    critic_of,
    gpt2,
    llama,
    lora,
    make_config,
    make_experience,
    make_samples,
    make_trainer,
    metrics_rows,
    trained,
    weights,
    with_values,
)
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from lmppo.loss import Penalties
from lmppo.models import ActorCritic
from lmppo.models.recomputation import prepare_recomputation
from lmppo.update import accumulate_gradients

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
ENDS = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS, "vocab_size": VOCAB}


def gpt_neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, hidden_dropout=0.3, **SIZES, **ENDS))


def opt():
    """In training mode it leaves out half of its layers."""
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=16, layerdrop=0.5, dropout=0.3, **SIZES, **ENDS))


def mixtral():
    """In training mode it multiplies what its router reads by noise."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.5}
    config = MixtralConfig(intermediate_size=32, num_key_value_heads=1, **experts, **SIZES, **ENDS)
    return MixtralForCausalLM(config)


FAMILIES = {**MODELS, "gpt_neox": gpt_neox, "opt": opt, "mixtral": mixtral}


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def counted(model):
    """How often a part of each layer runs, its first child that has weights; and the widths of what it reads."""
    widths = []
    parts = [next(c for c in layer.children() if next(c.parameters(), None) is not None) for layer in layers_of(model)]
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs: widths.append((*args, *kwargs.values())[0].shape[1]), with_kwargs=True
        )
        for part in parts
    ]
    yield widths
    for hook in hooks:
        hook.remove()


def gradients(model, experience, tmp_path, **settings):
    """The gradient of one minibatch, and how often layers ran for it."""
    config, accelerator = make_config(tmp_path, micro_batch_size=8, **settings), Accelerator(cpu=True)
    prepare_recomputation(model, config)
    model.zero_grad()
    with counted(model) as runs:
        accumulate_gradients(model, experience, config, accelerator, Penalties())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, len(runs)


def build(family, kind="shared"):
    if kind == "lora":
        return build_model(family, kind)
    return with_values(ActorCritic(FAMILIES[family](), critic_of() if kind == "separate" else None))


KINDS = [(family, "shared") for family in FAMILIES] + [("gpt2", "separate"), ("gpt2", "lora"), ("llama", "lora")]


@pytest.mark.parametrize("family, kind", KINDS)
def test_gradients_are_the_same_and_layers_run_twice(tmp_path, family, kind):
    model = build(family, kind)
    experience = make_experience(make_samples(model))
    kept, once = gradients(model, experience, tmp_path)
    recomputed, runs = gradients(model, experience, tmp_path, gradient_checkpointing=True)
    n_layers = len(layers_of(model))
    assert (once, runs) == (n_layers, 2 * n_layers)
    assert_same(recomputed, kept)
    assert any(gradient.any() for gradient in kept.values())
    if kind == "lora":
        assert {n for n in kept if "lora" in n} == {n for n, p in model.named_parameters() if "lora" in n}
    assert not any(module.training for module in model.policy.modules())


@pytest.mark.parametrize("family", ["opt", "mixtral", "gpt_neox"])
def test_in_training_mode_they_would_differ(tmp_path, family):
    """Layers left out, noise in the router, dropout: the test above can fail."""
    model = build(family)
    experience = make_experience(make_samples(model))
    kept, _ = gradients(model, experience, tmp_path)
    for module in model.policy.modules():
        module.training = True
    torch.manual_seed(1)
    noisy, _ = gradients(model, experience, tmp_path)
    assert not all(torch.equal(kept[name], noisy[name]) for name in kept if name in noisy)


def test_the_sampler_keeps_its_cache_and_recomputes_nothing(tmp_path):
    model = build("llama")
    with counted(model) as without:
        expected = make_samples(model)
    prepare_recomputation(model, make_config(tmp_path, gradient_checkpointing=True))
    with counted(model) as runs:
        samples = make_samples(model)
    assert runs == without and runs[-1] == 1, "one token at a time"
    assert torch.equal(samples.logprobs, expected.logprobs)


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_a_run_learns_the_same_and_exports_the_same_configuration(tmp_path, kind):
    arguments = {"shared": {}, "separate": {"critic": critic_of()}, "lora": {"peft_config": lora()}}[kind]
    plain = trained(tmp_path / "plain", **arguments)
    frugal = trained(tmp_path / "frugal", gradient_checkpointing=True, **arguments)
    assert metrics_rows(tmp_path / "frugal") == metrics_rows(tmp_path / "plain")
    assert_same(weights(frugal), weights(plain))
    assert (tmp_path / "frugal/final/config.json").read_text() == (tmp_path / "plain/final/config.json").read_text()


def test_a_model_that_has_it_switched_on_is_recomputed_and_a_line_says_so(tmp_path, capsys):
    """With the user's own function, and however it wanted to be called."""
    model, calls = llama(), []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for layer in layers_of(model):
        own = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, own=own, **kwargs: calls.append(1) or own(*args, **kwargs)
    trained(tmp_path / "own", model=model, max_steps=1, peft_config=lora("llama"))
    assert "model comes with gradient checkpointing, which is used" in capsys.readouterr().out
    assert len(calls) == 2 * 2 * 2  # layers, epochs, minibatches of one micro-batch each
    trained(tmp_path / "plain", model=llama(), max_steps=1, peft_config=lora("llama"))
    assert metrics_rows(tmp_path / "own") == metrics_rows(tmp_path / "plain")


def test_families_without_support_are_refused_by_name(tmp_path):
    model = GPTNeoXJapaneseForCausalLM(GPTNeoXJapaneseConfig(intermediate_multiple_size=2, **SIZES, **ENDS))
    with pytest.raises(ValueError, match="model is a GPTNeoXJapaneseForCausalLM, which does not support gradient"):
        make_trainer(tmp_path, model=model, gradient_checkpointing=True)


def test_trpo_refuses_it(tmp_path):
    """By the setting, and on the model."""
    with pytest.raises(ValueError, match="'trpo' differentiates twice, which gradient_checkpointing does not allow"):
        make_config(tmp_path, objective="trpo", gradient_checkpointing=True)
    model = gpt2()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"'trpo' differentiates twice.*model\.gradient_checkpointing_disable"):
        make_trainer(tmp_path, model=model, objective="trpo")
