"""The estimators on a real language model: a GPT-2 of one layer and four tokens, all of whose completions are listed.

Unlike a table it shares its parameters between all states. What `tests/functional` proves for tables must hold for the
gradient of every one of them.
"""

import pytest
import torch
from fakes import tiny_gpt2

from lmppo.functional import (
    clipped_policy_loss,
    exact_kl,
    gae,
    importance_sampled_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_penalized_policy_loss,
    kl_shaped_rewards,
    leave_one_out_baseline,
    policy_gradient_loss,
    rewards_to_go,
    total_return,
)
from lmppo.functional.exact import (
    action_values,
    completion_logprobs,
    enumerate_completions,
    expectation,
    expected_return,
    optimal_policy,
    sequence_kl,
    state_logits,
    state_values,
)
from lmppo.models import ActorCritic
from lmppo.records import Tokens
from lmppo.sampling import SamplingParams, sample, uniform_noise

EOS = 3
PROMPT = torch.tensor([[1, 2]])
COMPLETIONS = enumerate_completions(vocab_size=4, horizon=3, eos=EOS)
MASK = COMPLETIONS.mask
BETA = 0.3

torch.set_num_threads(1)


def gpt2(seed):
    """In float64 and without dropout."""
    return tiny_gpt2(4, seed=seed, n_layer=1, n_embd=8, n_positions=8, initializer_range=0.5).double().eval()


def logits_of(model):
    """On the grid: the model is asked prefix by prefix, and knows nothing of completions."""

    def policy(prefixes):
        return model(torch.cat([PROMPT.expand(len(prefixes), -1), prefixes], dim=1)).logits[:, -1]

    return state_logits(policy, COMPLETIONS)


def random_numbers(seed):
    """One for each state and token, on the grid."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(COMPLETIONS.state_count, 4, dtype=torch.float64, generator=generator)
    return torch.where(MASK, table[COMPLETIONS.states, COMPLETIONS.ids], 0.0)


MODEL, REFERENCE = gpt2(seed=0), gpt2(seed=1)
LOGITS = logits_of(MODEL)
LOGPROBS = completion_logprobs(LOGITS, COMPLETIONS)
REF_LOGITS = logits_of(REFERENCE).detach()
REF_LOGPROBS = completion_logprobs(REF_LOGITS, COMPLETIONS)
REWARDS = random_numbers(seed=2)
CRITIC = torch.where(MASK, COMPLETIONS.states.double().sin(), 0.0)  # a function of the state, and nothing more


def gradient(value):
    """Of all parameters, as one vector."""
    grads = torch.autograd.grad(value, list(MODEL.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def estimate(weights, extra_loss=None):
    """The expected step up from one sampled completion."""
    loss = policy_gradient_loss(LOGPROBS, weights, MASK)
    if extra_loss is not None:
        loss = loss + extra_loss
    return -gradient(expectation(LOGPROBS.detach(), loss.sum(dim=1)))


def assert_equal(estimated, truth):
    torch.testing.assert_close(estimated, truth, rtol=1e-9, atol=1e-12)


def assert_different(estimated, truth):
    assert (estimated - truth).norm() > 0.01 * truth.norm() > 0


TRUE_GRADIENT = gradient(expected_return(COMPLETIONS, LOGPROBS, REWARDS))
TRUE_VALUES = state_values(COMPLETIONS, LOGPROBS, REWARDS).detach()
TRUE_Q = action_values(COMPLETIONS, LOGPROBS, REWARDS).detach()

UNBIASED = {
    "total_return": total_return(REWARDS, MASK),
    "total_return - baseline": total_return(REWARDS, MASK) - CRITIC,
    "rewards_to_go": rewards_to_go(REWARDS, MASK),
    "rewards_to_go - baseline": rewards_to_go(REWARDS, MASK) - CRITIC,
    "gae, lam 1, any critic": gae(REWARDS, CRITIC, MASK, lam=1.0)[0],
    "gae, lam .5, true critic": gae(REWARDS, TRUE_VALUES, MASK, lam=0.5)[0],
    "gae, lam 0, true critic": gae(REWARDS, TRUE_VALUES, MASK, lam=0.0)[0],
    "Q": TRUE_Q,
    "Q - V": TRUE_Q - TRUE_VALUES,
}
BIASED = {
    "gae, lam .5, any critic": gae(REWARDS, CRITIC, MASK, lam=0.5)[0],
    "rewards_to_go, gamma .5": rewards_to_go(REWARDS, MASK, gamma=0.5),
    "immediate": REWARDS,
}


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_weights_give_the_true_gradient_of_every_parameter(name):
    """N4, N5, N9, N10, N11."""
    assert_equal(estimate(UNBIASED[name]), TRUE_GRADIENT)


@pytest.mark.parametrize("name", BIASED)
def test_the_others_do_not(name):
    """N6, N7, N11."""
    assert_different(estimate(BIASED[name]), TRUE_GRADIENT)


def test_leave_one_out_is_unbiased():
    """N10: over all pairs of independent completions."""
    rows = torch.cartesian_prod(torch.arange(len(MASK)), torch.arange(len(MASK)))
    chances = LOGPROBS.detach().sum(dim=1)[rows].sum(dim=1).exp().repeat_interleave(2)
    rows = rows.flatten()
    weights = rewards_to_go(REWARDS, MASK)[rows]
    weights = weights - leave_one_out_baseline(weights, MASK[rows], group_size=2)
    loss = policy_gradient_loss(LOGPROBS[rows], weights, MASK[rows]).sum(dim=1)
    assert_equal(-gradient((chances * loss).sum() / 2), TRUE_GRADIENT)


def test_at_ratio_1_all_objectives_agree():
    """N1, N14, N17."""
    weights, old = rewards_to_go(REWARDS, MASK), LOGPROBS.detach()
    for loss in (
        importance_sampled_loss(LOGPROBS, old, weights, MASK),
        clipped_policy_loss(LOGPROBS, old, weights, MASK, dual_clip=3.0),
        kl_penalized_policy_loss(LOGPROBS, old, weights, MASK, beta=1.0),
    ):
        assert_equal(-gradient(expectation(old, loss.sum(dim=1))), TRUE_GRADIENT)


STATE_KL = torch.where(MASK, exact_kl(LOGITS, REF_LOGITS), 0.0)
KL_FORMS = {
    "k1": kl_k1(LOGPROBS, REF_LOGPROBS),
    "k2": kl_k2(LOGPROBS, REF_LOGPROBS),
    "k3": kl_k3(LOGPROBS, REF_LOGPROBS),
    "exact": STATE_KL,
    "none": torch.zeros_like(REWARDS),
}
EXACT = [("k1", "none"), ("k1", "k1"), ("k3", "k3"), ("exact", "exact"), ("exact", "k2")]
INEXACT = [("k2", "none"), ("k3", "none"), ("exact", "none"), ("none", "k1"), ("none", "k2"), ("none", "k3"),
           ("none", "exact"), ("k2", "k2"), ("k1", "k2")]  # fmt: skip


@pytest.mark.parametrize("reward, loss", EXACT + INEXACT)
def test_the_kl_penalty(reward, loss):
    """The table of tests/functional/test_exact_kl.py: which KL in the reward and which in the loss make an exact penalty."""
    truth = TRUE_GRADIENT - BETA * gradient(sequence_kl(LOGPROBS, REF_LOGPROBS))
    shaped = kl_shaped_rewards(REWARDS, KL_FORMS[reward].detach(), MASK, kl_coef=BETA)
    got = estimate(rewards_to_go(shaped, MASK), extra_loss=BETA * KL_FORMS[loss])
    (assert_equal if (reward, loss) in EXACT else assert_different)(got, truth)


def test_no_step_of_the_model_reaches_beyond_the_optimum():
    """J* is out of reach of the model as it is, of the reference, and of models trained by the exact gradient."""
    scores = REWARDS.sum(dim=1)
    logprobs, best = optimal_policy(COMPLETIONS, REF_LOGPROBS, scores, kl_coef=BETA)

    def objective(logprobs):
        return expectation(logprobs, scores) - BETA * sequence_kl(logprobs, REF_LOGPROBS)

    model = gpt2(seed=1)  # start at the reference
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    gaps = []
    for _ in range(150):
        gap = best - objective(completion_logprobs(logits_of(model), COMPLETIONS))
        optimizer.zero_grad()
        gap.backward()
        optimizer.step()
        gaps.append(gap.item())
    assert objective(logprobs).item() == pytest.approx(best.item(), abs=1e-12)
    assert min(gaps) > 0
    assert gaps[-1] < 0.02 * gaps[0]


def test_the_librarys_forward_pass_and_sampler_have_these_probabilities():
    """Prefix by prefix, all at once under a mask, and by sampling: one distribution."""
    model = gpt2(seed=0)
    prompts = PROMPT.expand(len(MASK), -1)
    with torch.no_grad():
        tokens = Tokens(prompts, torch.ones_like(prompts, dtype=torch.bool), COMPLETIONS.ids, MASK)
        logits = ActorCritic(model).logits(tokens)
    torch.testing.assert_close(completion_logprobs(logits, COMPLETIONS), LOGPROBS.detach(), rtol=1e-10, atol=1e-10)
    count = 4000
    prompts = PROMPT.expand(count, -1)
    samples = sample(
        ActorCritic(model.float()),
        prompts,
        torch.ones_like(prompts, dtype=torch.bool),
        uniform_noise(0, 0, range(count), 3),
        SamplingParams(3, (EOS,)),
    )
    counts = torch.zeros(len(MASK)).double()
    lengths = samples.completion_mask.sum(dim=1)
    for row in range(len(MASK)):
        length = MASK[row].sum()
        same = (samples.tokens.completion_ids[:, :length] == COMPLETIONS.ids[row, :length]).all(dim=1) & (
            lengths == length
        )
        counts[row] = same.sum()
    assert counts.sum() == count
    chances = LOGPROBS.detach().sum(dim=1).exp()
    likely = chances * count > 5
    chi_squared = ((counts - chances * count).square() / (chances * count))[likely].sum().item()
    freedom = int(likely.sum())
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5
