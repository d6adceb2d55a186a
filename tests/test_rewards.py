"""Reward functions by trl's protocol: called, checked and added up; classifiers score each text as if it were alone."""

import asyncio
import functools
import inspect
import math
import random
import threading
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import tiny_gpt2, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from lmppo.rewards import REWARD_ARGUMENTS, ClassifierReward, RewardError, RewardSet, Scores

STATE = SimpleNamespace(global_step=7)


def score(reward_funcs, ids=((5, 6, 7), (8, 9)), *, width=4, columns=None, texts=("abc", "de"), **kwargs) -> Scores:
    rewards = RewardSet(reward_funcs, **kwargs)
    return rewards.score(["p"] * len(ids), list(texts), [list(row) for row in ids], columns or {}, STATE, width)


def returning(value):
    def reward(prompts, completions, completion_ids, **kwargs):
        return value

    return reward


# --- the protocol --------------------------------------------------------------------------------------------------


def test_a_number_per_completion_stands_on_the_last_token():
    scores = score(returning([2.0, -1]))
    assert scores.token_scores[..., 0].tolist() == [[0, 0, 2, 0], [0, -1, 0, 0]]
    assert scores.per_function.tolist() == [[2], [-1]]
    assert scores.token_scores[..., 0].dtype == scores.per_function.dtype == torch.float32


def test_dense_rewards_stand_on_their_tokens():
    scores = score(returning([[1, 2.5, -3], (0.5, 4)]))
    assert scores.token_scores[..., 0].tolist() == [[1, 2.5, -3, 0], [0.5, 4, 0, 0]]
    assert scores.per_function.tolist() == [[0.5], [4.5]]


def test_weights_and_none():
    scores = score(
        [returning([1.0, None]), returning([[1, 1, 1], None]), returning([None, 4.0])], reward_weights=[2, 0.5, -1]
    )
    assert scores.token_scores[..., 0].tolist() == [[0.5, 0.5, 2.5, 0], [0, -4, 0, 0]]
    expected = torch.tensor([[1, 3, math.nan], [math.nan, math.nan, 4]])
    assert torch.equal(scores.per_function.isnan(), expected.isnan())
    assert torch.equal(scores.per_function.nan_to_num(-9), expected.nan_to_num(-9))


def test_what_a_function_is_given():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(locals())
        log_extra("doubled", [a * 2 for a in answer])
        log_metric("answers", sum(answer))
        log_metric("answers", 0)
        return [0.0] * len(prompts)

    scores = score(reward, columns={"answer": [1, 2], "other": ["x", "y"]})
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (
        ["p", "p"],
        ["abc", "de"],
        [[5, 6, 7], [8, 9]],
    )
    assert seen["trainer_state"] is STATE and seen["kwargs"] == {"other": ["x", "y"]}
    assert scores.extras == {"doubled": [2, 4]} and scores.metrics == {"answers": 1.5}


@pytest.mark.parametrize("name", REWARD_ARGUMENTS)
def test_a_column_never_wins_over_what_was_sampled(name):
    def seen(columns):
        given = {}
        score(lambda **kwargs: given.update(kwargs) or [0.0, 0.0], columns=columns)
        return {key: value for key, value in given.items() if not key.startswith("log_")} | {"names": set(given)}

    assert seen({name: ["x", "y"]}) == seen({})


class CallableReward:
    def __call__(self, completions, **kwargs):
        return [float(len(c)) for c in completions]


class AsyncCallableReward:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]


async def async_length(completions, scale=1, **kwargs):
    await asyncio.sleep(0)
    return [scale * float(len(c)) for c in completions]


def test_every_kind_of_callable_and_its_name():
    functions = [
        CallableReward(),
        AsyncCallableReward(),
        async_length,
        functools.partial(async_length, scale=2),
        functools.partial(functools.partial(async_length), scale=3),
        lambda completions, **kwargs: async_length(completions, scale=4),
        get_soft_overlong_punishment(max_completion_len=3, soft_punish_cache=2),
    ]
    rewards = RewardSet(functions)
    assert rewards.names == [
        "CallableReward",
        "AsyncCallableReward",
        "async_length",
        "async_length_2",
        "async_length_3",
        "<lambda>",
        "soft_overlong_punishment_reward",
    ]
    scores = rewards.score(["p"] * 2, ["abc", "de"], [[1, 2, 3], [4, 5]], {}, STATE, 3)
    assert scores.per_function.tolist() == [[3, 3, 3, 6, 9, 12, -1], [2, 2, 2, 4, 6, 8, -0.5]]


def test_duplicate_names_never_collide():
    def reward(**kwargs): ...

    def reward_2(**kwargs): ...

    functions = [reward, reward_2, functools.partial(reward), functools.partial(reward_2)]
    assert RewardSet(functions).names == ["reward", "reward_2", "reward_3", "reward_2_2"]


def test_async_functions_run_at_the_same_time_and_inside_a_running_loop():
    def pair():
        met = []

        def member(number):
            async def reward(completions, **kwargs):
                met.append(number)
                for _ in range(1000):  # each waits until the other has begun
                    if len(met) == 2:
                        return [float(number)] * len(completions)
                    await asyncio.sleep(0.005)
                raise TimeoutError("the other function never began")

            return reward

        return [member(1), member(2)]

    async def notebook():
        return score(pair())

    assert asyncio.run(notebook()).per_function.tolist() == score(pair()).per_function.tolist() == [[1, 2], [1, 2]]


def test_an_async_client_may_live_longer_than_one_call():
    loops = []

    async def reward(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    rewards = RewardSet(reward)
    for _ in range(2):
        rewards.score(["p"], ["c"], [[1]], {}, STATE, 1)
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_plain_functions_stay_in_the_calling_thread():
    threads = []
    score(lambda completions, **kwargs: threads.append(threading.current_thread()) or [0.0, 0.0])
    assert threads == [threading.current_thread()]  # signal.alarm, which math_verify uses, works nowhere else


def test_trl_reward_functions_run_unchanged():
    def chat(text):
        return [{"role": "assistant", "content": text}]

    completions = [chat("<think>\nhm\n</think>\nyes"), chat("no")]
    ids = [[1, 2, 1, 2, 1, 2], [1, 2, 3]]
    functions = [
        think_format_reward,
        get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
        get_soft_overlong_punishment(max_completion_len=6, soft_punish_cache=4),
    ]
    scores = RewardSet(functions).score([chat("?")] * 2, completions, ids, {}, STATE, 6)
    by_hand = [[1.0, -(1 - 2 / 5), (2 - 6) / 4], [0.0, 0.0, (2 - 3) / 4]]
    assert scores.per_function.tolist() == [pytest.approx(row) for row in by_hand]
    assert scores.token_scores[..., 0][0, 5].item() == pytest.approx(sum(by_hand[0]))


# --- what functions may return (F43, F44, F45) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        (1.0, 2.0),
        np.array([1, 2]),
        np.array([1.0, 2.0], dtype=np.float32),
        torch.tensor([1, 2]),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0], requires_grad=True) * 1,
        [np.float64(1), np.int64(2)],
        [torch.tensor(1.0, requires_grad=True), torch.tensor(2)],
        [Fraction(1), np.array(2.0)],
        [torch.tensor([0, 0, 1.0]), np.array([0, 2])],
    ],
    ids=repr,
)
def test_forms_of_numbers_that_are_accepted(value):
    assert score(returning(value)).token_scores[..., 0].tolist() == [[0, 0, 1, 0], [0, 2, 0, 0]]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0], ValueError, "returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], ValueError, "returned 3 rewards for 2 completions"),
        ([], ValueError, "returned 0 rewards"),
        (None, TypeError, "returned a NoneType"),
        (1.0, TypeError, "returned a float"),
        ("12", TypeError, "returned a str"),
        ({0: 1.0, 1: 2.0}, TypeError, "returned a dict"),
        ((x for x in (1.0, 2.0)), TypeError, "returned a generator"),
        (torch.tensor(1.0), ValueError, r"Tensor of shape \(\); expected \(2,\)"),
        (torch.zeros(2, 1), ValueError, r"Tensor of shape \(2, 1\); expected \(2,\)"),
        (torch.zeros(2, 4), ValueError, r"Tensor of shape \(2, 4\)"),
        (np.zeros((2, 1)), ValueError, r"ndarray of shape \(2, 1\)"),
        ([[1.0], [2.0]], ValueError, "row 0 .*1 numbers for 3 completion tokens"),
        ([[1.0] * 3, [2.0] * 3], ValueError, "row 1 .*3 numbers for 2 completion tokens"),
        ([1.0, "2"], TypeError, "row 1 .*'2' is a str"),
        ([1.0, 2j], TypeError, "row 1 .*complex"),
        ([1.0, {"score": 2.0}], TypeError, "row 1 .*dict"),
        ([1.0, torch.zeros(2, 1)], TypeError, "row 1 .*list"),
        ([[1.0, None, 1.0], 1.0], TypeError, "row 0 .*None is a NoneType"),
        ([1.0, math.nan], ValueError, r"row 1 \(completion 'de'\): the reward nan"),
        ([1.0, None, math.nan][::2], ValueError, "row 1 .*nan"),
        ([math.inf, 1.0], ValueError, "row 0 .*inf"),
        ([-math.inf, 1.0], ValueError, "row 0 .*-inf"),
        ([1.0, [0.0, math.nan]], ValueError, "row 1 .*nan"),
        (np.array([1.0, np.nan]), ValueError, "row 1 .*nan"),
        ([1.0, 1.1e15], ValueError, r"row 1 .*reward 1100000000000000.0 is beyond 1e\+15: scale the rewards down"),
        ([1.0, -1e20], ValueError, r"row 1 .*beyond 1e\+15"),
        (np.array([1.0, 1e38], dtype=np.float32), ValueError, r"row 1 .*beyond 1e\+15"),
        ([1e39, 1.0], ValueError, r"row 0 .*beyond 1e\+15"),
        ([10**400, 1.0], ValueError, r"row 0 .*beyond 1e\+15"),
        ([[6e14, 6e14, 0.0], 1.0], ValueError, r"row 0 .*total.*beyond 1e\+15"),
    ],
)
def test_returns_that_are_refused(value, error, message):
    with pytest.raises(error, match=f"reward function 'reward'.*{message}"):
        score(returning(value))


@pytest.mark.parametrize("value", [torch.zeros(2, 1), [[1.0], [2.0]], None, ["1", 2.0]])
def test_refusals_name_the_right_form(value):
    with pytest.raises((TypeError, ValueError), match="list with one number per completion.*list of lists"):
        score(returning(value))


def test_an_async_return_is_checked_too():
    async def reward(completions, **kwargs):
        return [1.0, math.nan]

    with pytest.raises(ValueError, match="'reward', row 1"):
        score(reward)


def test_large_finite_rewards_and_equal_rewards_pass():
    assert score(returning([1e15, -1e15])).per_function.flatten().tolist() == pytest.approx([1e15, -1e15])
    assert score(returning([3.0, 3.0])).token_scores.sum(dim=(1, 2)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("weight", [10.0, -10.0, 1e300])
def test_a_weighted_sum_beyond_the_bound_is_refused(weight):
    with pytest.raises(ValueError, match=r"row 1 is beyond 1e\+15: lower reward_weights"):
        score(returning([0.0, 1e15]), reward_weights=[weight])


def test_weighted_sums_that_cancel_to_nan_are_refused():
    with pytest.raises(ValueError, match=r"row 1 is beyond 1e\+15: lower reward_weights"):
        score([returning([0.0, 1e15])] * 2, reward_weights=[1e300, -1e300])


def test_a_row_that_no_function_scores_is_named():
    with pytest.raises(ValueError, match=r"every reward function returned None for row 1 \(completion 'de'\)"):
        score([returning([1.0, None]), returning([None, None])])


def test_excerpts_are_short_and_work_for_chat():
    chat = [{"role": "assistant", "content": "x" * 200}]
    with pytest.raises(ValueError, match=r"completion 'x{50}\.\.\.'\)"):
        score(returning([math.nan]), ids=[[1]], texts=[chat])


def test_a_completion_without_tokens_or_beyond_the_width_is_refused():
    with pytest.raises(ValueError, match="0 to 2 tokens do not fit 1 to width=4"):
        score(returning([1.0, 1.0]), ids=[[1, 2], []])
    with pytest.raises(ValueError, match="do not fit"):
        score(returning([1.0, 1.0]), width=2)


# --- functions that fail or interfere (F41, F46) ----------------------------------------------------------------------


def fail(completions, **kwargs):
    for i, _ in enumerate(completions):
        if i == 1:
            raise KeyError("no such answer")


async def fail_async(completions, **kwargs):
    await asyncio.sleep(0)
    fail(completions)


@pytest.mark.parametrize("function", [fail, fail_async])
def test_an_exception_becomes_a_reward_error_with_name_step_and_cause(function):
    with pytest.raises(RewardError, match=f"'{function.__name__}' raised KeyError at step 7.*no such answer") as caught:
        score([returning([0.0, 0.0]), function])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_column_a_function_needs_and_the_data_lacks():
    def reward(completions, answer, **kwargs): ...

    with pytest.raises(RewardError, match="answer"):
        score(reward)


def test_a_wrong_log_extra_is_an_error():
    def reward(completions, log_extra, **kwargs):
        log_extra("column", [1])

    with pytest.raises(RewardError, match=r"log_extra\('column'\) got 1 values for 2 completions"):
        score(reward)


def test_functions_cannot_edit_each_others_arguments():
    def vandal(prompts, completions, completion_ids, answer, **kwargs):
        prompts[0][0]["content"] = "changed"
        completions.clear()
        completion_ids[0].append(99)
        answer[1]["deep"].append(1)
        return [0.0, 0.0]

    seen = []

    def witness(**kwargs):
        seen.append({k: kwargs[k] for k in ("prompts", "completions", "completion_ids", "answer")})
        return [0.0, 0.0]

    prompts = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    answer = [{"deep": []}, {"deep": []}]
    RewardSet([vandal, witness]).score(prompts, ["a", "b"], [[1], [2]], {"answer": answer}, STATE, 1)
    untouched = {
        "prompts": [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]],
        "completions": ["a", "b"],
        "completion_ids": [[1], [2]],
        "answer": [{"deep": []}, {"deep": []}],
    }
    assert seen == [untouched]
    assert prompts == untouched["prompts"] and answer == untouched["answer"]


def draws() -> list[float]:
    return [random.random(), np.random.random(), torch.rand(()).item()]


def test_a_function_that_seeds_changes_no_random_state_outside():
    def seeding(completions, **kwargs):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return [0.0] * len(completions)

    async def seeding_async(completions, **kwargs):
        return seeding(completions)

    for function in (returning([0.0, 0.0]), seeding, seeding_async, [seeding, fail]):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = draws()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        try:
            score(function)
        except RewardError:
            pass
        assert draws() == expected


def test_a_random_reward_is_reproducible_and_differs_between_steps():
    def noisy(completions, **kwargs):
        return [sum(draws()) for _ in completions]

    def at_step(step):
        random.seed(3)
        return RewardSet(noisy).score(["p"], ["c"], [[1]], {}, SimpleNamespace(global_step=step), 1).per_function.item()

    assert at_step(0) == at_step(0) != at_step(1)


# --- construction ---------------------------------------------------------------------------------------------------


def test_counts_and_kinds_are_checked_at_construction():
    f = returning([])
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        RewardSet([])
    with pytest.raises(ValueError, match="reward_weights has 1 entries for 2 reward functions"):
        RewardSet([f, f], [1.0])
    with pytest.raises(ValueError, match="reward_processing_classes has 1 entries for 2"):
        RewardSet([f, f], reward_processing_classes=[None])
    with pytest.raises(ValueError, match="must be finite"):
        RewardSet(f, [math.nan])
    with pytest.raises(TypeError, match="3 is a int: give a callable"):
        RewardSet([3])
    with pytest.raises(TypeError, match=r"'reward' does not accept .*log_metric.*: add \*\*kwargs"):
        RewardSet([lambda: 0, f][1:] + [_without_kwargs()])


def _without_kwargs():
    def reward(prompts, completions, completion_ids): ...

    return reward


def test_scores_check_their_shapes():
    good = {
        "token_scores": torch.zeros(2, 3, 1),
        "per_function": torch.zeros(2, 1),
        "metrics": {},
        "extras": {"a": [1, 2]},
    }
    Scores(**good)
    with pytest.raises(ValueError, match="per_function"):
        Scores(**good | {"per_function": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="token_scores"):
        Scores(**good | {"token_scores": torch.zeros(2, 3, 1, dtype=torch.float64)})
    with pytest.raises(ValueError, match="extras"):
        Scores(**good | {"extras": {"a": [1]}})


# --- classifiers ----------------------------------------------------------------------------------------------------

PROMPTS = ["This film ", "", "I ", "A rather long beginning of a review "]
COMPLETIONS = ["was good.", "bad", "x", "and its end"]
TEXTS = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
LABELS = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
GPT2_SIZES = {"vocab_size": 257, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}


def gpt2_classifier(**kwargs) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**{**GPT2_SIZES, "eos_token_id": 0, **LABELS, **kwargs}))


def llama_classifier(**kwargs) -> LlamaForSequenceClassification:
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4, "eos_token_id": 0}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**sizes, **LABELS, **kwargs}))


def distilbert_classifier(**kwargs) -> DistilBertForSequenceClassification:
    sizes = {"vocab_size": 257, "max_position_embeddings": 64, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(**{**sizes, "initializer_range": 0.4, "pad_token_id": 0, **LABELS, **kwargs})
    )


def bert_classifier(**kwargs) -> BertForSequenceClassification:
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4, "pad_token_id": 0}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**sizes, **LABELS, **kwargs}))


@torch.no_grad()
def logits_alone(model, text: str) -> torch.Tensor:
    """Plain transformers on one text, without padding."""
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


MODELS = [
    gpt2_classifier(pad_token_id=0),
    gpt2_classifier(pad_token_id=200),
    gpt2_classifier(pad_token_id=None),
    gpt2_classifier(pad_token_id=-1),
    llama_classifier(pad_token_id=None),
    llama_classifier(pad_token_id=0),
    distilbert_classifier(),
    bert_classifier(),
]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{type(m).__name__}-pad={m.config.pad_token_id}")
def test_a_score_in_a_batch_is_the_score_alone(model, padding_side):
    configured = model.config.pad_token_id
    reward = ClassifierReward(model, tiny_tokenizer(padding_side=padding_side), output="log_odds", batch_size=3)
    scores = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert model.config.pad_token_id == configured
    if configured == -1:  # transformers, too, knows no token of this id
        model.config.pad_token_id = None
    alone = [logits_alone(model, text) for text in TEXTS]
    model.config.pad_token_id = configured
    assert scores == pytest.approx([(x[1] - x[0]).item() for x in alone], abs=1e-5)
    assert max(scores) - min(scores) > 0.05  # the texts do differ


@pytest.mark.parametrize("pad_token_id", [0, 200, None])
def test_an_eos_in_the_text_scores_alike_alone_and_in_a_batch(pad_token_id):
    model = gpt2_classifier(pad_token_id=pad_token_id, num_labels=1, id2label={0: "x"})
    ends = [c + "<|endoftext|>" for c in COMPLETIONS]
    scores = ClassifierReward(model, tiny_tokenizer())(prompts=PROMPTS, completions=ends)
    alone = [logits_alone(model, p + c).item() for p, c in zip(PROMPTS, ends, strict=True)]
    assert scores == pytest.approx(alone, abs=1e-5)
    without = ClassifierReward(model, tiny_tokenizer())(prompts=PROMPTS, completions=COMPLETIONS)
    if pad_token_id == 0:  # this model was trained to pool the token before EOS
        assert scores == pytest.approx(without, abs=1e-5)
    else:
        assert max(abs(a - b) for a, b in zip(scores, without, strict=True)) > 0.05


def test_dropout_is_off_and_a_tokenizer_without_pad_works():
    model = gpt2_classifier(pad_token_id=None, num_labels=1, id2label={0: "x"}, resid_pdrop=0.5, embd_pdrop=0.5).train()
    tokenizer = tiny_tokenizer(pad_token=None)
    first, again = (ClassifierReward(model, tokenizer)(prompts=PROMPTS, completions=COMPLETIONS) for _ in range(2))
    assert first == again


def test_outputs_by_name():
    model = gpt2_classifier(pad_token_id=0, num_labels=3, id2label={0: "bad", 1: "so-so", 2: "Good"})
    alone = torch.stack([logits_alone(model, text) for text in TEXTS])
    p = alone.softmax(dim=-1)

    def scores(**kwargs):
        reward = ClassifierReward(model, tiny_tokenizer(), **kwargs)
        return torch.tensor(reward(prompts=PROMPTS, completions=COMPLETIONS))

    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    close(scores(output="logit", label="so-so"), alone[:, 1])
    close(scores(output="logit", label=0), alone[:, 0])
    close(scores(output="probability"), p[:, 2])
    close(scores(output="probability", label="GOOD"), p[:, 2])
    close(scores(output="log_odds"), (p[:, 2] / (1 - p[:, 2])).log())
    close(scores(output="log_odds", label="bad"), (p[:, 0] / (1 - p[:, 0])).log())
    model.config.problem_type = "multi_label_classification"
    close(scores(output="log_odds", label="bad"), alone[:, 0])


def test_one_label():
    model = gpt2_classifier(pad_token_id=0, num_labels=1, id2label={0: "reward"})
    alone = torch.stack([logits_alone(model, text) for text in TEXTS])[:, 0]
    for output, expected in (("logit", alone), ("log_odds", alone), ("probability", alone.sigmoid())):
        scores = ClassifierReward(model, tiny_tokenizer(), output=output)(prompts=PROMPTS, completions=COMPLETIONS)
        assert scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_long_text_loses_its_beginning():
    model = gpt2_classifier(pad_token_id=0)
    text = "".join(chr(97 + i % 26) for i in range(100))
    reward = ClassifierReward(model, tiny_tokenizer(), output="log_odds")
    assert reward.max_length == 64
    kept = logits_alone(model, text[-64:])
    assert reward(prompts=[text[:90]], completions=[text[90:]]) == pytest.approx([(kept[1] - kept[0]).item()], abs=1e-5)
    short = ClassifierReward(model, tiny_tokenizer(), output="log_odds", max_length=10)
    kept = logits_alone(model, text[-10:])
    assert short(prompts=[text[:90]], completions=[text[90:]]) == pytest.approx([(kept[1] - kept[0]).item()], abs=1e-5)


def test_an_empty_text_is_scored_as_eos():
    model = gpt2_classifier(pad_token_id=200)
    expected = logits_alone(model, "<|endoftext|>")
    reward = ClassifierReward(model, tiny_tokenizer(), output="log_odds")
    assert reward(prompts=["", "a"], completions=["", "b"])[0] == pytest.approx(
        (expected[1] - expected[0]).item(), abs=1e-5
    )


def test_chat_messages_go_through_the_template_without_extra_special_tokens():
    model = gpt2_classifier(pad_token_id=0)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    reward = ClassifierReward(model, tiny_tokenizer(chat_template=template), output="log_odds")
    prompt, completion = [{"role": "user", "content": "Well?"}], [{"role": "assistant", "content": "Fine."}]
    expected = logits_alone(model, "[user]Well?[assistant]Fine.")
    assert reward(prompts=[prompt], completions=[completion]) == pytest.approx(
        [(expected[1] - expected[0]).item()], abs=1e-5
    )


def with_eos(pad_token_id=200, **kwargs):
    """A one-label classifier, with its own token for padding unless told."""
    model = llama_classifier(pad_token_id=pad_token_id, num_labels=1, id2label={0: "reward"}, label2id={"reward": 0})
    return model, ClassifierReward(model, tiny_tokenizer(), **kwargs)


def test_texts_that_ended_are_scored_with_eos():
    model, reward = with_eos(append_eos=True, batch_size=3)
    ended = [True, False, True, False]
    ends = ["<|endoftext|>" if whole else "" for whole in ended]
    alone = [logits_alone(model, text + end).item() for text, end in zip(TEXTS, ends, strict=True)]
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, completion_ended=ended) == pytest.approx(alone, abs=1e-5)
    scores = RewardSet(reward).score(PROMPTS, COMPLETIONS, [[1]] * 4, {}, STATE, 1, ended=ended)
    assert scores.per_function[:, 0].tolist() == pytest.approx(alone, abs=1e-5)
    all_ended = [logits_alone(model, text + "<|endoftext|>").item() for text in TEXTS]
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(all_ended, abs=1e-5)
    without = ClassifierReward(model, tiny_tokenizer())(prompts=PROMPTS, completions=COMPLETIONS)
    assert without == pytest.approx([logits_alone(model, text).item() for text in TEXTS], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(all_ended, without, strict=True)) > 0.05


def test_an_eos_that_stands_there_is_not_doubled():
    """As trl appends it."""
    _, reward = with_eos(append_eos=True)
    assert reward(prompts=["a"], completions=["b<|endoftext|>"]) == reward(prompts=["a"], completions=["b"])


def test_where_eos_pads_it_makes_no_difference():
    model, reward = with_eos(pad_token_id=0, append_eos=True)
    without = ClassifierReward(model, tiny_tokenizer(), append_eos=False)
    arguments = {"prompts": PROMPTS, "completions": COMPLETIONS}
    assert reward(**arguments) == pytest.approx(without(**arguments), abs=1e-6)


def test_chat_messages_end_as_their_template_says():
    model = gpt2_classifier(pad_token_id=200)
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    reward = ClassifierReward(model, tokenizer, output="log_odds", append_eos=True)
    prompt, completion = [{"role": "user", "content": "Well?"}], [{"role": "assistant", "content": "Fine."}]
    expected = logits_alone(model, "[Well?][Fine.]")
    assert reward(prompts=[prompt], completions=[completion]) == pytest.approx(
        [(expected[1] - expected[0]).item()], abs=1e-5
    )


def test_eos_needs_a_token():
    with pytest.raises(ValueError, match="append_eos: the tokenizer of .* has no EOS token: set tokenizer.eos_token"):
        ClassifierReward(with_eos()[0], tiny_tokenizer(eos_token=None), append_eos=True)


def test_only_functions_that_ask_learn_what_ended():
    seen = {}

    def asks(completions, completion_ended, **kwargs):
        seen["asks"] = completion_ended
        return [0.0] * len(completions)

    def does_not(**kwargs):
        seen["does not"] = "completion_ended" in kwargs
        return [0.0] * len(kwargs["completions"])

    RewardSet([asks, does_not]).score(["p", "p"], ["a", "b"], [[1], [2]], {}, STATE, 1, ended=[False, True])
    assert seen == {"asks": [False, True], "does not": False}


def test_the_users_tokenizer_is_left_as_it_was():
    tokenizer = tiny_tokenizer(padding_side="left", truncation_side="right")
    ClassifierReward(gpt2_classifier(), tokenizer, output="log_odds")(prompts=["a"], completions=["b"])
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "right")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of a 1-label and a 2-label classifier, of a language model, and of pickled weights."""
    root = tmp_path_factory.mktemp("models")
    one = gpt2_classifier(pad_token_id=0, num_labels=1, id2label={0: "reward"})
    for name, model in (("one", one), ("two", gpt2_classifier(pad_token_id=0).half()), ("lm", tiny_gpt2())):
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    one.config.save_pretrained(root / "pickled")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"")
    return root


def test_strings_and_models_in_a_reward_set(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved / "one")
    other = gpt2_classifier(pad_token_id=0, num_labels=1, id2label={0: "x"})
    rewards = RewardSet(
        [str(saved / "one"), model, other, CallableReward()],
        reward_processing_classes=[None, None, tiny_tokenizer(), None],
        device="cpu",
    )
    assert rewards.names == ["one", "one_2", "GPT2ForSequenceClassification", "CallableReward"]
    scores = rewards.score(PROMPTS, COMPLETIONS, [[1]] * 4, {}, STATE, 1).per_function
    expected = [logits_alone(model, text).item() for text in TEXTS]
    for column in (0, 1):
        assert scores[:, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_directory_in_16_bit_is_scored_in_float32(saved):
    reward = ClassifierReward(saved / "two", output="log_odds")
    assert reward.model.dtype == torch.float32 and reward.__name__ == "two"
    assert not reward.model.training


def test_what_is_refused_at_construction(saved):
    with pytest.raises(ValueError, match="has 2 labels .NEGATIVE, POSITIVE.*label=.*output='log_odds'"):
        RewardSet(str(saved / "two"))
    with pytest.raises(ValueError, match="label='HAPPY' is not a label of two: choose one of NEGATIVE, POSITIVE"):
        ClassifierReward(saved / "two", label="HAPPY")
    with pytest.raises(ValueError, match="has no trained classification head .missing: score.weight"):
        ClassifierReward(saved / "lm", output="log_odds")
    with pytest.raises(ValueError, match="pickled weights only"):
        ClassifierReward(saved / "pickled")
    with pytest.raises(ValueError, match="output='logits' is not one of logit, log_odds, probability"):
        ClassifierReward(saved / "two", output="logits")
    with pytest.raises(ValueError, match="max_length=65 must be from 1 to 64"):
        ClassifierReward(saved / "one", max_length=65)
    with pytest.raises(ValueError, match="batch_size=0"):
        ClassifierReward(saved / "one", batch_size=0)
    with pytest.raises(ValueError, match="no tokenizer can be loaded from ''.*processing_class"):
        ClassifierReward(gpt2_classifier(num_labels=1, id2label={0: "x"}))


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    with pytest.raises(ValueError, match="token ids up to 257, its model an embedding of 257 tokens"):
        ClassifierReward(gpt2_classifier(), tokenizer, output="log_odds")


@pytest.mark.parametrize("name", ["no/such/dir", "./nowhere", "/nowhere", "lexicon", "nobody/nothing-at-all"])
def test_a_model_that_is_not_there_gives_one_clear_message(name):
    with pytest.raises(ValueError, match=f"{name}.*(is not a model directory|cannot be loaded)"):
        RewardSet(name)


def test_a_batch_that_uses_every_token_has_no_pad_left():
    model = gpt2_classifier(pad_token_id=None, vocab_size=257)
    reward = ClassifierReward(model, tiny_tokenizer(), output="log_odds")
    with pytest.raises(ValueError, match="lower batch_size"):
        reward._logits([list(range(200)), list(range(200, 257))])


def test_the_protocol_is_what_trl_calls():
    """Our keyword arguments are those of trl's own trainer, read from its source."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    source = inspect.getsource(RLOOTrainer._calculate_rewards)
    assert "prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs" in source
    given = {}
    score(lambda **kwargs: given.update(kwargs) or [0.0, 0.0])
    assert set(given) == {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    assert all(f'reward_kwargs["{key}"]' in source for key in ("trainer_state", "log_extra", "log_metric"))
