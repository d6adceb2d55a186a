"""Log-probability of the sampled tokens, and entropy, of the distribution that is really sampled from."""

from typing import Any

import torch
from torch import Tensor

from lmppo.functional._inputs import check_dtype, check_float, check_positive, check_shape, widen


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, support: Tensor | None = None
) -> Tensor:
    """Log-probability of each given token under the policy that the logits describe.

    ``log pi(a) = z_a - log sum_{v in support} exp(z_v)`` with ``z = logits / temperature``

    The temperature and the support (what top-k, top-p or min-p left over) must be those of the sampler, or the ratio of
    new to old policy is not 1 before the first step. Differentiable in ``logits``. Positions are independent, and there
    is no mask: where tokens do not count, pass any valid token and any finite logits.

    Args:
        logits: (..., V) float. ``logits[..., t, :]`` must be what predicts ``tokens[..., t]``: shift before the call.
        tokens: (...) int64, each in [0, V).
        temperature: Logits are divided by it.
        support: Bool, broadcastable to ``logits``; True = the sampler could choose that token. None: all tokens.

    Returns:
        (...) log-probabilities, float32 or wider. A token outside the support has -inf, and gradients stay finite.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Shapes do not fit, a token is outside [0, V) (on an NVIDIA GPU torch's own assertion fails), the
            temperature is not positive, or a position has an empty support.
    """
    _check_tokens("token_logprobs", logits, tokens)
    logprobs = log_distribution("token_logprobs", logits, temperature=temperature, support=support)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Entropy in nats of the next-token distribution at each position, exact over the vocabulary.

    ``H = -sum_{v in support} p_v log p_v`` with ``p = softmax(logits / temperature)`` over the support, and 0 log 0 = 0

    Differentiable in ``logits``; a probability of 0 adds nothing to the value or to the gradient.

    Args:
        logits: (..., V) float.
        temperature: Logits are divided by it.
        support: Bool, broadcastable to ``logits``; True = the sampler could choose that token. None: all tokens.

    Returns:
        (...) entropies, between 0 and log V, float32 or wider.

    Raises:
        TypeError: ``logits`` is not float or ``support`` is not bool.
        ValueError: Shapes do not fit, the temperature is not positive, or a position has an empty support.
    """
    check_float("token_entropy", logits=logits)
    return _entropy(log_distribution("token_entropy", logits, temperature=temperature, support=support))


def token_logprobs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    support: Tensor | None = None,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` and :func:`token_entropy` of the same logits, for the price of one softmax.

    Args:
        logits: (..., V) float, as in :func:`token_logprobs`.
        tokens: (...) int64, each in [0, V).
        temperature: Logits are divided by it.
        support: Bool, broadcastable to ``logits``; True = the sampler could choose that token. None: all tokens.
        entropy_gradient: Whether the entropy is to be differentiated. Without, less memory is taken and less is computed,
            and the log-probabilities can be differentiated once.

    Returns:
        ``(logprobs, entropy)``, both (...).

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: As :func:`token_logprobs`.
    """
    _check_tokens("token_logprobs_and_entropy", logits, tokens)
    if not entropy_gradient:
        kept = _kept_logits("token_logprobs_and_entropy", logits, temperature, support)
        both: tuple[Tensor, Tensor] = _LogprobsAndEntropy.apply(kept, tokens.unsqueeze(-1))  # type: ignore[no-untyped-call]
        return both
    logprobs = log_distribution("token_logprobs_and_entropy", logits, temperature=temperature, support=support)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), _entropy(logprobs)


def support_logprobs(logits: Tensor, *, temperature: float = 1.0, support: Tensor | None = None) -> Tensor:
    """Log-probability that a token drawn from *all* tokens lies in the support: the log of the kept mass.

    ``log sum_{v in support} p_v`` with ``p = softmax(logits / temperature)`` over all tokens

    Args:
        logits: (..., V) float.
        temperature: Logits are divided by it.
        support: Bool, broadcastable to ``logits``. None: all tokens, and the result is 0.

    Returns:
        (...) log-probabilities, 0 or less up to rounding, float32 or wider.

    Raises:
        TypeError: ``logits`` is not float or ``support`` is not bool.
        ValueError: Shapes do not fit, the temperature is not positive, or a position has an empty support.
    """
    check_float("support_logprobs", logits=logits)
    kept = _kept_logits("support_logprobs", logits, temperature, support)
    if support is None:
        return kept.new_zeros(kept.shape[:-1])
    everything = _kept_logits("support_logprobs", logits, temperature, None)
    return kept.logsumexp(dim=-1) - everything.logsumexp(dim=-1)


def log_distribution(function: str, logits: Tensor, *, temperature: float, support: Tensor | None) -> Tensor:
    """(..., V) log-probabilities of the sampled distribution, -inf outside the support; errors name ``function``."""
    return torch.log_softmax(_kept_logits(function, logits, temperature, support), dim=-1)


def _kept_logits(function: str, logits: Tensor, temperature: float, support: Tensor | None) -> Tensor:
    """(..., V) logits over the temperature, -inf outside the support."""
    check_positive(function, temperature=temperature)
    scaled = widen(logits) if temperature == 1 else widen(logits) / temperature
    if support is None:
        return scaled
    check_dtype(function, torch.bool, support=support)
    _check_support(function, support, logits)
    if support.shape[-1] == 1:  # one flag for a whole vocabulary is True, or it would be empty
        return scaled
    return torch.where(support, scaled, -torch.inf)


# Below it a probability is 0 in any dtype: a log-probability that is raised to it changes no value, and 0 * log 0 is 0.
_LOG_ZERO = -1e4


def _entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs.clamp(min=_LOG_ZERO)).sum(dim=-1)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Log-probabilities of tokens, and entropies without a gradient; only the probabilities are kept for the backward pass.

    ``d log p_a / d z_v = [v = a] - p_v``
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = kept.log_softmax(dim=-1)
        chosen, probabilities = logprobs.gather(-1, ids).squeeze(-1), logprobs.exp()
        entropy = -logprobs.clamp_(min=_LOG_ZERO).mul_(probabilities).sum(dim=-1)
        ctx.save_for_backward(probabilities, ids)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "token_logprobs_and_entropy with entropy_gradient=False can be differentiated once, and create_graph=True "
                "asks for more: pass entropy_gradient=True."
            )
        probabilities, ids = ctx.saved_tensors
        outer = outer.unsqueeze(-1)
        return (probabilities * -outer).scatter_add_(-1, ids, outer), None


def _check_tokens(function: str, logits: Tensor, tokens: Tensor) -> None:
    check_float(function, logits=logits)
    check_dtype(function, torch.int64, tokens=tokens)
    check_shape(function, logits.shape[:-1], "that of logits without its last axis", tokens=tokens)
    asserted = (
        tokens.device.type == "cuda" and torch.version.hip is None
    )  # by NVIDIA's gather: to look is to wait for it
    if not asserted and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < logits.shape[-1]:
        raise ValueError(
            f"{function}: tokens must be in [0, {logits.shape[-1]}), the vocabulary of logits, got values from "
            f"{tokens.min()} to {tokens.max()}; put any valid token where the mask is False"
        )


def _check_support(function: str, support: Tensor, logits: Tensor) -> None:
    try:
        support.expand(logits.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{function}: support must broadcast to the shape of logits, {tuple(logits.shape)}, "
            f"got {tuple(support.shape)}"
        ) from error
    empty = (~support.any(dim=-1)).nonzero()
    if len(empty):
        raise ValueError(
            f"{function}: support must leave at least one token at every position, "
            f"got none at {len(empty)}, the first at {tuple(empty[0].tolist())}"
        )
