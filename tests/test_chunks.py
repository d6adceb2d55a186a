"""Sums over logits in chunks of tokens: losses and gradients are those of all logits at once, by ordinary autograd."""

import dataclasses

import pytest
import torch
from builders import PROMPTS, VOCAB, gpt2, llama, lora, make_experience, make_samples, with_values
from peft import LoraConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from test_language_model import FAMILIES, randomised
from test_recomputation import mixtral
from test_update import ACCELERATOR, config

import lmppo.models.chunks
from lmppo.functional import token_mean_loss
from lmppo.loss import Penalties, _policy_terms, _value_terms
from lmppo.models import ActorCritic, LanguageModel, Reference, States, chunks_of, sum_over_logits
from lmppo.models.chunks import largest_chunk
from lmppo.models.recomputation import prepare_recomputation
from lmppo.update import accumulate_gradients

EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture(params=[1, 2, 7])
def n_tokens(request, monkeypatch):
    """Chunks of so many tokens at most."""
    monkeypatch.setattr(lmppo.models.chunks, "LOGITS_BYTES", 4 * VOCAB * request.param)
    return request.param


def adapted(model, **settings):
    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **settings))


class Odd(type(gpt2())):
    """Its logits depend on what its trunk alone knows, so that it cannot be split."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits * (1 + input_ids[:, -out.logits.shape[1] :, None] / 12)
        return out


def experts():
    """Its fast kernels are none of float64."""
    model = mixtral()
    model.set_experts_implementation("eager")
    return model


POLICIES = {
    **FAMILIES,
    "gpt2, an untied head": lambda: gpt2(tie_word_embeddings=False),
    "llama, a tied head": lambda: llama(tie_word_embeddings=True),
    "a mixture of experts": experts,
    "LoRA": lambda: get_peft_model(gpt2(), lora()),
    "LoRA on the head": lambda: adapted(llama(), target_modules=["q_proj", "lm_head"]),
    "LoRA on the head alone": lambda: adapted(llama(), target_modules=["lm_head"]),
    "LoRA on a tied head": lambda: adapted(gpt2(), target_modules=["lm_head"]),
    "LoRA with all biases": lambda: adapted(
        FAMILIES["gptj, a bias in the head"](), target_modules=["q_proj", "lm_head"], bias="all"
    ),
    "DoRA on the head": lambda: adapted(llama(), target_modules=["q_proj", "lm_head"], use_dora=True),
    "a whole head beside LoRA": lambda: adapted(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "rows of a tied embedding": lambda: get_peft_model(gpt2(), TrainableTokensConfig(token_indices=[3, 4])),
    "not to be split": lambda: Odd(gpt2().config),
}


def setting(model, n_streams=1, **sampling):
    """A model in float64, in all its parts, and ragged completions to learn from, one of them with a gap."""
    model = with_values(ActorCritic(randomised(model), n_streams=n_streams))
    experience = make_experience(make_samples(model, PROMPTS * 2, n_time=6, **sampling))
    model.double()
    model.values_of = lambda hidden: model.value_head(hidden)  # float32 otherwise, whatever it reads
    mask = experience.completion_mask.clone()
    mask[int(mask.sum(1).argmax()), 1:3] = False
    experience = dataclasses.replace(experience, tokens=dataclasses.replace(experience.tokens, completion_mask=mask))
    experience = experience.map(lambda tensor, _: tensor.double() if tensor.is_floating_point() else tensor)
    return model, experience


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def at_once(model, experience, settings, penalties, heads):
    """Gradients and sums of the whole minibatch's loss, all its logits in one tensor."""
    model.zero_grad()
    counted, tokens = experience.counted(), experience.tokens
    states, count = model.language_model.read(tokens), int(experience.completion_mask.sum())
    loss, sums = 0.0, {}
    if "logits" in heads:
        ref_logits = penalties.reference.logits(tokens)[tokens.completion_mask][None] if penalties.reference else None
        logits = model.language_model.logits_of(states)
        assert logits.shape == (1, count, VOCAB)
        per_token, sums = _policy_terms(logits, counted, settings, penalties, ref_logits)
        loss = token_mean_loss(per_token, counted.completion_mask, token_count=count)
    if "values" in heads:
        values = model.values_of(states.hidden if "logits" in heads else states.hidden.detach())
        value_loss, value_sums = _value_terms(values, counted, settings)
        loss, sums = loss + settings.vf_coef * value_loss.sum() / count, sums | value_sums
    loss.backward()
    return gradients(model), {n: s.item() if n.endswith("_max") else s.item() / count for n, s in sums.items()}


def assert_same_gradients(model, experience, penalties=None, heads=("logits", "values"), **settings):
    settings, penalties = config(**({"micro_batch_size": 2} | settings)), penalties or Penalties()
    expected, expected_sums = at_once(model, experience, settings, penalties, heads)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    model.zero_grad()
    stats = accumulate_gradients(model, experience, settings, ACCELERATOR, penalties, heads=heads)
    for name, gradient in gradients(model).items():
        wanted = expected[name]
        assert (gradient is None) == (wanted is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, wanted, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    assert stats == pytest.approx(expected_sums, rel=1e-6, abs=1e-6)  # reported in float32


@pytest.mark.parametrize("name", POLICIES)
def test_every_gradient_is_that_of_all_logits_at_once(name, n_tokens):
    torch.manual_seed(0)
    model, experience = setting(POLICIES[name]())
    assert (model.language_model.trunk is None) == (name == "not to be split")
    assert len(chunks_of(States(torch.zeros(1, int(experience.completion_mask.sum()), 2)), VOCAB)) > 3
    # Read in the same lines: norms are float32 in any model.
    model.language_model.positions = dataclasses.replace(model.language_model.positions, packs=False)
    assert_same_gradients(model, experience, ent_coef=0.1, micro_batch_size=12)


LOSSES = {
    "no entropy": {},
    "k2": {"kl_form": "k2_loss"},
    "k3": {"kl_form": "k3_both"},
    "exact": {"kl_form": "exact_both", "ent_coef": 0.1},
    "exact, as a loss alone": {"kl_form": "exact_loss", "temperature": 0.7},
    "a KL penalty": {"objective": "kl_penalty"},
    "importance sampling": {"objective": "importance_sampled", "ent_coef": 0.1},
    "policy gradient": {"objective": "policy_gradient", "ppo_epochs": 1, "minibatch_size": 12},
    "exact among a few tokens": {"kl_form": "exact_both", "top_k": 4, "temperature": 0.7, "ent_coef": 0.1},
    "no clip of values": {"value_clip_range": None, "vf_coef": 0.7},
}


@pytest.mark.filterwarnings("ignore:kl_form")
@pytest.mark.parametrize("name", LOSSES)
def test_every_term_of_the_loss_is_that_of_all_logits_at_once(name, n_tokens):
    settings = LOSSES[name]
    sampling = {n: settings[n] for n in ("top_k", "temperature") if n in settings}
    model, experience = setting(gpt2(tie_word_embeddings=False), **sampling)
    form = settings.get("kl_form", "")
    reference = Reference(model.policy, randomised(gpt2(seed=6))) if "exact" in form else None
    penalties = Penalties(beta=0.7, kl_coef=0.4 if form else 0.0, reference=reference)
    if reference is not None:
        reference.model.double()
    assert_same_gradients(model, experience, penalties, **settings)


@pytest.mark.parametrize("heads", [("logits",), ("values",), ("logits", "values")], ids=str)
def test_whoever_learns_and_of_several_streams(heads, n_tokens):
    model, experience = setting(gpt2(tie_word_embeddings=False), n_streams=3)
    assert experience.returns.shape[-1] == 3
    assert_same_gradients(model, experience, heads=heads)


@pytest.mark.parametrize("name", ["gpt2", "LoRA on the head", "a mixture of experts"])
def test_with_gradient_checkpointing(name, n_tokens):
    torch.manual_seed(0)
    model, experience = setting(POLICIES[name]())
    prepare_recomputation(model, config(gradient_checkpointing=True))
    assert_same_gradients(model, experience, ent_coef=0.1, micro_batch_size=12)


def test_a_prompt_that_is_learned_has_the_same_gradient(n_tokens):
    """An adapter that puts tokens of its own before the prompt; only as a reference does lmppo read such a model."""
    torch.manual_seed(0)
    tuned = get_peft_model(gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model = LanguageModel(randomised(tuned).double())
    tokens = make_samples(ActorCritic(gpt2())).tokens
    states = model.read(tokens)
    assert states.hidden is None and states.logits.requires_grad
    weights = torch.randn(len(states), VOCAB, dtype=torch.float64)
    states.logits.mul(weights).cos().sum().backward()
    expected = gradients(tuned)
    tuned.zero_grad()
    total, sums = model.sum_over_logits(
        model.read(tokens), lambda logits, part: ((logits * weights[part]).cos().sum(), {"n_max": logits.amax()})
    )
    total.backward()
    (found,) = [name for name, gradient in gradients(tuned).items() if gradient is not None]
    assert sums["n_max"] == states.logits.max()
    torch.testing.assert_close(gradients(tuned)[found], expected[found], **EXACT)


# --- the sum by itself -----------------------------------------------------------------------------------------------


def head_of(*weights):
    """A head whose weights are added up: autograd hands all of them the same tensor."""
    return lambda states: states.hidden @ sum(weights)


def cubes(scale):
    """The sum over tokens of the logits' third powers, each token with a weight of its own."""
    return lambda logits, part: ((logits**3).sum(-1).mul(scale[part]).sum(), {"total": logits.detach().sum()})


def leaves(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_the_gradient_is_scaled_by_what_is_made_of_the_sum(n_tokens):
    """Also where the states and the weights have other uses, before and after it."""
    inputs = leaves((1, 11, 3), (3, VOCAB), (3, VOCAB), (11,))
    results = []
    for chunked in (True, False):
        hidden, first, second, scale = inputs
        states, head = States(hidden.exp()), head_of(first, second)
        if chunked:
            total, sums = sum_over_logits(states, head, cubes(scale.detach()), vocab_size=VOCAB)
        else:
            total, sums = cubes(scale.detach())(head(states), slice(None))
        loss = (total / 100).sin() * scale.sum() + states.hidden.square().sum() + (first * second).sum()
        results.append((loss, sums["total"], *torch.autograd.grad(loss, inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_weights_that_are_frozen_and_states_that_are_not_and_the_other_way_round(n_tokens):
    hidden, weight = leaves((1, 11, 3), (3, VOCAB))
    scale = torch.arange(11.0, dtype=torch.float64)
    whole = torch.autograd.grad(cubes(scale)(head_of(weight)(States(hidden)), slice(None))[0], [hidden, weight])
    for frozen in (0, 1):
        parts = [x.detach() if i == frozen else x for i, x in enumerate((hidden, weight))]
        total, _ = sum_over_logits(States(parts[0]), head_of(parts[1]), cubes(scale), vocab_size=VOCAB)
        (gradient,) = torch.autograd.grad(total, [parts[1 - frozen]])
        torch.testing.assert_close(gradient, whole[1 - frozen], **EXACT)
    total, _ = sum_over_logits(States(hidden.detach()), head_of(weight.detach()), cubes(scale), vocab_size=VOCAB)
    assert not total.requires_grad
    with torch.no_grad():
        assert not sum_over_logits(States(hidden), head_of(weight), cubes(scale), vocab_size=VOCAB)[0].requires_grad


def test_a_chunk_is_one_product_of_matrices_in_a_frozen_head(monkeypatch):
    """Of a part of the states torch makes a batch of products, where the head's weights are frozen."""
    monkeypatch.setattr(lmppo.models.chunks, "largest_chunk", lambda *_: 3)
    model = LanguageModel(gpt2().eval().requires_grad_(False))
    states = States(torch.randn(1, 8, model.width, requires_grad=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sum_over_logits(states, model.logits_of, lambda logits, _: (logits.sum(), {}), vocab_size=VOCAB)[0].backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::mm"] == 6 and "aten::bmm" not in calls, "three chunks, forward and backward"


def test_without_tokens_the_sum_is_0_and_so_are_its_gradients(n_tokens):
    hidden, weight = leaves((1, 0, 3), (3, VOCAB))
    total, sums = sum_over_logits(States(hidden), head_of(weight), cubes(torch.zeros(0)), vocab_size=VOCAB)
    total.backward()
    assert total == 0 and sums["total"] == 0
    assert weight.grad.eq(0).all() and hidden.grad.shape == (1, 0, 3)


def test_a_second_backward_pass_through_the_sum_is_refused():
    """Its gradients were handed on; what they would be now is not known."""
    hidden, weight = leaves((1, 11, 3), (3, VOCAB))
    total, _ = sum_over_logits(States(hidden), head_of(weight), cubes(torch.ones(11)), vocab_size=VOCAB)
    (2 * total).backward(retain_graph=True)
    before = weight.grad.clone()
    with pytest.raises(RuntimeError, match="A second backward pass"):
        (2 * total).backward()
    assert torch.equal(weight.grad, before)


def test_a_second_derivative_of_the_sum_is_refused():
    hidden, weight = leaves((1, 11, 3), (3, VOCAB))
    total, _ = sum_over_logits(States(hidden), head_of(weight), cubes(torch.ones(11)), vocab_size=VOCAB)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(total, weight, create_graph=True)


@pytest.mark.parametrize("n, most", [(0, 3), (1, 3), (3, 3), (4, 3), (20, 7), (5, 100), (9, 1)])
def test_chunks_cover_the_tokens_in_order_and_none_is_larger_than_allowed(monkeypatch, n, most):
    monkeypatch.setattr(lmppo.models.chunks, "LOGITS_BYTES", 4 * VOCAB * most + 3)
    chunks = chunks_of(States(torch.zeros(1, n, 2)), VOCAB)
    assert [token for chunk in chunks for token in range(n)[chunk]] == list(range(n))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert max(sizes) <= most and len(chunks) == max(1, -(-n // most)) and max(sizes) - min(sizes) <= 1
    two = States(torch.zeros(1, 2, 2))
    assert chunks_of(two, 10**12) == [slice(0, 1), slice(1, 2)], "one token at a time, whatever it takes"


@pytest.mark.parametrize("vocab_size, tokens", [(32, 65_536), (4096, 512), (50_257, 512), (151_936, 220), (10**9, 1)])
def test_a_chunk_has_512_tokens_or_8_mib_and_never_more_than_128_mib(vocab_size, tokens):
    """Or one token, where that is larger."""
    assert largest_chunk(vocab_size) == tokens


@pytest.mark.parametrize("vocab_size, tokens", [(4096, 8192), (50_257, 667), (151_936, 220), (10**9, 1)])
def test_a_chunk_has_up_to_128_mib_on_an_accelerator(vocab_size, tokens):
    assert largest_chunk(vocab_size, "accelerator") == tokens
    states = States(torch.zeros(1, tokens + 1, 2, device="meta"))
    assert len(chunks_of(states, vocab_size)) == 2
