"""The probe: before any work, a model must read padded batches as it reads each row alone.

Every model that reads tokens is tried on a few short rows of different lengths, padded on the left, against each row
alone, without padding, mask, positions or cache; and a later token that is changed must move nothing before it. What
transformers and its models do wrong here would otherwise be trained on without a word.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmppo.checks import rounding_tolerance
from lmppo.context import usable_context
from lmppo.models.inputs import Aligned, Positions, inputs_of, kind_of
from lmppo.models.quantized import compute_precision
from lmppo.records import Tokens

Outputs = Sequence[Tensor]
"""What a model computes of some tokens: tensors ``(B, S, ...)``, padded positions included."""

Read = Callable[..., Outputs]
"""A model's forward pass: from ``input_ids`` and other arguments to its outputs."""

STEPS, PADDING = 3, 2
"""Completion tokens of each row of the probe, and padding of its longest row."""


class UnsupportedModelError(ValueError):
    """A model whose numbers would be wrong: it is refused before any work."""


def probe_tokens(model: Any) -> Tokens:
    """Three rows of 3, n and 5 prompt tokens and ``STEPS`` more: n = 16, or past a window or chunk of up to 64 tokens.

    Fewer where the model's context is shorter. The tokens are none that the configuration names: not padding, nor the
    end of a text, nor what stands for an image.

    Args:
        model: The model.
    """
    config, device = model.config, next(iter(model.parameters())).device
    text = config.get_text_config(decoder=True)
    numbers = {name: n for name, n in text.to_dict().items() if type(n) is int}
    windows = [n for name, n in numbers.items() if ("window" in name or "chunk" in name) and 2 <= n <= 64]
    context = usable_context(model)
    room = max([16, *(n + 16 for n in windows)])
    longest = room if context is None else max(2, min(room, context.length - STEPS - PADDING))
    lengths, width = [min(3, longest), longest, min(5, longest)], longest + PADDING
    named = {n for c in (config, text) for name, n in c.to_dict().items() if "token" in name and type(n) is int}
    plain = torch.tensor([i for i in range(text.vocab_size) if i not in named])
    plain = plain if len(plain) > 1 else torch.arange(text.vocab_size)
    generator = torch.Generator().manual_seed(0)
    few = plain[torch.randperm(len(plain), generator=generator)[:8]]  # so that tokens come again, as in texts
    picks = few[torch.randint(len(few), (len(lengths), width + STEPS), generator=generator)]
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths])
    completions = picks[:, width:]
    counted = torch.ones_like(completions, dtype=torch.bool)
    return Tokens(picks[:, :width] * mask, mask, completions, counted).map(lambda tensor, _: tensor.to(device))


def read_alone(read: Read, tokens: Tokens) -> list[Outputs]:
    """Each row's outputs without padding, mask, positions or cache, ``(1, n + STEPS, ...)``."""
    lengths = tokens.attention_mask.sum(dim=1).tolist()
    return [read(input_ids=row[None, -n:]) for row, n in zip(tokens.input_ids, lengths, strict=True)]


def check_finite(alone: list[Outputs], model: Any, name: str) -> None:
    """No NaN, and no row of infinities: a logit of -inf is a token that the model itself rules out.

    Raises:
        UnsupportedModelError: There is one.
    """
    if not all(output.amax(dim=-1).isfinite().all() for row in alone for output in row):
        raise UnsupportedModelError(
            f"{name} is a {kind_of(model)} whose outputs are not finite, with a few plain tokens: its weights are broken. "
            f"Load or train it anew."
        )


def check_causal(read: Read, tokens: Tokens, alone: list[Outputs], model: Any, name: str) -> None:
    """Later tokens that are changed move nothing before them.

    Args:
        read: The model's forward pass.
        tokens: The probe's.
        alone: What the model computes of each row alone.
        model: The model.
        name: How messages name it.

    Raises:
        UnsupportedModelError: It does.
    """
    row = int(tokens.prompt_mask.sum(dim=1).argmax())
    n = alone[row][0].shape[1]
    ids, half = tokens.input_ids[row : row + 1, -n:].clone(), n // 2
    ids[0, half:] = ids[0, half:].roll(1)
    error = excess(read(input_ids=ids), alone[row], model, slice(0, half))
    if error.too_large:
        raise UnsupportedModelError(
            f"{name} is a {kind_of(model)} that reads later tokens: changing some moved what it computes of "
            f"earlier ones by {error}. Give a causal model; an encoder such as BERT is one with config.is_decoder=True."
        )


def find_positions(
    read: Read, tokens: Tokens, alone: list[Outputs], model: Any, name: str, *, takes_positions: bool
) -> Positions:
    """How the model counts positions, as its outputs tell: from 0; as RoBERTa does; or without being told any.

    Args:
        read: The model's forward pass.
        tokens: The probe's.
        alone: What the model computes of each row alone.
        model: The model.
        name: How messages name it.
        takes_positions: Whether it can be told positions at all.

    Raises:
        UnsupportedModelError: In none of these ways it computes of a padded batch what it computes of each row alone.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    like_roberta = [Positions(padding + 1, padding)] if isinstance(padding, int) and padding >= 0 else []
    ways = [Positions(0), *like_roberta, Positions(None)] if takes_positions else [Positions(None)]
    aligned = Aligned.of(tokens, whole=True)
    lengths = [row[0].shape[1] for row in alone]
    problem = ""
    for positions in ways:
        try:
            batch = read(**inputs_of(aligned, positions))
        except Exception as error:
            problem = problem or one_line(error)
            continue
        rows = [[x[i : i + 1, :n] for x in batch] for i, n in enumerate(lengths)]
        difference = largest(excess(row, own, model) for row, own in zip(rows, alone, strict=True))
        if not difference.too_large:
            return replace(positions, packs=reads_packed(read, tokens, positions, model))
        problem = problem or f"a difference of {difference}"
    raise UnsupportedModelError(
        f"{name} is a {kind_of(model)}, which computes something else of a row when it is padded: {problem}. Its numbers "
        f"would be wrong in every batch of prompts of different lengths"
        f"{'' if takes_positions else ' (it takes no position_ids)'}. Choose a model of another family."
    )


def reads_packed(read: Read, tokens: Tokens, positions: Positions, model: Any) -> bool:
    """Whether a model computes of rows that stand one behind the other what it computes of each in a row of its own.

    A token that pads elsewhere is among them, which a model without a mask may take for padding.

    Args:
        read: The model's forward pass.
        tokens: The probe's.
        positions: How it counts positions.
        model: The model.
    """
    if positions.first is None or positions.padding_id is not None:
        return False
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < model.get_input_embeddings().weight.shape[0]:
        ids = tokens.completion_ids.clone()
        ids[:, 0] = padding
        tokens = replace(tokens, completion_ids=ids)
    positions = replace(positions, packs=True)
    found = []
    for line_length in (0, int(tokens.attention_mask.sum(dim=1).max())):
        aligned = Aligned.of(replace(tokens, line_length=line_length), whole=True)
        if line_length and not aligned.packed:
            return False  # a context so short that no two rows fit into a line
        try:
            outputs = read(**inputs_of(aligned, positions))
        except Exception:  # whatever it objects to, rows apart are right
            return False
        found.append([x[aligned.lines, aligned.columns].unsqueeze(0) for x in outputs])
    apart, together = found
    return not excess(together, apart, model).too_large


def one_line(error: Exception) -> str:
    """An error of another library, as a part of a sentence."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


@dataclass(frozen=True)
class Difference:
    """The largest difference between two sets of outputs, and the largest one that rounding explains."""

    size: float
    allowed: float

    @property
    def ratio(self) -> float:
        """The difference in units of the allowed one; NaN, which nothing explains, is infinitely many."""
        return float("inf") if math.isnan(self.size) else self.size / self.allowed

    @property
    def too_large(self) -> bool:
        """Whether it is more than rounding."""
        return self.ratio > 1

    def __str__(self) -> str:
        return f"{self.size:.2g} (rounding explains {self.allowed:.0e})"


def largest(differences: Iterable[Difference]) -> Difference:
    """The one that is furthest beyond what is allowed."""
    return max(differences, key=lambda d: d.ratio)


def excess(outputs: Outputs, expected: Outputs, model: Any, places: slice = slice(None)) -> Difference:
    """The difference that exceeds its tolerance most, over all outputs at some positions.

    Args:
        outputs: What is compared.
        expected: What it is compared with.
        model: Its precision decides the tolerance.
        places: The positions.
    """
    found = []
    for ours, theirs in zip(outputs, expected, strict=True):
        a, b = ours[:, places].float(), theirs[:, places].float()
        impossible = (a == float("-inf")) & (b == float("-inf"))
        size = (a - b).masked_fill(impossible, 0.0).abs().amax().item()
        magnitude = b.masked_fill(b.isinf(), 0.0).abs().amax().item()
        found.append(Difference(size, rounding_tolerance(magnitude, compute_precision(model))))
    return largest(found)
