"""The frozen policy that the KL penalty refers to."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmppo.models.adapters import adapter_changes_nothing, adapter_off
from lmppo.models.language_model import LanguageModel, vocab_size_of
from lmppo.models.loading import as_float32, check_not_trained, frozen_view
from lmppo.records import Tokens


class Reference:
    """The frozen policy the KL penalty refers to: a given ``ref_model``, else the policy as it is now.

    The policy as it is now is the policy itself with frozen copies of trained tensors in place for the pass. An adapter
    that changes nothing yet is switched off, and only what is trained beside it is copied, such as biases. Any other
    adapter stays on, and all trained tensors are copied, as they are of a policy without an adapter.

    ``ref_model`` stays as it is: a view of its weights is used, or a float32 copy.

    Raises:
        ValueError: ``ref_model`` has another vocabulary than the policy, or weights that are trained.
    """

    def __init__(self, policy: Any, ref_model: PreTrainedModel | None = None) -> None:
        self.model: Any
        self.adapter_off = False
        self._frozen: list[_Frozen] = []
        if ref_model is not None:
            n_policy, n_ref = vocab_size_of(policy), vocab_size_of(ref_model)
            if n_ref != n_policy:
                raise ValueError(
                    f"ref_model knows {n_ref} tokens and the policy {n_policy}: a KL needs distributions over the same "
                    f"vocabulary. Give a reference with the policy's tokenizer and embedding size."
                )
            check_not_trained(ref_model, policy)
            self.model = frozen_view(as_float32(ref_model, "ref_model")).to(next(policy.parameters()).device)
        else:
            self.model = policy.eval()
            self.adapter_off = hasattr(policy, "disable_adapter") and adapter_changes_nothing(policy)
            with self._adapter():  # peft marks what it has switched off as not trained
                self._frozen = _freeze_trained(self.model)
        with self._adapter():
            self.language_model = LanguageModel(self.model, "ref_model" if ref_model is not None else "model")

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the states before each completion token."""
        with self._adapter(), _in_place(self._frozen):
            return self.language_model.logits_of(self.language_model.read(tokens))[:, :-1]

    def _adapter(self) -> contextlib.AbstractContextManager:
        return adapter_off(self.model) if self.adapter_off else contextlib.nullcontext()


@dataclass(frozen=True)
class _Frozen:
    """A trained parameter where a module holds it, and a frozen copy of it."""

    module: nn.Module
    name: str
    trained: nn.Parameter
    copy: nn.Parameter


def _freeze_trained(model: nn.Module) -> list[_Frozen]:
    """A copy of each trained parameter, one for all modules that share it."""
    copies = {p: nn.Parameter(p.detach().clone(), False) for p in model.parameters() if p.requires_grad}
    return [
        _Frozen(module, name, parameter, copies[parameter])
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


@contextlib.contextmanager
def _in_place(frozen: list[_Frozen]) -> Iterator[None]:
    """Within it the modules hold the copies.

    The parameters are exchanged, not their data: autocast keeps what it has cast by parameter.
    """
    try:
        for f in frozen:
            f.module._parameters[f.name] = f.copy
        yield
    finally:
        for f in frozen:
            f.module._parameters[f.name] = f.trained
