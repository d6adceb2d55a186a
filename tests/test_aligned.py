"""Rows are read from their first token on, whatever surrounds them: each gets the numbers that it gets alone."""

import dataclasses

import pytest
import torch
from builders import EOS, critic_of, gpt2, llama, with_mask, with_values
from test_language_model import randomised
from test_probe import ENCODER, ENDS, lfm2, made, mamba, roberta
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
)

from lmppo.groups import GROUP_COST
from lmppo.models import ActorCritic, Reference, score_tokens, score_values
from lmppo.models.inputs import Aligned, Layout
from lmppo.prompts import pad_left
from lmppo.records import TokenRecord, Tokens
from lmppo.support import Support

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}  # float32, other matrix shapes
# Prompt, completion, which of its tokens count. Token 1 pads in some of the models, and 0 ends texts: here both are read.
ROWS = [
    ([5], [4], "1"),
    ([2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 2, 4, 1, 8, 9], [3, 1, 5, 0, 7, 8], "111111"),
    ([9, 1, 0], [4, 5, 6, 7], "0110"),
    ([7], [2, 9, 9, 3, 8, 8, 4], "1100011"),
    ([3, 2], [5, 6], "00"),
    ([1, 6, 11, 10], [9, 9, 2, 7, 3, 5], "010000"),
]


def bloom():
    return made(BloomForCausalLM, BloomConfig(hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3, **ENDS))


def windowed():
    """Each token sees 5 tokens, in either layer: a row of 21 is longer than all it can know of."""
    return made(MistralForCausalLM, MistralConfig(sliding_window=5, num_key_value_heads=1, **ENCODER))


def neox():
    return made(GPTNeoXForCausalLM, GPTNeoXConfig(**ENCODER))


POLICIES = {
    "gpt2": lambda: randomised(gpt2()),
    "llama": lambda: randomised(llama()),
    "neox": neox,
    "positions from 2 on": roberta,
    "ALiBi": bloom,
    "a recurrence": mamba,
    "convolutions": lfm2,
    "a sliding window": windowed,
}
CRITICS = {
    "of the same family": critic_of,
    "llama": lambda: made(LlamaForTokenClassification, LlamaConfig(num_labels=1, **ENCODER)),
    "positions from 2 on": lambda: made(
        RobertaForTokenClassification, RobertaConfig(is_decoder=True, num_labels=1, **ENCODER)
    ),
}


def tokens_of(rows, *, filler=EOS, left=0, right=0):
    """A batch, padded on both sides with a token."""
    prompts, completions, counted = zip(*rows, strict=True)
    width, n_time = left + max(map(len, prompts)), max(map(len, completions)) + right
    ids, prompt_mask = pad_left(prompts, width)
    mask = torch.tensor([[c == "1" for c in text.ljust(n_time, "0")] for text in counted])
    completion_ids = torch.tensor([row + [filler] * (n_time - len(row)) for row in completions])
    return Tokens(torch.where(prompt_mask, ids, filler), prompt_mask, completion_ids, mask)


@torch.no_grad()
def alone(model, row):
    """Logits and values of every state of one row, given to the models without anything else."""
    prompt, completion, counted = row
    ids = torch.tensor([prompt + completion[: counted.rfind("1") + 1]])
    out = model.policy(input_ids=ids, output_hidden_states=True)
    values = model.values_of(out.hidden_states[-1]) if model.critic is None else model.critic(input_ids=ids).logits
    return out.logits[0], values[0]


def assert_each_row_is_its_own(model, tokens, rows=ROWS):
    reference = Reference(model.policy)
    with torch.no_grad():
        logits, values, last = model.logits(tokens), model.values(tokens), model.last_values(tokens)
        ref_logits = reference.logits(tokens)
    for i, row in enumerate(rows):
        own_logits, own_values = alone(model, row)
        states = [len(row[0]) - 1 + t for t, c in enumerate(row[2]) if c == "1"]
        torch.testing.assert_close(logits[i][tokens.completion_mask[i]], own_logits[states], **ROUNDING)
        torch.testing.assert_close(ref_logits[i], logits[i], **ROUNDING)
        torch.testing.assert_close(values[i][tokens.completion_mask[i]], own_values[states], **ROUNDING)
        torch.testing.assert_close(last[i], own_values[-1], **ROUNDING)
    for numbers in (logits, values, ref_logits):
        assert numbers[~tokens.completion_mask].eq(0).all()


def looks_back(model):
    """Whether another first token moves what the models say of a later state."""
    prompt = [2, 3, 4, 5, 6]
    (logits, values), (others, other_values) = (alone(model, (p, [7], "1")) for p in (prompt, [9, *prompt[1:]]))
    return (logits[3] - others[3]).abs().max() > 1e-3 and (values[3] - other_values[3]).abs().max() > 1e-4


@pytest.mark.parametrize("name", POLICIES)
def test_each_row_has_the_numbers_it_has_alone(name):
    model = with_values(ActorCritic(POLICIES[name]()))
    assert looks_back(model)
    assert_each_row_is_its_own(model, tokens_of(ROWS))


@pytest.mark.parametrize("name", CRITICS)
def test_and_so_it_has_with_a_critic_of_its_own_of_whatever_family(name):
    model = ActorCritic(POLICIES["gpt2"](), CRITICS[name]())
    assert looks_back(model)
    assert_each_row_is_its_own(model, tokens_of(ROWS))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("filler, left, right", [(1, 4, 0), (7, 0, 3)])
def test_what_pads_is_not_read_wherever_it_stands(name, filler, left, right):
    """The padding token of the model among others, which is also a token of the rows."""
    model = with_values(ActorCritic(POLICIES[name]()))
    assert_each_row_is_its_own(model, tokens_of(ROWS, filler=filler, left=left, right=right))


@pytest.mark.parametrize("name", ["gpt2", "a recurrence"])
def test_a_batch_in_which_nothing_counts_has_no_numbers(name):
    model = with_values(ActorCritic(POLICIES[name]()))
    rows = [(prompt, completion, "0" * len(counted)) for prompt, completion, counted in ROWS]
    assert_each_row_is_its_own(model, tokens_of(rows), rows)
    assert model.language_model.read(tokens_of(rows)).hidden.shape == (1, 0, 16)


def test_the_shortest_batch_there_is():
    model = with_values(ActorCritic(POLICIES["gpt2"]()))
    assert_each_row_is_its_own(model, tokens_of(ROWS[:1]), ROWS[:1])
    assert_each_row_is_its_own(model, tokens_of([([5], [3], "0")]), [([5], [3], "0")])


def assert_scores_go_back_to_their_rows(model, record, size):
    """Log-probabilities and values in groups of this size are those of each of ROWS alone."""
    logprobs, values = score_tokens(Reference(model.policy), record, 0.7, size), score_values(model, record, size)
    for i, row in enumerate(ROWS):
        own_logits, own_values = alone(model, row)
        for t, counted in enumerate(record.completion_mask[i]):
            state = len(row[0]) - 1 + t
            expected = (own_logits[state] / 0.7).log_softmax(-1)[row[1][t]] if counted else torch.tensor(0.0)
            torch.testing.assert_close(logprobs[i, t], expected, **ROUNDING)
            torch.testing.assert_close(values[i, t], own_values[state] if counted else torch.zeros(1), **ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_log_probabilities_and_values_in_groups_go_back_to_their_rows(size, monkeypatch):
    monkeypatch.setitem(GROUP_COST, "cpu", 1)
    model, tokens = with_values(ActorCritic(POLICIES["gpt2"]())), tokens_of(ROWS)
    record = TokenRecord(tokens, Support.of_all(*tokens.completion_mask.shape))
    assert len(list(record.micro_batches(size))) > 2
    assert_scores_go_back_to_their_rows(model, record, size)


THREE = [([5, 6], [7, 8, 9], "101"), ([4], [3, 2], "00"), ([2], [9], "1")]


def test_where_each_state_lies():
    aligned = Aligned.of(tokens_of(THREE, filler=EOS), whole=True)
    assert aligned.ids[0].tolist() == [5, 6, 7, 8, 9], "up to the longest row's last counted token"
    assert aligned.ids[1, 0] == 4 and aligned.ids[2, :2].tolist() == [2, 9]
    assert aligned.lines.tolist() == [0, 0, 2] and aligned.columns.tolist() == [1, 3, 0]
    assert aligned.layout.line.tolist() == [0, 1, 2] and aligned.last.tolist() == [4, 0, 1]
    assert Aligned.of(tokens_of(THREE)).ids.tolist()[0] == [5, 6, 7, 8], "the last token is not read"


def test_behind_the_last_row_of_a_line_stands_its_last_token():
    layout = Layout.in_lines(torch.tensor([2, 5, 1]), 4)
    assert layout.rows.tolist() == [[1] * 5, [0, 0, 2, 2, 2]]
    assert layout.places.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert layout.line.tolist() == [1, 0, 1] and layout.start.tolist() == [0, 0, 2]


def test_where_each_state_lies_in_packed_rows():
    rows = [*THREE, ([10, 11], [3], "1")]
    aligned = Aligned.of(dataclasses.replace(tokens_of(rows), line_length=5), whole=True)
    assert aligned.packed and aligned.ids[0].tolist() == [5, 6, 7, 8, 9]
    assert aligned.ids[1].tolist() == [10, 11, 3, 2, 9] and aligned.layout.places[1].tolist() == [0, 1, 2, 0, 1]
    assert aligned.ids[2, 0] == 4 and aligned.layout.rows.tolist() == [[0] * 5, [3, 3, 3, 2, 2], [1] * 5]
    assert aligned.lines.tolist() == [0, 0, 1, 1] and aligned.columns.tolist() == [1, 3, 3, 1]
    assert aligned.layout.line.tolist() == [0, 2, 1, 1] and aligned.last.tolist() == [4, 0, 4, 2]


PACKS = {"gpt2", "llama", "neox", "a sliding window"}


@pytest.mark.parametrize("name", POLICIES)
def test_packed_rows_have_the_numbers_they_have_alone_where_the_model_tells_them_apart(name):
    model = with_values(ActorCritic(POLICIES[name]()))
    assert model.packs == (name in PACKS)
    if model.packs:
        tokens = dataclasses.replace(tokens_of(ROWS), line_length=20)
        assert Aligned.of(tokens).packed and len(Aligned.of(tokens).ids) < len(ROWS)
        assert_each_row_is_its_own(model, tokens)


@pytest.mark.parametrize("name", CRITICS)
def test_and_so_do_the_values_of_a_critic_of_its_own(name):
    model = ActorCritic(POLICIES["gpt2"](), CRITICS[name]())
    assert model.packs == (name != "positions from 2 on"), "both must"
    if model.packs:
        assert_each_row_is_its_own(model, dataclasses.replace(tokens_of(ROWS), line_length=20))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "a sliding window"])
def test_packed_rows_have_the_gradient_of_rows_apart(name, kernel):
    model = with_values(ActorCritic(POLICIES[name]()))
    model.policy.set_attn_implementation(kernel)
    found = []
    for packed in (False, True):
        tokens = dataclasses.replace(tokens_of(ROWS), line_length=20 * packed)
        model.zero_grad()
        out = model(tokens, of_logits=lambda logits, part: (logits.log_softmax(-1).square().sum(), {}))
        (out["logits"][0] + out["values"].square().sum()).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for n, gradient in found[0].items():
        torch.testing.assert_close(found[1][n], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=1e-4)


def test_a_model_without_a_mask_that_takes_a_token_for_padding_is_not_packed():
    """With a mask of ones it reads that token as any other."""

    class Guessing(GPT2Model):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            if attention_mask is None and input_ids is not None:
                input_ids = input_ids.masked_fill(input_ids == self.config.pad_token_id, 3)
            return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    policy = randomised(gpt2())
    policy.config.pad_token_id = 1
    assert ActorCritic(policy).packs
    policy.transformer.__class__ = Guessing
    assert not ActorCritic(policy).packs


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("cost", [0, 3, 10_000])
def test_packed_groups_go_back_to_their_rows_and_no_line_is_read_for_nothing(size, cost, monkeypatch):
    monkeypatch.setitem(GROUP_COST, "cpu", cost)
    model, tokens = with_values(ActorCritic(POLICIES["llama"]())), tokens_of(ROWS)
    record = TokenRecord(tokens, Support.of_all(*tokens.completion_mask.shape))
    groups = list(record.micro_batches(size, packs=True))
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(len(ROWS)))
    assert all(len(Aligned.of(micro.tokens).ids) <= max(size, 1) for _, micro in groups if micro.tokens.line_length)
    assert {micro.tokens.line_length for _, micro in groups} == ({20} if cost else {0}) or size > 1
    assert_scores_go_back_to_their_rows(model, record, size)


def test_tokens_that_are_put_there_are_read_and_what_follows_the_last_counted_one_is_not():
    model = with_values(ActorCritic(POLICIES["gpt2"]()))
    rows = [([5, 3], [4, 6, 7, 8, 9], "10110")]
    numbers = model.values(tokens_of(rows))
    for place, moves in ((1, True), (4, False)):
        changed = tokens_of(rows)
        changed.completion_ids[0, place] = 11
        difference = (model.values(changed) - numbers).abs().max()
        assert difference > 1e-3 if moves else difference == 0
    fewer = with_mask(
        TokenRecord(tokens_of(rows), Support.of_all(1, 5)), torch.tensor([[True, False, True, False, False]])
    )
    torch.testing.assert_close(model.values(fewer.tokens)[0, :3], numbers[0, :3], **ROUNDING)


def test_the_record_is_not_written_to():
    tokens = tokens_of(ROWS)
    before = [getattr(tokens, f.name) for f in dataclasses.fields(tokens) if "axes" in f.metadata]
    copies = [None if x is None else x.clone() for x in before]
    model = ActorCritic(POLICIES["gpt2"]())
    model.logits(tokens), model.values(tokens), model.last_values(tokens)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, copies, strict=True))
