"""The accelerator of a run, and what launchers may do that would make its numbers wrong."""

import atexit
import math
import os
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState

from lmppo.allocator import keep_freed_memory
from lmppo.config import PPOConfig
from lmppo.matrix_products import suits_onednn, use_onednn
from lmppo.update import critic_epochs, kl_limit


def make_accelerator(args: PPOConfig, *, evaluates: bool) -> Accelerator:
    """The accelerator of a run; a launch that would start several runs in one directory is refused.

    Args:
        args: The configuration.
        evaluates: Whether there is an evaluation set, so that its completions are shared among the processes too.

    Raises:
        RuntimeError: The launcher started more processes than accelerate sees, or the model would be sharded.
        ModuleNotFoundError: A tracker is not installed.
        ValueError: The sizes of the configuration do not divide over the processes, or the launcher (or an Accelerator
            made before) asks for accumulation of gradients or a precision that lmppo does not support.
    """
    _check_launch(args)
    together = args.objective != "trpo" and critic_epochs(args) == args.ppo_epochs
    together = together and kl_limit(args) == math.inf  # or the policy may stop before the critic
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
    if accelerator.device.type == "cpu" and accelerator.num_processes > 1 and torch.cuda.is_available():
        raise RuntimeError(
            "Several processes on the CPU of a machine with GPUs: accelerate's barrier would name GPUs that they do not "
            "use. Hide them, with CUDA_VISIBLE_DEVICES= before the command (see docs/distributed.md)."
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
    args.check_processes(accelerator.num_processes, evaluates=evaluates)
    if accelerator.num_processes > 1:
        atexit.register(_end_process_group)
    if accelerator.mixed_precision == "bf16" and not args.bf16:
        accelerator.print("Forward passes run in bfloat16, as the launcher or an earlier Accelerator says, not bf16.")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        if suits_onednn():
            use_onednn()
    if args.cpu_threads is not None and accelerator.device.type == "cpu":
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(args.cpu_threads or max(1, share))
    return accelerator


def _end_process_group() -> None:
    """End the process group while Python still runs.

    A thread of the group that asks for the interpreter's lock when Python is already shutting down aborts the process
    ("terminate called without an active exception"), and then the launcher reports a finished run as failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_launch(args: PPOConfig) -> None:
    """Refuse what the launcher's environment, or an Accelerator made before, would silently do to the numbers."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ValueError(
            f"The launcher asks for gradient_accumulation_steps={steps}, which would divide every gradient: set it to 1 "
            f"in accelerate's configuration (or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS). To save memory, lower "
            f"micro_batch_size: minibatch_size={args.minibatch_size} stays the size of a step."
        )
    precision = "bf16" if args.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    source = "The launcher asks for"
    if AcceleratorState._shared_state:  # accelerate keeps what the first Accelerator of a process was made with
        precision, source = AcceleratorState().mixed_precision, "An Accelerator made earlier in this process holds"
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"{source} mixed_precision={precision!r}, and lmppo runs in float32 or bfloat16: set mixed_precision to "
            f"'no', or to 'bf16' (the setting bf16 does the same)."
        )
    if precision == "bf16" and args.objective == "trpo":
        raise ValueError(
            f"{source} mixed_precision='bf16', whose rounding is as large as the KL that objective='trpo' measures: "
            f"set mixed_precision to 'no'."
        )
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        names = [f"PARALLELISM_CONFIG_{kind}_SIZE" for kind in ("DP_SHARD", "TP", "CP", "SP")]
        wrong = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name, "1") != "1"]
        if wrong:
            raise RuntimeError(
                f"The launcher asks for {', '.join(wrong)}, which shards the model or its inputs; lmppo does not "
                f"support that: use plain data parallelism (--multi_gpu)."
            )


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a bit-identical resume needs to be the same."""
    return {
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "device": accelerator.device.type,
        "matrix_products": "oneDNN" if accelerator.device.type == "cpu" and suits_onednn() else None,
        "mixed_precision": accelerator.mixed_precision,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
