"""A formula for the peak memory of an iteration, from a model's configuration.

Weights, gradients and the optimizer's state are counted on a model without memory (torch's meta device). What autograd
keeps of a token is counted in a real step of a small model of the same proportions, so that it is that of this tree.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from run_lmppo import lora_config, make_trainer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from workloads import Workload, share_of_even

from lmppo.groups import MOST_TOKENS
from lmppo.models.chunks import largest_chunk
from lmppo.models.held import HeldInBFloat16
from lmppo.setting_rules import FROZEN_DTYPES

FLOAT = 4  # bytes
LOGITS = 4  # tensors of the logits' size at once: the logits, what their log-probabilities keep, and two gradients
DRAW = 24  # bytes for each token of the vocabulary while one is drawn: logits, probabilities, and their sums in float64


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        critic: Whether the critic is a model of its own, of the policy's size.
        lora: Whether an adapter of rank 16 on all linear layers is trained, in place of the policy's weights.
        gradient_checkpointing: As in the configuration.
        bf16: As in the configuration.
        frozen_bf16: Whether ``frozen_dtype`` is bfloat16.
    """

    critic: bool = False
    lora: bool = False
    gradient_checkpointing: bool = False
    bf16: bool = False
    frozen_bf16: bool = False


def footprint(
    config: PretrainedConfig,
    setting: Setting,
    kept: float,
    *,
    batch: int,
    micro_batch: int,
    prompt: int,
    length: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Bytes by what they are for.

    Args:
        config: The model.
        setting: What is trained.
        kept: What :func:`kept_per_token` gives for them.
        batch: Completions of a rollout.
        micro_batch: Completions of a forward pass in the update.
        prompt: Tokens of a prompt.
        length: Tokens of a completion.
        device: What it runs on, ``cpu`` or ``accelerator``.
    """
    counts = parameters(config, setting)
    learning = counts["trained"] + counts["critic"]
    layers, tokens = config.num_hidden_layers, prompt + length
    activations = layers * kept
    if setting.gradient_checkpointing:  # each layer's input, and all that one layer keeps
        activations = kept + (1 + setting.critic) * layers * config.hidden_size * FLOAT
    frozen = counts["policy"] - counts["trained"] if setting.frozen_bf16 else 0  # autocast takes it as it is
    copies = 2 * (counts["policy"] - frozen + counts["critic"])
    if setting.lora and setting.gradient_checkpointing:  # frozen weights are cast anew at each use
        copies /= layers
    widened = FLOAT * config.vocab_size * config.hidden_size if setting.frozen_bf16 else 0  # the head, in each product
    heads = config.num_attention_heads
    cached = 2 * layers * config.hidden_size * getattr(config, "num_key_value_heads", heads) / heads
    return {
        "policy": FLOAT * counts["policy"] - 2 * frozen,
        "critic": FLOAT * counts["critic"],
        "reference": 0 if setting.lora else (2 if setting.frozen_bf16 else FLOAT) * counts["trained"],
        "gradients": FLOAT * learning,
        "optimizer": 2 * FLOAT * learning,
        "rollout": batch * (tokens * cached * (2 if setting.bf16 else FLOAT) + DRAW * config.vocab_size),
        "activations": min(micro_batch * tokens, max(tokens, MOST_TOKENS[device])) * activations,
        "logits": LOGITS
        * FLOAT
        * config.vocab_size
        * min(micro_batch * length, largest_chunk(config.vocab_size, device)),
        "copies": (copies if setting.bf16 else 0) + widened,
    }


def peak(terms: dict[str, float]) -> float:
    """Bytes at the worst moment: what stays, and the greater of what the rollout and the update need beside it."""
    stays = sum(terms[name] for name in ("policy", "critic", "reference", "gradients", "optimizer", "copies"))
    return stays + max(terms["rollout"], terms["activations"] + terms["logits"])


def parameters(config: PretrainedConfig, setting: Setting) -> dict[str, int]:
    """How many numbers the policy (with its adapter) has, how many of them are trained, and how many the critic has."""
    with torch.device("meta"):
        policy: Any = AutoModelForCausalLM.from_config(config)
        trunk = AutoModel.from_config(config) if setting.critic else torch.nn.Module()
        if setting.lora:
            from peft import get_peft_model

            policy = get_peft_model(policy, lora_config(policy))
    sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    return {
        "policy": sum(n for n, _ in sizes),
        "trained": sum(n for n, is_trained in sizes if is_trained),
        "critic": config.hidden_size + 1 + sum(p.numel() for p in trunk.parameters()),
    }


def kept_per_token(config: PretrainedConfig, setting: Setting) -> float:
    """Bytes that autograd keeps for the backward pass, of each token in each layer (of the policy and of its critic).

    What does not grow with the layers and the tokens cancels: models of one and two layers read two numbers of rows.
    """
    heads = config.num_attention_heads
    shrink = 8 if config.hidden_size // heads >= 64 else 1
    few, many, length = 1, 3, 16
    kept = {}
    for layers in (1, 2):
        small = copy.deepcopy(config)
        small.vocab_size, small.num_hidden_layers, small.hidden_size = 64, layers, config.hidden_size // shrink
        for name in ("intermediate_size", "head_dim"):
            if getattr(config, name, None):
                setattr(small, name, getattr(config, name) // shrink)
        if getattr(config, "layer_types", None):
            small.layer_types = config.layer_types[:layers]
        for rows in (few, many):
            kept[layers, rows] = saved_bytes(small, setting, rows, length)
    tokens = 2 * length * (many - few)
    return shrink * (kept[2, many] - kept[2, few] - kept[1, many] + kept[1, few]) / tokens


def saved_bytes(config: PretrainedConfig, setting: Setting, rows: int, length: int) -> int:
    """Bytes that autograd keeps of a step of one forward pass, over prompts and completions of the same length."""
    shared = AcceleratorState._shared_state  # the precision of a process's first trainer, which this need not be
    others = dict(shared)
    shared.clear()
    work = Workload(vocab=config.vocab_size, batch=rows, prompt=(length, length), length=length, epochs=1)
    config.num_labels = 1
    critic = {"critic": AutoModelForTokenClassification.from_config(config)} if setting.critic else {}
    trainer = make_trainer(
        AutoModelForCausalLM.from_config(config),
        work,
        lambda completion_ids, **_: [share_of_even(ids) for ids in completion_ids],
        settings={"use_cpu": True, "bf16": setting.bf16, "frozen_dtype": FROZEN_DTYPES[setting.frozen_bf16]},
        lora=setting.lora,
        **critic,
    )
    parameters = trainer.actor_critic.parameters()
    weights = {p.untyped_storage().data_ptr() for p in parameters if not isinstance(p, HeldInBFloat16)}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, HeldInBFloat16):  # a weight, or a view of one
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no memory is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step()
    shared.clear()
    shared.update(others)
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in weights)
