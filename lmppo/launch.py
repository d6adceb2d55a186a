"""The accelerator of a run, and what launchers may do that would make its numbers wrong."""

import os
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

from lmppo.config import PPOConfig
from lmppo.update import critic_epochs


def make_accelerator(args: PPOConfig) -> Accelerator:
    """The accelerator of a run; a launch that would start several runs in one directory is refused.

    Raises:
        RuntimeError: The launcher started more processes than accelerate sees, or the model would be sharded.
        ModuleNotFoundError: A tracker is not installed.
        ValueError: The sizes of the configuration do not divide over the processes.
    """
    together = args.objective != "trpo" and critic_epochs(args) == args.ppo_epochs
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
