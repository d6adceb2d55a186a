"""The reference is the policy as it was when the trainer was built, whatever is trained and however."""

import copy

import pytest
import torch
from builders import gpt2, llama, lora, make_trainer
from fakes import tiny_llama
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)

from lmppo.models import Reference, load_policy
from lmppo.models.adapters import adapter_off
from lmppo.records import Tokens

LLAMA = ["q_proj", "v_proj"]
TASK = {"task_type": "CAUSAL_LM"}


def llama_with(config_class=LoraConfig, **kwargs):
    """A llama with a fresh adapter."""
    kwargs = {"target_modules": LLAMA, **TASK, **kwargs}
    return lambda: (llama(), config_class(**kwargs))


def gpt2_with(*targets, **kwargs):
    """A GPT-2, whose head is tied to its embedding, with a fresh adapter."""
    return lambda: (gpt2(), LoraConfig(r=2, target_modules=["c_attn", *targets], fan_in_fan_out=True, **TASK, **kwargs))


def sft(**kwargs):
    """A GPT-2 with an adapter that has been trained before."""
    torch.manual_seed(3)
    model = get_peft_model(gpt2(), lora(**kwargs))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_trained_norms():
    model = get_peft_model(gpt2(), lora())
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            parameter.requires_grad_(True)
    return model


def half_frozen():
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    return model


# What is trained, and of it what has to be copied (None: all of it; otherwise a part of the parameter's name).
FRESH = {
    "lora": (gpt2_with(), []),
    "bias all": (gpt2_with(bias="all"), ["bias"]),
    "bias lora_only": (gpt2_with(bias="lora_only"), ["bias"]),
    "dora": (llama_with(r=2, use_dora=True), []),
    "embedding": (llama_with(r=2, target_modules=[*LLAMA, "embed_tokens"]), []),
    "head": (llama_with(r=2, target_modules=[*LLAMA, "lm_head"]), []),
    "tied head": (gpt2_with("lm_head"), []),
    "tied embedding": (gpt2_with("wte"), []),
    "modules_to_save": (llama_with(r=2, modules_to_save=["lm_head", "embed_tokens"]), []),
    "token rows": (gpt2_with(trainable_token_indices=[5, 6]), []),
    "token rows alone": (llama_with(TrainableTokensConfig, target_modules=["embed_tokens"], token_indices=[5, 6]), []),
    "ia3": (llama_with(IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), []),
    "loha": (llama_with(LoHaConfig, r=2), []),
    "lokr": (llama_with(LoKrConfig, r=2), []),
    "oft": (llama_with(OFTConfig, r=2, oft_block_size=0), []),
    "vera": (llama_with(VeraConfig, r=2), []),
    "norms": (llama_with(LNTuningConfig, target_modules=["input_layernorm"]), []),
    "starts at random": (llama_with(VBLoRAConfig, num_vectors=4, vector_length=4, topk=1), None),
    "identity up to rounding": (llama_with(HRAConfig, r=2), None),
}
GIVEN = {
    "full": (gpt2, None),
    "half frozen": (half_frozen, None),
    "adapter of the user's": (lambda: get_peft_model(gpt2(), lora()), []),
    "norms beside an adapter": (with_trained_norms, ["ln_"]),
    "trained adapter": (sft, None),
    "trained adapter with biases": (lambda: sft(bias="all"), None),
    "trained adapter with token rows": (lambda: sft(trainable_token_indices=[5, 6]), None),
    "adapter with another name": (lambda: get_peft_model(gpt2(), lora(), adapter_name="mine"), []),
}
CASES = {**FRESH, **{name: (lambda make=make: (make(), None), part) for name, (make, part) in GIVEN.items()}}


def logprobs_alone(model, tokens):
    """Log-probabilities of the counted tokens, each row alone through the model's own forward."""
    rows = []
    for i in range(len(tokens.prompt_ids)):
        prompt = tokens.prompt_ids[i][tokens.prompt_mask[i]]
        completion = tokens.completion_ids[i][tokens.completion_mask[i]]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.parametrize("name", CASES)
def test_after_training_the_kl_is_that_to_the_initial_policy(name, tmp_path):
    make, copied = CASES[name]
    model, peft_config = make()
    trainer = make_trainer(tmp_path, model=model, peft_config=peft_config, learning_rate=3e-2)
    policy = trainer.actor_critic.policy
    initial = copy.deepcopy(policy)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    shared = {p.data_ptr() for p in trainer.reference.model.parameters()}
    names = [n for n, p in policy.named_parameters() if p.data_ptr() not in shared]
    assert names == (trained if copied is None else [n for n in trained if any(part in n for part in copied)])
    trainer.step()
    trainer.step()
    rollout = trainer.collector.collect(trainer.prompts.next_batch(8), 99).rollout
    counted = rollout.completion_mask
    kl = rollout.logprobs[counted] - logprobs_alone(initial, rollout.tokens)
    assert kl.abs().max() > 0.02, "the policy has moved"
    torch.testing.assert_close(rollout.kl_to_ref[counted], kl, atol=1e-5, rtol=0)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained
    torch.testing.assert_close(logprobs_alone(policy, rollout.tokens), rollout.logprobs[counted], atol=1e-5, rtol=0)


def test_rows_of_an_embedding_that_no_probe_reads_count():
    """An adapter that was trained on one token alone: a few random tokens do not show it."""
    model = get_peft_model(tiny_llama(5000), TrainableTokensConfig(token_indices=[4321], **TASK))
    parameter = next(p for p in model.parameters() if p.requires_grad)
    before = Reference(model)
    with torch.no_grad():
        parameter.add_(0.1)
    assert before.adapter_off and not Reference(model).adapter_off


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_a_reference_within_autocast_is_not_what_autocast_kept_of_the_policy(mixed_precision):
    """autocast casts each trained weight once, and takes the same again within the same block."""
    model = half_frozen()
    reference, inputs = Reference(model), torch.tensor([[1, 2, 3]])
    initial = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = tokens_of(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision):
        model(input_ids=inputs)
        logits = reference.logits(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision):
        expected = Reference(initial).logits(tokens)
    assert torch.equal(logits, expected)


def tokens_of(ids):
    mask = torch.ones_like(ids).bool()
    return Tokens(ids, mask, ids, mask)


def test_gradients_are_those_without_a_reference_pass_between():
    """With the KL in the loss the reference is read between the policy's forward and backward pass."""
    gradients = []
    for read_reference in (False, True):
        model = gpt2()
        reference = Reference(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05)
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        if read_reference:
            reference.logits(tokens_of(torch.tensor([[4, 5]])))
        logits.log_softmax(-1)[0, :, 3].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_frozen_adapter_stays_frozen():
    """peft makes an adapter trainable when it is switched on again."""
    model = get_peft_model(gpt2(), lora(modules_to_save=["ln_f"]))
    model.requires_grad_(False)
    with adapter_off(model):
        pass
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="within"), adapter_off(model):
        raise RuntimeError("within")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdaLoraConfig(target_modules=["c_attn"], total_step=10, **TASK), "AdaLoraConfig: ADALORA moves ranks"),
        (PromptTuningConfig(num_virtual_tokens=3, **TASK), "PROMPT_TUNING puts states of its own before the prompt"),
        (PrefixTuningConfig(num_virtual_tokens=3, **TASK), "PREFIX_TUNING puts states of its own before the prompt"),
    ],
)
def test_methods_that_would_be_wrong_are_refused_by_name(tmp_path, config, message):
    with pytest.raises(ValueError, match=rf"{message}.*such as LoraConfig"):
        make_trainer(tmp_path, peft_config=config)
    with pytest.raises(ValueError, match=rf"{message}.*such as LoraConfig"):
        make_trainer(tmp_path, model=get_peft_model(gpt2(), config))


def test_adapters_that_are_no_peft_model_are_refused(tmp_path):
    model = gpt2()
    model.add_adapter(lora())
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel with an adapter within: give a peft\.PeftModel"):
        make_trainer(tmp_path, model=model)


def test_several_active_adapters_are_refused_and_one_of_several_is_right(tmp_path):
    model = get_peft_model(gpt2(), lora())
    model.add_adapter("other", lora(), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"active adapters \['default', 'other'\]: expected one"):
        make_trainer(tmp_path, model=model)
    model.set_adapter("other")
    policy = load_policy(model)
    assert all(".other." in n for n, p in policy.named_parameters() if p.requires_grad)


# --- adapters by name ------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """The directory of an adapter that was trained before, on a base model in a directory."""
    gpt2().save_pretrained(tmp_path / "base")
    model = sft()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def test_an_adapter_by_name_is_trained_on(adapter, tmp_path, capsys):
    policy = load_policy(str(adapter))
    assert isinstance(policy, PeftModel)
    assert all("lora" in n for n, p in policy.named_parameters() if p.requires_grad)
    assert "sft' on the base model '" in capsys.readouterr().out
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(policy.eval()(input_ids=ids).logits, sft().eval()(input_ids=ids).logits)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "lm_head"]])
def test_an_adapter_by_name_is_merged_before_a_new_one(adapter, capsys, targets):
    model = sft(**({} if targets == ["c_attn"] else {"modules_to_save": ["lm_head"]}))
    model.peft_config["default"].base_model_name_or_path = str(adapter.parent / "base")
    model.save_pretrained(adapter)
    policy = load_policy(str(adapter), lora()).eval()
    assert "merged into it, and a new one is trained" in capsys.readouterr().out
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(policy(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert Reference(policy).adapter_off


def test_a_pickled_adapter_is_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(OSError, match=r"pickled weights only \(adapter_model\.bin\)"):
        load_policy(str(adapter))
