"""One job of lmppo, in a process of its own: `python benchmarks/run_lmppo.py '{"workload": {"layers": 4}}'`.

Phases are told apart from outside: sampling ends when the reference is first run, and the reference's pass (with what
a critic of its own, bfloat16 or `truncation` add to it) when the rewards are asked for.
"""

import dataclasses
import json
import sys
import tempfile
from typing import Any

from measuring import Recorder
from peft import LoraConfig
from transformers import GPT2ForTokenClassification
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

LORA = LoraConfig(r=16, target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM")


class Measured:
    """A trainer of lmppo on a workload, whose iterations are recorded.

    Args:
        work: The workload.
        iterations: Counted iterations, after one to warm up.
        device: ``cpu`` or ``cuda``.
        settings: Further settings of the configuration.
        lora: Whether to train a LoRA adapter.
    """

    def __init__(
        self,
        work: Workload,
        iterations: int = 3,
        device: str = "cpu",
        settings: dict[str, Any] | None = None,
        lora: bool = False,
    ) -> None:
        self.work, self.iterations = work, iterations
        model, critic = make_model(work), None
        tokenizer = make_tokenizer(work, **({"eos_token": EOS} if work.eos_probability else {}))
        if not work.eos_probability:
            model.generation_config.eos_token_id = None
        if work.critic:
            shape = work.config
            shape.num_labels = 1
            critic = GPT2ForTokenClassification(shape)
        settings = dict(settings or {})
        if work.unfrozen is not None and any(f.name == "num_layers_unfrozen" for f in dataclasses.fields(PPOConfig)):
            settings["num_layers_unfrozen"] = work.unfrozen
        else:
            freeze(model, work.unfrozen)
        self.recorder = Recorder(device)
        self.marks: dict[str, float] = {}
        self.trainer = PPOTrainer(
            model=model,
            reward_funcs=self._reward,
            args=self._config(device, settings),
            train_dataset=[{"prompt": ids} for ids in make_prompts(work, 1 + iterations)],
            processing_class=tokenizer,
            critic=critic,
            peft_config=LORA if lora else None,
        )
        for module in self.trainer.reference.model.modules():
            module.register_forward_pre_hook(lambda *_: self._mark("sampled"))

    def _config(self, device: str, settings: dict[str, Any]) -> PPOConfig:
        sizes = dict.fromkeys(("rollout_batch_size", "minibatch_size", "micro_batch_size"), self.work.batch)
        fixed = {
            "output_dir": tempfile.mkdtemp(),
            "max_steps": 1 + self.iterations,
            "ppo_epochs": self.work.epochs,
            "max_completion_length": self.work.length,
            "learning_rate": LEARNING_RATE,
            "use_cpu": device == "cpu",
            "disable_tqdm": True,
        }
        return PPOConfig(**(fixed | sizes | settings))

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
        for _ in range(1 + self.iterations):
            self.step()
        return self.recorder.result()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job: the arguments of :class:`Measured`, the workload as a dict."""
    return Measured(**(job | {"work": Workload(**job["work"])})).run()


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
