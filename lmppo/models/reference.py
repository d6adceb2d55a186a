"""The frozen policy that the KL penalty refers to."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmppo.models.activations import use_fused_gelu
from lmppo.models.adapters import adapter_changes_nothing, adapter_off
from lmppo.models.frozen_weights import store_frozen
from lmppo.models.language_model import LanguageModel, vocab_size_of
from lmppo.models.loading import as_float32, check_not_trained, frozen_view
from lmppo.models.states import States
from lmppo.records import Tokens, spread


class Reference:
    """The frozen policy the KL penalty refers to: a given ``ref_model``, else the policy as it is now.

    The policy as it is now is a view of it, with frozen copies of what is trained in modules that share all else. Of an
    adapter that changes nothing yet the view has none: it is switched off there, and only what is trained beside it is
    copied, such as biases. Any other adapter stays on, and is copied.

    ``ref_model`` stays as it is: a view of its weights is used, or a float32 copy.

    Attributes:
        rounded: Whether ``frozen_dtype`` has rounded it, so that it is not the policy's equal at the start.

    Args:
        policy: The policy.
        ref_model: The reference, if it is not the policy as it is now.
        num_layers_unfrozen: How many of the policy's top layers are trained; None: all.
        frozen_dtype: What ``ref_model``, or the copies of what is trained, are stored in; the copies of an adapter, which
            are small, stay in float32.

    Raises:
        ValueError: ``ref_model`` has another vocabulary than the policy, or weights that are trained.
    """

    def __init__(
        self,
        policy: Any,
        ref_model: PreTrainedModel | None = None,
        num_layers_unfrozen: int | None = None,
        frozen_dtype: str = "float32",
    ) -> None:
        self.model: Any
        self.adapter_off = False
        if ref_model is not None:
            n_policy, n_ref = vocab_size_of(policy), vocab_size_of(ref_model)
            if n_ref != n_policy:
                raise ValueError(
                    f"ref_model knows {n_ref} tokens and the policy {n_policy}: a KL needs distributions over the same "
                    f"vocabulary. Give a reference with the policy's tokenizer and embedding size."
                )
            check_not_trained(ref_model, policy)
            self.model = frozen_view(as_float32(ref_model, "ref_model"))
        else:
            policy.eval()
            self.adapter_off = hasattr(policy, "disable_adapter") and adapter_changes_nothing(policy)
            with self._adapter(policy):  # peft marks what it has switched off as not trained
                trained = [p for p in policy.parameters() if p.requires_grad]
            self.model = frozen_view(policy, copied=trained)
        own_copy = ref_model is not None or not hasattr(policy, "peft_config")
        what = "and the KL is to these"
        self.rounded = own_copy and store_frozen(self.model, frozen_dtype, "The reference", what)
        self.model.to(next(policy.parameters()).device)
        use_fused_gelu(self.model)
        with self._adapter(self.model):
            if ref_model is not None:
                self.language_model = LanguageModel(self.model, "ref_model")
            else:  # the policy's lower layers are its own
                self.language_model = LanguageModel(self.model, num_layers_unfrozen=num_layers_unfrozen)

    @property
    def vocab_size(self) -> int:
        """``V``."""
        return self.language_model.vocab_size

    @property
    def packs(self) -> bool:
        """Whether it can read several rows one behind the other."""
        return self.language_model.packs

    @torch.no_grad()
    def read(self, tokens: Tokens) -> States:
        """The states before the N counted tokens, ``(1, N, ...)``."""
        with self._adapter(self.model):
            return self.language_model.read(tokens)

    @torch.no_grad()
    def logits_of(self, states: States) -> Tensor:
        """``(1, n, V)`` the logits of some states."""
        with self._adapter(self.model):
            return self.language_model.logits_of(states)

    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the states before the counted tokens, 0 elsewhere."""
        return spread(self.logits_of(self.read(tokens)), tokens.completion_mask)

    def _adapter(self, model: Any) -> contextlib.AbstractContextManager:
        return adapter_off(model) if self.adapter_off else contextlib.nullcontext()
