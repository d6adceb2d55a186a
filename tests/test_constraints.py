"""Forbidden tokens and a minimum length: against the definition, against generate(), and in every number that follows."""

import math

import pytest
import torch
from builders import (
    EOS,
    MODELS,
    PROMPTS,
    VOCAB,
    critic_of,
    encode,
    gpt2,
    llama,
    make_samples,
    make_trainer,
    metrics_rows,
    row_alone,
    supports,
    trained,
    with_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lmppo.checks import NonFiniteError
from lmppo.models import ActorCritic
from lmppo.run.checkpoint import CheckpointError
from lmppo.sampling import SamplingParams

ENDS = (EOS, 3)
CONSTRAINTS = [
    {"suppress_tokens": (1, 5)},
    {"min_new_tokens": 3},
    {"min_new_tokens": 8},
    {"suppress_tokens": (7,), "min_new_tokens": 2, "top_k": 2},
    {"min_new_tokens": 4, "top_p": 0.6, "temperature": 0.7},
    {"suppress_tokens": (2, 4, 6, 8, 10), "min_new_tokens": 5, "min_p": 0.3, "top_k": 4, "temperature": 1.3},
]


def defined(logits, t, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, min_new_tokens=0, suppress_tokens=()):
    """The ids that may be sampled at position t, rule by rule: what is forbidden, then top-k, top-p and min-p."""
    left = {i for i in range(len(logits)) if i not in suppress_tokens and not (t < min_new_tokens and i in ENDS)}

    def chances():
        weights = {i: math.exp(logits[i].double().item() / temperature) for i in left}
        return {i: weight / sum(weights.values()) for i, weight in weights.items()}

    if top_k:
        left = set(sorted(left, key=lambda i: -logits[i].item())[:top_k])
    if top_p < 1:
        p, mass, kept = chances(), 0.0, set()
        for i in sorted(left, key=lambda i: -p[i]):
            kept |= {i} if mass < top_p else set()
            mass += p[i]
        left = kept
    p = chances()
    return {i for i in left if p[i] >= min_p * max(p.values())}


def check_rows(model, samples, **params):
    """Every position by the plain model on the row alone: the support, the log-probability, the values."""
    allowed, temperature = supports(samples), params.get("temperature", 1.0)
    for row in range(len(samples)):
        prompt = samples.tokens.prompt_ids[row][samples.tokens.prompt_mask[row]]
        mask = samples.completion_mask[row]
        completion = samples.tokens.completion_ids[row][mask]
        logits, values = row_alone(model, prompt, completion)
        for t, token in enumerate(completion.tolist()):
            left = defined(logits[t], t, **params)
            assert set(allowed[row, t].expand(VOCAB).nonzero()[:, 0].tolist()) == left and token in left
            z = logits[t] / temperature
            expected = z[token] - z[sorted(left)].logsumexp(0)
            assert samples.logprobs[row, t].item() == pytest.approx(expected.item(), abs=1e-5)
            assert (token in ENDS) == (bool(samples.ended[row]) and t == len(completion) - 1)
        torch.testing.assert_close(samples.values[row][mask], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("params", CONSTRAINTS, ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_what_is_sampled_is_the_constrained_distribution(family, params):
    model = with_values(ActorCritic(MODELS[family]()))
    samples = make_samples(model, eos=ENDS, **params)
    check_rows(model, samples, **params)
    assert samples.completion_mask.sum(1).min() >= min(8, params.get("min_new_tokens", 0) + 1)


def test_any_constraints_together():
    model = with_values(ActorCritic(llama()))

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.integers(0, VOCAB - 1), max_size=6), st.integers(0, 8), st.integers(0, 5),
        st.sampled_from([1.0, 0.8, 0.3]), st.sampled_from([0.0, 0.2, 0.9]), st.sampled_from([1.0, 0.6]),
    )  # fmt: skip
    def check(suppressed, minimum, top_k, top_p, min_p, temperature):
        params = {"suppress_tokens": tuple(suppressed), "min_new_tokens": minimum, "top_k": top_k, "top_p": top_p,
                  "min_p": min_p, "temperature": temperature}  # fmt: skip
        check_rows(model, make_samples(model, PROMPTS[:3], eos=ENDS, **params), **params)

    check()


@pytest.mark.parametrize("params", CONSTRAINTS, ids=str)
def test_supports_are_those_generate_samples_from(params):
    """Position by position, along what generate() itself samples."""
    policy, (ids, mask) = gpt2(), encode(*PROMPTS)
    asked = {"top_k": 0, "top_p": 1.0, "min_p": None, "temperature": 1.0} | params
    asked["suppress_tokens"] = list(params.get("suppress_tokens", ())) or None
    torch.manual_seed(0)
    out = policy.generate(
        ids, attention_mask=mask.long(), max_new_tokens=8, pad_token_id=EOS, eos_token_id=list(ENDS), do_sample=True,
        return_dict_in_generate=True, output_logits=True, output_scores=True, **asked,
    )  # fmt: skip
    ours = SamplingParams(8, ENDS, **params)
    rules = ours.rules(VOCAB)
    for t, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        rule = rules[ours.rule_numbers()[t]]
        assert ours.allowed(logits, rule).equal(scores > float("-inf"))


@pytest.mark.parametrize("params", CONSTRAINTS, ids=str)
def test_rows_do_not_depend_on_each_other(params):
    model = ActorCritic(gpt2())
    whole = make_samples(model, eos=ENDS, **params)
    for n in (1, 4):
        part = make_samples(model, PROMPTS[:n], eos=ENDS, **params)
        assert part.tokens.completion_ids.equal(whole.tokens.completion_ids[:n])
        mask = part.completion_mask
        assert mask.equal(whole.completion_mask[:n])
        assert supports(part)[mask].equal(supports(whole)[:n][mask])


def test_what_is_constant_costs_a_byte_a_position():
    """Not the vocabulary's bits, neither while sampling nor after."""
    constant = make_samples(ActorCritic(gpt2()), suppress_tokens=tuple(range(5, 12)), min_new_tokens=2)
    assert constant.support.entries.shape == (len(PROMPTS), 8, 1) and constant.support.form == "rules"
    assert constant.support.entries.dtype == torch.uint8 and constant.support.rules.shape == (2, VOCAB)


def test_a_position_that_the_model_and_the_constraints_leave_empty_is_refused_by_row():
    model = ActorCritic(gpt2())

    def only_three(module, arguments, output):
        rest = torch.arange(VOCAB) != 3
        output.logits[1:2, :, rest] = float("-inf")

    model.policy.register_forward_hook(only_three)
    make_samples(model, eos=())
    for more in ({}, {"top_p": 0.9}, {"top_k": 2}):
        with pytest.raises(NonFiniteError, match=r"No token can be sampled in rows \[1\].*suppress_tokens"):
            make_samples(model, eos=(), suppress_tokens=(3,), **more)


# --- in a run --------------------------------------------------------------------------------------------------------

ASKED = {"suppress_tokens": [2, 9], "bad_words_ids": [[4]], "min_new_tokens": 3, "stop_token_ids": [5],
         "stop_strings": ["gh", "ij"]}  # fmt: skip
KINDS = {
    "value head": {},
    "a critic of its own": {"critic": critic_of()},
    "no critic": {"estimator": "rewards_to_go", "baseline": "leave_one_out", "num_generations": 2},
    "bootstrap": {"truncation": "bootstrap"},
    "mask": {"truncation": "mask"},
    "trpo": {"objective": "trpo"},
    "kl_penalty": {"objective": "kl_penalty"},
    "exact": {"kl_form": "exact_both", "ent_coef": 0.01},
    "k3": {"kl_form": "k3_both", "top_p": 0.9},
    "warm": {"temperature": 0.8, "top_k": 6},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_train_starts_at_ratio_1_and_at_the_cost_of_the_support(tmp_path, kind):
    """The checks before the first step are exact, and the run goes on with finite numbers."""
    trainer = trained(tmp_path, step_zero_tolerance=2e-5, eval_dataset=PROMPTS, **ASKED, **KINDS[kind])
    assert all(math.isfinite(value) for row in trainer.state.log_history for value in row.values())
    rollout = trainer.last_step.scored.rollout
    counted = rollout.tokens.completion_ids[rollout.completion_mask]
    assert not torch.isin(counted, torch.tensor([2, 9, 4])).any()
    ids, mask = rollout.tokens.completion_ids[:, :3], rollout.completion_mask[:, :3]
    assert not torch.isin(ids[mask], torch.tensor([EOS, 5])).any()
    assert math.isfinite(trainer.evaluate()["eval_kl_to_ref"])


def test_the_entropy_is_that_of_the_tokens_left(tmp_path):
    """Two tokens are left, so that it is below log 2."""
    trainer = trained(tmp_path, suppress_tokens=list(range(2, VOCAB)), max_steps=1)
    assert 0 < trainer.state.log_history[0]["entropy"] <= math.log(2)


def test_a_run_is_not_resumed_with_other_constraints(tmp_path):
    trained(tmp_path, max_steps=1, save_steps=1, **ASKED)
    changes = {"suppress_tokens": [2], "bad_words_ids": None, "min_new_tokens": 2, "stop_token_ids": None,
               "stop_strings": ["gh"]}  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(CheckpointError, match=f"{name}: was "):
            trained(tmp_path, max_steps=2, resume_from_checkpoint="auto", **(ASKED | {name: value}))
    trained(tmp_path, max_steps=2, resume_from_checkpoint="auto", **ASKED)
    through = trained(tmp_path / "through", max_steps=2, save_steps=1, **ASKED)
    assert metrics_rows(tmp_path) == metrics_rows(through.args.output_dir)


# --- refused, or warned of, when the trainer is built ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"suppress_tokens": [3, 12]},
            r"suppress_tokens has 12, outside the model's vocabulary: token ids are 0 to 11",
        ),
        ({"stop_token_ids": [-1]}, r"stop_token_ids has -1, outside"),
        ({"bad_words_ids": [[1], [50256]]}, r"bad_words_ids has 50256, outside"),
        ({"bad_words_ids": [[1], [EOS]]}, r"bad_words_ids has 0, which end completions, .*generate\(\) ignores"),
        ({"suppress_tokens": list(range(12))}, r"No token can be sampled: .* forbid all 12"),
        ({"suppress_tokens": list(range(1, 12)), "min_new_tokens": 1}, "No token can be sampled"),
    ],
)
def test_what_the_model_cannot_fulfil_is_refused(tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **asked)


def warnings_of(recwarn, *about):
    return [str(w.message) for w in recwarn if any(text in str(w.message) for text in about)]


@pytest.mark.parametrize(
    ("asked", "warned"),
    [
        ({"suppress_tokens": [EOS]}, True),
        ({"min_new_tokens": 8}, True),
        ({"suppress_tokens": [EOS], "stop_token_ids": [3]}, False),
        ({"suppress_tokens": [EOS], "stop_strings": ["a"]}, False),
        ({"min_new_tokens": 7}, False),
        ({}, False),
    ],
    ids=str,
)
def test_completions_that_cannot_end_are_warned_of(tmp_path, recwarn, asked, warned):
    trainer = make_trainer(tmp_path, **asked)
    assert len(warnings_of(recwarn, "No completion can end")) == warned
    if warned:
        assert trainer.collector.collect(trainer.prompts.next_batch(8), 0).rollout.ended.sum() == 0


@pytest.mark.parametrize(
    ("fields", "named", "unnamed"),
    [
        ({}, [], []),
        ({"do_sample": True, "max_length": None, "pad_token_id": 3, "use_cache": False, "output_scores": True,
          "return_dict_in_generate": True}, [], []),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, ["temperature=0.6", "top_p=0.9"], ["do_sample"]),
        (
            {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            ["repetition_penalty=1.05", "top_k=20", "set temperature, top_k, top_p in",
             "there is no setting for repetition_penalty"], [],
        ),
        ({"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.0, "top_k": 50, "num_beams": 1}, [], []),
        ({"no_repeat_ngram_size": 3, "num_beams": 4, "penalty_alpha": 0.6, "forced_eos_token_id": 0},
         ["no_repeat_ngram_size=3", "num_beams=4", "penalty_alpha=0.6", "forced_eos_token_id=0"], []),
        ({"bad_words_ids": [[1, 2]], "min_length": 5, "max_new_tokens": 99, "sequence_bias": [[[3], -1.0]]},
         ["bad_words_ids=[[1, 2]]", "set max_completion_length, min_new_tokens, bad_words_ids in",
          "there is no setting for sequence_bias"], []),
        ({"suppress_tokens": [7], "stop_strings": "x"}, [], []),
    ],
    ids=str,
)  # fmt: skip
def test_one_line_names_every_field_of_the_generation_config_that_nothing_reads(
    tmp_path, recwarn, fields, named, unnamed
):
    model = gpt2()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    asked = {"temperature": 0.5} if fields.get("temperature") == 0.5 else {}
    asked |= {"suppress_tokens": [7], "stop_strings": ["x"]} if "stop_strings" in fields else {}
    make_trainer(tmp_path, model=model, **asked)
    messages = warnings_of(recwarn, "generation_config")
    assert len(messages) == bool(named)
    for text in named:
        assert text in messages[0]
    for text in unnamed:
        assert text not in messages[0]
