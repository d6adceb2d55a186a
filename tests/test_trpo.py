"""TRPO's step (N16), in float64, against score vectors, distributions and solves written out one state at a time."""

import copy
import dataclasses
import math
import threading
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from builders import PROMPTS, assert_same, build_model, make_config, make_experience, make_samples, supports, with_mask
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmppo import trpo
from lmppo.checks import NonFiniteError
from lmppo.records import Tokens
from lmppo.trpo import PolicyBatch, conjugate_gradients, trpo_update

ACCELERATOR = Accelerator(cpu=True)
CASES = [
    ("gpt2", "shared", {}),
    ("gpt2", "lora", {}),
    ("gpt2", "separate", {"top_k": 5}),
    ("llama", "shared", {"temperature": 0.7, "top_p": 0.9}),
]


def config(**settings):
    return make_config("unused", objective="trpo", **({"micro_batch_size": 4} | settings))


def setting(family="gpt2", kind="shared", prompts=PROMPTS, *, temperature=1.0, **sampling):
    """A model in float64 and what it may learn from: ragged completions, one of them with a gap."""
    model = build_model(family, kind)
    experience = make_experience(make_samples(model, prompts, temperature=temperature, **sampling))
    model.policy.double()
    mask = experience.completion_mask.clone()
    mask[int(mask.sum(1).argmax()), 1:3] = False  # read, but not trained on
    experience = dataclasses.replace(with_mask(experience, mask), advantages=experience.advantages.double())
    old = torch.zeros(mask.shape, dtype=torch.float64)
    old[mask] = chosen(distributions(model, experience, temperature).detach(), experience)
    return model, dataclasses.replace(experience, old_logprobs=old)


def step(model, experience, *, accelerator=ACCELERATOR, **settings):
    return trpo_update(model, experience, config(**settings), accelerator, iteration=3)


# --- by definition ---------------------------------------------------------------------------------------------------


def distributions(model, experience, temperature=1.0):
    """``(N, V)`` log-probabilities at all counted states, each row read alone: no padding, no masks."""
    found = []
    for row, mask in enumerate(experience.completion_mask):
        prompt = experience.tokens.prompt_ids[row][experience.tokens.prompt_mask[row]]
        times = mask.nonzero()[:, 0].tolist()
        ids = torch.cat([prompt, experience.tokens.completion_ids[row, : times[-1] + 1]])[None]
        logits = model.policy(input_ids=ids).logits[0]
        for t in times:
            z = logits[len(prompt) - 1 + t] / temperature
            z = z.masked_fill(~supports(experience)[row, t].expand(len(z)), -torch.inf)
            found.append(z - z.exp().sum().log())
    return torch.stack(found)


def chosen(logprobs, experience):
    """``(N,)`` the log-probabilities of the sampled tokens."""
    return logprobs.gather(1, experience.tokens.completion_ids[experience.completion_mask][:, None])[:, 0]


def mean_kl(old, new):
    """The mean over states of KL(old || new)."""
    return torch.where(old > -torch.inf, old.exp() * (old - new), 0.0).sum(1).mean()


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def score_of(model, logprob):
    gradients = torch.autograd.grad(logprob, model.policy_parameters(), retain_graph=True, materialize_grads=True)
    return flat(gradients)


def fisher_factors(model, experience, temperature=1.0):
    """Scores ``(M, N)`` of every token that could come at every counted state, and their weights in the Fisher matrix."""
    logprobs = distributions(model, experience, temperature)
    possible = (logprobs > -torch.inf).nonzero().tolist()
    scores = torch.stack([score_of(model, logprobs[i, token]) for i, token in possible])
    weights = torch.stack([logprobs[i, token].exp() for i, token in possible]) / len(logprobs)
    return scores, weights.detach()


def surrogate_by_definition(model, experience, temperature=1.0):
    """Its gradient at ratio 1: the mean of score * advantage."""
    logprobs = chosen(distributions(model, experience, temperature), experience)
    return score_of(model, (logprobs * experience.advantages[experience.completion_mask]).mean())


def batch_of(model, experience, **settings):
    return PolicyBatch(model.language_model, experience, config(**settings), ACCELERATOR)


def assert_near(actual, expected, family):
    tolerance = 1e-4 if family == "llama" else 1e-10  # Llama's norms and rotations are in float32 whatever its weights
    assert (actual - expected).norm() < tolerance * expected.norm()


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- its parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kind, sampling", CASES)
def test_the_products_are_those_of_the_fisher_matrix(family, kind, sampling):
    model, experience = setting(family, kind, PROMPTS[:3], **sampling)
    temperature = sampling.get("temperature", 1.0)
    scores, weights = fisher_factors(model, experience, temperature)
    batch = batch_of(model, experience, temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        v = torch.randn(scores.shape[1], dtype=torch.float64, generator=generator)
        expected = scores.T @ (weights * (scores @ v))
        assert_near(batch.fisher_vector_product(v), expected, family)


@pytest.mark.parametrize("family, kind, sampling", CASES)
def test_the_gradient_is_the_surrogates(family, kind, sampling):
    model, experience = setting(family, kind, **sampling)
    temperature = sampling.get("temperature", 1.0)
    expected = surrogate_by_definition(model, experience, temperature)
    gradient = batch_of(model, experience, temperature=temperature).surrogate_gradient()
    assert_near(gradient, expected, family)


def test_conjugate_gradients_need_one_step_per_eigenvalue():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    eigenvalues = torch.tensor([0.1, 1.0, 5.0, 30.0], dtype=torch.float64).repeat(3)
    matrix = basis @ eigenvalues.diag() @ basis.T
    target = torch.randn(12, dtype=torch.float64, generator=generator)
    solution = torch.linalg.solve(matrix, target)
    products = []

    def product(v):
        products.append(v)
        return matrix @ v

    torch.testing.assert_close(conjugate_gradients(product, target, steps=4), solution, rtol=1e-9, atol=1e-9)
    assert (conjugate_gradients(product, target, steps=3) - solution).norm() > 1e-3 * solution.norm()
    products.clear()
    conjugate_gradients(product, target, steps=100)
    assert len(products) <= 6, "it stops when it is done"


# --- the step --------------------------------------------------------------------------------------------------------


def test_the_step_is_the_natural_gradient_of_the_right_length():
    """The Fisher matrix of an adapter, written out and solved."""
    model, experience = setting("gpt2", "lora", PROMPTS[:3])
    scores, weights = fisher_factors(model, experience)
    fisher = scores.T @ (weights[:, None] * scores)
    gradient = surrogate_by_definition(model, experience)
    direction = torch.linalg.solve(fisher + 0.05 * torch.eye(len(fisher), dtype=torch.float64), gradient)
    whole = (2 * 0.002 / (direction @ fisher @ direction)).sqrt() * direction
    before = flat(p.detach().clone() for p in model.policy_parameters())
    stats = step(model, experience, trpo_damping=0.05, trpo_max_kl=0.002, trpo_cg_steps=80)
    moved = flat(p.detach() for p in model.policy_parameters()) - before
    assert stats["trpo/step_fraction"] in [pytest.approx(0.8**i) for i in range(3)]
    torch.testing.assert_close(moved, stats["trpo/step_fraction"] * whole, rtol=1e-5, atol=1e-9)
    assert stats["trpo/grad_norm"] == pytest.approx(gradient.norm().item())
    assert stats["trpo/expected_improvement"] == pytest.approx((gradient @ whole).item(), rel=1e-6)
    assert stats["trpo/cg_residual"] < 1e-6


@pytest.mark.parametrize("family, kind, sampling", CASES)
def test_the_step_improves_the_surrogate_and_fills_its_ball(family, kind, sampling):
    model, experience = setting(family, kind, PROMPTS * 2, **sampling)
    temperature, mask = sampling.get("temperature", 1.0), experience.completion_mask
    old = distributions(model, experience, temperature).detach()
    stats = step(model, experience, temperature=temperature, trpo_max_kl=0.01)
    new = distributions(model, experience, temperature).detach()
    kl = mean_kl(old, new).item()
    assert 0.005 < kl <= 0.01
    log_ratio = chosen(new, experience) - chosen(old, experience)
    advantages = experience.advantages[mask]
    assert stats["trpo/improvement"] > 0.02
    assert stats == {
        "trpo/kl": pytest.approx(kl),
        "trpo/improvement": pytest.approx(((log_ratio.exp() - 1) * advantages).mean().item()),
        "policy_loss": pytest.approx(-(log_ratio.exp() * advantages).mean().item()),
        "approx_kl": pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item()),
        "ratio": pytest.approx(log_ratio.exp().mean().item()),
        "entropy": pytest.approx(torch.where(new > -torch.inf, -new.exp() * new, 0.0).sum(1).mean().item()),
        "first_ratio_error": pytest.approx(0.0, abs=1e-12),
        "trpo/grad_norm": stats["trpo/grad_norm"],
        "trpo/expected_improvement": stats["trpo/expected_improvement"],
        "trpo/step_fraction": stats["trpo/step_fraction"],
        "trpo/cg_residual": stats["trpo/cg_residual"],
    }
    assert stats["trpo/improvement"] == pytest.approx(
        stats["trpo/step_fraction"] * stats["trpo/expected_improvement"], rel=0.3
    )


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_only_the_policy_moves_and_no_gradient_is_left(kind):
    model, experience = setting("gpt2", kind)
    before = parameters(model)
    step(model, experience)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in model.named_parameters() if name.startswith("policy.") and p.requires_grad}
    assert moved == trainable
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_padding_and_what_is_masked_change_nothing():
    model, experience = setting()
    narrow, wide, padded = (copy.deepcopy(model) for _ in range(3))
    mask = experience.completion_mask
    masked = {n: torch.where(mask, getattr(experience, n), torch.nan) for n in ("advantages", "old_logprobs")}
    ids = torch.where(mask.flip(1).cumsum(1).flip(1) > 0, experience.tokens.completion_ids, 7)
    prompt_ids = torch.nn.functional.pad(experience.tokens.prompt_ids, (3, 0), value=5)
    prompt_mask = torch.nn.functional.pad(experience.tokens.prompt_mask, (3, 0))
    shifted = dataclasses.replace(experience, tokens=Tokens(prompt_ids, prompt_mask, ids, mask), **masked)
    expected = step(narrow, experience, micro_batch_size=1)
    assert expected["trpo/step_fraction"] > 0
    for other, same, size in ((wide, experience, 64), (padded, shifted, 4)):
        assert step(other, same, micro_batch_size=size) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        for left, right in zip(narrow.policy_parameters(), other.policy_parameters(), strict=True):
            torch.testing.assert_close(right, left, rtol=1e-6, atol=1e-9)


def test_without_advantages_nothing_moves():
    model, experience = setting()
    before = parameters(model)
    stats = step(model, dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages)))
    assert_same(parameters(model), before)
    assert stats["trpo/step_fraction"] == stats["trpo/kl"] == stats["trpo/improvement"] == stats["trpo/grad_norm"] == 0
    assert stats["ratio"] == pytest.approx(1)


def test_a_step_that_no_try_of_the_line_search_passes_leaves_every_bit_as_it_was(monkeypatch):
    """A curvature that is 100 times too small makes the step 10 times too long."""
    exact = PolicyBatch.fisher_vector_product
    monkeypatch.setattr(PolicyBatch, "fisher_vector_product", lambda self, v: 0.01 * exact(self, v))
    model, experience = setting()
    before = parameters(model)
    stats = step(model, experience, trpo_damping=0.001, trpo_line_search_steps=5)
    assert stats["trpo/step_fraction"] == stats["trpo/kl"] == stats["trpo/improvement"] == 0
    assert stats["trpo/expected_improvement"] > 0
    assert_same(parameters(model), before)
    stats = step(model, experience, trpo_damping=0.001, trpo_line_search_steps=20)
    assert 0.05 < stats["trpo/step_fraction"] < 0.15
    assert 0.005 < stats["trpo/kl"] <= 0.01


def test_in_float32_the_ratio_starts_at_one_and_attention_is_left_as_it_was():
    model = build_model("gpt2", "shared")
    experience = make_experience(make_samples(model, PROMPTS))
    before = torch.backends.cuda.flash_sdp_enabled(), model.policy.config._attn_implementation
    stats = step(model, experience)
    assert stats["first_ratio_error"] < 2e-5
    assert 0.004 < stats["trpo/kl"] <= 0.01 and stats["trpo/improvement"] > 0
    assert (torch.backends.cuda.flash_sdp_enabled(), model.policy.config._attn_implementation) == before
    assert before == (True, "sdpa"), "the kernel that cannot be differentiated twice is the usual one"


class Process:
    """One of two processes that are threads: what trpo_update asks of an accelerator."""

    num_processes, device = 2, torch.device("cpu")
    autocast = staticmethod(nullcontext)
    unwrap_model = staticmethod(lambda model: model)

    def __init__(self, index, barrier, board):
        self.process_index, self.barrier, self.board = index, barrier, board

    def gather(self, tensor):
        self.barrier.wait(60)
        self.board[self.process_index] = tensor
        self.barrier.wait(60)
        return torch.stack(self.board)

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return self.gather(tensor).sum(dim=0)


def test_the_line_search_reads_the_old_policy_once(monkeypatch):
    """Before it, however many lengths it tries; each try reads the new policy once."""
    model, experience = setting()
    passes, at_search = [], []
    search, read = trpo._line_search, model.language_model.read
    monkeypatch.setattr(model.language_model, "read", lambda tokens: passes.append(1) or read(tokens))

    def searched(batch, *rest):
        at_search.append(len(passes))
        measures, fraction = search(batch, *rest)
        tries = 1 + round(math.log(fraction) / math.log(trpo.BACKTRACK))
        assert tries > 1 and len(passes) - at_search[0] == len(batch.micros) * tries
        return measures, fraction

    monkeypatch.setattr(trpo, "_line_search", searched)
    monkeypatch.setattr(trpo, "_natural_step", lambda batch, gradient, *_: (gradient / gradient.norm(), 0.0))
    step(model, experience, trpo_max_kl=0.05)
    assert at_search, "a step was looked for"


def test_two_processes_take_the_step_of_one():
    alone, experience = setting()
    models, board, results, barrier = [copy.deepcopy(alone) for _ in range(2)], [None, None], {}, threading.Barrier(2)

    def run(index):
        results[index] = step(models[index], experience, accelerator=Process(index, barrier, board))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    with sdpa_kernel(SDPBackend.MATH):  # the choice of kernel is the whole process's: let no thread undo another's
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = step(alone, experience)
    assert expected["trpo/step_fraction"] > 0
    assert results[0] == results[1] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert_same(parameters(models[0]), parameters(models[1]))
    for left, right in zip(alone.parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-6, atol=1e-9)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_refused():
    model, experience = setting()
    before = parameters(model)
    advantages = experience.advantages.clone()
    advantages[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"Iteration 3: .*first parameter: policy\.transformer\.wte\.weight"):
        step(model, dataclasses.replace(experience, advantages=advantages))
    assert_same(parameters(model), before)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_curvature_that_is_not_positive_is_refused(monkeypatch, value):
    model, experience = setting()
    before = parameters(model)
    monkeypatch.setattr(PolicyBatch, "fisher_vector_product", lambda self, v: value * v)
    with pytest.raises(NonFiniteError, match="curvature along TRPO's direction .* Raise trpo_damping=0.1"):
        step(model, experience)
    assert_same(parameters(model), before)


def test_a_sharded_policy_is_refused():
    model, experience = setting()
    model.policy.transformer.h[0].mlp.c_fc.bias.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc\.bias is sharded over processes: use plain data"):
        step(model, experience)


def test_attention_that_cannot_be_differentiated_twice_is_refused():
    model, experience = setting()
    model.policy.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="which 'flash_attention_2' attention cannot: load the model with"):
        step(model, experience)
