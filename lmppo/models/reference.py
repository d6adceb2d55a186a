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
from lmppo.protocols import CausalLM
from lmppo.records import Tokens


class Reference:
    """The frozen policy the KL penalty refers to: a given ``ref_model``, else the policy as it is now.

    The policy as it is now is the policy itself with frozen copies of trained tensors in place for the pass. An adapter
    that changes nothing yet is switched off, and only what is trained beside it is copied, such as biases. Any other
    adapter stays on, and all trained tensors are copied, as they are of a policy without an adapter.

    A given ``ref_model`` is neither cast nor changed, and is in its own mode again after each pass.

    Raises:
        ValueError: ``ref_model`` has another vocabulary than the policy, or shares trained weights with it.
    """

    def __init__(self, policy: CausalLM, ref_model: PreTrainedModel | None = None) -> None:
        self.model: Any = policy if ref_model is None else ref_model
        self.adapter_off = False
        self._frozen: list[_Frozen] = []
        if ref_model is not None:
            _check_fit(policy, ref_model)
        else:
            self.model.eval()
            self.adapter_off = hasattr(policy, "disable_adapter") and adapter_changes_nothing(policy)
            with self._adapter():  # peft marks what it has switched off as not trained
                self._frozen = _freeze_trained(self.model)
        with _evaluating(self.model):
            self.language_model = LanguageModel(self.model)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the states before each completion token."""
        with self._adapter(), _in_place(self._frozen), _evaluating(self.model):
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
    copies: dict[nn.Parameter, nn.Parameter] = {}
    frozen = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                if parameter not in copies:
                    copies[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                frozen.append(_Frozen(module, name, parameter, copies[parameter]))
    return frozen


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


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_fit(policy: Any, ref_model: Any) -> None:
    n_policy, n_ref = vocab_size_of(policy), vocab_size_of(ref_model)
    if n_ref != n_policy:
        raise ValueError(
            f"ref_model knows {n_ref} tokens and the policy {n_policy}: a KL needs distributions over the same "
            f"vocabulary. Give a reference with the policy's tokenizer and embedding size."
        )
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    shared = [name for name, p in ref_model.named_parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            f"ref_model shares weights with the policy that are trained ({', '.join(shared[:3])}), so it would follow "
            f"the policy. Leave ref_model out for the policy as it is now, or give a model of its own."
        )
