"""A policy that is fed one token per row at a time, over a cache of any kind."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lmppo.models.inputs import kind_of, position_ids_of, takes
from lmppo.models.language_model import LanguageModel
from lmppo.models.probe import STEPS, Difference, UnsupportedModelError, excess, largest, probe_tokens, read_alone


class Decoder:
    """The policy's cache, fed one token per row at a time; rows can be dropped.

    Attributes:
        logits: ``(B, V)`` of the next token.
        hidden: ``(B, H)`` last hidden state; None where the model gives none.

    Args:
        language_model: The policy.
        prompt_ids: ``(B, P)`` left-padded.
        prompt_mask: ``(B, P)``.
        masks_steps: Whether the attention mask is given after the prompt as well.
    """

    def __init__(
        self, language_model: LanguageModel, prompt_ids: Tensor, prompt_mask: Tensor, *, masks_steps: bool = True
    ) -> None:
        self.language_model = language_model
        self.masks_steps = masks_steps
        self.cache = DynamicCache(config=language_model.model.config)
        self.attention_mask = prompt_mask.long()
        first = language_model.first_position
        self._forward(prompt_ids, None if first is None else position_ids_of(prompt_mask, first), self.attention_mask)

    def feed(self, token: Tensor) -> None:
        """Append one token per row, ``(B,)``."""
        n_before, first = self.attention_mask.sum(dim=1, keepdim=True), self.language_model.first_position
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(n_before)], dim=1)
        mask = self.attention_mask if self.masks_steps else None
        self._forward(token[:, None], None if first is None else n_before + first, mask)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, ``(B,)`` bool."""
        self.cache.reorder_cache(rows.nonzero()[:, 0])  # of states of convolutions and recurrences too
        self.attention_mask = self.attention_mask[rows]

    def _forward(self, input_ids: Tensor, position_ids: Tensor | None, mask: Tensor | None) -> None:
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": True}
        inputs[cache_name(self.language_model.model)] = self.cache
        inputs |= {"position_ids": position_ids} if position_ids is not None else {}
        inputs |= {"attention_mask": mask} if mask is not None else {}
        states = self.language_model.forward(last=1, **inputs)
        self.logits = self.language_model.logits_of(states)[:, -1]
        self.hidden = None if states.hidden is None else states.hidden[:, -1]


def cache_name(model: Any) -> str:
    """What the model calls its cache, ``past_key_values`` or ``cache_params``; empty: it has none.

    Empty too where it has one that is not transformers' ``Cache`` (XLNet's ``mems``, RWKV's ``state``).
    """
    return next((name for name in ("past_key_values", "cache_params") if takes(model, name)), "")


@torch.no_grad()
def needs_step_masks(language_model: LanguageModel, name: str = "model") -> bool:
    """Whether the sampler gives the attention mask after the prompt too, as the model's own numbers tell.

    The probe's rows go through the cache token by token, one of them is dropped on the way, and every logit must be that
    of the row alone.

    Args:
        language_model: The policy.
        name: How messages name it.

    Raises:
        UnsupportedModelError: It has no cache, or the cache gives other numbers than a full pass.
    """
    model = language_model.model
    kind = kind_of(model)
    if not cache_name(model):
        raise UnsupportedModelError(
            f"{name} is a {kind}, which has no cache of keys and values that is transformers' own: sampling needs one. "
            f"Choose a model of another family."
        )
    device = next(iter(model.parameters())).device
    found = []
    with torch.autocast(device.type, enabled=False):
        for masks_steps in (True, False):
            try:
                found.append(_decode_error(language_model, masks_steps))
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
                continue
            if not found[-1].too_large:
                return masks_steps
    if found:
        problem = f"a difference of {min(found, key=lambda d: d.ratio)}"
    raise UnsupportedModelError(
        f"{name} is a {kind}, which computes something else with its cache than without: {problem}. What is sampled would "
        f"not be what is learned from. Choose a model of another family."
    )


def _decode_error(language_model: LanguageModel, masks_steps: bool) -> Difference:
    """How far the logits over the cache, row 1 dropped after its first token, are from each row alone."""
    tokens = probe_tokens(language_model.model.config, next(iter(language_model.model.parameters())).device)
    alone = read_alone(language_model.outputs, tokens)
    rows = torch.arange(len(alone), device=tokens.prompt_ids.device)
    decoder = Decoder(language_model, tokens.prompt_ids, tokens.prompt_mask, masks_steps=masks_steps)
    lengths, errors = tokens.prompt_mask.sum(dim=1).tolist(), []
    for t in range(STEPS + 1):
        computed = [x[:, None] for x in (decoder.logits, decoder.hidden) if x is not None]
        for i, row in enumerate(rows.tolist()):
            place = lengths[row] - 1 + t
            expected = [x[:, place : place + 1] for x in alone[row]]
            errors.append(excess([x[i : i + 1] for x in computed], expected, language_model.model))
        if t == 1:
            decoder.keep(rows != 1)
            rows = rows[rows != 1]
        if t < STEPS:
            decoder.feed(tokens.completion_ids[rows, t])
    return largest(errors)
