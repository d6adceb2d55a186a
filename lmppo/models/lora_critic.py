"""A critic that is an adapter of its own on the policy's base: one set of base weights for policy, reference and critic.

No adapter is ever switched. The critic has modules of its own, whose weights are the base's as far as they are not trained,
as the reference has; so whatever runs again in a backward pass is what ran in the forward pass, and its gradients are those
of a model of its own.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from lmppo.models.actor_critic import ActorCritic
from lmppo.models.adapters import add_adapter, base_of_adapter, load_adapter
from lmppo.models.inputs import base_of
from lmppo.models.language_model import freeze_lower_layers
from lmppo.models.loading import frozen_view, print_once
from lmppo.pretrained import UntrustedModelError
from lmppo.protocols import CausalLM

if TYPE_CHECKING:
    from peft import LoraConfig

LORA = "lora"
"""What a user writes in place of a critic's name."""

HEAD = "value_head.safetensors"
"""The file of a value head."""


def with_lora_critic(
    policy: CausalLM,
    n_streams: int = 1,
    *,
    num_layers_unfrozen: int | None = None,
    left: Path | None = None,
    trust_remote_code: bool = False,
) -> ActorCritic:
    """The policy, and a critic that is an adapter on its base with a value head.

    The adapter is made like the policy's, and starts as the base; the value head starts at zero.

    Args:
        policy: A language model with a LoRA adapter.
        n_streams: Number of reward streams.
        num_layers_unfrozen: How many top layers of both are trained; None: all.
        left: A critic of this kind that another run has left. It is taken over if it fits; a line says so, or why not.
        trust_remote_code: Whether code that comes with the base may run.

    Raises:
        UntrustedModelError: The weights of what is left are pickled.
        ValueError: The policy has no LoRA adapter, or one whose making has changed the base.
    """
    config = _lora_config(policy)
    if left is not None:
        try:
            model = _take_over(left, policy, n_streams, num_layers_unfrozen, trust_remote_code)
        except UntrustedModelError:
            raise
        except (ValueError, OSError, RuntimeError) as error:  # the last: weights of other shapes
            print_once(f"Critic: a new adapter, as the one in {left} does not fit. {error}")
        else:
            print_once(f"Critic: taken over from {left}.")
            return model
    return _join(policy, add_adapter(_base_view(policy), config), n_streams, num_layers_unfrozen)


def _lora_config(policy: Any) -> "LoraConfig":
    """The configuration of the policy's adapter, for one that starts as the base."""
    own = policy.peft_config[policy.active_adapter] if hasattr(policy, "peft_config") else None
    method = str(getattr(own and own.peft_type, "value", None))
    if method != "LORA":
        has = "the model has no adapter" if own is None else f"the model's adapter is of the method {method}"
        raise ValueError(
            f"critic={LORA!r} is a second adapter on the policy's base, made like the policy's LoRA adapter, and {has}: "
            f"give peft_config=LoraConfig(...), or another critic."
        )
    config: Any = copy.deepcopy(own)
    if config.init_lora_weights in (False, "orthogonal"):  # which do not start as the base
        config.init_lora_weights = True
    config.layer_replication = None  # the base has been changed by it already
    return config


def _base_view(policy: Any) -> Any:
    """The policy without its adapter, in modules of its own over the same weights, frozen.

    Copied are the weights that the policy trains, and biases, which the adapter of the critic may train.
    """
    copied = [p for name, p in policy.named_parameters() if p.requires_grad or "bias" in name]
    return frozen_view(policy, copied).unload()


def _join(policy: CausalLM, critic: Any, n_streams: int, num_layers_unfrozen: int | None) -> ActorCritic:
    freeze_lower_layers(critic, num_layers_unfrozen)
    return ActorCritic(policy, critic, n_streams, num_layers_unfrozen)


def _take_over(
    left: Path, policy: Any, n_streams: int, num_layers_unfrozen: int | None, trust_remote_code: bool
) -> ActorCritic:
    """What another run has left, if it is an adapter for the same base.

    Raises:
        ValueError: It is for another base, or of another number of streams.
    """
    base = base_of_adapter(str(left), trust_remote_code=trust_remote_code)
    own_base = policy.peft_config[policy.active_adapter].base_model_name_or_path
    merged = getattr(base_of(policy), "merged_adapter", None)
    if not base or base != own_base or merged:
        own = f"{own_base!r} with {merged!r} merged into it" if merged else repr(own_base)
        raise ValueError(
            f"It is an adapter on {base!r}, and the policy's is on {own}. To go on with both, give the run's adapter/ as "
            f"the model, without peft_config."
        )
    head = load_file(left / HEAD)
    if len(head["bias"]) != n_streams:
        raise ValueError(f"It has {len(head['bias'])} outputs; expected {n_streams}, one per reward stream.")
    critic = load_adapter(_base_view(policy), str(left), trust_remote_code=trust_remote_code)
    model = _join(policy, critic, n_streams, num_layers_unfrozen)
    model.value_head.load_state_dict(head)
    return model
