"""Policy, critic and reference: the answer for a row is the one it gets alone, without any padding and with no masks."""

import pytest
import torch
from builders import (
    EOS,
    MODELS,
    PROMPTS,
    VOCAB,
    alone,
    build_model,
    critic_of,
    encode,
    gpt2,
    llama,
    lora,
    make_samples,
    read,
    row_alone,
    with_values,
)
from fakes import tiny_gpt2
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2Model
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from lmppo.functional import token_logprobs
from lmppo.models import (
    ActorCritic,
    Positions,
    Reference,
    load_policy,
)
from lmppo.records import Tokens

ROUNDING = {"atol": 5e-6, "rtol": 1e-5}  # float32, other matrix shapes


def bits(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def shift_right(tensor, columns, fill):
    return torch.cat([torch.full((len(tensor), columns), fill, dtype=tensor.dtype), tensor], dim=1)


def lengthen(tensor, columns, fill):
    return torch.cat([tensor, torch.full((len(tensor), columns), fill, dtype=tensor.dtype)], dim=1)


# --- masks and positions ---------------------------------------------------------------------------------------------


def test_the_model_attends_to_gaps_but_not_to_padding():
    ids = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)
    mask = Tokens(ids[0], bits("011", "111"), ids[1], bits("1010", "1100")).attention_mask
    assert mask.equal(bits("0111110", "1111100"))


def test_positions_count_tokens_not_columns():
    mask, ids = bits("00111", "11111"), torch.tensor([[1, 1, 5, 1, 6], [5, 5, 5, 5, 1]])
    assert Positions(0).of(ids, mask)["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert Positions(None).of(ids, mask) == {}


def test_roberta_counts_its_padding_nowhere():
    """As transformers' own function has it, which sees the tokens alone."""
    mask, ids = bits("00111", "11111"), torch.tensor([[1, 1, 5, 1, 6], [5, 5, 5, 5, 1]])
    positions = Positions(2, padding_id=1).of(ids, mask)["position_ids"]
    assert positions.equal(RobertaEmbeddings.create_position_ids_from_input_ids(ids, padding_idx=1))
    assert positions.tolist() == [[1, 1, 2, 1, 3], [2, 3, 4, 5, 1]]


# --- a row's numbers are its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
@pytest.mark.parametrize("family", MODELS)
def test_each_row_gets_the_numbers_it_gets_alone(family, kind):
    """Left padding, right padding, pad == eos, batch composition: none of them changes a logit or a value."""
    model = build_model(family, kind)
    samples = make_samples(model)
    assert samples.completion_mask.sum(1).unique().numel() > 1, "the test needs completions of several lengths"
    with torch.no_grad():
        logits, values = model.logits(samples.tokens), model.values(samples.tokens)
    for row in range(len(PROMPTS)):
        prompt = alone(samples.tokens.prompt_ids, samples.tokens.prompt_mask, row)
        completion = alone(samples.tokens.completion_ids, samples.completion_mask, row)
        expected_logits, expected_values = row_alone(model, prompt, completion)
        torch.testing.assert_close(logits[row, : len(completion)], expected_logits, **ROUNDING)
        torch.testing.assert_close(values[row, : len(completion)], expected_values, **ROUNDING)


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("left, right, filler", [(3, 0, 7), (0, 4, EOS), (5, 2, 11)])
def test_more_padding_changes_nothing_whatever_it_is_made_of(family, kind, left, right, filler):
    model = build_model(family, kind)
    samples = make_samples(model)
    batch = (
        samples.tokens.prompt_ids,
        samples.tokens.prompt_mask,
        samples.tokens.completion_ids,
        samples.completion_mask,
    )
    n_time = samples.completion_mask.shape[1]
    widened = (
        shift_right(torch.where(samples.tokens.prompt_mask, samples.tokens.prompt_ids, filler), left, filler),
        shift_right(samples.tokens.prompt_mask, left, False),
        lengthen(torch.where(samples.completion_mask, samples.tokens.completion_ids, filler), right, filler),
        lengthen(samples.completion_mask, right, False),
    )
    with torch.no_grad():
        outputs, wide_outputs = read(model, *batch), read(model, *widened)
    for output, wide in zip(outputs, wide_outputs, strict=True):
        counted = samples.completion_mask
        torch.testing.assert_close(wide[:, :n_time][counted], output[counted], **ROUNDING)


def test_positions_matter_to_gpt2():
    """The check above can fail: a GPT-2 that counts padding gives other log-probabilities (TRL 1.16 does this)."""
    model = build_model("gpt2", "shared")
    ids, mask = encode("a", "deadbeef")
    with torch.no_grad():
        blind = model.policy(input_ids=ids, attention_mask=mask.long()).logits[0, -1]
        alone = model.policy(input_ids=ids[0][mask[0]][None]).logits[0, -1]
    assert (blind.log_softmax(-1) - alone.log_softmax(-1)).abs().max() > 0.01


@pytest.mark.parametrize("family", MODELS)
def test_tokens_in_a_gap_are_read_and_padding_is_not(family):
    model = build_model(family, "shared")
    prompt_ids, prompt_mask = encode("ab")
    ids, gap = torch.tensor([[3, 4, 5, 6, 0]]), bits("10110")
    in_gap, in_padding = ids.clone(), ids.clone()
    in_gap[0, 1] = 9
    in_padding[0, 4] = 9
    with torch.no_grad():
        logits, changed, padded = (
            read(model, prompt_ids, prompt_mask, tokens, gap)[0][0, 2:4] for tokens in (ids, in_gap, in_padding)
        )
    assert (logits - changed).abs().max() > 0.01
    torch.testing.assert_close(logits, padded, **ROUNDING)


# --- dropout, precision, tied weights --------------------------------------------------------------------------------


def test_dropout_stays_off_though_the_configuration_has_it():
    """GPT-2 ships dropout 0.1, and every training framework calls train()."""
    model = ActorCritic(load_policy(gpt2(), lora(lora_dropout=0.5)), critic_of())
    assert model.policy.config.resid_pdrop == 0.1
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    torch.nn.Sequential(model).train()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_trained_in_float32(tmp_path, dtype):
    """In pure bfloat16, steps of 1e-6 are lost. Tied weights stay tied (one tensor in the file)."""
    tiny_gpt2().to(dtype).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.lm_head.weight is policy.transformer.wte.weight
    in_memory = load_policy(tiny_gpt2().to(dtype))
    assert {p.dtype for p in in_memory.parameters()} == {torch.float32}
    assert in_memory.lm_head.weight is in_memory.transformer.wte.weight


def test_the_value_head_is_float32_under_autocast():
    model = with_values(ActorCritic(gpt2()))
    ids, mask = encode("abc")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, values = read(model, ids, mask, ids, mask)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_a_fresh_value_head_says_zero():
    model = ActorCritic(gpt2(), n_streams=2)
    ids, mask = encode("abc", "d")
    assert read(model, ids, mask, ids, mask)[1].eq(0).all()
    assert read(model, ids, mask, ids, mask)[1].shape == (2, 3, 2)


# --- what learns from what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_values_only_reaches_the_critic_alone(kind):
    model = build_model("gpt2", kind)
    ids, mask = encode("abc", "d")
    tokens = Tokens(ids, mask, ids, mask)
    outputs = model(tokens, ("values",))
    assert outputs.keys() == {"values"}
    both = model(tokens, of_logits=lambda logits, part: (logits.sum(), {}))
    assert both.keys() == {"logits", "values"}
    torch.testing.assert_close(outputs["values"], both["values"])
    outputs["values"].sum().backward()
    assert all(p.grad is None for p in model.policy.parameters())
    assert all(p.grad is not None for p in model.critic_parameters())


def test_parameters_are_split_without_remainder():
    for kind in ("shared", "separate", "lora"):
        model = build_model("gpt2", kind)
        policy, critic = model.policy_parameters(), model.critic_parameters()
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in policy} | {id(p) for p in critic} == trainable
        assert not {id(p) for p in policy} & {id(p) for p in critic}
    assert all("lora" in n for n, p in model.policy.named_parameters() if p.requires_grad)


# --- the reference ---------------------------------------------------------------------------------------------------


def logprobs_of(logits_of):
    ids, mask = encode("abc", "d")
    tokens = torch.tensor([[3, 4, 5], [6, 0, 1]])
    return token_logprobs(logits_of(Tokens(ids, mask, tokens, torch.ones_like(tokens).bool())), tokens)


def test_a_copied_reference_does_not_follow_the_policy():
    policy = gpt2()
    reference = Reference(policy)
    before = logprobs_of(reference.logits)
    torch.testing.assert_close(before, logprobs_of(ActorCritic(policy).logits), **ROUNDING)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert torch.equal(logprobs_of(reference.logits), before)
    assert not torch.equal(logprobs_of(ActorCritic(policy).logits), before), "the policy has its own weights again"
    assert all(p.requires_grad for p in policy.parameters())


def test_with_an_adapter_the_reference_is_the_same_weights_with_the_adapter_off():
    base = gpt2()
    expected = logprobs_of(Reference(base).logits)
    model = ActorCritic(load_policy(gpt2(), lora()))
    reference = Reference(model.policy)
    shared = {p.data_ptr() for p in reference.model.parameters()}
    assert shared == {p.data_ptr() for p in model.policy.parameters()}, "no second copy of the weights"
    for name, parameter in model.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.testing.assert_close(logprobs_of(reference.logits), expected, **ROUNDING)
    adapted = logprobs_of(model.logits)
    assert (adapted - expected).abs().max() > 0.01
    assert torch.equal(logprobs_of(model.logits), adapted), "the adapter is on again"


def test_a_given_reference_wins():
    model = build_model("gpt2", "lora")
    other = gpt2(seed=8)
    reference = Reference(model.policy, other)
    torch.testing.assert_close(logprobs_of(reference.logits), logprobs_of(Reference(gpt2(seed=8)).logits), **ROUNDING)


@pytest.mark.parametrize("family", MODELS)
def test_a_fresh_adapter_is_the_identity(family):
    before = logprobs_of(Reference(MODELS[family]()).logits)
    adapted = ActorCritic(load_policy(MODELS[family](), lora(family)))
    torch.testing.assert_close(logprobs_of(adapted.logits), before, **ROUNDING)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_policy_that_cannot_be_loaded_is_named():
    with pytest.raises(OSError, match=r"'no/such-model'.*neither a local directory.*nor a Hub id"):
        load_policy("no/such-model")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(OSError, match=r"pickled weights only.*save_pretrained"):
        load_policy(str(tmp_path))


def test_a_policy_must_be_a_language_model():
    with pytest.raises(TypeError, match="GPT2Model: expected a causal language model"):
        load_policy(GPT2Model(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1)))


def test_a_second_adapter_is_refused():
    with pytest.raises(ValueError, match="has an adapter already: leave peft_config out"):
        load_policy(get_peft_model(gpt2(), lora()), lora())


def test_an_adapter_that_changes_the_base_weights_is_refused():
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' changes the base weights.*use True"):
        load_policy(llama(), lora("llama", init_lora_weights="pissa"))


def test_an_adapter_of_the_users_is_trained_on(tmp_path):
    get_peft_model(gpt2(), lora()).save_pretrained(tmp_path)
    policy = load_policy(PeftModel.from_pretrained(gpt2(), tmp_path, is_trainable=True))
    assert ActorCritic(policy).policy_parameters()
