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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmppo.functional import token_logprobs
from lmppo.functional._inputs import widen
from lmppo.protocols import CausalLM
from lmppo.records import TokenRecord, Tokens

if TYPE_CHECKING:
    from peft import PeftConfig

HEADS = ("logits", "values")


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

    def __init__(self, policy: CausalLM, critic: PreTrainedModel | None = None, n_streams: int = 1) -> None:
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
        self.language_model = LanguageModel(policy)

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

    def forward(self, tokens: Tokens, heads: Sequence[str] = HEADS) -> dict[str, Tensor]:
        """What is asked for of the states before each completion token, from one pass of the trunk.

        Args:
            tokens: Prompts and completions.
            heads: Any of ``"logits"`` and ``"values"``. Values alone leave the policy as it is: no gradient reaches a
                trunk that they share with it.

        Returns:
            ``{"logits": (B, T, V), "values": (B, T, K)}``, as far as asked; position t of both is the state before
            token t.
        """
        outputs = {}
        states: Any = None
        if "logits" in heads or self.critic is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and "logits" in heads):
                states = self.language_model.read(tokens)
        if "logits" in heads:
            outputs["logits"] = self.language_model.logits_of(states)[:, :-1]
        if "values" in heads:
            outputs["values"] = self.values_of(states.hidden[:, :-1]) if self.critic is None else self._critic(tokens)
        return outputs

    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the distributions that the completion's tokens were drawn from."""
        return self(tokens, ("logits",))["logits"]

    def last_values(self, tokens: Tokens) -> Tensor:
        """``(B, K)`` values of the state after each row's last counted token."""
        attention_mask = tokens.attention_mask
        columns = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
        last = (attention_mask * columns).argmax(dim=1)
        rows = torch.arange(len(last), device=last.device)
        if self.critic is not None:
            return self.critic(**inputs_of(self.critic, tokens)).logits[rows, last].float()
        states = self.language_model.forward(last=attention_mask.shape[1], **inputs_of(self.policy, tokens))
        return self.values_of(states.hidden[rows, last])

    def values_of(self, hidden: Tensor) -> Tensor:
        """The shared trunk's value head, in float32 whatever the autocast: ``(..., H) -> (..., K)``."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float())

    def _critic(self, tokens: Tokens) -> Tensor:
        n_completion = tokens.completion_ids.shape[1]
        return self.critic(**inputs_of(self.critic, tokens)).logits[:, -n_completion - 1 : -1].float()


@torch.no_grad()
def score_tokens(
    logits_of: Callable[[Tokens], Tensor], record: TokenRecord, temperature: float, micro_batch_size: int
) -> Tensor:
    """``(B, T)`` log-probabilities of sampled tokens under a model, a few rows at a time; 0 where the mask is False.

    Args:
        logits_of: From tokens to logits ``(B, T, V)``.
        record: The tokens and their ``support``.
        temperature: Divides the logits.
        micro_batch_size: Rows per forward pass.
    """

    def score(micro: TokenRecord) -> Tensor:
        return token_logprobs(
            logits_of(micro.tokens),
            micro.tokens.completion_ids,
            temperature=temperature,
            support=micro.support.allowed(),
        )

    return record.per_token(score, micro_batch_size=micro_batch_size)


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


class Reference:
    """The frozen policy the KL penalty refers to.

    A given ``ref_model``; else, for a policy with an adapter, the same weights with the adapter off; else a frozen copy
    of the policy as it is now.

    Raises:
        ValueError: ``ref_model`` has another vocabulary than the policy.
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
        model: Any = policy if self.adapter_off else ref_model if ref_model is not None else copy.deepcopy(policy)
        if not self.adapter_off:
            model = model.float().requires_grad_(False)
        self.model = model.eval()
        self.language_model = LanguageModel(self.model)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """``(B, T, V)`` logits of the states before each completion token."""
        with self._adapter_off():
            return self.language_model.logits_of(self.language_model.read(tokens))[:, :-1]

    def _adapter_off(self) -> contextlib.AbstractContextManager:
        return self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext()
