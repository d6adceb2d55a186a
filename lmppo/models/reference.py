"""The frozen policy that the KL penalty refers to."""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmppo.models.language_model import LanguageModel
from lmppo.models.loading import as_float32, check_not_trained, frozen_view
from lmppo.protocols import CausalLM
from lmppo.records import Tokens


class Reference:
    """The frozen policy the KL penalty refers to.

    A given ``ref_model``; else, for a policy with an adapter, the same weights with the adapter off; else a frozen copy
    of the policy as it is now.

    ``ref_model`` stays as it is: a view of its weights is used, or a float32 copy.

    Raises:
        ValueError: ``ref_model`` has another vocabulary than the policy, or weights that are trained.
    """

    def __init__(self, policy: CausalLM, ref_model: PreTrainedModel | None = None) -> None:
        self.adapter_off = ref_model is None and hasattr(policy, "disable_adapter")
        if ref_model is not None:
            n_policy, n_ref = (m.get_input_embeddings().num_embeddings for m in (policy, ref_model))
            if n_ref != n_policy:
                raise ValueError(
                    f"ref_model knows {n_ref} tokens and the policy {n_policy}: a KL needs distributions over the same "
                    f"vocabulary. Give a reference with the policy's tokenizer and embedding size."
                )
            check_not_trained(ref_model, policy)
            ref_model = frozen_view(as_float32(ref_model, "ref_model")).to(next(policy.parameters()).device)
        model: Any = policy if self.adapter_off else ref_model if ref_model is not None else copy.deepcopy(policy)
        if not self.adapter_off:
            model = model.requires_grad_(False)
        self.model = model.eval()
        self.language_model = LanguageModel(self.model)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the states before each completion token."""
        with self._adapter_off():
            return self.language_model.logits_of(self.language_model.read(tokens))[:, :-1]

    def _adapter_off(self) -> contextlib.AbstractContextManager:
        return self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext()
