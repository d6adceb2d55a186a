"""One job of trl 1.12.0's `trl.experimental.ppo.PPOTrainer`, in the environment that speed.py makes.

It needs a critic of its own (a second model of the policy's size) and a reward model (here one layer of width 64, whose
cost is small). It samples all completions to their full length and pads them, whether they have ended or not.
"""

import json
import sys
import tempfile
from typing import Any

import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from measuring import Recorder
from transformers import GPT2ForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer
from workloads import EOS, LEARNING_RATE, Workload, counted, freeze, make_model, make_prompts, make_tokenizer


class Clock(TrainerCallback):
    """Records an iteration between each two of the trainer's steps."""

    def __init__(self, recorder: Recorder, work: Workload) -> None:
        self.recorder, self.work, self.responses = recorder, work, []
        generate = module.batch_generation

        def keeping(model: Any, queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sequences, logits = generate(model, queries, *args, **kwargs)
            self.responses = sequences[:, queries.shape[1] :].tolist()
            return sequences, logits

        module.batch_generation = keeping

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first iteration begins."""
        self.recorder.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """An iteration has ended."""
        self.recorder.stop(sum(counted(ids, self.work) for ids in self.responses))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The recorder's result of a job: ``work``, ``iterations``, ``device`` (``cpu`` or ``cuda``) and ``bf16``."""
    work, iterations = Workload(**job["work"]), job["iterations"]
    tokenizer = make_tokenizer(work, eos_token=EOS)
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy, reference = make_model(work), make_model(work)
    torch.manual_seed(0)
    shape = work.config
    shape.num_labels = 1
    critic = GPT2ForSequenceClassification(shape)
    small = Workload(layers=1, width=64, heads=2, vocab=work.vocab, positions=work.positions).config
    small.num_labels = 1
    reward_model = GPT2ForSequenceClassification(small)
    for trained in (policy, critic):
        freeze(trained, work.unfrozen)
    recorder = Recorder(job["device"])
    prompts = make_prompts(work, 1 + iterations)
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=work.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=work.epochs,
        total_episodes=len(prompts),
        local_rollout_forward_batch_size=work.batch,
        response_length=work.length,
        temperature=1.0,
        stop_token="eos" if work.eos_probability else None,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        use_cpu=job["device"] == "cpu",
        bf16=job["bf16"],
        disable_tqdm=True,
    )
    dataset, clock = Dataset.from_dict({"input_ids": prompts}), Clock(recorder, work)
    PPOTrainer(config, tokenizer, policy, reference, reward_model, dataset, critic, callbacks=[clock]).train()
    return recorder.result()


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
