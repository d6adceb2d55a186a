"""Log-probability of the sampled tokens, and entropy, of the distribution that is really sampled from."""

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
        ValueError: Shapes do not fit, a token is outside [0, V), the temperature is not positive, or a position has an
            empty support.
    """
    check_float("token_logprobs", logits=logits)
    check_dtype("token_logprobs", torch.int64, tokens=tokens)
    check_shape("token_logprobs", logits.shape[:-1], "that of logits without its last axis", tokens=tokens)
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < logits.shape[-1]:
        raise ValueError(
            f"token_logprobs: tokens must be in [0, {logits.shape[-1]}), the vocabulary of logits, got values from "
            f"{tokens.min()} to {tokens.max()}; put any valid token where the mask is False"
        )
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
    logprobs = log_distribution("token_entropy", logits, temperature=temperature, support=support)
    possible = logprobs > -torch.inf
    return -(logprobs.exp() * torch.where(possible, logprobs, 0.0)).sum(dim=-1)


def log_distribution(function: str, logits: Tensor, *, temperature: float, support: Tensor | None) -> Tensor:
    """(..., V) log-probabilities of the sampled distribution, -inf outside the support; errors name ``function``."""
    check_positive(function, temperature=temperature)
    scaled = widen(logits) / temperature
    if support is None:
        return torch.log_softmax(scaled, dim=-1)
    check_dtype(function, torch.bool, support=support)
    _check_support(function, support, logits)
    return torch.log_softmax(torch.where(support, scaled, -torch.inf), dim=-1)


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
