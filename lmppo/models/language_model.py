"""A causal language model in two parts, trunk and head, probed when it is made.

Axes: ``B`` sequences, ``S`` positions, ``N`` counted tokens of all sequences, ``H`` hidden, ``V`` vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lmppo.functional._inputs import widen
from lmppo.models.chunks import OfLogits, Sums, leaves_of, sum_over_logits
from lmppo.models.exchange import exchanged
from lmppo.models.frozen_layers import FrozenLayers
from lmppo.models.inputs import Aligned, Positions, base_of, inputs_of, kind_of, takes
from lmppo.models.last_layer import LastLayer
from lmppo.models.probe import (
    Outputs,
    UnsupportedModelError,
    check_causal,
    check_finite,
    excess,
    find_positions,
    one_line,
    probe_tokens,
    read_alone,
)
from lmppo.models.states import States
from lmppo.protocols import CausalLM
from lmppo.records import Tokens, spread


class LanguageModel:
    """A causal language model in two parts: hidden states once, and the logits of those states when they are asked for.

    The head is the model's own forward with its trunk's output given, so that soft-caps, scales and adapters are part
    of it. A model for which that is not its own forward to the bit (prompt-learning adapters; models that put their
    parts together in another way) is not split: its logits come with its hidden states.

    Attributes:
        model: The model.
        trunk: Its trunk, if it can be split.
        positions: How it counts positions.
        cache_name: What it calls its cache; empty where it has none of transformers' kind (RWKV's ``state``).
        width: ``H``; 0 where the model gives no hidden states.
        size_of_states: The sum of a hidden state's absolute values, on average over the probe's tokens.
        frozen: Its lower layers, if they are never trained.

    Args:
        model: A causal language model, plain or with a peft adapter, in evaluation mode.
        name: How messages name it.
        num_layers_unfrozen: How many of its top layers are trained; None: all.

    Raises:
        UnsupportedModelError: It is none, or computes something else of a row when the row is padded; or its lower layers
            cannot be told from the others.
    """

    def __init__(self, model: CausalLM, name: str = "model", num_layers_unfrozen: int | None = None) -> None:
        self.model = model
        self.frozen: FrozenLayers | None = None
        self.trunk: Any = None
        self._output_class: Any = None
        self.cache_name = next((n for n in ("past_key_values", "cache_params") if takes(model, n)), "")
        self.positions, hidden = self._probe(name)
        self.width, self.size_of_states = hidden.shape[-1], hidden.abs().sum(dim=-1).mean().item()
        if num_layers_unfrozen is not None:
            self.frozen = FrozenLayers(model, num_layers_unfrozen, name)
            self._check_frozen()
        self._last_layer = LastLayer(model, lambda aligned: self._read_counted(aligned, None).parts)

    @torch.no_grad()
    def _probe(self, name: str) -> tuple[Positions, Tensor]:
        """How the model counts positions, and the hidden states of the probe's tokens ``(N, H)``, as it itself tells."""
        kind = kind_of(self.model)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{name} is a {kind}, an encoder and a decoder: expected a causal language model."
            )
        with torch.autocast(next(iter(self.model.parameters())).device.type, enabled=False):
            try:
                tokens = probe_tokens(self.model)
                self.trunk = self._find_trunk(tokens)
                alone = read_alone(self.outputs, tokens)
            except Exception as error:
                raise UnsupportedModelError(
                    f"{name} is a {kind}, which cannot read a few tokens as a causal language model does "
                    f"({one_line(error)}): expected a model that AutoModelForCausalLM loads."
                ) from error
            check_finite(alone, self.model, name)
            check_causal(self.outputs, tokens, alone, self.model, name)
            told = takes(self.model if self.trunk is None else self.trunk, "position_ids")
            positions = find_positions(self.outputs, tokens, alone, self.model, name, takes_positions=told)
        hidden = [numbers[1].float().flatten(0, -2) for numbers in alone if len(numbers) > 1]
        return positions, torch.cat(hidden) if hidden else torch.zeros(1, 0)

    @torch.no_grad()
    def _check_frozen(self) -> None:
        """From the states at the boundary the model computes what it computes of the tokens."""
        assert self.frozen is not None
        tokens = probe_tokens(self.model)
        aligned = Aligned.of(tokens)
        expected, started = (self._read_counted(aligned, b).source for b in (None, self.read_below(tokens)))
        difference = excess([started], [expected], self.model)
        if difference.too_large:
            raise self.frozen.unsupported(f"its upper layers alone compute something else ({difference})")

    @property
    def vocab_size(self) -> int:
        """``V``."""
        return vocab_size_of(self.model)

    @property
    def packs(self) -> bool:
        """Whether it can read several rows one behind the other."""
        return self.positions.packs

    def read(self, tokens: Tokens) -> States:
        """What the model computes of the states before the N counted tokens, ``(1, N, ...)``; nothing behind them."""
        aligned = Aligned.of(tokens)
        with self._last_layer.reading(aligned):
            return self._read_counted(aligned, tokens.below)

    def read_last(self, tokens: Tokens) -> States:
        """What it computes of the state after each row's last counted token, ``(1, B, ...)``; ``tokens.below`` ends there."""
        aligned = Aligned.of(tokens, whole=True)
        return self._read(aligned, None).at(aligned.layout.line, aligned.last)

    def read_below(self, tokens: Tokens) -> Tensor:
        """``(B, W, H)`` what the frozen lower layers compute, for ``tokens.below``; of rows that are not packed."""
        assert self.frozen is not None and not tokens.line_length
        return self.frozen.compute(self.model, inputs_of(Aligned.of(tokens, whole=True), self.positions))

    def _read_counted(self, aligned: Aligned, below: Tensor | None) -> States:
        return self._read(aligned, below).at(aligned.lines, aligned.columns)

    def _read(self, aligned: Aligned, below: Tensor | None) -> States:
        inputs = {"last": aligned.ids.shape[1], **inputs_of(aligned, self.positions)}
        if self.frozen is None or below is None:
            return self.forward(**inputs)
        with self.frozen.answering(below[aligned.layout.rows, aligned.layout.places]):
            return self.forward(**inputs)

    def forward(self, *, last: int, **inputs: Any) -> States:
        """The ``last`` positions of a forward pass."""
        if self.trunk is not None:
            hidden = self.trunk(**inputs).last_hidden_state[:, -last:]
            return States(hidden.contiguous())  # of rows that lie apart, a frozen head would read its weights for each
        if takes(self.model, "logits_to_keep"):
            inputs["logits_to_keep"] = last
        out = self.model(**inputs, output_hidden_states=True)
        hidden = (getattr(out, "hidden_states", None) or [None])[-1]
        if hidden is not None:
            hidden = hidden[:, -last:] if hidden.shape[:2] == inputs["input_ids"].shape else None
        return States(hidden, out.logits[:, -last:])

    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the distributions that the counted tokens were drawn from, 0 elsewhere: few rows."""
        return spread(self.logits_of(self.read(tokens)), tokens.completion_mask)

    def sum_over_logits(self, states: States, compute: OfLogits) -> tuple[Tensor, Sums]:
        """See :func:`lmppo.models.chunks.sum_over_logits`."""
        return sum_over_logits(states, self.logits_of, compute, vocab_size=self.vocab_size)

    def logits_of(self, states: States) -> Tensor:
        """``(B, n, V)`` the logits of some states; in float32 whatever the autocast, where the model can be split.

        bfloat16 holds a logit of 80 to a quarter: rounding in the head would be most of what a log-ratio is made of.
        """
        if states.logits is not None:
            return states.logits
        assert states.hidden is not None
        with torch.autocast(states.hidden.device.type, enabled=False):
            weight = self.model.get_output_embeddings().weight
            hidden = widen(states.hidden)
            return self._head(self.trunk, hidden.to(weight.dtype) if weight.is_floating_point() else hidden)

    @torch.compiler.disable  # it cannot follow a forward that is exchanged
    def _head(self, trunk: nn.Module, hidden: Tensor) -> Tensor:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        answer = self._output_class(last_hidden_state=hidden)
        with exchanged({trunk: lambda *args, **kwargs: answer}):
            return self.model(input_ids=ids, use_cache=False).logits

    def outputs(self, **inputs: Any) -> Outputs:
        """Logits, and hidden states where there are any, of a whole forward pass."""
        states = self.forward(last=inputs["input_ids"].shape[1], **inputs)
        logits = self.logits_of(states)
        return [logits] if states.hidden is None else [logits, states.hidden]

    def _find_trunk(self, tokens: Tokens) -> Any:
        base = base_of(self.model)
        inner = [getattr(base, getattr(base, "base_model_prefix", ""), None)]
        inner += [base.get_decoder()] if hasattr(base, "get_decoder") else []
        return next(
            (t for t in inner if isinstance(t, nn.Module) and t is not base and self._splits_at(t, tokens)), None
        )

    def _splits_at(self, trunk: nn.Module, tokens: Tokens) -> bool:
        """Whether trunk and head give what the model's own forward gives, to the bit."""
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return False  # it puts tokens of its own before the prompt
        inputs = {"input_ids": tokens.completion_ids, "use_cache": False}
        try:
            output = trunk(**inputs)
            self._output_class = type(output)
            hidden, expected = output.last_hidden_state, self.model(**inputs).logits
            one_row = self._head(trunk, hidden.flatten(0, 1).unsqueeze(0)).view_as(expected)
            same = torch.equal(self._head(trunk, hidden), expected)
            return same and not excess([one_row], [expected], self.model).too_large
        except Exception:  # whatever the parts of a model object to, its own forward is right
            return False


def freeze_lower_layers(policy: Any, num_layers_unfrozen: int | None) -> None:
    """Train only what is computed after the lower layers: the layers above, the final norm, a head that is not tied.

    A head that is tied to the embedding stays as it is, and so does what is frozen already.

    Args:
        policy: A causal language model, plain or with an adapter.
        num_layers_unfrozen: How many of its top layers are trained; None: all, and nothing is frozen.

    Raises:
        ValueError: It has fewer layers, or an adapter with weights below the layers that are trained.
        UnsupportedModelError: Its lower layers cannot be told from the others.
    """
    if num_layers_unfrozen is None:
        return
    model = LanguageModel(policy.eval(), num_layers_unfrozen=num_layers_unfrozen)
    tokens = probe_tokens(policy)
    with torch.enable_grad():
        above = set(leaves_of(model.logits(replace(tokens, below=model.read_below(tokens))).sum()))
    above -= {policy.get_input_embeddings().weight}
    below = {name: p for name, p in policy.named_parameters() if p.requires_grad and p not in above}
    if hasattr(policy, "peft_config") and below:
        raise ValueError(
            f"num_layers_unfrozen={num_layers_unfrozen}: the adapter has weights below those layers, such as "
            f"{next(iter(below))}. Give it the top layers only (LoraConfig(layers_to_transform=...)), or leave "
            f"num_layers_unfrozen out."
        )
    for parameter in below.values():
        parameter.requires_grad_(False)


def vocab_size_of(model: Any) -> int:
    """The number of rows of a model's embedding of tokens, also within what an adapter wraps around it."""
    return int(model.get_input_embeddings().weight.shape[0])
