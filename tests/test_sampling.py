"""Sampling: equal to generate(), to teacher forcing, to the definition of each truncation; independent of the batch."""

import dataclasses

import pytest
import torch
from builders import (
    EOS,
    MODELS,
    PROMPTS,
    VOCAB,
    alone,
    build_model,
    encode,
    gpt2,
    llama,
    make_samples,
    read,
    row_alone,
    supports,
    with_values,
)
from transformers import LogitsProcessor, LogitsProcessorList

from lmppo.checks import NonFiniteError
from lmppo.functional import token_logprobs
from lmppo.models import ActorCritic
from lmppo.sampling import (
    EVALUATION,
    ROLLOUT,
    SamplingParams,
    _in_their_places,
    _largest,
    draw,
    sample,
    uniform_noise,
)

ROUNDING = {"atol": 5e-6, "rtol": 1e-5}  # float32, other matrix shapes
TRUNCATIONS = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.8, "min_p": 0.1}]


class Force(LogitsProcessor):
    """Makes generate() choose given tokens, so that its own logits for them can be read."""

    def __init__(self, tokens, n_prompt):
        self.tokens, self.n_prompt = tokens, n_prompt

    def __call__(self, input_ids, scores):
        token = self.tokens[:, input_ids.shape[1] - self.n_prompt]
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)


def generate(policy, ids, mask, n_time, **kwargs):
    return policy.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=n_time, pad_token_id=EOS, eos_token_id=EOS,
        return_dict_in_generate=True, output_logits=True, output_scores=True, **kwargs,
    )  # fmt: skip


# --- equal to generate() ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "lora"])
@pytest.mark.parametrize("family", MODELS)
def test_the_only_token_left_by_top_1_is_generates_greedy_token(family, kind):
    model = build_model(family, kind)
    ids, mask = encode(*PROMPTS)
    greedy = generate(model.policy, ids, mask, 8, do_sample=False).sequences[:, ids.shape[1] :]
    samples = make_samples(model, top_k=1)
    n_time = greedy.shape[1]
    counted = samples.completion_mask[:, :n_time]
    assert samples.tokens.completion_ids[:, :n_time][counted].tolist() == greedy[counted].tolist()
    assert not samples.completion_mask[:, n_time:].any()
    assert samples.logprobs.eq(0).all(), "the only possible token has probability 1"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", MODELS)
def test_logprobs_are_those_generate_gives_the_same_tokens(family, temperature):
    model = build_model(family, "lora")
    samples = make_samples(model, temperature=temperature)
    n_prompt = samples.tokens.prompt_ids.shape[1]
    forced = LogitsProcessorList([Force(samples.tokens.completion_ids, n_prompt)])
    out = generate(
        model.policy, samples.tokens.prompt_ids, samples.tokens.prompt_mask, 8, do_sample=False, logits_processor=forced
    )
    logits = torch.stack(out.logits, dim=1)
    tokens, counted = (x[:, : logits.shape[1]] for x in (samples.tokens.completion_ids, samples.completion_mask))
    assert out.sequences[:, n_prompt:][counted].equal(tokens[counted])
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(samples.logprobs[:, : logits.shape[1]][counted], expected[counted], **ROUNDING)


# --- equal to teacher forcing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, *TRUNCATIONS, {"temperature": 1.4, "top_p": 0.7}], ids=str
)
@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("family", MODELS)
def test_logprobs_and_values_are_those_of_the_whole_sequence_alone(family, kind, settings):
    model = build_model(family, kind)
    samples = make_samples(model, **settings)
    assert 1 < samples.completion_mask.sum() < samples.completion_mask.numel(), "the test needs ragged completions"
    for row in range(len(PROMPTS)):
        prompt, completion, logprobs, values = (
            alone(x, samples.tokens.prompt_mask if x is samples.tokens.prompt_ids else samples.completion_mask, row)
            for x in (samples.tokens.prompt_ids, samples.tokens.completion_ids, samples.logprobs, samples.values)
        )
        logits, expected_values = row_alone(model, prompt, completion)
        z = logits / settings.get("temperature", 1.0)
        support = supports(samples)[row, : len(completion)].expand_as(z)
        expected = torch.stack(
            [z[t, a] - z[t][support[t]].exp().sum().log() for t, a in enumerate(completion.tolist())]
        )
        torch.testing.assert_close(logprobs, expected, **ROUNDING)
        torch.testing.assert_close(values, expected_values, **ROUNDING)
    for tensor in (samples.tokens.completion_ids, samples.logprobs, samples.values):
        assert tensor[~samples.completion_mask].eq(0).all()
    assert supports(samples)[~samples.completion_mask].all()


def test_sampling_builds_no_graph():
    samples = make_samples(with_values(ActorCritic(gpt2())))
    assert not samples.logprobs.requires_grad and not samples.values.requires_grad


# --- EOS, and rows that are dropped ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_dropping_finished_rows_changes_nothing_for_the_others(family):
    """Against the same run without EOS, where no row is ever dropped."""
    model = build_model(family, "shared")
    dropped, kept = make_samples(model, n_time=12), make_samples(model, n_time=12, eos=())
    lengths = dropped.completion_mask.sum(1)
    assert lengths.unique().numel() > 2
    counted = dropped.completion_mask
    assert dropped.tokens.completion_ids[counted].equal(kept.tokens.completion_ids[counted])
    for name in ("logprobs", "values"):
        torch.testing.assert_close(getattr(dropped, name)[counted], getattr(kept, name)[counted], **ROUNDING)
    for row, length in enumerate(lengths.tolist()):
        first_eos = (kept.tokens.completion_ids[row] == EOS).nonzero()[:1].flatten().tolist()
        assert length == (first_eos[0] + 1 if first_eos else 12), "EOS itself counts, nothing after it does"
        assert bool(dropped.ended[row]) == bool(first_eos)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_of_the_rows_that_go_on_no_more_are_moved_than_have_ended(share):
    generator = torch.Generator().manual_seed(0)
    for n_rows in range(1, 40):
        goes_on = torch.rand(n_rows, generator=generator) < share
        rows = _in_their_places(goes_on)
        assert sorted(rows.tolist()) == goes_on.nonzero()[:, 0].tolist()
        moved = rows != torch.arange(len(rows))
        assert moved.sum() == (~goes_on[: len(rows)]).sum()


def test_without_an_eos_token_every_completion_is_full():
    samples = make_samples(ActorCritic(gpt2()), eos=())
    assert samples.completion_mask.all()
    assert not samples.ended.any()


def test_all_rows_can_end_at_once():
    """Lengths of 1, from a model that says EOS first, and one row that does not."""
    model = ActorCritic(llama())
    with torch.no_grad():
        model.policy.lm_head.weight.zero_()  # all tokens alike: the uniform number alone decides
    ids, mask = encode(*PROMPTS)
    uniforms = torch.full((len(PROMPTS), 5), 0.5 / VOCAB, dtype=torch.float64)
    samples = sample(model, ids, mask, uniforms, SamplingParams(5, (EOS,)))
    assert samples.completion_mask.sum(1).tolist() == [1] * len(PROMPTS)
    assert samples.ended.all()
    assert samples.support.entries.shape[:2] == (len(PROMPTS), 5)
    uniforms[2, :] = 0.99
    samples = sample(model, ids, mask, uniforms, SamplingParams(5, (EOS,)))
    assert samples.completion_mask.sum(1).tolist() == [1, 1, 5, 1, 1, 1]
    assert samples.ended.tolist() == [True, True, False, True, True, True]
    assert samples.tokens.completion_ids[2].tolist() == [VOCAB - 1] * 5


def test_an_end_at_the_last_position_is_an_end():
    model = ActorCritic(llama())
    with torch.no_grad():
        model.policy.lm_head.weight.zero_()
    ids, mask = encode("a")
    samples = sample(model, ids, mask, torch.tensor([[0.9, 0.9, 0.0]]), SamplingParams(3, (EOS,)))
    assert samples.completion_mask.all()
    assert samples.ended.all()


def test_any_of_several_eos_tokens_ends_a_completion():
    kept = make_samples(ActorCritic(gpt2()), n_time=12, eos=())
    stopped = make_samples(ActorCritic(gpt2()), n_time=12, eos=(3, 7))
    for row, ids in enumerate(kept.tokens.completion_ids.tolist()):
        expected = next((t + 1 for t, token in enumerate(ids) if token in (3, 7)), 12)
        assert stopped.completion_mask[row].sum() == expected


def test_eos_inside_a_prompt_is_a_token_like_any_other():
    """Masks come from lengths, never from ids == pad."""
    model = with_values(ActorCritic(gpt2()))
    prompts = [[EOS, 1, EOS, 2], [EOS], [5, EOS]]
    samples = make_samples(model, prompts)
    for row, prompt in enumerate(prompts):
        single = make_samples(model, prompts[: row + 1])  # the same rows get the same noise
        assert single.tokens.completion_ids[row].equal(samples.tokens.completion_ids[row])
        completion = alone(samples.tokens.completion_ids, samples.completion_mask, row)
        logits, _ = row_alone(model, torch.tensor(prompt), completion)
        expected = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        torch.testing.assert_close(alone(samples.logprobs, samples.completion_mask, row), expected, **ROUNDING)


def test_the_whole_context_can_be_used():
    model = ActorCritic(gpt2(n_positions=12))
    samples = make_samples(model, ["abcd"], n_time=8, eos=())
    assert samples.completion_mask.sum() == 8


# --- independence of the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_tokens_do_not_depend_on_how_the_rows_are_batched(family):
    """Other batches, another order, other padding: each row keeps its noise, and so its tokens."""
    model = build_model(family, "shared")
    rows = PROMPTS * 2
    ids, mask = encode(*rows)
    params = SamplingParams(10, (EOS,))
    noise = uniform_noise(1, 4, range(len(rows)), 10)
    whole = sample(model, ids, mask, noise, params)
    backwards = torch.arange(len(rows)).flip(0)
    for batch in (backwards, torch.tensor([3]), torch.arange(0, 12, 2), torch.tensor([5, 1, 7])):
        part_ids, part_mask = encode(*[rows[i] for i in batch])  # narrower, where the longest prompt is not among them
        part = sample(model, part_ids, part_mask, noise[batch], params)
        assert part.tokens.completion_ids.equal(whole.tokens.completion_ids[batch])
        assert part.completion_mask.equal(whole.completion_mask[batch])
        assert part.ended.equal(whole.ended[batch])
        torch.testing.assert_close(part.logprobs, whole.logprobs[batch], **ROUNDING)
        torch.testing.assert_close(part.values, whole.values[batch], **ROUNDING)


def test_noise_is_a_function_of_seed_iteration_row_position_and_purpose():
    noise = uniform_noise(7, 3, range(6), 5)
    assert noise.dtype == torch.float64 and noise.min() >= 0 and noise.max() < 1
    assert torch.equal(uniform_noise(7, 3, range(2, 4), 5), noise[2:4])
    assert torch.equal(uniform_noise(7, 3, range(6), 3), noise[:, :3]), "a longer completion changes no earlier token"
    others = [
        uniform_noise(8, 3, range(6), 5),
        uniform_noise(7, 4, range(6), 5),
        uniform_noise(7, 3, range(6, 12), 5),
        uniform_noise(7, 3, range(6), 5, purpose=EVALUATION),
    ]
    assert EVALUATION != ROLLOUT
    assert torch.cat([noise, *others]).unique().numel() == 5 * 30, "no number is used twice"


def test_noise_is_uniform_and_uncorrelated():
    noise = uniform_noise(0, 0, range(500), 40)
    n = noise.numel()
    assert abs(noise.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5  # four standard errors
    counts = torch.histc(noise.float(), bins=20, min=0, max=1)
    chi_square = ((counts - n / 20) ** 2 / (n / 20)).sum()
    assert chi_square < 43.8, "chi-square of 19 degrees of freedom, p = 0.001"
    centered = noise - noise.mean()
    for left, right in ((centered[:-1], centered[1:]), (centered[:, :-1], centered[:, 1:])):
        correlation = (left * right).mean() / centered.square().mean()
        assert abs(correlation) < 4 / left.numel() ** 0.5


# --- drawing from a distribution -------------------------------------------------------------------------------------


def brute_force_draw(logits, support, uniform, temperature):
    """The first token at which the running sum of probabilities exceeds the uniform number, in plain Python."""
    weights = [
        torch.exp(logit.double() / temperature).item() if keep else 0.0
        for logit, keep in zip(logits, support, strict=True)
    ]
    threshold, running = uniform * sum(weights), 0.0
    for token, weight in enumerate(weights):
        running += weight
        if running > threshold:
            return token
    raise AssertionError


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_invert_the_cumulative_distribution(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 9, generator=generator) * 2
    support = torch.rand(300, 9, generator=generator) < 0.6
    support[:, 4] = True
    uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
    tokens = draw(SamplingParams(1, temperature=temperature).distribution(logits, support), uniforms)
    expected = [brute_force_draw(*row, temperature) for row in zip(logits, support, uniforms.tolist(), strict=True)]
    assert tokens.tolist() == expected


def test_equally_spaced_uniforms_give_every_token_its_share():
    logits = torch.tensor([[0.3, -1.0, 2.0, float("-inf"), 0.0]])
    n = 10_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    support = torch.tensor([[True, True, True, True, False]])
    tokens = draw(SamplingParams(1, temperature=0.8).distribution(logits, support).expand(n, -1), uniforms)
    shares = torch.bincount(tokens, minlength=5) / n
    expected = torch.tensor([0.3, -1.0, 2.0]).div(0.8).softmax(0)
    torch.testing.assert_close(shares[:3], expected, atol=2e-4, rtol=0)  # a grid of 1e-4 has two ends per token
    assert shares[3:].eq(0).all(), "what has no probability is never drawn"


@pytest.mark.parametrize("uniform, expected", [(0.0, 1), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval_stay_within_the_support(uniform, expected):
    """The first and last token with any probability, not token 0 and not one past the end."""
    logits = torch.tensor([[9.0, 0.0, 1.0, 1.0, 9.0]])
    support = torch.tensor([[False, True, True, True, False]])
    uniforms = torch.tensor([uniform], dtype=torch.float64)
    assert draw(SamplingParams(1).distribution(logits, support), uniforms).tolist() == [expected]


@pytest.mark.parametrize("size", [256, 1277])
@pytest.mark.parametrize("kept", [1.0, 0.3, 0.002])
def test_a_draw_from_many_tokens_is_that_of_a_running_sum(size, kept):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(100, size, generator=generator) * 3
    support = torch.rand(100, size, generator=generator) < kept
    support[:, 128] |= ~support.any(dim=1)
    uniforms = torch.rand(100, generator=generator, dtype=torch.float64)
    uniforms[:2], uniforms[2:4] = 0.0, 1 - 2**-53
    tokens = draw(SamplingParams(1).distribution(logits, support), uniforms)
    expected = [brute_force_draw(*row, 1.0) for row in zip(logits, support, uniforms.tolist(), strict=True)]
    assert tokens.tolist() == expected


def test_a_nan_draws_some_token_of_the_vocabulary():
    """It is refused afterwards; until then it must be a token."""
    assert 0 <= draw(torch.full((1, 300), float("nan")), torch.tensor([0.5], dtype=torch.float64)).item() < 300


@pytest.mark.parametrize("rows", [[[1.0, -3.0, 2.0]], [[float("-inf"), 1.0, -0.5]], [[-2.0, -1.0, float("-inf")]]])
def test_the_largest_logit_is_that_of_the_tokens_that_the_model_allows(rows):
    assert _largest(torch.tensor(rows)).tolist() == [max(abs(x) for x in rows[0] if x > float("-inf"))]


# --- truncation ------------------------------------------------------------------------------------------------------


def defined_support(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens may be drawn, from the papers' definitions, one after the other as generate() applies them."""
    allowed = set(range(len(logits)))

    def probability():
        total = sum(torch.exp(logits[i].double() / temperature).item() for i in allowed)
        return {i: torch.exp(logits[i].double() / temperature).item() / total for i in allowed}

    if top_k:
        allowed = set(sorted(allowed, key=lambda i: -logits[i].item())[:top_k])
    if top_p < 1:
        p, kept, mass = probability(), set(), 0.0
        for i in sorted(allowed, key=lambda i: -p[i]):
            if mass >= top_p:
                break
            kept.add(i)
            mass += p[i]
        allowed = kept
    if min_p:
        p = probability()
        allowed = {i for i in allowed if p[i] >= min_p * max(p.values())}
    return [i in allowed for i in range(len(logits))]


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_supports_are_those_of_the_definitions(settings, temperature):
    logits = torch.randn(40, 15, generator=torch.Generator().manual_seed(1)) * 2
    support = SamplingParams(4, temperature=temperature, **settings).allowed(logits)
    assert support.tolist() == [defined_support(row, temperature, **settings) for row in logits]


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_supports_are_those_generate_samples_from(settings):
    policy = gpt2()
    ids, mask = encode(*PROMPTS)
    without = {"top_k": 0, "top_p": 1.0, "min_p": None}
    out = generate(policy, ids, mask, 1, do_sample=True, temperature=0.9, **(without | settings))
    support = SamplingParams(1, temperature=0.9, **settings).allowed(out.logits[0])
    assert support.equal(out.scores[0] > float("-inf"))


def test_nothing_is_cut_off_by_default():
    assert SamplingParams(4).allowed(torch.randn(3, 15)) is None
    assert SamplingParams(4, top_k=99).allowed(torch.randn(3, 15)).all(), "more than there are: all"


# --- broken models ---------------------------------------------------------------------------------------------------


def test_broken_logits_name_the_rows():
    model = ActorCritic(llama())
    with torch.no_grad():
        model.policy.model.embed_tokens.weight[11] = float("nan")  # the letter k: of the prompts, in the third
    with pytest.raises(NonFiniteError, match=r"not finite in rows \[2\]"):
        make_samples(model)


def test_broken_logits_name_the_rows_as_they_were_given_though_others_have_ended():
    """Row 0 ends at once and is dropped; row 1 says k and breaks on reading it."""
    model = ActorCritic(llama())
    with torch.no_grad():
        model.policy.lm_head.weight.zero_()
        model.policy.model.embed_tokens.weight[11] = float("nan")
    ids, mask = encode("a", "b")
    uniforms = torch.tensor([[0.0, 0.5], [0.99, 0.5]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"rows \[1\]"):
        sample(model, ids, mask, uniforms, SamplingParams(2, (EOS,)))


@pytest.mark.parametrize("forbidden, breaks", [(float("inf"), True), (float("nan"), True), (float("-inf"), False)])
def test_a_model_may_forbid_tokens_but_not_overflow(forbidden, breaks):
    model = ActorCritic(gpt2())

    def edit(module, arguments, output):
        output.logits[..., 3] = forbidden

    model.policy.register_forward_hook(edit)
    if breaks:
        with pytest.raises(NonFiniteError, match=r"rows \[0, 1, 2, 3, 4, 5\]"):
            make_samples(model)
    else:
        samples = make_samples(model, n_time=20, eos=())
        assert not samples.tokens.completion_ids.eq(3).any()
        assert samples.logprobs.isfinite().all()


def test_a_sample_is_frozen():
    samples = make_samples(ActorCritic(gpt2()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        samples.ended = None


def test_truncated_logprobs_are_those_of_the_truncated_distribution():
    """They sum to 1 over the support; those of the whole distribution would not."""
    model = ActorCritic(gpt2())
    samples = make_samples(model, top_k=3)
    first = supports(samples)[:, 0]
    assert first.sum(1).eq(3).all()
    ids, mask = encode(*PROMPTS)
    with torch.no_grad():
        logits = read(model, ids, mask, samples.tokens.completion_ids[:, :1], samples.completion_mask[:, :1])[0][:, 0]
    every = torch.stack(
        [token_logprobs(logits, torch.full((len(PROMPTS),), v), support=first) for v in range(VOCAB)], dim=1
    )
    torch.testing.assert_close(every.exp().sum(1), torch.ones(len(PROMPTS)), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        samples.logprobs[:, 0], every.gather(1, samples.tokens.completion_ids[:, :1])[:, 0], **ROUNDING
    )
