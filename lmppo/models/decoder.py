"""A policy that is fed one token per row at a time, over a cache of any kind."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmppo.models.cache import make_cache
from lmppo.models.inputs import kind_of
from lmppo.models.language_model import LanguageModel
from lmppo.models.probe import (
    STEPS,
    Difference,
    UnsupportedModelError,
    excess,
    largest,
    one_line,
    probe_tokens,
    read_alone,
)


@dataclass(frozen=True)
class Step:
    """What a forward pass has computed of its last tokens; see :class:`Decoder`."""

    logits: Tensor
    hidden: Tensor | None
    below: Tensor | None

    def rows(self, numbers: Tensor) -> "Step":
        """Some rows alone."""
        hidden, below = (None if x is None else x[numbers] for x in (self.hidden, self.below))
        return Step(self.logits[numbers], hidden, below)


class Decoder:
    """The policy's cache, fed one token per row at a time; rows can be dropped.

    A prompt that stands in several rows, one after the other, is read once.

    Args:
        language_model: The policy.
        prompt_ids: ``(B, P)`` left-padded.
        prompt_mask: ``(B, P)``.
        masks_steps: Whether the attention mask is given after the prompt as well, see :func:`needs_step_masks`.
    """

    last: Step

    def __init__(
        self, language_model: LanguageModel, prompt_ids: Tensor, prompt_mask: Tensor, *, masks_steps: bool
    ) -> None:
        self.language_model = language_model
        self.masks_steps = masks_steps
        self.cache: Any = self._make_cache()
        rows = torch.cat([prompt_ids * prompt_mask, prompt_mask], dim=1)
        _, copies = torch.unique_consecutive(rows, dim=0, return_inverse=True)
        firsts = torch.unique_consecutive(copies, return_counts=True)[1].cumsum(dim=0)
        firsts = torch.cat([firsts.new_zeros(1), firsts[:-1]])
        self.ids, self.mask = prompt_ids[firsts], prompt_mask[firsts].long()
        self._forward(prompt_ids.shape[1], masks=True)
        if len(firsts) < len(copies):
            self.keep(copies)
            self.last = self.last.rows(copies)

    @property
    def logits(self) -> Tensor:
        """``(B, V)`` of the next token."""
        return self.last.logits

    @property
    def hidden(self) -> Tensor | None:
        """``(B, H)`` last hidden state; None where the model gives none."""
        return self.last.hidden

    @property
    def below(self) -> Tensor | None:
        """``(B, n, H)`` what frozen lower layers have computed of the n tokens that were read last; None: there are none.

        They are the prompt's, or one more.
        """
        return self.last.below

    def feed(self, token: Tensor) -> None:
        """Append one token per row, ``(B,)``."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(token[:, None])], dim=1)
        self._forward(1, masks=self.masks_steps)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, given by their numbers; one that is named again is copied."""
        self.cache.reorder_cache(rows)  # of states of convolutions and recurrences too
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def _make_cache(self) -> Any:
        return make_cache(self.language_model.model.config)

    def _forward(self, n_new: int, *, masks: bool) -> None:
        """Read the last ``n_new`` tokens."""
        inputs = {"input_ids": self.ids[:, -n_new:]}
        if masks:
            inputs["attention_mask"] = self.mask
        told = self.language_model.positions.of(self.ids, self.mask)
        inputs |= {name: x[:, -n_new:] for name, x in told.items()}
        self.last = self._compute(inputs)

    def _compute(self, inputs: dict[str, Tensor]) -> Step:
        """A forward pass that adds to the cache."""
        frozen, cache = self.language_model.frozen, {self.language_model.cache_name: self.cache}
        with ExitStack() as stack:
            reached = [] if frozen is None else stack.enter_context(frozen.watching())
            states = self.language_model.forward(last=1, use_cache=True, **cache, **inputs)
        logits = self.language_model.logits_of(states)[:, -1]
        hidden = None if states.hidden is None else states.hidden[:, -1]
        return Step(logits, hidden, None if frozen is None else frozen.hidden_in(reached[-1]))


@torch.no_grad()
def needs_step_masks(language_model: LanguageModel, name: str = "model") -> bool:
    """Whether the attention mask is given after the prompt as well, as the policy's own numbers tell.

    Mamba's convolutions take a mask for the prompt's.

    The probe's rows go through the cache token by token, one of them is dropped on the way, and every logit must be that
    of the row alone.

    Args:
        language_model: The policy.
        name: How messages name it.

    Raises:
        UnsupportedModelError: It has no cache, or the cache gives other numbers than a full pass.
    """
    model = language_model.model
    if not language_model.cache_name:
        raise UnsupportedModelError(
            f"{name} is a {kind_of(model)}, which has no cache of keys and values that is transformers' own: sampling "
            f"needs one. Choose a model of another family."
        )
    problem = ""
    with torch.autocast(next(iter(model.parameters())).device.type, enabled=False):
        for masks_steps in (True, False):
            try:
                difference = decode_error(language_model, partial(Decoder, masks_steps=masks_steps))
            except Exception as error:
                problem = problem or one_line(error)
                continue
            if not difference.too_large:
                return masks_steps
            problem = problem or f"a difference of {difference}"
    raise UnsupportedModelError(
        f"{name} is a {kind_of(model)}, which computes something else with its cache than without: {problem}. What is "
        f"sampled would not be what is learned from. Choose a model of another family."
    )


def decode_error(language_model: LanguageModel, make: Callable[[LanguageModel, Tensor, Tensor], Decoder]) -> Difference:
    """How far the logits over the cache are from each row alone: row 0 twice, row 1 dropped after its first token.

    Args:
        language_model: The policy.
        make: Makes its decoder over left-padded prompts, given by their ids and mask.
    """
    tokens = probe_tokens(language_model.model)
    alone = read_alone(language_model.outputs, tokens)
    rows = torch.tensor([0, *range(len(alone))], device=tokens.prompt_ids.device)
    decoder = make(language_model, tokens.prompt_ids[rows], tokens.prompt_mask[rows])
    lengths, differences = tokens.prompt_mask.sum(dim=1).tolist(), []
    for t in range(STEPS + 1):
        computed = [x[:, None] for x in (decoder.logits, decoder.hidden) if x is not None]
        for i, row in enumerate(rows.tolist()):
            place = lengths[row] - 1 + t
            expected = [x[:, place : place + 1] for x in alone[row]]
            differences.append(excess([x[i : i + 1] for x in computed], expected, language_model.model))
        if t == 1:
            left = (rows != 1).nonzero()[:, 0]
            decoder.keep(left)
            rows = rows[left]
        if t < STEPS:
            decoder.feed(tokens.completion_ids[rows, t])
    return largest(differences)
