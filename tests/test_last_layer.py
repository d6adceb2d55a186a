"""The last layer's feed-forward part runs for counted tokens alone: the same numbers and gradients, from fewer tokens."""

import pytest
import torch
from builders import VOCAB, critic_of, gpt2, llama
from peft import LoraConfig, get_peft_model
from test_aligned import ROUNDING
from test_frozen_layers import FAMILIES
from test_language_model import randomised
from torch import nn
from transformers import GPT2ForTokenClassification, MixtralConfig, MixtralForCausalLM

from lmppo.models import ActorCritic, LanguageModel
from lmppo.models.recomputation import recomputing
from lmppo.prompts import pad_left
from lmppo.records import Tokens

# "." is a token that was put there by an environment: it is read, and not counted.
ROWS = [([2, 3, 4, 5, 6, 7, 8], [9, 3, 4], "111"), ([5], [4, 8, 7, 2, 3], "1..11"), ([3, 9], [4], "."), ([6], [7], "1")]
COUNTED = 7


def tokens(line_length=0):
    prompts = pad_left([prompt for prompt, _, _ in ROWS], 9)
    width = max(len(completion) for _, completion, _ in ROWS)
    ids, mask = torch.full((len(ROWS), width), 1), torch.zeros(len(ROWS), width, dtype=torch.bool)
    for row, (_, completion, counted) in enumerate(ROWS):
        ids[row, : len(completion)] = torch.tensor(completion)
        mask[row, : len(counted)] = torch.tensor([c == "1" for c in counted])
    return Tokens(*prompts, ids, mask, line_length=line_length)


def mixtral():
    """Its last layer has experts, each of which computes for the tokens that are sent to it."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, num_key_value_heads=1, num_local_experts=4, **sizes))


class Mixing(nn.Module):
    """Part of a layer that looks at earlier tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + hidden.cumsum(dim=1)


def mixing():
    model = llama()
    model.model.layers[-1].mlp = Mixing(model.model.layers[-1].mlp)
    return model


def seen_by(linear):
    """Tokens of each pass of a layer, appended when it runs."""
    counts = []
    linear.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].shape[:-1].numel()))
    return counts


def last_linear(model):
    """A linear layer within the last layer's ``mlp``."""
    parts = [
        m for name, m in model.named_modules() if name.endswith((".mlp.c_fc", ".mlp.up_proj", ".mlp.dense_h_to_4h"))
    ]
    return parts[-1]


def weighted(hidden):
    return (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum()


def numbers_and_gradients(model, read):
    model.zero_grad()
    found = read()
    weighted(found).backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("line_length", [0, 24], ids=["apart", "packed"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "bloom"])
def test_it_runs_for_the_counted_tokens(family, line_length):
    model = randomised(FAMILIES[family]())
    language_model = LanguageModel(model)
    counts = seen_by(last_linear(model))
    batch = tokens(line_length if language_model.packs else 0)
    found, gradients = numbers_and_gradients(model, lambda: language_model.read(batch).hidden)
    assert counts == [COUNTED]
    language_model._last_layer._part = None
    expected, whole = numbers_and_gradients(model, lambda: language_model.read(batch).hidden)
    assert counts[1] > 2 * COUNTED
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], **ROUNDING)


def test_under_an_adapter():
    model = randomised(
        get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    )
    language_model = LanguageModel(model.eval())
    counts = seen_by(last_linear(model.get_base_model()).base_layer)
    found, gradients = numbers_and_gradients(model, lambda: language_model.read(tokens()).hidden)
    assert counts == [COUNTED]
    language_model._last_layer._part = None
    expected, whole = numbers_and_gradients(model, lambda: language_model.read(tokens()).hidden)
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert gradients.keys() == whole.keys() and any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], **ROUNDING)


def test_a_critic_of_its_own():
    critic = randomised(critic_of())
    assert isinstance(critic, GPT2ForTokenClassification)
    model = ActorCritic(gpt2(), critic)
    counts = seen_by(last_linear(critic))
    found, gradients = numbers_and_gradients(critic, lambda: model.values(tokens()))
    assert counts == [COUNTED]
    model._critic_last_layer._part = None
    expected, whole = numbers_and_gradients(critic, lambda: model.values(tokens()))
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert found.any() and counts[1] > 2 * COUNTED and gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], **ROUNDING)


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = randomised(llama())
    language_model = LanguageModel(model)
    expected = model(torch.tensor([[3, 4, 5]])).logits
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        language_model.read(tokens())
    handle.remove()
    assert "forward" not in vars(model.model.layers[-1].mlp)
    assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, expected)


@pytest.mark.parametrize("make", [mixing, mixtral])
def test_a_part_that_looks_at_other_tokens_or_none_runs_for_all(make):
    """The states are those of the model's own pass over each row alone."""
    model = randomised(make())
    language_model = LanguageModel(model)
    assert (language_model._last_layer._part is None) == (make is mixing)
    found = language_model.read(tokens()).hidden[0]
    expected = []
    for prompt, completion, counted in ROWS:
        hidden = model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        expected += [hidden[len(prompt) + t - 1] for t, c in enumerate(counted) if c == "1"]
    torch.testing.assert_close(found, torch.stack(expected), **ROUNDING)


def test_where_nothing_counts():
    batch = tokens()
    batch.completion_mask[:] = False
    assert LanguageModel(gpt2().eval()).read(batch).hidden.shape == (1, 0, 16)


def test_what_is_recomputed_runs_for_the_same_tokens():
    model = gpt2()
    actor_critic = ActorCritic(model)
    counts = seen_by(last_linear(model))
    model.gradient_checkpointing_enable()
    with recomputing(actor_critic):
        hidden = actor_critic.language_model.read(tokens()).hidden
    weighted(hidden).backward()
    assert counts == [COUNTED, COUNTED]
    assert "forward" not in vars(model.transformer.h[-1].mlp) and "forward" not in vars(model.transformer.h[-1])
