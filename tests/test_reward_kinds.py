"""What may be a reward function: torch modules, objects, partials, methods, async functions; and scores of true and false."""

import asyncio
import functools

import numpy as np
import pytest
import torch
from builders import make_trainer, trained
from fakes import letter_tokenizer, tiny_gpt2, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from test_rewards import gpt2_classifier, returning, score
from transformers import BartConfig, BartForSequenceClassification, GPT2Model, T5Config, T5ForSequenceClassification

from lmppo.rewards import RewardError, RewardSet

# --- torch modules ---------------------------------------------------------------------------------------------------


class Scorer(torch.nn.Module):
    """A module with the protocol as its forward: a weight times the length, with dropout before it."""

    def __init__(self):
        super().__init__()
        self.dropout, self.linear = torch.nn.Dropout(0.9), torch.nn.Linear(1, 1, bias=False)

    def forward(self, prompts, completions, **kwargs):
        self.grad_enabled, self.modes = torch.is_grad_enabled(), [module.training for module in self.modules()]
        lengths = torch.tensor([[float(len(text))] for text in completions])
        return self.linear(self.dropout(lengths))[:, 0]


def test_a_module_with_the_protocol_as_its_forward_scores_without_dropout_and_gradients():
    module = Scorer().train()
    module.linear.eval()
    modes = [m.training for m in module.modules()]
    scores = score([module, module])
    weight = module.linear.weight.item()
    assert scores.per_function.tolist() == pytest.approx(np.array([[3, 3], [2, 2]]) * weight)
    assert (module.grad_enabled, module.modes) == (False, [False] * 3)
    assert [m.training for m in module.modules()] == modes, "as it was"
    assert RewardSet([module, module]).names == ["Scorer", "Scorer_2"]


def test_a_module_that_fails_is_in_its_own_mode_again():
    class Failing(torch.nn.Module):
        def forward(self, completions, **kwargs):
            raise KeyError("no such thing")

    module = Failing().train()
    with pytest.raises(RewardError, match="'Failing' raised KeyError"):
        score(module)
    assert module.training


def test_a_module_is_trained_with(tmp_path):
    module = Scorer()
    weight = module.linear.weight.clone()
    trainer = trained(tmp_path, reward=module)
    assert "rewards/Scorer/mean" in trainer.state.log_history[0]
    assert torch.equal(module.linear.weight, weight) and module.linear.weight.grad is None


def test_a_compiled_module_is_scored_with():
    module = Scorer()
    compiled = torch.compile(module, backend="eager")
    assert score(compiled).per_function.tolist() == score(module).per_function.tolist()


def test_columns_that_a_modules_forward_needs():
    class Needing(torch.nn.Module):
        def forward(self, completions, answer, weight=1.0, **kwargs):
            return [float(a in text) for a, text in zip(answer, completions, strict=True)]

    assert RewardSet(Needing()).needed_columns == {"answer": "reward function 'Needing'"}
    assert score(Needing(), columns={"answer": ["b", "x"]}).per_function.tolist() == [[1.0], [0.0]]


class AsyncForward(torch.nn.Module):
    async def forward(self, prompts, completions, **kwargs): ...


class NoKwargs(torch.nn.Module):
    def forward(self, prompts, completions): ...


@pytest.mark.parametrize(
    "module, complaint",
    [
        (
            torch.nn.Linear(2, 2),
            r"'Linear' is a torch module whose forward takes \(input\): expected a sequence classifier",
        ),
        (torch.nn.Sequential(), r"'Sequential' is a torch module .*forward\(prompts, completions, \*\*kwargs\)\.$"),
        (tiny_gpt2(), "'GPT2LMHeadModel' is a torch module .*expected a sequence classifier"),
        (GPT2Model(tiny_gpt2().config), "'GPT2Model' is a torch module .*expected a sequence classifier"),
        (AsyncForward(), "'AsyncForward' has an async forward"),
        (NoKwargs(), r"'NoKwargs' does not accept .*log_extra.*: add \*\*kwargs"),
        (Scorer, r"'Scorer' is a class: give an object of it, Scorer\(\.\.\.\)"),
    ],
    ids=str,
)
def test_any_other_module_is_refused_in_one_sentence(module, complaint):
    with pytest.raises(TypeError, match=rf"^reward function {complaint}"):
        RewardSet([module])


def bart():
    return BartForSequenceClassification(
        BartConfig(
            vocab_size=257, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_labels=1, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForSequenceClassification(T5Config(vocab_size=257, **sizes, num_labels=1, eos_token_id=0, pad_token_id=1))


def with_adapter():
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(gpt2_classifier(pad_token_id=0, num_labels=1, id2label={0: "x"}), config)


@pytest.mark.parametrize("build", [bart, t5, with_adapter])
def test_sequence_classifiers_of_any_kind_are_still_taken(build):
    rewards = RewardSet(build(), reward_processing_classes=tiny_tokenizer())
    assert len(rewards.names) == 1


# --- other callables -------------------------------------------------------------------------------------------------


class Judge:
    def __call__(self, completions, answer, **kwargs):
        return [float(a in text) for a, text in zip(answer, completions, strict=True)]

    def method(self, completions, answer, **kwargs):
        return self(completions, answer)

    async def later(self, completions, answer, **kwargs):
        await asyncio.sleep(0)
        return self(completions, answer)


class AsyncJudge:
    async def __call__(self, completions, answer, **kwargs):
        await asyncio.sleep(0)
        return Judge()(completions, answer)


def with_bonus(completions, answer, bonus, **kwargs):
    return [bonus * value for value in Judge()(completions, answer)]


@pytest.mark.parametrize(
    "function, name",
    [
        (Judge(), "Judge"),
        (Judge().method, "method"),
        (Judge().later, "later"),
        (AsyncJudge(), "AsyncJudge"),
        (functools.partial(with_bonus, bonus=1.0), "with_bonus"),
        (functools.partial(Judge()), "Judge"),
        (lambda completions, answer, **kwargs: Judge()(completions, answer), "<lambda>"),
    ],
    ids=("object", "bound", "bound async", "async", "partial", "partial object", "lambda"),
)
def test_callables_of_any_kind_have_a_name_and_say_what_they_need(function, name):
    rewards = RewardSet(function)
    assert (rewards.names, rewards.needed_columns) == ([name], {"answer": f"reward function {name!r}"})
    assert score(function, columns={"answer": ["b", "x"]}).per_function.tolist() == [[1.0], [0.0]]


def test_what_is_needed_is_named_by_the_first_that_needs_it():
    def other(answer, key, label=None, *, also, **kwargs): ...

    needed = RewardSet([returning(0), Judge()], watch_funcs=other).needed_columns
    assert needed == {
        "answer": "reward function 'Judge'", "key": "watch function 'other'", "also": "watch function 'other'",
    }  # fmt: skip


# --- true and false --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [True, False], [np.bool_(True), np.False_], np.array([True, False]), torch.tensor([True, False]),
        [torch.tensor(True), torch.tensor(False)], [np.array(True), 0], [[False, False, True], [False, np.False_]],
        torch.tensor([True, False]).unbind(), np.array([True, False], dtype=object),
    ],
    ids=repr,
)  # fmt: skip
def test_true_counts_one_and_false_nothing(returned):
    assert score(returning(returned)).per_function.nan_to_num(0.0).tolist() == [[1.0], [0.0]] or returned == (
        True,
        None,
    )
    assert score([returning(returned), returning([0, 0])]).token_scores[..., 0].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


def test_arrays_and_tensors_of_columns_are_copies():
    columns = {"array": [np.zeros(2), np.zeros(2)], "tensor": [torch.zeros(2), torch.zeros(2)]}

    def vandal(completions, array, tensor, **kwargs):
        array[0] += 1
        tensor[0] += 1
        return [0.0, 0.0]

    score([vandal], columns=columns)
    assert columns["array"][0].sum() == 0 and columns["tensor"][0].sum() == 0


# --- saving ----------------------------------------------------------------------------------------------------------


def test_save_model_without_a_directory_saves_into_the_run_directory_and_leaves_the_run_alone(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer(tmp_path)
    trainer.save_model()
    trainer.train()
    trainer.save_model()
    saved, final = (
        AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (tmp_path, tmp_path / "final")
    )
    assert all(torch.equal(saved[name], final[name]) for name in final)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == letter_tokenizer()("ab")["input_ids"]
    assert make_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint="auto").global_step == 3
