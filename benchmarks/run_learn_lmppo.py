"""One run of lmppo on the task of learn.py: a value head on the policy's trunk, default settings but for the sizes."""

import json
import sys
import tempfile
from typing import Any

import torch
from learn_task import TRAINING, Curve, load_model, make_tokenizer, task_of

from lmppo import PPOConfig, PPOTrainer


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The curve's result of a job, and what its critic explained.

    ``settings`` of the job are further ones of lmppo, which may be such that the number of optimizer steps is another;
    with ``own_critic`` the critic is a model of its own that starts from the policy.
    """
    task = task_of(job["task"])
    policy, curve = load_model(job["model"]), Curve(task, job["model"])

    def reward(ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return curve.note(policy, torch.cat([torch.tensor(ids), torch.tensor(completion_ids)], dim=1))

    config = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": task.iterations,
        "rollout_batch_size": task.batch,
        "minibatch_size": task.minibatch,
        "micro_batch_size": task.minibatch,
        "ppo_epochs": task.epochs,
        "max_completion_length": task.length,
        "learning_rate": job["learning_rate"],
        "kl_coef": job["price"],
        "seed": job["seed"],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=PPOConfig(**(config | job.get("settings", {}))),
        train_dataset=[{"prompt": ids, "ids": ids} for ids in task.prompts(task.samples, TRAINING)],
        processing_class=make_tokenizer(task),
        critic=job["model"] if job.get("own_critic") else None,
    )
    curve.start()
    trainer.train()
    rows = [{name: x for name, x in row.items() if "explained_variance" in name} for row in trainer.state.log_history]
    return curve.result(policy, job["output"], steps="any" if job.get("settings") else "no more") | {"rows": rows}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
