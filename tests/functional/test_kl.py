"""KL estimators, the exact divergence they estimate, and the penalty inside the reward."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import mask_of, modest, numbers, ragged, tensor

from lmppo.functional import exact_kl, kl_k1, kl_k2, kl_k3, kl_shaped_rewards
from lmppo.functional.kl import ALL_TOKENS

# Two policies over two tokens: p = (1/2, 1/2) and q = (1/4, 3/4).
P = tensor([1 / 2, 1 / 2])
Q = tensor([1 / 4, 3 / 4])


def random_logits(seed, vocabulary=5):
    """Two unlike policies."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, vocabulary, generator=generator, dtype=torch.float64).unbind(0)


def expectation(estimator, logits, ref_logits):
    """E over tokens sampled from the first policy, by enumeration; the sampling weights carry no gradient."""
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logprobs.exp().detach() * estimator(logprobs, ref_logprobs)).sum()


def test_estimators_by_hand():
    """One number per token, from p(a) and q(a) alone."""
    log2, log3 = math.log(2), math.log(3)
    # k1 = log p/q: log 2 for the first token, log 2/3 for the second
    torch.testing.assert_close(kl_k1(P.log(), Q.log()), tensor([log2, log2 - log3]))
    # k2 = half its square
    torch.testing.assert_close(kl_k2(P.log(), Q.log()), tensor([log2**2 / 2, (log2 - log3) ** 2 / 2]))
    # k3 = q/p - 1 - log q/p: 1/2 - 1 + log 2, and 3/2 - 1 - log 3/2
    torch.testing.assert_close(kl_k3(P.log(), Q.log()), tensor([log2 - 1 / 2, 1 / 2 - log3 + log2]))


def test_exact_kl_by_hand():
    """It is not symmetric: the order of the arguments matters."""
    # KL(p || q) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3
    assert exact_kl(P.log(), Q.log()).item() == pytest.approx(0.5 * math.log(4 / 3))
    # KL(q || p) = 1/4 log 1/2 + 3/4 log 3/2
    assert exact_kl(Q.log(), P.log()).item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed):
    """E_{a~p} of k1 and of k3 is KL(p || q) exactly; k2 misses it unless the policies are close."""
    logits, ref_logits = random_logits(seed)
    truth = exact_kl(logits, ref_logits).item()
    assert expectation(kl_k1, logits, ref_logits).item() == pytest.approx(truth, abs=1e-12)
    assert expectation(kl_k3, logits, ref_logits).item() == pytest.approx(truth, abs=1e-12)
    assert abs(expectation(kl_k2, logits, ref_logits).item() - truth) > 0.01 * truth
    # With the arguments exchanged the estimates are of something else: the sampling policy comes first.
    assert abs(expectation(lambda p, q: kl_k3(q, p), logits, ref_logits).item() - truth) > 0.01 * truth
    nearby = logits + 0.01 * (ref_logits - logits)
    assert expectation(kl_k2, logits, nearby).item() == pytest.approx(exact_kl(logits, nearby).item(), rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_which_estimator_is_right_as_a_loss(seed):
    """Gradients in expectation: k1's is 0 (N2), k2's is that of KL(p || q), k3's that of KL(q || p)."""
    logits, ref_logits = random_logits(seed)
    logits.requires_grad_()

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    torch.testing.assert_close(gradient(expectation(kl_k1, logits, ref_logits)), torch.zeros(5, dtype=torch.float64))
    forward, reverse = gradient(exact_kl(logits, ref_logits)), gradient(exact_kl(ref_logits, logits))
    torch.testing.assert_close(gradient(expectation(kl_k2, logits, ref_logits)), forward)
    torch.testing.assert_close(gradient(expectation(kl_k3, logits, ref_logits)), reverse)
    assert (forward - reverse).abs().max() > 0.01


@modest
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_signs_and_symmetries(pairs):
    """k1 is odd, k2 even, k2 and k3 never negative, and all are 0 where the policies agree."""
    p, q = tensor(pairs).unbind(-1)
    assert torch.equal(kl_k1(p, q), -kl_k1(q, p))
    assert torch.equal(kl_k2(p, q), kl_k2(q, p))
    assert (kl_k2(p, q) >= 0).all() and (kl_k3(p, q) >= 0).all()
    for estimator in (kl_k1, kl_k2, kl_k3):
        assert torch.equal(estimator(p, p), torch.zeros_like(p))
    # k3 is k1 plus the control variate q/p - 1 (below the cap)
    torch.testing.assert_close(kl_k3(p, q), kl_k1(p, q) + (q - p).clamp(max=20.0).exp() - 1)


def test_k3_keeps_small_values_in_float32():
    """Log-ratios of 1e-3, as in the first minibatches: k3 is about d^2 / 2 = 5e-7, near float32's rounding of 1."""
    d = torch.tensor([1e-3, -1e-3, 3e-4])
    exact = [math.expm1(x) - x for x in d.double().tolist()]
    torch.testing.assert_close(kl_k3(torch.zeros(3), d).tolist(), exact, rtol=1e-3, atol=0)
    naive = d.exp() - 1 - d
    assert ((naive.double() - tensor(exact)).abs() / tensor(exact)).max() > 0.01


def test_k3_is_finite_for_any_log_ratio():
    """Capped at e^20 on the side that would overflow, where its gradient is 0; linear, and right, on the other."""
    logprobs = torch.tensor([0.0, -1e4, 0.0, -21.0], requires_grad=True)
    k3 = kl_k3(logprobs, torch.tensor([-1e4, 0.0, -21.0, 0.0]))
    capped = math.expm1(20.0) - 20.0
    torch.testing.assert_close(k3, torch.tensor([1e4 - 1, capped, 20.0, capped]))
    k3.sum().backward()
    # below the cap: d k3 / d logp = 1 - q/p = 1
    torch.testing.assert_close(logprobs.grad, torch.tensor([1.0, 0.0, 1.0, 0.0]))


def test_exact_kl_agrees_with_torch_distributions():
    """Another implementation; the temperature divides both logits."""
    logits, ref_logits = torch.randn(2, 4, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (torch.distributions.Categorical(logits=x / 0.6) for x in (logits, ref_logits))
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(exact_kl(logits, ref_logits, temperature=0.6), expected)


def test_exact_kl_on_a_support():
    """Both distributions are renormalized over it; what is outside never matters, not even in the gradient."""
    support = torch.tensor([True, True, False])
    logits = torch.cat([P.log(), tensor([math.nan])]).requires_grad_()
    ref_logits = torch.cat([Q.log(), tensor([5.0])]).requires_grad_()
    value = exact_kl(logits, ref_logits, support=support)
    assert value.item() == pytest.approx(0.5 * math.log(4 / 3))
    value.backward()
    # d KL / d z_p = p_v (log p_v/q_v - KL), d KL / d z_q = q_v - p_v
    log_ratio = (P / Q).log()
    torch.testing.assert_close(logits.grad[:2], P * (log_ratio - value.detach()))
    torch.testing.assert_close(ref_logits.grad[:2], Q - P)
    assert logits.grad[2].item() == ref_logits.grad[2].item() == 0.0


def test_exact_kl_of_a_support_to_a_reference_of_all_tokens():
    """q as it is, with what it gives to the tokens outside: the KL over the support, plus -log of q's share of it."""
    support = torch.tensor([True, True, False])
    logits, ref = tensor([0.0, 0.0, math.nan]), tensor([1 / 8, 3 / 8, 1 / 2]).log()
    # 1/2 log (1/2)/(1/8) + 1/2 log (1/2)/(3/8)
    value = exact_kl(logits, ref, support=support, ref_support=ALL_TOKENS)
    assert value.item() == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))
    assert value.item() == pytest.approx(exact_kl(logits, ref, support=support).item() - math.log(1 / 2))
    # any support of its own: that of the first and the last token leaves out one that p can choose
    assert exact_kl(logits, ref, support=support, ref_support=torch.tensor([True, False, True])).item() == math.inf
    assert torch.equal(exact_kl(P.log(), Q.log(), ref_support=ALL_TOKENS), exact_kl(P.log(), Q.log()))


def test_k3_with_a_support_by_hand():
    """q/p - q(S) - log q/p: for q = (1/8, 3/8) on a support of mass 1/2, and without one when q(S) = 1."""
    q, half = tensor([1 / 8, 3 / 8]), tensor([1 / 2, 1 / 2])
    expected = tensor([1 / 4 - 1 / 2 + math.log(4), 3 / 4 - 1 / 2 + math.log(4 / 3)])
    torch.testing.assert_close(kl_k3(P.log(), q.log(), ref_support_logprobs=half.log()), expected)
    assert torch.equal(kl_k3(P.log(), Q.log(), ref_support_logprobs=torch.zeros(2)), kl_k3(P.log(), Q.log()))


def test_exact_kl_at_probability_zero():
    """Where p = 0 nothing is paid, whatever q is; q = 0 where p > 0 is infinitely far."""
    certain, even = tensor([0.0, -math.inf]).requires_grad_(), tensor([0.0, 0.0])
    value = exact_kl(certain, even)
    assert value.item() == pytest.approx(math.log(2))
    value.backward()
    assert certain.grad.isfinite().all()
    assert exact_kl(certain, tensor([0.0, -math.inf])).item() == 0.0
    assert exact_kl(even, certain).item() == math.inf


def test_rewards_by_hand():
    """A price on every counted token, and the score on the last one."""
    kl = tensor([[1.0, 2.0, 4.0, 9.0], [-1.0, 9.0, 3.0, 9.0]])
    mask = mask_of("111.", "1.1.")  # the second row has a gap
    # kl_coef 1/2. Row 0: -.5, -1, -2 + 10. Row 1: +.5, gap, -1.5 + 20.
    expected = tensor([[-0.5, -1.0, 8.0, 0.0], [0.5, 0.0, 18.5, 0.0]])
    assert torch.equal(kl_shaped_rewards(tensor([10.0, 20.0]), kl, mask, kl_coef=0.5), expected)


def test_the_score_is_on_the_last_counted_token_and_not_on_the_pad_after_it():
    """A score on the pad, where TRL's later trainer put it, would reach the last token only through lam and V."""
    mask = mask_of("11..", "1111", ".1.1", "...1")
    rewards = kl_shaped_rewards(tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, 4), mask, kl_coef=0.1)
    expected = tensor([[0, 1.0, 0, 0], [0, 0, 0, 2.0], [0, 0, 0, 3.0], [0, 0, 0, 4.0]])
    assert torch.equal(rewards, expected)


def test_dense_scores_stay_on_their_tokens():
    """One score per token: each is added where it stands, and what is not counted is dropped."""
    scores = tensor([[1.0, 2.0, 3.0]])
    rewards = kl_shaped_rewards(scores, tensor([[1.0, 1.0, 1.0]]), mask_of("1.1"), kl_coef=0.25)
    assert torch.equal(rewards, tensor([[0.75, 0.0, 2.75]]))


def test_a_completion_without_counted_tokens_carries_nothing():
    """Not its own score, and not another row's; not even a NaN."""
    rewards = kl_shaped_rewards(tensor([math.nan, 1.0]), torch.ones(2, 2), mask_of("..", "1."), kl_coef=1.0)
    assert torch.equal(rewards, tensor([[0.0, 0.0], [0.0, 0.0]]))  # row 1: 1 - 1


@modest
@given(ragged(count=2))
def test_rewards_sum_to_the_score_minus_the_price(batch):
    """Sum over a completion: score - kl_coef * sum of kl. Each score lands exactly once."""
    mask, kl, other = batch
    scores, has_tokens = other[:, 0], mask.any(dim=1)
    rewards = kl_shaped_rewards(scores, kl, mask, kl_coef=0.5)
    expected = torch.where(has_tokens, scores, 0.0) - 0.5 * torch.where(mask, kl, 0.0).sum(dim=1)
    assert torch.equal(rewards.sum(dim=1), expected)
    # the same scores, spread by hand to (B, T)
    dense = torch.zeros_like(kl)
    for row in range(len(mask)):
        for t in mask[row].nonzero()[-1:, 0]:
            dense[row, t] = scores[row]
    assert torch.equal(kl_shaped_rewards(dense, kl, mask, kl_coef=0.5), rewards)


def test_the_penalty_lowers_the_reward_of_tokens_the_reference_finds_unlikely():
    """The sign, from log-probabilities to rewards: moving away from the reference must cost."""
    kl = kl_k1(tensor([[-1.0, -1.0]]), tensor([[-3.0, -0.5]]))
    rewards = kl_shaped_rewards(tensor([0.0]), kl, mask_of("11"), kl_coef=0.1)
    torch.testing.assert_close(rewards, tensor([[-0.2, 0.05]]))


def test_bad_arguments():
    """Named, before anything is computed."""
    kl, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"scores must have shape \(2,\) \(one score per row of mask\), got \(3,\)"):
        kl_shaped_rewards(torch.zeros(3), kl, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"scores must have shape \(2, 3\).*or \(B,\), one per comp.*got \(2, 1\)"):
        kl_shaped_rewards(torch.zeros(2, 1), kl, mask, kl_coef=0.1)
    with pytest.raises(TypeError, match="kl_shaped_rewards: scores must be a float tensor, got a list"):
        kl_shaped_rewards([1.0, 2.0], kl, mask, kl_coef=0.1)
    for kl_coef in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="kl_shaped_rewards: kl_coef must be 0 or more and finite"):
            kl_shaped_rewards(torch.zeros(2), kl, mask, kl_coef=kl_coef)
    for estimator in (kl_k1, kl_k2, kl_k3):
        with pytest.raises(ValueError, match=rf"{estimator.__name__}: ref_logprobs must have shape \(2, 3\).*\(2,\)"):
            estimator(kl, torch.zeros(2))
    with pytest.raises(ValueError, match=r"exact_kl: ref_logits must have shape \(2, 3\)"):
        exact_kl(kl, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"kl_k3: ref_support_logprobs must have shape \(2, 3\).*got \(2,\)"):
        kl_k3(kl, kl, ref_support_logprobs=torch.zeros(2))
    with pytest.raises(TypeError, match="exact_kl: support must be a torch.bool tensor"):
        exact_kl(kl, kl, ref_support=torch.ones(3))
    with pytest.raises(ValueError, match="exact_kl: temperature must be positive"):
        exact_kl(kl, kl, temperature=0.0)
