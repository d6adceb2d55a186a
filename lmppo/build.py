"""The parts of a trainer, built from the configuration and checked before anything is sampled."""

import os
from collections.abc import Sequence
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

from lmppo.config import PPOConfig
from lmppo.kl_control import AdaptiveKL, FixedKL
from lmppo.models import ActorCritic, load_critic
from lmppo.prompts import PromptEncoder
from lmppo.sampling import SamplingParams
from lmppo.update import epochs_of


def make_accelerator(args: PPOConfig) -> Accelerator:
    """The accelerator of a run; a launch that would start several runs in one directory is refused.

    Raises:
        RuntimeError: The launcher started more processes than accelerate sees, or the model would be sharded.
        ModuleNotFoundError: A tracker is not installed.
        ValueError: The sizes of the configuration do not divide over the processes.
    """
    together = all(learns.policy == learns.critic for learns in epochs_of(args, policy_frozen=False))
    always = args.critic_warmup_steps == 0 and (together or not args.uses_critic)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not always)  # a critic or a policy that sits out
    accelerator = Accelerator(
        cpu=args.use_cpu or not torch.accelerator.is_available(),
        mixed_precision="bf16" if args.bf16 else None,
        log_with=[tracker for tracker in args.report_to if tracker != "none"] or None,
        project_dir=args.output_dir,
        kwargs_handlers=[ddp],
    )
    missing = set(args.report_to) - {"none", "all"} - {str(tracker) for tracker in accelerator.log_with}
    if missing:  # accelerate leaves them out without a word
        raise ModuleNotFoundError(
            f"report_to={args.report_to}: {', '.join(sorted(missing))} is not installed. Install it, or leave it out."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"The launcher started {launched} processes, but accelerate sees {accelerator.num_processes}: each would "
            f"run alone and overwrite the others. On CPUs, launch with ACCELERATE_USE_CPU=true and --multi_gpu "
            f"(see docs/distributed.md)."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RuntimeError(
            f"{accelerator.distributed_type.value} shards the model, which lmppo does not support yet: use plain "
            f"data parallelism (--multi_gpu), and LoRA (--use_peft) to save memory."
        )
    args.check_processes(accelerator.num_processes)
    if args.cpu_threads is not None and accelerator.device.type == "cpu":
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(args.cpu_threads or max(1, share))
    return accelerator


def describe_model(model: ActorCritic) -> dict[str, Any]:
    """What `run_config.yaml` says of the model, so that a run is not continued with another one."""
    settings: dict[str, Any] = {"model_name_or_path": getattr(model.policy.config, "_name_or_path", "")}
    if model.critic is not None:
        settings["critic"] = model.critic.config._name_or_path or type(model.critic).__name__
    if hasattr(model.policy, "peft_config"):
        adapter = model.policy.peft_config[model.policy.active_adapter].to_dict()
        settings["adapter"] = {n: adapter.get(n) for n in ("r", "lora_alpha", "target_modules", "modules_to_save")}
        if isinstance(adapter.get("target_modules"), set | list):
            settings["adapter"]["target_modules"] = sorted(adapter["target_modules"])  # a set has no order to compare
    return settings


def make_callbacks(callbacks: Sequence[Any] | None) -> list[TrainerCallback]:
    """The callbacks, classes made into objects as transformers does.

    Raises:
        TypeError: Something is no callback.
    """
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks={callbacks!r} is a {type(callbacks).__name__}; expected a list of callbacks.")
    made = [callback() if isinstance(callback, type) else callback for callback in callbacks or []]
    for callback in made:
        if not isinstance(callback, TrainerCallback):
            raise TypeError(
                f"callbacks has a {type(callback).__name__}; expected transformers.TrainerCallback objects."
            )
    return made


def make_optimizer(model: ActorCritic, args: PPOConfig) -> torch.optim.AdamW:
    """AdamW with the policy's parameters in one group and the critic's own in another.

    Raises:
        ValueError: Every parameter of the policy is frozen.
    """
    groups = [{"params": model.policy_parameters()}, {"params": model.critic_parameters()}]
    if not groups[0]["params"]:
        raise ValueError(
            "The policy has no trainable parameters. Load an adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True), and give the reference as a model of its own, not the policy itself."
        )
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay
    )


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a bit-identical resume needs to be the same."""
    return {
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def make_actor_critic(policy: Any, critic: Any, args: PPOConfig, *, n_streams: int) -> ActorCritic:
    """Policy and critic; without a use for the critic its head stays as it is.

    Raises:
        ValueError: A critic is given, and the baseline uses none; or its labels or vocabulary do not fit.
        OSError: The critic cannot be loaded.
    """
    if critic is not None and not args.uses_critic:
        raise ValueError(f"baseline={args.baseline!r} uses no critic: leave critic out, or set baseline='critic'.")
    model = ActorCritic(policy, None if critic is None else load_critic(critic, policy, n_streams), n_streams)
    if not args.uses_critic:
        model.value_head.requires_grad_(False)
    return model


def make_kl_control(args: PPOConfig) -> FixedKL | AdaptiveKL:
    """The controller of the KL coefficient that the configuration asks for."""
    if args.kl_target is None:
        return FixedKL(args.kl_coef)
    return AdaptiveKL(args.kl_coef, target=args.kl_target, horizon=args.kl_horizon)


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer that lies beside a model's weights.

    Raises:
        OSError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer could be loaded from {name_or_path!r}: it must be a directory or a Hub id that holds one. "
            f"For a model without, pass processing_class. ({str(error).splitlines()[0]})"
        ) from error


def make_sampling_params(args: PPOConfig, tokenizer: Any, policy: PreTrainedModel) -> SamplingParams:
    """The distribution to sample, ending at the model's (or else the tokenizer's) end-of-text tokens."""
    eos = getattr(policy.generation_config, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    return SamplingParams(
        max_completion_length=args.max_completion_length,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
    )


def make_prompt_encoder(tokenizer: Any, readers: dict[str, Any], args: PPOConfig) -> PromptEncoder:
    """The encoder of prompts.

    Args:
        tokenizer: The policy's tokenizer.
        readers: The models that read prompt and completion (None: not there), by their names as arguments; the policy is
            ``"model"``. The shortest context decides how long a prompt may be.
        args: Gives the longest completion.

    Raises:
        ValueError: The tokenizer has tokens that the policy does not know.
    """
    vocab_size = readers["model"].get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model's embedding {vocab_size} rows: they do not "
            f"belong together, or the model needs model.resize_token_embeddings({len(tokenizer)})."
        )
    contexts = {
        name: getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for name, model in readers.items()
        if model is not None
    }
    limits = {name: limit for name, limit in contexts.items() if limit is not None}
    shortest = min(limits, key=lambda name: limits[name], default="model")
    return PromptEncoder(tokenizer, vocab_size, limits.get(shortest), args.max_completion_length, reader=shortest)
