"""The enumeration itself, against loops and recursions that share no code with it."""

import inspect
import itertools
import math

import pytest
import torch
from problems import KINDS, gradient, problem, random_numbers

from lmppo.functional import exact, exact_kl
from lmppo.functional.exact import (
    action_values,
    completion_logprobs,
    enumerate_completions,
    expectation,
    expected_return,
    mean_given_action,
    mean_given_state,
    optimal_policy,
    sequence_kl,
    state_logits,
    state_values,
)

kinds = pytest.mark.parametrize("kind", KINDS)
GAMMA = 0.7


def completions_by_recursion(vocab_size, horizon, eos, prefix=()):
    """All completions as tuples: those that end at the first EOS, and those that are cut."""
    if len(prefix) == horizon or (prefix and prefix[-1] == eos):
        return [prefix]
    return [c for a in range(vocab_size) for c in completions_by_recursion(vocab_size, horizon, eos, (*prefix, a))]


def as_tuples(completions):
    """The counted tokens of every row."""
    return [tuple(ids[mask].tolist()) for ids, mask in zip(completions.ids, completions.mask, strict=True)]


def by_prefix(p, grid):
    """{prefix with token: number}, which fails unless equal prefixes have equal numbers."""
    numbers = {}
    for row, tokens in enumerate(as_tuples(p.completions)):
        for t in range(len(tokens)):
            number = grid[row, t].item()
            assert numbers.setdefault(tokens[: t + 1], number) == pytest.approx(number, abs=1e-12)
    return numbers


def bellman(p, gamma=GAMMA):
    """V by prefix and Q by prefix with token, from the Bellman equation, one state at a time."""
    chance, reward = by_prefix(p, p.logprobs.exp()), by_prefix(p, p.rewards)
    values, action_values = {}, {}

    def value(prefix):
        if prefix + (0,) not in chance:  # it has ended
            return 0.0
        total = 0.0
        for token in range(p.completions.vocab_size):
            step = (*prefix, token)
            action_values[step] = reward[step] + gamma * value(step)
            total += chance[step] * action_values[step]
        values[prefix] = total
        return total

    value(())
    return values, action_values


@pytest.mark.parametrize("vocab_size, horizon", [(1, 1), (1, 3), (2, 1), (2, 4), (3, 3), (4, 2), (5, 3)])
@pytest.mark.parametrize("eos", [None, 0, "last"])
def test_every_completion_is_listed_once(vocab_size, horizon, eos):
    eos = vocab_size - 1 if eos == "last" else eos
    completions = enumerate_completions(vocab_size=vocab_size, horizon=horizon, eos=eos)
    assert as_tuples(completions) == sorted(completions_by_recursion(vocab_size, horizon, eos))
    assert completions.vocab_size == vocab_size
    assert set(completions.ids[~completions.mask].tolist()) <= {eos}
    # Numbers of states and prefixes are the same thing, the empty prefix first, then by length.
    names = [tuple(prefix) for level in completions.prefixes for prefix in level.tolist()]
    assert len(set(names)) == len(names) == completions.state_count
    assert names == sorted(names, key=lambda prefix: (len(prefix), prefix))
    for row, tokens in enumerate(as_tuples(completions)):
        for t in range(horizon):
            state = completions.states[row, t]
            assert names[state] == tokens[:t] if t < len(tokens) else state == 0


def test_bad_numbers_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="10 tokens and 6 steps make 1000000 completions, more than max_completions"):
        enumerate_completions(vocab_size=10, horizon=6)
    assert len(enumerate_completions(vocab_size=2, horizon=3, max_completions=8).ids) == 8
    for sizes in ({"vocab_size": 0, "horizon": 3}, {"vocab_size": 3, "horizon": 0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            enumerate_completions(**sizes)
    with pytest.raises(ValueError, match=r"eos must be in \[0, 3\), the vocabulary, got 3"):
        enumerate_completions(vocab_size=3, horizon=2, eos=3)


def test_the_policy_is_asked_once_for_every_state_that_goes_on():
    completions = enumerate_completions(vocab_size=3, horizon=3, eos=1)
    asked = []

    def policy(prefixes):
        asked.extend(map(tuple, prefixes.tolist()))
        return torch.stack([(prefixes + 1).sum(dim=1), *[prefixes.sum(dim=1)] * 2], dim=1).double()

    logits = state_logits(policy, completions)
    going_on = [c for length in range(3) for c in itertools.product((0, 2), repeat=length)]
    assert asked == going_on
    for row, tokens in enumerate(as_tuples(completions)):
        for t in range(len(tokens)):
            assert logits[row, t].tolist() == [sum(tokens[:t]) + t, sum(tokens[:t]), sum(tokens[:t])]
    assert not logits[~completions.mask].any()
    with pytest.raises(ValueError, match=r"state_logits: logits must have shape \(1, 3\) .*got \(1, 4\)"):
        state_logits(lambda prefixes: torch.zeros(len(prefixes), 4), completions)
    with pytest.raises(TypeError, match="state_logits: logits must be a float tensor"):
        state_logits(lambda prefixes: prefixes, completions)


@kinds
def test_chances_add_up_to_one(kind):
    p = problem(kind)
    assert expectation(p.logprobs, torch.ones(len(p.completions.ids)).double()).item() == pytest.approx(1, abs=1e-14)
    for row, tokens in enumerate(as_tuples(p.completions)):
        table, states = p.table.log_softmax(-1), p.completions.states
        by_hand = sum(table[states[row, t], token].item() for t, token in enumerate(tokens))
        assert p.logprobs[row].sum().item() == pytest.approx(by_hand, abs=1e-14)
    with pytest.raises(ValueError, match="expectation: x must have shape"):
        expectation(p.logprobs, torch.ones(2).double())


@kinds
def test_values_solve_the_bellman_equation(kind):
    """N9, N13: V, Q and J against the recursion, discounted."""
    p = problem(kind)
    values, q = bellman(p)
    true_values = state_values(p.completions, p.logprobs, p.rewards, gamma=GAMMA)
    for row, tokens in enumerate(as_tuples(p.completions)):
        for t in range(len(tokens)):
            assert true_values[row, t].item() == pytest.approx(values[tokens[:t]], abs=1e-13)
    assert by_prefix(p, action_values(p.completions, p.logprobs, p.rewards, gamma=GAMMA)) == pytest.approx(q, abs=1e-13)
    true_return = expected_return(p.completions, p.logprobs, p.rewards, gamma=GAMMA)
    assert true_return.item() == pytest.approx(values[()], abs=1e-13)


@kinds
def test_the_gradient_of_the_return_is_that_of_finite_differences(kind):
    p = problem(kind)

    def true_return(table):
        return expected_return(
            p.completions, completion_logprobs(table[p.completions.states], p.completions), p.rewards
        )

    assert torch.autograd.gradcheck(true_return, p.table)


@kinds
def test_sampled_completions_have_these_means(kind):
    """A sampler that knows only the policy: J and V within four standard errors of 20 000 samples."""
    p = problem(kind)
    generator = torch.Generator().manual_seed(0)
    rows = torch.multinomial(p.logprobs.sum(dim=1).exp(), 20_000, replacement=True, generator=generator)
    returns = p.rewards.sum(dim=1)[rows]
    error = 4 * returns.std() / math.sqrt(len(rows))
    assert abs(returns.mean() - expected_return(p.completions, p.logprobs, p.rewards)) < error
    state = p.completions.prefixes[0].shape[0]  # the first state of length 1
    here = rows[p.completions.states[rows, 1] == state]
    to_go = p.rewards[here, 1:].sum(dim=1)
    true_values = state_values(p.completions, p.logprobs, p.rewards)
    assert abs(to_go.mean() - true_values[here[0], 1]) < 4 * to_go.std() / math.sqrt(len(here))


@kinds
def test_conditional_means_are_what_they_say(kind):
    """Of a number that depends on the whole completion: brute force over all completions that share a prefix."""
    p = problem(kind)
    x = random_numbers(*p.completions.ids.shape, seed=9)
    chances, tokens = p.logprobs.sum(dim=1).exp(), as_tuples(p.completions)
    given_state = mean_given_state(p.completions, p.logprobs, x)
    given_action = mean_given_action(p.completions, p.logprobs, x)
    for row, mine in enumerate(tokens):
        for t in range(len(mine)):
            for given, length in ((given_state, t), (given_action, t + 1)):
                here = torch.tensor([len(other) > t and other[:length] == mine[:length] for other in tokens])
                by_hand = (chances[here] * x[here, t]).sum() / chances[here].sum()
                assert given[row, t].item() == pytest.approx(by_hand.item(), abs=1e-13)
    assert not given_state[~p.completions.mask].any() and not given_action[~p.completions.mask].any()


@kinds
def test_the_kl_of_sequences_is_the_expected_sum_of_that_of_states(kind):
    """The chain rule of KL; its gradient is not the sum of the states' gradients, see test_exact_kl.py."""
    p = problem(kind)
    kl = sequence_kl(p.logprobs, p.ref_logprobs)
    chances, ref_chances = p.logprobs.sum(dim=1).exp(), p.ref_logprobs.sum(dim=1).exp()
    assert kl.item() == pytest.approx((chances * (chances / ref_chances).log()).sum().item(), abs=1e-13)
    of_states = exact_kl(p.table[p.completions.states], p.ref_table[p.completions.states])
    torch.testing.assert_close(expected_return(p.completions, p.logprobs, of_states), kl)
    with pytest.raises(ValueError, match="ref_logprobs must have shape"):
        sequence_kl(p.logprobs, p.ref_logprobs[:2])


@kinds
@pytest.mark.parametrize("kl_coef", [0.2, 1.0, 5.0])
def test_the_optimum_is_the_optimum(kind, kl_coef):
    """Its gradient is zero, its value is J*, and no other policy has more; the closed form at the level of sequences."""
    p = problem(kind)
    scores = p.rewards.sum(dim=1)
    logprobs, best = optimal_policy(p.completions, p.ref_logprobs, scores, kl_coef=kl_coef)
    unnormalized = p.ref_logprobs.sum(dim=1).exp() * (scores / kl_coef).exp()
    torch.testing.assert_close(logprobs.sum(dim=1).exp(), unnormalized / unnormalized.sum())

    def objective(logprobs):
        return expectation(logprobs, scores) - kl_coef * sequence_kl(logprobs, p.ref_logprobs)

    assert objective(logprobs).item() == pytest.approx(best.item(), abs=1e-12)
    assert objective(p.logprobs) < best and objective(p.ref_logprobs) < best
    # As a table of logits: token by token it is a policy, and a stationary point.
    table = torch.zeros_like(p.table)
    table[p.completions.states[p.completions.mask], p.completions.ids[p.completions.mask]] = logprobs[
        p.completions.mask
    ]
    torch.testing.assert_close(table.logsumexp(dim=1), torch.zeros(len(table)).double())
    table.requires_grad_()
    at_optimum = objective(completion_logprobs(table[p.completions.states], p.completions))
    assert gradient(at_optimum, table).abs().max() < 1e-12
    assert gradient(objective(p.logprobs), p.table).abs().max() > 0.01


def test_the_optimum_refuses_what_it_cannot_do():
    p = problem("fixed")
    scores = p.rewards.sum(dim=1)
    with pytest.raises(ValueError, match="kl_coef must be positive"):
        optimal_policy(p.completions, p.ref_logprobs, scores, kl_coef=0.0)
    with pytest.raises(ValueError, match="kl_coef=0.0001 is too small for these scores"):
        optimal_policy(p.completions, p.ref_logprobs, scores, kl_coef=1e-4)
    with pytest.raises(ValueError, match="one score per completion"):
        optimal_policy(p.completions, p.ref_logprobs, p.rewards, kl_coef=1.0)


@kinds
def test_what_is_masked_never_matters(kind):
    """NaN at masked positions changes nothing."""
    p = problem(kind)
    poisoned = torch.where(p.completions.mask, p.rewards, float("nan"))
    logits = torch.where(p.completions.mask.unsqueeze(-1), p.table[p.completions.states], float("nan"))
    assert torch.equal(completion_logprobs(logits, p.completions), p.logprobs)
    for function in (expected_return, state_values, action_values, mean_given_state, mean_given_action):
        clean, dirty = (function(p.completions, p.logprobs, x) for x in (p.rewards, poisoned))
        assert torch.equal(clean, dirty), function.__name__


def test_every_public_function_is_documented():
    functions = {name: f for name, f in vars(exact).items() if inspect.isfunction(f) and f.__module__ == exact.__name__}
    for name, function in functions.items():
        assert name.startswith("_") or all(word in function.__doc__ for word in ("Args", "Returns")), name
