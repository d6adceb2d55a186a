"""One job of lmppo, in a process of its own: `python benchmarks/run_lmppo.py '{"work": {"layers": 4}}'`.

Phases are told apart from outside: sampling ends when the reference is first run, and the reference's pass (with what
`truncation` adds to it) when the rewards are asked for. The values of a critic of its own are part of the sampling.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from measuring import Recorder
from transformers import GPT2ForTokenClassification, PreTrainedModel
from workloads import (
    EOS,
    LEARNING_RATE,
    Workload,
    freeze,
    make_model,
    make_prompts,
    make_tokenizer,
    share_of_even,
)

from lmppo import PPOConfig, PPOTrainer

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(model: PreTrainedModel) -> "LoraConfig":
    """An adapter of rank 16 on every linear layer."""
    from peft import LoraConfig  # the other workloads do without

    conv1d = model.config.model_type == "gpt2"
    return LoraConfig(r=16, target_modules="all-linear", fan_in_fan_out=conv1d, task_type="CAUSAL_LM")


def make_trainer(
    model: PreTrainedModel,
    work: Workload,
    reward: Callable,
    *,
    iterations: int = 1,
    settings: dict[str, Any] | None = None,
    lora: bool = False,
    **arguments: Any,
) -> PPOTrainer:
    """A trainer of the model on a workload; ``settings`` and ``arguments`` are further ones of lmppo."""
    if not work.eos_probability:
        model.generation_config.eos_token_id = None
    sizes = dict.fromkeys(("rollout_batch_size", "minibatch_size", "micro_batch_size"), work.batch)
    fixed = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": iterations,
        "ppo_epochs": work.epochs,
        "max_completion_length": work.length,
        "learning_rate": LEARNING_RATE,
        "disable_tqdm": True,
    }
    return PPOTrainer(
        model=model,
        reward_funcs=reward,
        args=PPOConfig(**(fixed | sizes | (settings or {}))),
        train_dataset=[{"prompt": ids} for ids in make_prompts(work, iterations)],
        processing_class=make_tokenizer(work, **({"eos_token": EOS} if work.eos_probability else {})),
        peft_config=lora_config(model) if lora else None,
        **arguments,
    )


class Measured:
    """A trainer of lmppo on a workload, whose iterations are recorded.

    Args:
        work: The workload.
        iterations: Counted iterations, after one to warm up.
        device: ``cpu`` or ``cuda``.
        bf16: Whether products are computed in bfloat16.
        settings: Further settings of the configuration.
        lora: Whether to train a LoRA adapter.
    """

    def __init__(
        self,
        work: Workload,
        iterations: int = 3,
        device: str = "cpu",
        bf16: bool = False,
        settings: dict[str, Any] | None = None,
        lora: bool = False,
    ) -> None:
        self.work, self.iterations = work, 1 + iterations
        settings = {"use_cpu": device == "cpu", "bf16": bf16, **(settings or {})}
        model = make_model(work).to(device)
        if work.unfrozen is not None and any(f.name == "num_layers_unfrozen" for f in dataclasses.fields(PPOConfig)):
            settings["num_layers_unfrozen"] = work.unfrozen
        else:
            freeze(model, work.unfrozen)
        self.recorder = Recorder(device)
        self.marks: dict[str, float] = {}
        arguments = {"critic": make_critic(work)} if work.critic else {}
        self.trainer = make_trainer(
            model, work, self._reward, iterations=self.iterations, settings=settings, lora=lora, **arguments
        )
        for module in self.trainer.reference.model.modules():
            module.register_forward_pre_hook(lambda *_: self._mark("sampled"))

    def _reward(self, prompts: list, completions: list, completion_ids: list, **_: Any) -> list[float]:
        self._mark("referred")
        return [share_of_even(ids) for ids in completion_ids]

    def _mark(self, name: str) -> None:
        if name not in self.marks:
            self.marks[name] = self.recorder.elapsed()

    def step(self) -> dict[str, float]:
        """One iteration; returns what it logged."""
        self.marks = {}
        self.recorder.start()
        row = self.trainer.step()
        assert row["optimizer_steps"] == self.work.epochs, row["optimizer_steps"]
        referred = self.marks["referred"]
        sampled = self.marks.get("sampled", referred)  # a reference that has nothing of its own to run
        phases = {"generate": sampled, "reference": referred - sampled, "update": row["time/update"]}
        self.recorder.stop(round(row["completion_length"] * self.work.batch), **phases)
        return row

    def run(self) -> dict[str, Any]:
        """All iterations; returns the recorder's result."""
        for _ in range(self.iterations):
            self.step()
        return self.recorder.result()


def make_critic(work: Workload) -> PreTrainedModel:
    """A critic of the policy's shape."""
    torch.manual_seed(1)
    config = work.config
    config.num_labels = 1
    return GPT2ForTokenClassification(config)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job: the arguments of :class:`Measured`, the workload as a dict; ``mkl`` keeps oneDNN out."""
    job = job | {"work": Workload(**job["work"])}
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None) if job.pop("mkl", False) else nullcontext():
        return Measured(**job).run()


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
