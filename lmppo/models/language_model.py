"""A causal language model in two parts, trunk and head, and the inputs that it is given.

Position ids always come from the attention mask: GPT-2 counts positions from the left edge otherwise, padding included,
and its log-probabilities are silently wrong.

Axes: ``B`` sequences, ``P`` prompt positions, ``T`` completion positions, ``S = P + T``, ``H`` hidden,
``V`` vocabulary, ``K`` reward streams.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmppo.functional._inputs import widen
from lmppo.protocols import CausalLM
from lmppo.records import Tokens


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """``(B, S)`` each token's place among the tokens that are there, from 0; padding gets 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def inputs_of(model: Any, tokens: Tokens) -> dict[str, Any]:
    """The arguments of a model's forward pass over prompts and completions."""
    attention_mask = tokens.attention_mask
    inputs = {"input_ids": tokens.input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if takes_position_ids(model):
        inputs["position_ids"] = position_ids_of(attention_mask)
    return inputs


def takes_position_ids(model: Any) -> bool:
    """Whether the model counts positions itself unless told (all but the ALiBi models)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(base.forward).parameters


@dataclass(frozen=True)
class States:
    """What a language model has computed of some states, before its head.

    Attributes:
        hidden: ``(B, n, H)`` what the head reads.
        logits: ``(B, n, V)`` where the model cannot be split and has computed them already.
    """

    hidden: Tensor
    logits: Tensor | None = None

    def drop_last(self) -> "States":
        """Without the last position."""
        return States(self.hidden[:, :-1], None if self.logits is None else self.logits[:, :-1])


class LanguageModel:
    """A causal language model in two parts: hidden states once, and the logits of those states when they are asked for.

    The head is the model's own forward with its trunk's output given, so that soft-caps, scales and adapters are part
    of it. A model for which that is not its own forward to the bit (prompt-learning adapters; models that put their
    parts together in another way) is not split: its logits come with its hidden states.

    Args:
        model: A causal language model, plain or with a peft adapter, in evaluation mode.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.trunk: Any = None
        self._output_class: Any = None
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner = [getattr(base, getattr(base, "base_model_prefix", ""), None)]
        inner += [base.get_decoder()] if hasattr(base, "get_decoder") else []
        self.trunk = next((t for t in inner if isinstance(t, nn.Module) and t is not base and self._splits_at(t)), None)

    def read(self, tokens: Tokens) -> States:
        """What the model computes of the ``T + 1`` states before and after each completion token."""
        return self.forward(last=tokens.completion_ids.shape[1] + 1, **inputs_of(self.model, tokens))

    def forward(self, *, last: int, **inputs: Any) -> States:
        """The ``last`` positions of a forward pass."""
        if self.trunk is not None:
            return States(self.trunk(**inputs).last_hidden_state[:, -last:])
        out = self.model(**inputs, output_hidden_states=True, logits_to_keep=last)
        return States(out.hidden_states[-1][:, -last:], out.logits[:, -last:])

    def logits_of(self, states: States) -> Tensor:
        """``(B, n, V)`` the logits of some states; in float32 whatever the autocast, where the model can be split.

        bfloat16 holds a logit of 80 to a quarter: rounding in the head would be most of what a log-ratio is made of.
        """
        if states.logits is not None:
            return states.logits
        with torch.autocast(states.hidden.device.type, enabled=False):
            return self._head(self.trunk, widen(states.hidden))

    @torch.compiler.disable  # it cannot follow a forward that is exchanged
    def _head(self, trunk: nn.Module, hidden: Tensor) -> Tensor:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with _answering(trunk, self._output_class(last_hidden_state=hidden)):
            return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def _splits_at(self, trunk: nn.Module) -> bool:
        """Whether trunk and head give what the model's own forward gives, to the bit."""
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return False  # it puts tokens of its own before the prompt
        ids = torch.tensor([[1, 2, 1]], device=next(self.model.parameters()).device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        try:
            output = trunk(**inputs)
            self._output_class = type(output)
            return torch.equal(self._head(trunk, output.last_hidden_state), self.model(**inputs).logits)
        except Exception:  # whatever the parts of a model object to, its own forward is right
            return False


@contextlib.contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Within it the module answers ``output``, whatever it is given."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def vocab_size_of(model: Any) -> int:
    """The number of rows of a model's embedding of tokens, also within what an adapter wraps around it."""
    return int(model.get_input_embeddings().weight.shape[0])
