"""One job of trl 0.11.4: `PPOTrainer.generate` and `PPOTrainer.step`, in the environment that speed.py makes.

Generous to it: completions are sampled for the whole batch at once (its default is 4 at a time).
"""

import json
import sys
from typing import Any

import torch
from measuring import Recorder
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from workloads import EOS, LEARNING_RATE, Workload, freeze, make_model, make_prompts, make_tokenizer, share_of_even


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The recorder's result of a job: ``work``, ``iterations``, ``device`` (``cpu`` or ``cuda``) and ``bf16``."""
    work, iterations = Workload(**job["work"]), job["iterations"]
    tokenizer = make_tokenizer(work, eos_token=EOS, pad_token=EOS)
    tokenizer.padding_side = "left"
    policy = make_model(work)
    freeze(policy, work.unfrozen)
    model, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(m) for m in (policy, make_model(work)))
    recorder = Recorder(job["device"])
    config = PPOConfig(
        learning_rate=LEARNING_RATE,
        batch_size=work.batch,
        mini_batch_size=work.batch,
        ppo_epochs=work.epochs,
        accelerator_kwargs={"cpu": job["device"] == "cpu", "mixed_precision": "bf16" if job["bf16"] else "no"},
        remove_unused_columns=False,
    )
    trainer = PPOTrainer(config, model, reference, tokenizer)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": work.length, "pad_token_id": 0}
    if not work.eos_probability:
        sampling["min_new_tokens"] = work.length
    prompts = [torch.tensor(ids, device=job["device"]) for ids in make_prompts(work, 1 + iterations)]
    for start in range(0, len(prompts), work.batch):
        queries = prompts[start : start + work.batch]
        recorder.start()
        responses = trainer.generate(queries, return_prompt=False, batch_size=work.batch, **sampling)
        rewards = [torch.tensor(share_of_even(ids.tolist())) for ids in responses]
        trainer.step(queries, responses, rewards)
        recorder.stop(sum(map(len, responses)))
    return recorder.result()


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
