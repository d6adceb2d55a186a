"""Token-by-token sampling over a KV cache: tokens, log-probabilities and values in one pass.

The noise of a token is a pure function of (seed, iteration, row, position). So tokens do not depend on the number of
processes, on which rows have finished or on batching, and the sampler has no state to save.

Axes: ``B`` rows, ``P`` prompt positions, ``T`` completion positions, ``V`` vocabulary, ``K`` reward streams.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lmppo.checks import can_be_sampled, check_choice, check_logits
from lmppo.models import ActorCritic, score_values
from lmppo.protocols import CausalLM, Tokenizer
from lmppo.records import Samples, TokenRecord, Tokens
from lmppo.settings import SamplingSettings
from lmppo.stopping import Endings, StopStrings
from lmppo.support import Support, pack

# What a stream of noise is for; each purpose has its own numbers.
ROLLOUT, EVALUATION = 0, 1


@dataclass(frozen=True)
class SamplingParams:
    """The distribution to sample: forbidden tokens, then temperature, top-k, top-p and min-p, as in transformers.

    Attributes:
        max_completion_length: Most tokens of a completion.
        eos_token_ids: A completion ends with any of these, the model's own and ``stop_token_ids``.
        temperature: Divides the logits.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens of this probability; 1 keeps all.
        min_p: Keep tokens of at least ``min_p`` times the likeliest one's probability; 0 keeps all.
        min_new_tokens: None of ``eos_token_ids`` is among the first so many tokens.
        suppress_tokens: Tokens that are never sampled, ``bad_words_ids`` included.
        stop_strings: A completion ends with the token that completes any of these, at any length.
    """

    max_completion_length: int
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    stop_strings: StopStrings | None = None

    @classmethod
    def of(cls, config: SamplingSettings, tokenizer: Tokenizer, policy: CausalLM) -> "SamplingParams":
        """What the configuration asks for, ending also at the model's (or else the tokenizer's) end-of-text tokens."""
        eos = getattr(policy.generation_config, "eos_token_id", None)
        eos = tokenizer.eos_token_id if eos is None else eos
        own = [] if eos is None else eos if isinstance(eos, list) else [eos]
        bad_words = [token for word in config.bad_words_ids or [] for token in word]
        return cls(
            max_completion_length=config.max_completion_length,
            eos_token_ids=(*own, *(config.stop_token_ids or [])),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            min_new_tokens=config.min_new_tokens or 0,
            suppress_tokens=(*(config.suppress_tokens or []), *bad_words),
            stop_strings=StopStrings(tuple(config.stop_strings), tokenizer) if config.stop_strings else None,
        )

    @property
    def warps(self) -> bool:
        """Whether the tokens that may be sampled depend on the logits."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def rules(self, vocab_size: int, device: torch.device | None = None) -> Tensor | None:
        """``(2, V)`` True on the tokens not forbidden within ``min_new_tokens``, and after; None: none ever is."""
        early = self.eos_token_ids if self.min_new_tokens else ()
        if not self.suppress_tokens and not early:
            return None
        forbidden = torch.zeros(2, vocab_size, dtype=torch.bool)
        for rows, ids in ((slice(2), self.suppress_tokens), (slice(1), early)):
            forbidden[rows, [token for token in ids if token < vocab_size]] = True
        return ~forbidden.to(device)

    def rule_numbers(self) -> Tensor:
        """``(T,)`` the row of :meth:`rules` that holds at each position."""
        return (torch.arange(self.max_completion_length) >= self.min_new_tokens).long()

    def allowed(self, logits: Tensor, rule: Tensor | None = None) -> Tensor | None:
        """``(B, V)`` True on the tokens that may be sampled; None if all may.

        Args:
            logits: ``(B, V)``.
            rule: ``(V,)`` True on the tokens that are not forbidden: one of :meth:`rules`.
        """
        if not self.warps:
            return None if rule is None else rule.expand(logits.shape)
        scores = logits.float() if rule is None else logits.float().masked_fill(~rule, float("-inf"))
        warpers = LogitsProcessorList()
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(min(self.top_k, logits.shape[-1])))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers(torch.empty(0), scores / self.temperature) > float("-inf")

    def distribution(self, logits: Tensor, allowed: Tensor | None) -> Tensor:
        """``(B, V)`` log-probabilities to sample from, -inf on the tokens that are not ``allowed``."""
        kept = logits.float() if allowed is None else logits.float().masked_fill(~allowed, float("-inf"))
        return (kept if self.temperature == 1 else kept / self.temperature).log_softmax(dim=-1)


def uniform_noise(seed: int, iteration: int, rows: range, n_time: int, *, purpose: int = ROLLOUT) -> Tensor:
    """``(len(rows), T)`` float64 uniforms in [0, 1), row by row from a counter-based generator (Philox 4x64).

    Args:
        seed: The run's seed.
        iteration: The PPO iteration.
        rows: Global row numbers.
        n_time: ``T``.
        purpose: ``ROLLOUT`` or ``EVALUATION``.
    """
    noise = np.empty((len(rows), n_time))
    for i, row in enumerate(rows):
        generator = np.random.Philox(key=[seed, iteration], counter=[0, 0, row, purpose])
        noise[i] = np.random.Generator(generator).random(n_time)
    return torch.from_numpy(noise)


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """``(B,)`` tokens by inversion of the cumulative distribution: the first token whose cdf exceeds the uniform.

    The distribution is accumulated in float64, on the CPU where the device has none (Apple's GPUs).

    Args:
        logprobs: ``(B, V)`` of the distribution, -inf on what it rules out.
        uniforms: ``(B,)`` float64 in [0, 1), on any device.
    """
    place = logprobs.device if has_float64(logprobs.device) else "cpu"
    cdf = logprobs.exp().to(place).double().cumsum(dim=-1)
    total = cdf[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    targets = torch.minimum(uniforms.to(place)[:, None] * total, below_total)
    token = torch.searchsorted(cdf, targets, right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)  # beyond it for a NaN
    return token.to(logprobs.device)


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's GPUs raise a TypeError, some of Intel's a RuntimeError."""
    try:
        torch.ones(2, dtype=torch.float64, device=device).cumsum(dim=0)
    except (TypeError, RuntimeError):
        return False
    return True


@torch.no_grad()
def sample(
    model: ActorCritic,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    params: SamplingParams,
    *,
    values: bool = True,
    micro_batch_size: int | None = None,
    graphs: bool = False,
) -> Samples:
    """Sample one completion per row.

    Rows that have ended are dropped from the batch and from the cache. A value head's values come from the same pass; a
    critic of its own reads the finished sequences once.

    Args:
        model: Policy and critic.
        prompt_ids: ``(B, P)`` left-padded.
        prompt_mask: ``(B, P)``, no row empty.
        uniforms: ``(B, T)``, see :func:`uniform_noise`.
        params: The distribution.
        values: Whether to compute the critic's values; they are 0 otherwise.
        micro_batch_size: Rows of the greatest length that a critic of its own reads at a time (default: all).
        graphs: Whether the policy reads tokens by a CUDA graph, see :class:`lmppo.models.graphs.GraphedDecoder`.

    Returns:
        :class:`lmppo.records.Samples`, ``T = params.max_completion_length``; 0 where the mask is False. With frozen layers,
        its ``tokens.below`` is what they have computed on the way.

    Raises:
        NonFiniteError: The policy's logits are NaN or infinite, or -inf for every token that may be sampled.
    """
    device, n_rows, n_time = prompt_ids.device, prompt_ids.shape[0], params.max_completion_length
    ids = torch.zeros(n_rows, n_time, dtype=torch.long, device=device)
    mask = torch.zeros(n_rows, n_time, dtype=torch.bool, device=device)
    logprobs = torch.zeros(n_rows, n_time, device=device)
    state_values = torch.zeros(n_rows, n_time, model.n_streams, device=device)
    ended = torch.zeros(n_rows, dtype=torch.bool, device=device)
    max_logit = torch.zeros(n_rows, device=device)
    endings = Endings(prompt_ids, prompt_mask, params.eos_token_ids, params.stop_strings)

    uniforms = uniforms.to(device if has_float64(device) else "cpu")
    decoder = model.decoder(prompt_ids, prompt_mask, graphs_for=n_time if graphs else None)
    rules, support = _supports(params, n_rows, decoder.logits)
    below = None if decoder.below is None else _from_first_token(decoder.below, prompt_mask, n_time - 1)
    alive = torch.arange(n_rows, device=device)
    for t in range(n_time):
        logits = decoder.logits
        max_logit[alive] = torch.maximum(max_logit[alive], _largest(logits))
        allowed = params.allowed(logits, None if rules is None else rules[int(t >= params.min_new_tokens)])
        if params.warps and allowed is not None:
            support.entries[alive, t] = pack(allowed)
        distribution = params.distribution(logits, allowed)
        token = draw(distribution, uniforms[alive.to(uniforms.device), t])
        ids[alive, t] = token
        mask[alive, t] = True
        logprobs[alive, t] = distribution.gather(1, token[:, None])[:, 0]
        if values and model.critic is None:
            state_values[alive, t] = model.values_of(decoder.hidden)
        finished = endings.of(alive, token)
        ended[alive] = finished
        goes_on, usable = torch.stack([~finished, can_be_sampled(logits, allowed)]).cpu()  # the one wait for the device
        if not usable.all():
            check_logits(logits, alive)
            check_choice(logits, allowed, alive)
        if t + 1 == n_time or not goes_on.any():
            break
        if not goes_on.all():
            rows = _in_their_places(goes_on)
            alive, token = alive[rows], token[rows]
            decoder.keep(rows)
        decoder.feed(token)
        if below is not None and decoder.below is not None:
            below[alive, prompt_mask[alive].sum(dim=1) + t] = decoder.below[:, 0]
    del decoder  # its cache, before a critic of its own reads
    record = TokenRecord(Tokens(prompt_ids, prompt_mask, ids, mask, below), support)
    if values and model.critic is not None:
        state_values = score_values(model, record, micro_batch_size or n_rows)
    return Samples(record.tokens, support, logprobs, state_values, ended, max_logit)


def _in_their_places(goes_on: Tensor) -> Tensor:
    """``(b,)`` the rows that go on, in their places; the last ones in those of rows that have ended: few are moved."""
    rows = torch.arange(int(goes_on.sum()))
    rows[~goes_on[: len(rows)]] = len(rows) + goes_on[len(rows) :].nonzero()[:, 0]
    return rows


def _from_first_token(states: Tensor, prompt_mask: Tensor, n_more: int) -> Tensor:
    """``(B, P + n_more, H)`` the states of left-padded prompts, each row from its first token on, and room behind them."""
    rows, columns = prompt_mask.nonzero(as_tuple=True)
    result = states.new_zeros(states.shape[0], states.shape[1] + n_more, states.shape[2])
    result[rows, (prompt_mask.cumsum(dim=1) - 1)[rows, columns]] = states[rows, columns]
    return result


def _supports(params: SamplingParams, n_rows: int, logits: Tensor) -> tuple[Tensor | None, Support]:
    """The rules of what is forbidden, and the record of what could be sampled, to be filled in if it depends on logits."""
    device, n_time, vocab_size = logits.device, params.max_completion_length, logits.shape[-1]
    rules = params.rules(vocab_size, device)
    if params.warps:
        return rules, Support.of_bits(n_rows, n_time, vocab_size, device)
    if rules is None:
        return None, Support.of_all(n_rows, n_time, device)
    return rules, Support.of_rules(n_rows, rules, params.rule_numbers().to(device))


def _largest(logits: Tensor) -> Tensor:
    """``(B,)`` the largest |logit| of each row, tokens that the model rules out (-inf) left aside."""
    finite = logits.nan_to_num(neginf=0.0)  # NaN and inf are refused elsewhere
    return torch.maximum(finite.amax(dim=-1), -finite.amin(dim=-1)).float()
