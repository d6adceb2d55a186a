"""Policy and critic as one module, and the frozen reference.

Dropout is off everywhere, always: the modules stay in evaluation mode, in training as well, so that sampling and
learning see the same function and the first ratio is 1. Position ids always come from the attention mask: GPT-2 counts
positions from the left edge otherwise, padding included, and its log-probabilities are silently wrong.

Axes: ``B`` sequences, ``P`` prompt positions, ``T`` completion positions, ``S = P + T``, ``H`` hidden,
``V`` vocabulary, ``K`` reward streams.
"""

import contextlib
import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmppo.experience import select_rows, trim
from lmppo.functional import token_logprobs

if TYPE_CHECKING:
    from peft import PeftConfig


def attention_mask_of(prompt_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """``(B, P + T)`` what the model may attend to: the prompt, and the completion up to its last counted token.

    Gaps within ``completion_mask`` (tokens put there by an environment) are part of the context; padding is not.
    """
    inside = completion_mask.flip(1).cummax(1).values.flip(1)
    return torch.cat([prompt_mask, inside], dim=1)


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """``(B, S)`` each token's place among the tokens that are there, from 0; padding gets 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def load_weights(auto_class: Any, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained`` in float32, safetensors only, with one clear message when it fails.

    Raises:
        OSError: The model is neither a directory with safetensors weights nor a reachable Hub id.
    """
    try:
        return auto_class.from_pretrained(name_or_path, dtype=torch.float32, use_safetensors=True, **kwargs)
    except OSError as error:
        path = Path(name_or_path)
        if path.is_dir() and list(path.glob("*.bin")) and not list(path.glob("*.safetensors")):
            raise OSError(
                f"{name_or_path!r} holds pickled weights only (*.bin), which can run code when loaded. Convert them "
                f"once: load the model with transformers and save_pretrained() it again."
            ) from error
        raise OSError(
            f"Could not load a model from {name_or_path!r}: it is neither a local directory with config.json and "
            f"safetensors weights nor a Hub id reachable from here. ({str(error).splitlines()[0]})"
        ) from error


def load_policy(model: "str | PreTrainedModel", peft_config: "PeftConfig | None" = None) -> nn.Module:
    """The policy: loaded if named, float32, with a fresh adapter if ``peft_config`` is given.

    Raises:
        OSError: The model cannot be loaded.
        ValueError: An adapter is asked for on a model that has one, or starts from something other than the identity.
        TypeError: ``model`` is neither a name nor a model that can generate.
    """
    policy = load_weights(AutoModelForCausalLM, str(model)) if isinstance(model, str | Path) else model
    if not hasattr(policy, "get_output_embeddings") or policy.get_output_embeddings() is None:
        raise TypeError(f"model is a {type(policy).__name__}: expected a causal language model or the name of one.")
    policy = policy.float()
    if peft_config is None:
        return policy
    from peft import PeftModel, get_peft_model

    if isinstance(policy, PeftModel):
        raise ValueError("model has an adapter already: leave peft_config out to go on training that one.")
    starts_changed = getattr(peft_config, "init_lora_weights", True) not in (True, "gaussian", "orthogonal")
    if starts_changed:
        raise ValueError(
            f"init_lora_weights={peft_config.init_lora_weights!r} changes the base weights, so the model with its "
            f"adapter off would not be the reference: use True or 'gaussian'."
        )
    return get_peft_model(policy, peft_config, autocast_adapter_dtype=False)


class ActorCritic(nn.Module):
    """Policy and critic in one module, so that one forward pass (and one DDP wrapper) serves both.

    Without ``critic`` they share the trunk: a linear value head, zero at first, reads the policy's last hidden state.
    With it, the critic is a model of its own with one output per stream.

    Args:
        policy: A causal language model, plain or with a peft adapter.
        critic: ``None``, or a token-classification model with ``n_streams`` labels.
        n_streams: Number of reward streams ``K``.
    """

    policy: Any
    critic: Any
    value_head: Any

    def __init__(self, policy: Any, critic: PreTrainedModel | None = None, n_streams: int = 1) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = None
        self.n_streams = n_streams
        if critic is None:
            self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, n_streams, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(next(policy.parameters()).device)
        self.eval()

    def train(self, mode: bool = True) -> "ActorCritic":
        """Stay in evaluation mode: dropout is off everywhere."""
        return super().train(False)

    def policy_parameters(self) -> list[nn.Parameter]:
        """The parameters the policy loss may move."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the value loss moves."""
        module = self.value_head if self.critic is None else self.critic
        return [p for p in module.parameters() if p.requires_grad]

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        values_only: bool = False,
        policy_only: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the distributions the completion's tokens were drawn from, and the values of those states.

        Args:
            prompt_ids: ``(B, P)``.
            prompt_mask: ``(B, P)``.
            completion_ids: ``(B, T)``.
            completion_mask: ``(B, T)``.
            values_only: The policy is frozen: no logits, and no gradient reaches the trunk.
            policy_only: The critic is left alone: no values.

        Returns:
            ``logits (B, T, V)`` (None if ``values_only``) and ``values (B, T, K)`` (None if ``policy_only``); position
            t of both is the state before token t.
        """
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        attention_mask = attention_mask_of(prompt_mask, completion_mask)
        n_completion = completion_ids.shape[1]
        logits: Any = None
        hidden: Any = None
        if not values_only or self.critic is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not values_only):
                logits, hidden = causal_forward(self.policy, input_ids, attention_mask, n_completion)
        if policy_only:
            return logits, None
        if self.critic is None:
            return (None if values_only else logits), self.value_of(hidden)
        return logits, self.critic_values(input_ids, attention_mask, n_completion)

    def last_values(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """``(B, K)`` values of the state after each row's last counted token; shapes as in :meth:`forward`."""
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        attention_mask = attention_mask_of(prompt_mask, completion_mask)
        last = (attention_mask * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        if self.critic is not None:
            return self.critic(**_inputs(self.critic, input_ids, attention_mask)).logits[rows, last].float()
        out = self.policy(
            **_inputs(self.policy, input_ids, attention_mask), output_hidden_states=True, logits_to_keep=1
        )
        return self.value_of(out.hidden_states[-1][rows, last])

    def value_of(self, hidden: Tensor) -> Tensor:
        """The shared trunk's value head, in float32 whatever the autocast: ``(..., H) -> (..., K)``."""
        assert self.value_head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float())

    def critic_values(self, input_ids: Tensor, attention_mask: Tensor, n_completion: int) -> Tensor:
        """``(B, T, K)`` values of a critic that is a model of its own, fed the same tokens."""
        assert self.critic is not None
        values = self.critic(**_inputs(self.critic, input_ids, attention_mask)).logits
        return values[:, -n_completion - 1 : -1].float()


def causal_forward(model: Any, input_ids: Tensor, attention_mask: Tensor, n_completion: int) -> tuple[Tensor, Tensor]:
    """Teacher forcing: what the model says at the ``T`` states before each completion token.

    Args:
        model: A causal language model.
        input_ids: ``(B, S)``, the completion in the last ``T`` columns.
        attention_mask: ``(B, S)``.
        n_completion: ``T``.

    Returns:
        ``logits (B, T, V)`` and the last hidden states ``(B, T, H)``.
    """
    out = model(**_inputs(model, input_ids, attention_mask), output_hidden_states=True, logits_to_keep=n_completion + 1)
    return out.logits[:, :-1], out.hidden_states[-1][:, -n_completion - 1 : -1]


@torch.no_grad()
def score_tokens(logits_of: Any, record: Any, temperature: float, micro_batch_size: int) -> Tensor:
    """``(B, T)`` log-probabilities of sampled tokens under a model, a few rows at a time; 0 where the mask is False.

    Args:
        logits_of: ``(prompt_ids, prompt_mask, completion_ids, completion_mask) -> (B, T, V)``.
        record: The tokens, with those fields and ``support``.
        temperature: Divides the logits.
        micro_batch_size: Rows per forward pass.
    """
    result = torch.zeros(record.completion_ids.shape, device=record.completion_ids.device)
    for start in range(0, len(result), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        micro = trim(select_rows(record, rows))
        logits = logits_of(micro.prompt_ids, micro.prompt_mask, micro.completion_ids, micro.completion_mask)
        logprobs = token_logprobs(logits, micro.completion_ids, temperature=temperature, support=micro.support)
        result[rows, : logprobs.shape[1]] = torch.where(micro.completion_mask, logprobs, 0.0)
    return result


def _inputs(model: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if takes_position_ids(model):
        inputs["position_ids"] = position_ids_of(attention_mask)
    return inputs


def takes_position_ids(model: Any) -> bool:
    """Whether the model counts positions itself unless told (all but the ALiBi models)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(base.forward).parameters


class Reference:
    """The frozen policy the KL penalty refers to.

    A given ``ref_model``; else, for a policy with an adapter, the same weights with the adapter off; else a frozen copy
    of the policy as it is now.

    Raises:
        ValueError: ``ref_model`` has another vocabulary than the policy.
    """

    def __init__(self, policy: Any, ref_model: Any = None) -> None:
        self.adapter_off = ref_model is None and hasattr(policy, "disable_adapter")
        if ref_model is not None:
            n_policy, n_ref = (m.get_input_embeddings().num_embeddings for m in (policy, ref_model))
            if n_ref != n_policy:
                raise ValueError(
                    f"ref_model knows {n_ref} tokens and the policy {n_policy}: a KL needs distributions over the same "
                    f"vocabulary. Give a reference with the policy's tokenizer and embedding size."
                )
        model = policy if self.adapter_off else ref_model if ref_model is not None else copy.deepcopy(policy)
        if not self.adapter_off:
            model = model.float().eval().requires_grad_(False)
        self.model = model
        self.is_initial_policy = ref_model is None

    @torch.no_grad()
    def logits(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """``(B, T, V)`` logits of the states before each completion token."""
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        attention_mask = attention_mask_of(prompt_mask, completion_mask)
        with self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext():
            return causal_forward(self.model, input_ids, attention_mask, completion_ids.shape[1])[0]
