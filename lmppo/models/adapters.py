"""peft adapters on the policy: which are right, loading and merging them, and what switching them off gives."""

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmppo.models.held import plain
from lmppo.models.language_model import vocab_size_of
from lmppo.models.names import parameters_of
from lmppo.models.probe import PADDING, probe_tokens
from lmppo.pretrained import UntrustedModelError, find_base, find_source, load_peft

if TYPE_CHECKING:
    from peft import PeftConfig

_IDS_AT_ONCE = 8192  # of an embedding that is compared row by row
# Methods that need more of a training loop than gradients, and what that is.
_NEEDS_MORE = {
    "ADALORA": "moves ranks between layers by a call of its own after each step, which lmppo does not make",
    "POLY": "needs the task of each row",
    "XLORA": "computes how to mix its adapters in a pass of its own before each pass",
}
# Layers whose weights the kernels of these families read by themselves: peft refuses to adapt them.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_NOT_ADAPTED = ["conv1d", "out_proj"]


def check_adapter(policy: Any) -> None:
    """Refuse an adapter with which log-probabilities or exports would be wrong.

    Raises:
        ValueError: Names the adapter and what to use instead.
    """
    from peft import PeftModel

    if not isinstance(policy, PeftModel):
        if hasattr(policy, "peft_config") or getattr(policy, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"model is a {type(policy).__name__} with an adapter within: give a peft.PeftModel instead, such as "
                f"PeftModel.from_pretrained(base_model, adapter, is_trainable=True), or the adapter's directory."
            )
        return
    if len(policy.active_adapters) != 1:
        raise ValueError(
            f"model has the active adapters {list(policy.active_adapters)}: expected one. Combine them with "
            f"add_weighted_adapter(), or merge all but one, and activate the one to be trained with set_adapter()."
        )
    _check_method(policy.peft_config[policy.active_adapter])


def _check_method(peft_config: "PeftConfig") -> None:
    method = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    why = _NEEDS_MORE.get(method, "")
    if getattr(peft_config, "alora_invocation_tokens", None) is not None:
        why = "with alora_invocation_tokens depends on where these tokens are, which the cache of keys and values hides"
    elif peft_config.is_prompt_learning:
        why = "puts states of its own before the prompt, for which peft drops the position ids that left padding needs"
    elif peft_config.is_adaption_prompt:
        why = "adds to attention in a way that neither the cache of keys and values nor merging supports"
    if why:
        raise ValueError(
            f"{type(peft_config).__name__}: {method} {why}. Use an adapter of the weights, such as LoraConfig."
        )


def add_adapter(policy: Any, peft_config: "PeftConfig") -> Any:
    """The policy with a fresh adapter.

    Raises:
        ValueError: The policy has an adapter, or log-probabilities or exports would be wrong with the new one.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(policy, PeftModel):
        raise ValueError("model has an adapter already: leave peft_config out to go on training that one.")
    check_adapter(policy)
    _check_method(peft_config)
    init = getattr(peft_config, "init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={init!r} changes the base weights, so the exported adapter would not fit the model "
            f"that it was made for: use True or 'gaussian'."
        )
    if peft_config.target_modules == "all-linear" and policy.config.model_type in _MAMBA:
        peft_config = copy.copy(peft_config)
        peft_config.exclude_modules = _NOT_ADAPTED
    return get_peft_model(policy, peft_config)


def base_of_adapter(name: str, *, trust_remote_code: bool = False) -> str | None:
    """The name of the model that the adapter in a directory or on the Hub is for; None if no adapter is there.

    Raises:
        UntrustedModelError: What is there, or the base model, cannot be loaded safely.
    """
    try:
        adapter = find_source(name, trust_remote_code=trust_remote_code)
    except UntrustedModelError:
        raise
    except OSError:  # loading the model says what is missing
        return None
    if adapter.adapter_base is not None:
        find_base(adapter, trust_remote_code=trust_remote_code)
    return adapter.adapter_base


def load_adapter(base: Any, name: str, *, merge: bool = False, trust_remote_code: bool = False) -> Any:
    """A model with the adapter of a directory or of the Hub on it, to be trained on, or merged.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code that is not trusted.
        ValueError: It is to be merged, and that is not possible.
    """
    policy = load_peft(base, name, trust_remote_code=trust_remote_code)
    check_adapter(policy)
    if not merge:
        return policy
    try:
        merged = merge_adapter(policy.eval())
    except Exception as error:  # what peft objects to differs from method to method
        raise ValueError(
            f"The adapter {name!r} cannot be merged ({error}), so no new one can be put on top of it. Leave peft_config "
            f"out to go on training it."
        ) from error
    merged.merged_adapter = name
    return merged


def merge_adapter(policy: Any) -> Any:
    """The base model with the active adapter merged into its weights; the policy itself is used up."""
    _untie_adapted(policy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # untied by now
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        return policy.merge_and_unload()


def copy_to(policy: Any, device: str) -> Any:
    """A copy on another device; nothing is copied on the device where the policy is."""
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(plain(p.detach()).to(device, copy=True), False) for p in policy.parameters()
    }
    tensors |= {id(buffer): buffer.to(device, copy=True) for buffer in policy.buffers()}
    return copy.deepcopy(policy, tensors)


def trained_beside(policy: Any) -> dict[str, nn.Parameter]:
    """What is trained and is no part of the adapter as peft saves it."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter, save_embedding_layers=False)
    places = {(t.data_ptr(), t.shape) for t in saved.values()}
    return {
        name: parameter
        for name, parameter in parameters_of(policy).items()
        if parameter.requires_grad and (parameter.data_ptr(), parameter.shape) not in places
    }


def _untie_adapted(policy: nn.Module) -> None:
    """Give every module that an adapter wraps weights of its own, so that merging changes no other module."""
    adapted: dict[int, Any] = {id(m.base_layer): m.base_layer for m in policy.modules() if hasattr(m, "base_layer")}
    holders = Counter(id(p) for m in policy.modules() for p in m._parameters.values() if p is not None)
    for module in adapted.values():
        for name, parameter in module._parameters.items():
            if parameter is not None and holders[id(parameter)] > 1:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


@contextlib.contextmanager
def adapter_off(policy: Any) -> Iterator[None]:
    """Within it the adapter is off; afterwards everything is trained or frozen as before.

    peft switches an adapter on again as one that is trained, whatever it was.
    """
    trained = [(p, p.requires_grad) for p in policy.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")  # biases are copied
            with policy.disable_adapter():
                yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def probe_ids(model: Any) -> Tensor:
    """``(1, S)`` a few plain tokens, the same at every call and no more than the model can read, to compare logits on."""
    tokens = probe_tokens(model)
    row = int(tokens.prompt_mask.sum(dim=1).argmax())
    return tokens.input_ids[row : row + 1, PADDING:]


@torch.no_grad()
def probe_logits(model: Any, ids: Tensor) -> Tensor:
    """``(1, S, V)`` the model's logits of :func:`probe_ids`."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@torch.no_grad()
def adapter_changes_nothing(policy: Any) -> bool:
    """Whether the policy computes the same with its adapter off, to the bit.

    Logits of a few tokens show it for everything but the embedding, of which they read a few rows: all rows are compared.
    """
    ids = probe_ids(policy)
    logits = probe_logits(policy, ids)
    with adapter_off(policy):
        if not torch.equal(probe_logits(policy, ids), logits):
            return False
    embedding = policy.get_input_embeddings()
    for ids in torch.arange(vocab_size_of(policy), device=logits.device).split(_IDS_AT_ONCE):
        rows = embedding(ids)
        with adapter_off(policy):
            if not torch.equal(embedding(ids), rows):
                return False
    return True
