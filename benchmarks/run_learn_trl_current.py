"""One run of trl 1.16.0's `RLOOTrainer` or `GRPOTrainer` on the task of learn.py.

Both have no critic: they sample 8 completions of each prompt, and compare them with each other. Both clip gradients to norm
1, as lmppo does; everything else that is no size is the default.

The price means the same in RLOO as in PPO: the KL is part of the reward. GRPO has it in the loss, beside advantages that are
divided by the standard deviation of the rewards of a prompt's completions: with that deviation s, a nat costs `beta` * s of
reward, less and less as the completions become alike. And the gradient of its term (k3 at the sampled tokens) is that of the
KL from the reference to the policy, at the states that the policy visits. Its price is the number given as `beta`.
"""

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from learn_task import TRAINING, Curve, load_model, make_tokenizer, task_of
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

METHODS = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The curve's result of a job, whose ``method`` is a name in ``METHODS``."""
    task = task_of(job["task"])
    policy, curve = load_model(job["model"]), Curve(task, job["model"])

    def reward(ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return curve.note(policy, torch.cat([torch.tensor(ids), torch.tensor(completion_ids)], dim=1))

    make_config, make_trainer = METHODS[job["method"]]
    config = make_config(
        output_dir=tempfile.mkdtemp(),
        learning_rate=job["learning_rate"],
        weight_decay=0.0,
        beta=job["price"],
        num_generations=task.group,
        per_device_train_batch_size=task.minibatch,
        steps_per_generation=task.batch // task.minibatch,
        num_iterations=task.epochs,
        max_steps=task.optimizer_steps,
        max_completion_length=task.length,
        temperature=1.0,
        seed=job["seed"],
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    prompts = task.prompts(task.samples // task.group, TRAINING)
    rows = {"prompt": [" ".join(f"t{i}" for i in ids) for ids in prompts], "ids": prompts}
    trainer = make_trainer(
        model=policy,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=make_tokenizer(task, "pad_token", "eos_token"),
    )
    curve.start()
    trainer.train()
    return curve.result(policy, job["output"])


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
