"""One run of trl 1.12.0's `trl.experimental.ppo.PPOTrainer` on the task of learn.py.

Its critic is a model of its own: the policy's size, with the reference's trunk to start from and a random head. Its reward
model is a module that computes the programmed reward from the token ids. Dropout is off, gradients are not clipped by it.
"""

import json
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from learn_task import TRAINING, Curve, load_model, make_tokenizer, task_of
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer


class ProgrammedReward(nn.Module):
    """What the trainer takes for a sequence classifier: it reads the score at a completion's last token.

    Args:
        policy: The policy whose completions are scored.
        curve: Computes and keeps the rewards.
    """

    base_model_prefix = "trunk"

    def __init__(self, policy: nn.Module, curve: Curve) -> None:
        super().__init__()
        self.trunk, self.score = Rewards(policy, curve), nn.Identity()


class Rewards(nn.Module):
    """Zero at every token but the last, which holds the reward."""

    def __init__(self, policy: nn.Module, curve: Curve) -> None:
        super().__init__()
        self.note = lambda tokens: curve.note(
            policy, tokens
        )  # not an attribute, whose dropout the trainer would change

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """The rewards as a hidden state, ``(B, P + T, 1)``."""
        states = torch.zeros(*input_ids.shape, 1)
        states[:, -1, 0] = torch.tensor(self.note(input_ids))
        return SimpleNamespace(hidden_states=[states])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The curve's result of a job."""
    task = task_of(job["task"])
    torch.manual_seed(job["seed"])
    policy, reference, curve = load_model(job["model"]), load_model(job["model"]), Curve(task, job["model"])
    critic = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1)
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=job["learning_rate"],
        weight_decay=0.0,
        kl_coef=job["price"],
        # With the minibatch here and gradient accumulation instead, it would step once per pass.
        per_device_train_batch_size=task.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=task.batch // task.minibatch,
        num_ppo_epochs=task.epochs,
        total_episodes=task.samples,
        local_rollout_forward_batch_size=task.batch,
        response_length=task.length,
        temperature=1.0,
        num_sample_generations=0,
        seed=job["seed"],
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"input_ids": task.prompts(task.samples, TRAINING)})
    reward = ProgrammedReward(policy, curve)
    trainer = PPOTrainer(
        config, make_tokenizer(task, "pad_token", "eos_token"), policy, reference, reward, dataset, critic
    )
    curve.start()
    trainer.train()
    return curve.result(policy, job["output"])


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
