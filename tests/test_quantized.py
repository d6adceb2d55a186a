"""QLoRA: an adapter on a base that bitsandbytes has quantized, in 4 and in 8 bits, computing in float32 and bfloat16."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from builders import (
    PROMPTS,
    VOCAB,
    critic_of,
    encode,
    gpt2,
    llama,
    make_config,
    make_experience,
    make_samples,
    make_trainer,
    metrics_rows,
    optimizer_state,
    weights,
)
from fakes import letter_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2ForSequenceClassification

from lmppo.checks import rounding_tolerance
from lmppo.loss import Penalties
from lmppo.models import ActorCritic, Reference, compute_precision, load_policy
from lmppo.models.quantized import quantized_layers
from lmppo.rewards import ClassifierReward
from lmppo.update import accumulate_gradients

FLOAT, BF16 = torch.float32, torch.bfloat16
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
KINDS = {
    "nf4": (NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": FLOAT}, FLOAT, "no"),
    "nf4, compute in bf16": (NF4 | {"bnb_4bit_compute_dtype": BF16}, FLOAT, "int4"),
    "nf4 in bf16": (NF4 | {"bnb_4bit_compute_dtype": BF16}, BF16, "int4"),
    "int8": (INT8, FLOAT, "int8"),
    "int8 in bf16": (INT8, BF16, "int8"),
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of plain models."""
    folder = tmp_path_factory.mktemp("models")
    llama(hidden_size=64, num_attention_heads=4, intermediate_size=128).save_pretrained(folder / "llama")
    gpt2(n_embd=64, n_head=4).save_pretrained(folder / "gpt2")
    return folder


def load(path, kind="nf4", dtype=None, **more):
    settings, its_dtype, _ = KINDS[kind]
    config = BitsAndBytesConfig(**settings | more)
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=dtype or its_dtype, device_map="cpu"
    )


def lora(family="llama", **kwargs):
    return LoraConfig(r=2, target_modules=TARGETS[family], task_type="CAUSAL_LM", **kwargs)


def adapted(path, kind="nf4", family="llama"):
    """An actor-critic over a quantized base, with an adapter that does something."""
    policy = load_policy(load(path / family, kind), lora(family))
    torch.manual_seed(2)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return ActorCritic(policy)


def base_facts(model):
    """The base's weights, scales and types: an adapter's own are left aside."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def assert_same_base(model, before):
    after = base_facts(model)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(bits(tensor), bits(before[name])), name


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def dequantized(policy):
    """A plain model of the same numbers: the quantized layers' weights as floats, the adapter merged by hand."""
    plain = copy.deepcopy(policy)
    for name, layer in list(plain.named_modules()):
        inner = getattr(layer, "base_layer", layer)
        if inner in quantized_layers(plain) and not name.endswith("base_layer"):
            weight = inner.weight
            if hasattr(weight, "quant_state"):
                weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            else:
                scales = inner.state.SCB if inner.state.SCB is not None else weight.SCB
                weight = weight.data.float() * scales[:, None] / 127
            if inner is not layer:
                delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                weight = weight + layer.scaling["default"] * delta
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=inner.bias is not None)
            linear.weight.data = weight.detach()
            if inner.bias is not None:
                linear.bias.data = inner.bias.detach().float()
            plain.set_submodule(name, linear)
    return torch.nn.Module.float(plain.get_base_model()).eval()


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_the_policy_computes_what_a_plain_model_of_the_same_weights_does(saved, family, kind):
    model = adapted(saved, kind, family)
    plain = ActorCritic(dequantized(model.policy))
    samples = make_samples(model)
    with torch.no_grad():
        logits, expected = (m.logits(samples.tokens)[samples.completion_mask].float() for m in (model, plain))
    tolerance = rounding_tolerance(expected.abs().max().item(), KINDS[kind][2])
    worst = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    assert worst < (3 * tolerance if kind == "nf4" else tolerance)
    if KINDS[kind][2] == "no":
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_computes_in_decides_the_tolerances(saved, kind):
    assert compute_precision(adapted(saved, kind).policy, "no") == KINDS[kind][2]
    assert compute_precision(adapted(saved, kind).policy, "bf16") == ("bf16" if kind == "nf4" else KINDS[kind][2])
    assert compute_precision(llama(), "no") == "no"


def gradients(model, experience, tmp_path):
    model.zero_grad()
    accumulate_gradients(
        model, experience, make_config(tmp_path, micro_batch_size=8), Accelerator(cpu=True), Penalties()
    )
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_gradients_after_a_rollout_equal_those_before_it(saved, tmp_path, monkeypatch, family, kind):
    """Also on CPUs on which bitsandbytes rewrites the weights in passes without gradients."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = adapted(saved, kind, family)
    before = base_facts(model.policy)
    experience = make_experience(make_samples(adapted(saved, kind, family)))
    first = gradients(model, experience, tmp_path)
    make_samples(model)
    Reference(model.policy).logits(experience.tokens)
    second = gradients(model, experience, tmp_path)
    assert {n for n in first if "lora" in n} == {n for n, p in model.named_parameters() if "lora" in n}
    assert all(first[name].any() and torch.equal(first[name], second[name]) for name in first if "lora" in name)
    assert_same_base(model.policy, before)


def test_gradients_are_those_of_a_plain_model_of_the_same_weights(saved, tmp_path):
    """4 bits in float32: by central differences through the dequantized model."""
    model = adapted(saved)
    experience = make_experience(make_samples(model))
    gradient = gradients(model, experience, tmp_path)
    name = "policy.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    parameter, (i, j), losses = model.get_parameter(name), divmod(gradient[name].abs().argmax().item(), 2), []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            parameter[i, j] += step
            plain = ActorCritic(dequantized(model.policy))
            parameter[i, j] -= step
        config, accelerator = make_config(tmp_path, micro_batch_size=8), Accelerator(cpu=True)
        stats = accumulate_gradients(plain, experience, config, accelerator, Penalties())
        losses.append(stats["policy_loss"] + config.vf_coef * stats["value_loss"])
    assert gradient[name][i, j].item() == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2)  # curvature


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kind", [("llama", kind) for kind in KINDS] + [("gpt2", "nf4"), ("gpt2", "int8")])
def test_qlora_trains_and_leaves_the_base_as_it_is(saved, tmp_path, family, kind):
    base = load(saved / family, kind).train()
    before = base_facts(base)
    trainer = make_trainer(tmp_path, model=base, peft_config=lora(family), gradient_checkpointing=kind == "nf4")
    started = weights(trainer)
    trainer.train()
    row = metrics_rows(tmp_path)[0]
    largest = trainer.last_step.scored.rollout.max_logit.max().item()
    assert abs(row["kl_to_ref"]) < 1e-4 and row["first_ratio_error"] <= rounding_tolerance(largest, KINDS[kind][2])
    moved = {n for n, t in weights(trainer).items() if not torch.equal(t, started[n])}
    assert {n for n in moved if "lora" not in n} == {"value_head.weight", "value_head.bias"}
    assert any("lora_A" in n for n in moved) and any("lora_B" in n for n in moved)
    assert_same_base(base, before)
    assert base.training and not any("lora" in name for name, _ in base.named_modules()), "the adapter is on a view"
    own = {p.data_ptr() for p in trainer.actor_critic.policy.parameters()}
    assert {layer.weight.data_ptr() for layer in quantized_layers(base)} <= own, "shared, not copied"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_lora_critic_shares_the_quantized_base(saved, tmp_path, kind):
    base = load(saved / "llama", kind)
    before = base_facts(base)
    trainer = make_trainer(tmp_path, model=base, peft_config=lora(), critic="lora", gradient_checkpointing=True)
    model, started = trainer.actor_critic, weights(trainer)
    trainer.train()
    assert_same_base(base, before)
    shared = {layer.weight.data_ptr() for layer in quantized_layers(base)}
    assert {layer.weight.data_ptr() for layer in quantized_layers(model.critic)} == shared
    moved = {n for n, t in weights(trainer).items() if not torch.equal(t, started[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("critic") and "lora_A" in n for n in moved)
    tokens = trainer.last_step.experience.tokens
    ids = torch.cat([tokens.prompt_ids[0][tokens.prompt_mask[0]], tokens.completion_ids[0][tokens.completion_mask[0]]])
    plain = dequantized(model.critic)
    hidden = plain(ids[None], output_hidden_states=True).hidden_states[-1][0]
    expected = (hidden @ model.value_head.weight.T + model.value_head.bias)[int(tokens.prompt_mask[0].sum()) - 1 : -1]
    close = {"atol": 1e-4, "rtol": 1e-3} if kind == "nf4" else {"atol": 0.05, "rtol": 0.05}  # int8 rounds what it reads
    torch.testing.assert_close(model.values(tokens)[0, : len(expected)], expected, **close)


def test_all_but_the_quantized_layers_is_float32(saved, capsys):
    """bfloat16 around them would round what is trained, and every logit to 8 bits."""
    base = load(saved / "llama", "nf4 in bf16", bnb_4bit_quant_storage=BF16)
    before = base_facts(base)
    policy = load_policy(base, lora(modules_to_save=["lm_head"]))
    assert "model is in bfloat16: a copy whose other parts are float32" in capsys.readouterr().out
    quantized = {layer.weight.data_ptr() for layer in quantized_layers(base)}
    others = [p for p in policy.parameters() if p.data_ptr() not in quantized]
    assert {p.dtype for p in others} == {FLOAT}
    assert len(list(policy.parameters())) - len(others) == len(quantized) == 2 * 7, "they are shared"
    assert compute_precision(policy) == "int4"
    assert_same_base(base, before)
    again = load_policy(get_peft_model(load(saved / "llama", "nf4 in bf16"), lora(modules_to_save=["lm_head"])))
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in policy.named_parameters() if p.requires_grad}
    assert {again.get_parameter(n).dtype for n in trained} == {FLOAT}


def test_biases_that_are_trained_are_not_those_of_the_passed_base(saved, tmp_path):
    base = load(saved / "gpt2")
    before = base_facts(base)
    trainer = make_trainer(tmp_path, model=base, peft_config=lora("gpt2", bias="all"))
    started = weights(trainer)
    trainer.train()
    name = "policy.base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"
    assert not torch.equal(weights(trainer)[name], started[name])
    assert_same_base(base, before)


def test_a_quantized_checkpoint_is_loaded_by_its_directory(saved, tmp_path):
    load(saved / "llama").save_pretrained(tmp_path / "quantized")
    trainer = make_trainer(tmp_path / "run", model=str(tmp_path / "quantized"), peft_config=lora())
    assert len(quantized_layers(trainer.actor_critic.policy)) == 2 * 7
    trainer.train()


def test_a_model_prepared_by_peft_trains(saved, tmp_path):
    """prepare_model_for_kbit_training switches gradient checkpointing on and casts what is not quantized."""
    base = load(saved / "llama")
    for i in range(2):  # the first run leaves nothing behind
        model = prepare_model_for_kbit_training(base)
        make_trainer(tmp_path / str(i), model=model, peft_config=lora()).train()
    assert metrics_rows(tmp_path / "0") == metrics_rows(tmp_path / "1")


def test_a_run_is_resumed_and_its_checkpoint_holds_the_adapter_alone(saved, tmp_path):
    settings = {"peft_config": lora(), "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", model=load(saved / "llama"), max_steps=3, **settings)
    whole.train()
    make_trainer(tmp_path / "cut", model=load(saved / "llama"), max_steps=2, save_steps=1, **settings).train()
    for path in (tmp_path / "cut/checkpoints/step-000002/policy", tmp_path / "cut/final/adapter"):
        assert (path / "adapter_model.safetensors").stat().st_size < 100_000
    assert not list((tmp_path / "cut").rglob("model.safetensors"))
    again = make_trainer(
        tmp_path / "cut", model=load(saved / "llama"), max_steps=3, resume_from_checkpoint="auto", **settings
    )
    again.train()
    assert metrics_rows(tmp_path / "cut") == metrics_rows(tmp_path / "whole")
    for ours, theirs in ((weights(again), weights(whole)), (optimizer_state(again), optimizer_state(whole))):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["nf4", "int8", "nf4, compute in bf16"])
def test_the_export_is_the_adapter_and_says_so(saved, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)  # its kernel for such CPUs takes larger models
    trainer = make_trainer(tmp_path, model=load(saved / "llama", kind), peft_config=lora())
    trainer.train()
    assert (
        "Export: the adapter alone, in adapter/; it cannot be merged, as its base is quantized"
        in capsys.readouterr().out
    )
    again = PeftModel.from_pretrained(load(saved / "llama", kind, dtype=FLOAT), tmp_path / "final/adapter").eval()
    ids = encode(*PROMPTS[-1:])[0]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trainer.actor_critic.policy(input_ids=ids).logits)
    assert (tmp_path / "final/tokenizer.json").exists() and (tmp_path / "final/value_head.safetensors").exists()


def test_trpo_steps_in_four_bits_and_refuses_where_it_would_round(saved, tmp_path):
    trainer = make_trainer(
        tmp_path / "a", model=load(saved / "llama"), peft_config=lora(), objective="trpo", max_steps=1
    )
    trainer.train()
    row = metrics_rows(tmp_path / "a")[0]
    assert 0.002 < row["trpo/kl"] <= 0.01
    for kind in ("int8", "nf4 in bf16"):
        with pytest.raises(ValueError, match="'trpo' differentiates twice and needs float32"):
            make_trainer(tmp_path / "b", model=load(saved / "llama", kind), peft_config=lora(), objective="trpo")


# --- other quantized models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_reference_and_reward_model_stay_as_they_are(saved, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    reference = load(saved / "llama", kind).train()
    before = base_facts(reference)
    scorer = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=2, num_labels=1, eos_token_id=0, pad_token_id=0)
    GPT2ForSequenceClassification(scorer).save_pretrained(tmp_path / "scorer")
    config = BitsAndBytesConfig(**KINDS[kind][0])
    judge = GPT2ForSequenceClassification.from_pretrained(tmp_path / "scorer", quantization_config=config).train()
    judge_before = base_facts(judge)
    reward = ClassifierReward(judge, letter_tokenizer())
    trainer = make_trainer(tmp_path / "run", model=llama(), ref_model=reference, reward=reward, max_steps=1)
    trainer.train()
    assert reference.training and judge.training
    assert_same_base(reference, before)
    assert_same_base(judge, judge_before)
    own = {p.data_ptr() for p in trainer.reference.model.parameters()}
    assert {layer.weight.data_ptr() for layer in quantized_layers(reference)} <= own, "shared, not copied"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_threshold_for_outliers_is_refused(saved, tmp_path):
    base = load(saved / "llama", "int8", llm_int8_threshold=6.0)
    match = r"model is in 8 bits with llm_int8_threshold=6.*depend on its neighbors.*llm_int8_threshold=0\.0"
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, model=base, peft_config=lora())
    with pytest.raises(ValueError, match="ref_model is in 8 bits with llm_int8_threshold=6"):
        make_trainer(tmp_path, model=llama(), ref_model=base)


def test_a_quantized_base_without_an_adapter_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"model is quantized.*give peft_config=LoraConfig"):
        make_trainer(tmp_path, model=load(saved / "llama"))


def test_a_base_that_was_rewritten_on_a_cpu_is_refused(saved, tmp_path):
    base = load(saved / "llama")
    quantized_layers(base)[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="bitsandbytes has rewritten its 4-bit weights.*load it anew"):
        make_trainer(tmp_path, model=base, peft_config=lora())


def test_other_quantizers_are_refused_by_name(saved, tmp_path):
    model = llama()
    model.hf_quantizer = object()
    model.config.quantization_config = BitsAndBytesConfig()
    model.config.quantization_config.quant_method = "gptq"
    with pytest.raises(ValueError, match="model is quantized by gptq: only bitsandbytes"):
        make_trainer(tmp_path, model=model, peft_config=lora())


def test_a_quantized_critic_is_refused(tmp_path):
    critic_of("llama").save_pretrained(tmp_path / "critic")
    config = BitsAndBytesConfig(**NF4)
    critic = type(critic_of("llama")).from_pretrained(tmp_path / "critic", quantization_config=config)
    with pytest.raises(ValueError, match="critic is quantized, and all weights of a critic are trained"):
        make_trainer(tmp_path / "run", model=llama(), critic=critic)


def test_merging_into_a_quantized_base_is_refused(saved, tmp_path):
    load(saved / "llama").save_pretrained(tmp_path / "quantized")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is quantized, and merging would round the adapter away"):
        load_policy(str(tmp_path / "adapter"), lora())
    assert load_policy(str(tmp_path / "adapter")).peft_config
