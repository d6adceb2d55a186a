"""One run of trl 0.11.4's `PPOTrainer` on the task of learn.py: a value head on the policy's trunk.

The KL coefficient is fixed, as it is in the other systems; by default it adapts. Everything else that is no size is the
default: Adam without weight decay, a constant learning rate, gradients that are not clipped.
"""

import json
import sys
from typing import Any

import torch
from learn_task import TRAINING, Curve, load_model, make_tokenizer, task_of
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The curve's result of a job."""
    task = task_of(job["task"])
    torch.manual_seed(job["seed"])
    policy, curve = load_model(job["model"]), Curve(task, job["model"])
    models = [
        AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.0)
        for model in (policy, load_model(job["model"]))
    ]
    config = PPOConfig(
        learning_rate=job["learning_rate"],
        init_kl_coef=job["price"],
        adap_kl_ctrl=False,
        batch_size=task.batch,
        mini_batch_size=task.minibatch,
        ppo_epochs=task.epochs,
        seed=job["seed"],
        remove_unused_columns=False,
    )
    trainer = PPOTrainer(config, *models, make_tokenizer(task, "pad_token", "eos_token"))
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": task.vocab}
    sampling |= {"max_new_tokens": task.length, "min_new_tokens": task.length}
    prompts = [torch.tensor(ids) for ids in task.prompts(task.samples, TRAINING)]
    curve.start()
    for start in range(0, len(prompts), task.batch):
        queries = prompts[start : start + task.batch]
        responses = trainer.generate(queries, return_prompt=False, batch_size=task.batch, **sampling)
        tokens = torch.cat([torch.stack(queries), torch.stack(responses)], dim=1)
        rewards = curve.note(policy, tokens)
        trainer.step(queries, responses, [torch.tensor(reward) for reward in rewards])
    return curve.result(policy, job["output"])


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
