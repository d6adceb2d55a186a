"""Models that are passed stay as they are: their types, modes, flags and weights; what is used of them is float32."""

import copy

import pytest
import torch
from builders import MODELS, VOCAB, critic_of, encode, gpt2, llama, lora, make_trainer
from fakes import letter_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from lmppo.models import Reference, load_policy
from lmppo.models.critics import load_critic
from lmppo.rewards import ClassifierReward

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
HALVES = [torch.bfloat16, torch.float16]


def gemma(seed=0):
    """Rotary positions, and an embedding with a scale: tables that are not saved with the weights."""
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(seed)
    return GemmaForCausalLM(GemmaConfig(vocab_size=VOCAB, num_key_value_heads=1, initializer_range=0.2, **sizes))


FAMILIES = {**MODELS, "gemma": gemma}


def mixed(model):
    """A model that is half in one mode and half in the other, with a frozen part."""
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    return model


def facts(model):
    """Everything that must stay: weights and tables with their types, gradients' flags, modes, configuration."""
    tensors = {n: (t.detach().clone(), t.dtype) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    return tensors, flags, {n: m.training for n, m in model.named_modules()}, model.config.to_dict()


def assert_untouched(model, before):
    tensors, *rest = facts(model)
    old_tensors, *old_rest = before
    assert rest == old_rest
    assert tensors.keys() == old_tensors.keys()
    for name, (tensor, dtype) in tensors.items():
        assert dtype == old_tensors[name][1] and torch.equal(tensor, old_tensors[name][0]), name


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_in_another_type_is_trained_as_a_float32_copy(tmp_path, capsys, family, dtype):
    """The copy is what from_pretrained makes of the same weights, to the bit: its tables are not rounded."""
    model = mixed(FAMILIES[family]().to(dtype))
    before = facts(model)
    policy = load_policy(model)
    assert f"model is in {str(dtype)[6:]}: a float32 copy" in capsys.readouterr().out
    assert_untouched(model, before)
    assert {t.dtype for t in [*policy.parameters(), *policy.buffers()] if t.is_floating_point()} == {torch.float32}
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == before[1], "what was frozen stays frozen"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(policy), logits_of(loaded))
    if dtype in HALVES and family != "gpt2":
        assert not torch.equal(logits_of(policy), logits_of(copy.deepcopy(model).float())), "this test can fail"


def test_a_float32_policy_is_trained_itself(capsys):
    model = gpt2()
    assert load_policy(model) is model
    assert not capsys.readouterr().out


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"]])
def test_an_adapter_over_a_bfloat16_base_is_trained_over_a_float32_one(tmp_path, targets):
    base = gemma().bfloat16()
    base.save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    before = facts(model)
    policy = load_policy(model)
    assert_untouched(model, before)
    expected = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), config)
    expected.load_state_dict(model.state_dict())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {n for n, grad in before[1].items() if grad}
    assert torch.equal(logits_of(policy), logits_of(expected))


def test_a_class_that_cannot_be_rebuilt_is_named():
    class Needy(type(llama())):
        def __init__(self, config, more):
            super().__init__(config)

    with pytest.raises(ValueError, match=r"model is a Needy in bfloat16.*Load it with dtype=torch\.float32"):
        load_policy(Needy(llama().config, more=1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_reference_stays_as_it_is(tmp_path, dtype):
    model = mixed(llama(seed=3).to(dtype))
    before = facts(model)
    reference = Reference(llama(), model)
    assert_untouched(model, before)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not any(m.training for m in reference.model.modules())
    model.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(reference.model), logits_of(expected))
    pairs = zip(reference.model.parameters(), model.parameters(), strict=True)
    assert all((own.data_ptr() == given.data_ptr()) == (dtype == torch.float32) for own, given in pairs), "shared"


def test_a_reference_with_the_policys_trained_weights_is_refused():
    """It would follow the policy; the base of an adapter has the adapter in it."""
    base = gpt2()
    policy = get_peft_model(base, lora())
    with pytest.raises(ValueError, match=r"ref_model shares .*lora_A.* with the policy, which trains it"):
        Reference(policy, base)
    half = gpt2().bfloat16()
    Reference(load_policy(half), half)  # the policy is a copy


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_critic_stays_as_it_is(dtype):
    model = mixed(critic_of().to(dtype))
    before = facts(model)
    critic = load_critic(model, gpt2(), tokenizer=letter_tokenizer())
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    assert torch.equal(logits_of(critic), logits_of(copy.deepcopy(model).float()))
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_stays_as_it_is(dtype):
    torch.manual_seed(4)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=VOCAB, num_labels=1, **ends, **sizes)).to(dtype)
    before = facts(mixed(model))
    reward = ClassifierReward(model, letter_tokenizer(), device="cpu")
    scores = reward(["ab", "a"], ["cde", "b"])
    assert_untouched(model, before)
    with torch.no_grad():
        rows = [encode(text)[0] for text in ("abcde", "ab")]
        alone = [model.eval()(input_ids=row).logits.item() for row in rows]
    assert scores == pytest.approx(alone, abs=1e-6 if dtype == torch.float32 else 1e-2)  # bfloat16 rounds 8 bits


def test_a_whole_run_leaves_all_passed_models_as_they_are(tmp_path):
    policy, reference, critic = llama().bfloat16(), llama(seed=2), critic_of("llama")
    passed = {"model": mixed(policy), "ref_model": mixed(reference), "critic": mixed(critic)}
    before = {name: facts(model) for name, model in passed.items()}
    trainer = make_trainer(tmp_path, **passed)
    trainer.train()
    for name, model in passed.items():
        assert_untouched(model, before[name])
    start = load_policy(policy)
    moved = {n for n, p in trainer.actor_critic.policy.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert moved == {n for n, p in policy.named_parameters() if p.requires_grad}
