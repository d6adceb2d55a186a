"""Log-probabilities of tokens and entropy, under the temperature and support of the sampler."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import modest, numbers, tensor

from lmppo.functional import support_logprobs, token_entropy, token_logprobs, token_logprobs_and_entropy

# exp of these is 1, 2, 5: probabilities 1/8, 2/8, 5/8.
LOGITS = tensor([0.0, math.log(2), math.log(5)])
INF = math.inf


def every_token(logits, **options):
    """Log-probability of each token of the vocabulary in turn: (V,) from (V,)."""
    vocabulary = torch.arange(logits.shape[-1])
    return token_logprobs(logits.expand(len(vocabulary), -1), vocabulary, **options)


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({}, [1 / 8, 2 / 8, 5 / 8]),
        # temperature 1/2 squares the weights: 1, 4, 25 of 30
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 25 / 30]),
        # the support drops the middle token: 1, 5 of 6
        ({"support": torch.tensor([True, False, True])}, [1 / 6, 0.0, 5 / 6]),
        # both: 1, 25 of 26
        ({"support": torch.tensor([True, False, True]), "temperature": 0.5}, [1 / 26, 0.0, 25 / 26]),
        # greedy: the only token left is certain
        ({"support": torch.tensor([False, False, True])}, [0.0, 0.0, 1.0]),
    ],
)
def test_by_hand(options, probabilities):
    """Probabilities that can be read off, and the entropy that follows from them."""
    expected = tensor(probabilities)
    torch.testing.assert_close(every_token(LOGITS, **options), expected.log())
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    assert token_entropy(LOGITS, **options).item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "mass"),
    [
        ({}, 1.0),
        ({"support": torch.tensor([True, False, True])}, 6 / 8),
        ({"support": torch.tensor([True, False, True]), "temperature": 0.5}, 26 / 30),
        ({"support": torch.tensor([False, True, False])}, 2 / 8),
        ({"support": torch.tensor([True, True, True])}, 1.0),
    ],
)
def test_the_mass_of_a_support_by_hand(options, mass):
    """The share of all tokens' probability that is left, in the leading axes' order."""
    assert support_logprobs(LOGITS, **options).item() == pytest.approx(math.log(mass), abs=1e-12)
    got = support_logprobs(torch.stack([LOGITS, torch.zeros(3).double()]), **options)
    assert got.shape == (2,) and got[0].item() == pytest.approx(math.log(mass), abs=1e-12)


def test_a_small_mass_and_one_near_1_are_right_in_float32():
    """As logs: 1e-26 of a support is not 0, and what is missing to 1 is not rounded away by logits of -130."""
    logits = torch.tensor([0.0, 60.0])
    assert support_logprobs(logits, support=torch.tensor([True, False])).item() == pytest.approx(-60.0)
    shifted = torch.tensor([-130.0, -125.0, -120.0])
    assert support_logprobs(shifted, support=torch.tensor([True, True, True])).item() == 0.0


def test_entropy_by_hand():
    """In nats."""
    # 1/2, 1/4, 1/4: 1/2 log 2 + 2 * 1/4 log 4 = 1.5 log 2
    assert token_entropy(tensor([0.5, 0.25, 0.25]).log()).item() == pytest.approx(1.5 * math.log(2))
    # uniform over n of V tokens: log n
    assert token_entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))
    assert token_entropy(torch.zeros(8), support=torch.arange(8) < 3).item() == pytest.approx(math.log(3))


def test_each_position_has_its_own_token_and_support():
    """Leading axes are kept in order; nothing leaks from one position to another."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 4, 2], [3, 1, 1]])
    support = torch.ones(2, 3, 5, dtype=torch.bool)
    support[1, 0, 4] = support[0, 2, 0] = False
    got = token_logprobs(logits, tokens, temperature=0.7, support=support)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(logits[b, t, v].item() / 0.7) if support[b, t, v] else 0.0 for v in range(5)]
            assert got[b, t].item() == pytest.approx(math.log(weights[tokens[b, t]] / sum(weights)), abs=1e-12)


@modest
@given(st.lists(numbers, min_size=2, max_size=6), st.floats(0.1, 4.0), st.data())
def test_what_any_distribution_obeys(logits, temperature, data):
    """Probabilities sum to 1; entropy is the mean of -log p, at least 0 and at most log of the support's size."""
    logits = tensor(logits)
    support = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(any)))
    logprobs = every_token(logits, temperature=temperature, support=support)
    entropy = token_entropy(logits, temperature=temperature, support=support).item()
    assert logprobs.exp().sum().item() == pytest.approx(1.0)
    assert logprobs.exp()[~support].sum().item() == 0.0
    kept = logprobs[support]
    assert entropy == pytest.approx(-(kept.exp() * kept).sum().item(), abs=1e-12)
    assert -1e-12 <= entropy <= math.log(support.sum()) + 1e-12


def test_agrees_with_torch_distributions():
    """Another implementation."""
    logits = torch.randn(4, 6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    categorical = torch.distributions.Categorical(logits=logits / 1.3)
    torch.testing.assert_close(token_logprobs(logits, tokens, temperature=1.3), categorical.log_prob(tokens))
    torch.testing.assert_close(token_entropy(logits, temperature=1.3), categorical.entropy())


def test_gradient_of_a_log_probability():
    """By z_v it is (1[v = a] - p_v) / temperature, and 0 outside the support."""
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, torch.tensor(1), temperature=0.5).backward()
    # p = 1/30, 4/30, 25/30
    torch.testing.assert_close(logits.grad, tensor([-1 / 30, 26 / 30, -25 / 30]) / 0.5)
    logits.grad = None
    token_logprobs(logits, torch.tensor(0), support=torch.tensor([True, False, True])).backward()
    # p = 1/6, 5/6
    torch.testing.assert_close(logits.grad, tensor([5 / 6, 0.0, -5 / 6]))


def test_gradient_of_the_entropy():
    """By z_v it is -p_v (log p_v + H) / temperature: probable tokens lose, so a bonus on H flattens the policy."""
    logits = LOGITS.clone().requires_grad_()
    entropy = token_entropy(logits, temperature=2.0)
    entropy.backward()
    logprobs = torch.log_softmax(LOGITS / 2.0, dim=-1)
    torch.testing.assert_close(logits.grad, -logprobs.exp() * (logprobs + entropy.detach()) / 2.0)
    assert logits.grad[2] < 0 < logits.grad[0]


@pytest.mark.parametrize("impossible", [-INF, -1e30, -1e4])
def test_a_probability_of_zero_adds_nothing_to_value_or_gradient(impossible):
    """0 log 0 is 0, and so is its gradient: exp underflows for all three, and -inf * 0 would be NaN."""
    logits = tensor([[impossible, 0.0, math.log(3)]]).requires_grad_()
    entropy = token_entropy(logits)
    logprob = token_logprobs(logits, torch.tensor([2]))
    # probabilities 0, 1/4, 3/4
    assert entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert logprob.item() == pytest.approx(math.log(0.75))
    (entropy + logprob).sum().backward()
    assert logits.grad[0, 0].item() == 0.0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e30])
def test_logits_outside_the_support_never_matter(garbage):
    """Neither in the value nor in the gradient, bit for bit."""
    support = torch.tensor([True, False, True])

    def value_and_gradient(unsupported):
        logits = LOGITS.clone()
        logits[1] = unsupported
        logits.requires_grad_()
        value = token_logprobs(logits, torch.tensor(2), support=support) + 3 * token_entropy(logits, support=support)
        value.backward()
        return value.detach(), logits.grad

    for clean, dirty in zip(value_and_gradient(0.0), value_and_gradient(garbage), strict=True):
        assert torch.equal(clean, dirty)


def test_a_token_outside_the_support_has_log_probability_minus_infinity():
    """It cannot have been sampled: log 0; the gradients of the others stay finite."""
    logits = LOGITS.clone().requires_grad_()
    logprob = token_logprobs(logits, torch.tensor(1), support=torch.tensor([True, False, True]))
    assert logprob.item() == -INF
    logprob.backward()
    assert logits.grad.isfinite().all() and logits.grad[1].item() == 0.0


def test_a_support_may_broadcast():
    """(V,) for all positions, or (B, 1, V) for all positions of a row."""
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    support = torch.tensor([[[True, True, False, True]], [[False, True, True, True]]])
    tokens = torch.tensor([[0, 1, 3], [1, 2, 3]])
    expected = token_logprobs(logits, tokens, support=support.expand(2, 3, 4))
    assert torch.equal(token_logprobs(logits, tokens, support=support), expected)
    assert torch.equal(token_entropy(logits[0], support=support[0, 0]), token_entropy(logits, support=support)[0])


def test_a_large_common_offset_costs_no_precision():
    """GPT-2's logits lie near -100, and softmax ignores the offset: its rounding must not enter log-probabilities."""
    logits = torch.tensor([0.0, 1.0, 2.5])
    shifted = logits - 8192.0  # exact in float32
    torch.testing.assert_close(every_token(shifted), every_token(logits), rtol=0, atol=1e-6)
    # The textbook form, gathered logit minus logsumexp, rounds its normalizer at the size of the offset.
    assert (shifted - shifted.logsumexp(0) - every_token(logits)).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """Exactly as if the logits had been converted first; the gradient comes back in the logits' own dtype."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    tokens = torch.tensor([0, 7, 49])
    got = token_logprobs(logits, tokens, temperature=0.9)
    assert torch.equal(got, token_logprobs(logits.float(), tokens, temperature=0.9))
    assert torch.equal(token_entropy(logits), token_entropy(logits.float()))
    got.sum().backward()
    assert logits.grad.dtype == dtype


def test_bad_arguments():
    """Named, before anything is computed."""
    logits, tokens = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    nothing_left = torch.ones(2, 3, 5, dtype=torch.bool)
    nothing_left[1, 2] = False
    with pytest.raises(TypeError, match=r"token_logprobs: logits must be a float tensor, got a torch.int64 tensor"):
        token_logprobs(logits.long(), tokens)
    with pytest.raises(TypeError, match=r"token_logprobs: tokens must be a torch.int64 tensor, got a torch.float32"):
        token_logprobs(logits, tokens.float())
    with pytest.raises(ValueError, match=r"token_logprobs: tokens must have shape \(2, 3\).*got \(2, 4\)"):
        token_logprobs(logits, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\).*got values from -100 to -100"):
        token_logprobs(logits, tokens - 100)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\).*got values from 5 to 5"):
        token_logprobs(logits, tokens + 5)
    for temperature in (0.0, -1.0, math.nan, INF):
        with pytest.raises(ValueError, match="token_entropy: temperature must be positive and finite"):
            token_entropy(logits, temperature=temperature)
    with pytest.raises(TypeError, match="token_entropy: support must be a torch.bool tensor"):
        token_entropy(logits, support=nothing_left.float())
    with pytest.raises(TypeError, match="support_logprobs: logits must be a float tensor"):
        support_logprobs(tokens)
    with pytest.raises(ValueError, match=r"support must broadcast to the shape of logits, \(2, 3, 5\), got \(3, 2"):
        token_entropy(logits, support=torch.ones(3, 2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"at least one token at every position, got none at 1, the first at \(1, 2\)"):
        token_logprobs(logits, tokens, support=nothing_left)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("support", [None, torch.tensor([True]), torch.tensor([True, False, True, True])])
def test_both_at_once_are_the_two_alone_with_their_gradients(temperature, support):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 2, 3], [3, 0, 2]])
    kwargs = {"temperature": temperature, "support": support}
    once, twice = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    both = token_logprobs_and_entropy(once, tokens, **kwargs)
    alone = token_logprobs(twice, tokens, **kwargs), token_entropy(twice, **kwargs)
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    (both[0].sum() + 3 * both[1].sum()).backward()
    (alone[0].sum() + 3 * alone[1].sum()).backward()
    assert once.grad.isfinite().all()
    torch.testing.assert_close(once.grad, twice.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("support", [None, torch.tensor([True]), torch.tensor([True, False, True, True])])
def test_without_an_entropy_gradient_the_rest_is_the_same(dtype, temperature, support):
    """A logit of -inf that the model itself gives included; and the numbers and gradients of each are in float32 or wider."""
    logits = 20 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, 0, 2] = -INF
    tokens, weights = torch.tensor([[0, 2, 3], [3, 0, 2]]), torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options = {"temperature": temperature, "support": support}
    logprobs, entropy = token_logprobs_and_entropy(one, tokens, entropy_gradient=False, **options)
    expected, expected_entropy = token_logprobs_and_entropy(other, tokens, **options)
    assert not entropy.requires_grad and entropy.isfinite().all()
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=0)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=1e-6, atol=1e-6)
    (weights * logprobs).sum().backward(retain_graph=True)
    once = one.grad.clone()
    (weights * expected).sum().backward()
    torch.testing.assert_close(once, other.grad)
    (weights * logprobs).sum().backward()
    torch.testing.assert_close(one.grad, 2 * once, msg="a second pass over a graph that was kept")


def test_without_an_entropy_gradient_a_second_derivative_is_refused():
    logits, tokens = torch.randn(2, 4, requires_grad=True), torch.tensor([0, 3])
    logprobs, _ = token_logprobs_and_entropy(logits, tokens, entropy_gradient=False)
    with pytest.raises(RuntimeError, match="pass entropy_gradient=True"):
        torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
