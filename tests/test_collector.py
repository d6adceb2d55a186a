"""The rollout: sampled, measured under the reference, scored as trl's reward functions are, and gathered."""

from types import SimpleNamespace

import pytest
import torch
from builders import (
    MODELS,
    PROMPTS,
    alone,
    build_model,
    build_policy_arguments,
    gpt2,
    make_samples,
    make_trainer,
    row_alone,
    supports,
    with_values,
)
from fakes import letter_tokenizer
from test_prompts import CHAT_TEMPLATE

from lmppo.collector import completion_texts, local_rows
from lmppo.config import KL_FORMS
from lmppo.models import ActorCritic, Reference, score_tokens
from lmppo.prompts import PromptBatch

ROUNDING = {"atol": 5e-6, "rtol": 1e-5}  # float32, other matrix shapes


def collect(trainer, iteration=0):
    size = trainer.args.rollout_batch_size // trainer.args.num_generations
    return trainer.collector.collect(trainer.prompts.next_batch(size, trainer.args.num_generations), iteration)


# --- log-probabilities of samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "top_k": 4}], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_logprobs_are_those_of_the_row_alone_on_the_records_support(family, sampling):
    samples = make_samples(build_model(family, "shared"), **sampling)
    other = ActorCritic(MODELS[family](seed=6))
    temperature = sampling.get("temperature", 1.0)
    logprobs = score_tokens(Reference(other.policy).logits, samples, temperature, 4)
    for row in range(len(PROMPTS)):
        completion = alone(samples.tokens.completion_ids, samples.completion_mask, row)
        logits, _ = row_alone(other, alone(samples.tokens.prompt_ids, samples.tokens.prompt_mask, row), completion)
        z = (logits / temperature).masked_fill(~supports(samples)[row, : len(completion)], -torch.inf)
        expected = z.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        torch.testing.assert_close(alone(logprobs, samples.completion_mask, row), expected, **ROUNDING)
    assert logprobs[~samples.completion_mask].eq(0).all()


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_number_of_rows_per_forward_pass_changes_nothing(size):
    samples = make_samples(build_model("gpt2", "shared"))
    reference = Reference(gpt2(seed=6))
    torch.testing.assert_close(
        score_tokens(reference.logits, samples, 1.0, size),
        score_tokens(reference.logits, samples, 1.0, 6),
        **ROUNDING,
    )


def test_trimming_before_the_forward_pass_changes_nothing():
    samples = make_samples(build_model("gpt2", "shared"), n_time=20)
    reference = Reference(gpt2(seed=6))
    narrow = samples.trim()
    width = narrow.tokens.completion_ids.shape[1]
    torch.testing.assert_close(
        score_tokens(reference.logits, samples, 1.0, 6)[:, :width],
        score_tokens(reference.logits, narrow, 1.0, 6),
        **ROUNDING,
    )


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}], ids=str)
def test_kl_to_the_reference_is_zero_before_any_update(tmp_path, family, settings):
    rollout = collect(make_trainer(tmp_path, model=MODELS[family](), rollout_batch_size=12, **settings)).rollout
    assert rollout.completion_mask.sum(1).unique().numel() > 1
    assert rollout.kl_to_ref.abs().max() < 2e-5
    assert rollout.kl_of_support.eq(0).all()


def test_kl_to_a_given_reference_is_the_log_ratio(tmp_path):
    trainer = make_trainer(tmp_path, ref_model=gpt2(seed=6))
    rollout = collect(trainer).rollout
    expected = rollout.logprobs - score_tokens(trainer.reference.logits, rollout, 1.0, 3)
    torch.testing.assert_close(rollout.kl_to_ref, expected, **ROUNDING)
    assert rollout.kl_to_ref.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("form", KL_FORMS)
def test_the_kl_of_the_rollout_is_the_configured_estimate(tmp_path, form):
    other = gpt2(seed=6)
    trainer = make_trainer(tmp_path, ref_model=other, kl_form=form, temperature=0.8, micro_batch_size=3)
    rollout = collect(trainer).rollout
    for row in range(8):
        prompt, completion = (alone(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, row),
                              alone(rollout.tokens.completion_ids, rollout.completion_mask, row))  # fmt: skip
        p, q = (
            (row_alone(m, prompt, completion)[0] / 0.8).log_softmax(-1)
            for m in (trainer.actor_critic, ActorCritic(other))
        )
        d = (p - q).gather(-1, completion[:, None])[:, 0]
        expected = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d, "exact": (p.exp() * (p - q)).sum(-1)}
        paid = alone(rollout.kl_penalty, rollout.completion_mask, row)
        torch.testing.assert_close(paid, expected[form.partition("_")[0]], atol=1e-4, rtol=1e-4)
    assert rollout.kl_penalty[~rollout.completion_mask].eq(0).all()


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_a_cut_completion_has_the_value_of_its_last_state(tmp_path, kind):
    trainer = make_trainer(tmp_path, truncation="bootstrap", micro_batch_size=3, **build_policy_arguments(kind))
    with_values(trainer.actor_critic)
    rollout = collect(trainer).rollout
    assert rollout.ended.any() and not rollout.ended.all()
    end = torch.tensor([1])  # any token: the state before it is the one that is asked for
    for row in range(8):
        context = torch.cat([alone(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, row),
                             alone(rollout.tokens.completion_ids, rollout.completion_mask, row)])  # fmt: skip
        expected = torch.zeros(1) if rollout.ended[row] else row_alone(trainer.actor_critic, context, end)[1][0]
        torch.testing.assert_close(rollout.bootstrap_values[row], expected, atol=1e-5, rtol=1e-4)
    assert collect(make_trainer(tmp_path)).rollout.bootstrap_values.eq(0).all()
    long = collect(make_trainer(tmp_path, truncation="bootstrap", max_completion_length=50)).rollout
    assert long.ended.all() and long.bootstrap_values.eq(0).all(), "no row was cut"


def test_scores_stand_on_the_last_token_of_each_completion(tmp_path):
    """Finished, cut and one-token completions alike; EOS is the last token of a finished one, and counts."""
    calls = []

    def reward(prompts, completions, completion_ids, **kwargs):
        calls.extend(completion_ids)
        return [float(i + 1) for i in range(len(prompts))]

    trainer = make_trainer(tmp_path, reward=reward, rollout_batch_size=24, minibatch_size=12)
    scored = collect(trainer)
    rollout = scored.rollout
    lengths = rollout.tokens.lengths.tolist()
    assert 1 in lengths and 8 in lengths and len(set(lengths)) > 2
    assert rollout.ended.any() and not rollout.ended.all()
    for row, length in enumerate(lengths):
        expected = torch.zeros(8)
        expected[length - 1] = row + 1
        assert rollout.scores[row, :, 0].equal(expected)
        last = rollout.tokens.completion_ids[row, length - 1].item()
        assert bool(rollout.ended[row]) == (last == 0)
        assert calls[row] == rollout.tokens.completion_ids[row, :length].tolist(), (
            "EOS is among the ids a function sees"
        )
        assert "<|endoftext|>" not in scored.completions[row]
    assert scored.per_function[:, 0].tolist() == [float(i + 1) for i in range(24)]


def test_dense_rewards_stand_on_their_tokens(tmp_path):
    def per_token(prompts, completions, completion_ids, **kwargs):
        return [[0.5 * token for token in ids] for ids in completion_ids]

    rollout = collect(make_trainer(tmp_path, reward=per_token)).rollout
    expected = torch.where(rollout.completion_mask, 0.5 * rollout.tokens.completion_ids, 0.0)
    assert rollout.scores[..., 0].equal(expected)


def test_columns_and_generations_reach_the_reward_functions(tmp_path):
    calls = []

    def reward(prompts, completions, completion_ids, label, note, trainer_state, **kwargs):
        calls.append((prompts, label, note, trainer_state.global_step))
        return [float(x) for x in label]

    data = [{"prompt": p, "label": i, "note": f"n{i}"} for i, p in enumerate(PROMPTS[:4])]
    trainer = make_trainer(tmp_path, reward=reward, dataset=data, num_generations=2, shuffle_dataset=False)
    scored = collect(trainer)
    ((prompts, labels, notes, step),) = calls
    assert prompts == [p for p in PROMPTS[:4] for _ in range(2)] == scored.prompts
    assert labels == [0, 0, 1, 1, 2, 2, 3, 3]
    assert notes == [f"n{i}" for i in labels]
    assert step == 0
    assert scored.rollout.tokens.completion_ids[0::2].ne(scored.rollout.tokens.completion_ids[1::2]).any(), (
        "each has its own noise"
    )


def test_chat_completions_are_messages(tmp_path):
    calls = []

    def reward(prompts, completions, **kwargs):
        calls.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    data = [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS]
    tokenizer = letter_tokenizer(chat_template=CHAT_TEMPLATE)
    scored = collect(make_trainer(tmp_path, reward=reward, dataset=data, tokenizer=tokenizer))
    for (prompt, completion), text in zip(calls, scored.completions, strict=True):
        assert prompt[0]["role"] == "user"
        assert completion == [{"role": "assistant", "content": text}]


def test_prompts_of_token_ids_reach_the_reward_functions_as_text(tmp_path):
    calls = []

    def reward(prompts, completions, **kwargs):
        calls.extend(prompts)
        return [1.0] * len(prompts)

    collect(make_trainer(tmp_path, reward=reward, dataset=[{"prompt": [1, 2]}, {"prompt": [11]}]))
    assert set(calls) == {"ab", "k"}


def test_what_functions_log_is_kept(tmp_path):
    def reward(prompts, completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(c) for c in completions])
        log_metric("longest", max(map(len, completions)))
        return [1.0] * len(prompts)

    scored = collect(make_trainer(tmp_path, reward=reward))
    assert scored.extras == {"length": [len(c) for c in scored.completions]}
    assert scored.metrics == {"longest": max(map(len, scored.completions))}


def test_functions_are_added_with_their_weights(tmp_path):
    def one(prompts, completions, **kwargs):
        return [1.0] * len(prompts)

    def sometimes(prompts, completions, **kwargs):
        return [10.0 if i % 2 else None for i in range(len(prompts))]

    scored = collect(make_trainer(tmp_path, reward=[one, sometimes], reward_weights=[2.0, 0.5]))
    assert scored.rollout.scores.sum(dim=(1, 2)).tolist() == [2.0, 7.0] * 4
    assert scored.per_function.isnan().tolist() == [[False, True], [False, False]] * 4


def test_the_same_iteration_samples_the_same_and_another_does_not(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = trainer.prompts.next_batch(8)
    first, again, other = (trainer.collector.collect(batch, i).rollout.tokens.completion_ids for i in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert not first.equal(trainer.collector.collect(batch, 0, purpose=1).rollout.tokens.completion_ids), (
        "evaluation has its own noise"
    )


def test_nothing_in_the_record_carries_a_gradient(tmp_path):
    rollout = collect(make_trainer(tmp_path)).rollout
    seen = []
    rollout.map(lambda tensor, _: seen.append(tensor.requires_grad) or tensor)
    assert len(seen) == 14 and not any(seen)


def test_text_and_chat_may_stand_side_by_side():
    prompts = PromptBatch(["a", [{"role": "user", "content": "b"}], "c"], [[1], [2], [3]], {})
    assert completion_texts(letter_tokenizer(), prompts, [[4, 5], [6, 0], [7]]) == ["de", "f", "g"]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_share_the_rows_without_gap_or_overlap(processes):
    shares = [local_rows(12, SimpleNamespace(num_processes=processes, process_index=i)) for i in range(processes)]
    assert [row for share in shares for row in share] == list(range(12))


def test_trainer_state_counts_the_steps(tmp_path):
    steps = []

    def reward(prompts, completions, trainer_state, **kwargs):
        steps.append(trainer_state.global_step)
        return [1.0] * len(prompts)

    make_trainer(tmp_path, reward=reward, max_steps=3).train()
    assert steps == [0, 1, 2]


def test_functions_that_ask_learn_which_completions_ended(tmp_path):
    seen = []

    def reward(completions, completion_ids, completion_ended, **kwargs):
        seen.extend(zip(completion_ids, completion_ended, strict=True))
        return [0.0] * len(completions)

    collect(make_trainer(tmp_path, reward=reward))
    assert {ended for _, ended in seen} == {True, False}
    assert all(ended == (ids[-1] == 0) and (ended or len(ids) == 8) for ids, ended in seen)
