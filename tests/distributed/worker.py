"""What each process of the two-process tests runs: ``worker.py OUTPUT_DIR SCENARIO``."""

import atexit
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from builders import PROMPTS, VOCAB, build_policy_arguments, count_a, gpt2, make_trainer, supports, weights
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, TrainerCallback

from lmppo.groups import GROUP_COST
from lmppo.loss import Penalties
from lmppo.prompts import pad_left
from lmppo.records import Experience, Tokens
from lmppo.support import Support
from lmppo.trainer import PPOTrainer
from lmppo.update import accumulate_gradients

# One run for each way the gradients have to be brought together.
RUNS = {
    "shared": {},
    "separate": {"critic_learning_rate": 2e-2},
    "lora": {"ent_coef": 0.05, "top_p": 0.9, "learning_rate": 3e-2, "kl_form": "k3_both"},
    "lora critic": {"critic_learning_rate": 2e-2, "gradient_checkpointing": True, "ent_coef": 0.05},
    "lora critic, warm-up": {
        "critic_warmup_steps": 1,
        "critic_epochs": 3,
        "num_layers_unfrozen": 1,
        "frozen_dtype": "bfloat16",
    },
    "untied": {"kl_form": "k2_loss", "truncation": "mask"},
    "head": {"kl_form": "exact_both", "learning_rate": 3e-2},
    "warm-up": {"critic_warmup_steps": 1, "weight_decay": 0.1, "target_kl": 10.0, "kl_target": 0.05, "kl_horizon": 40},
    "kl-penalty": {
        "objective": "kl_penalty",
        "critic_epochs": 3,
        "kl_form": "exact_both",
        "truncation": "bootstrap",
        "save_rollouts": 5,
    },
    "trpo": {"objective": "trpo", "trpo_max_kl": 0.02, "trpo_damping": 1.0, "trpo_cg_steps": 3},
    "stopped": {"lam": 1.0, "kl_form": "k1_end", "target_kl": 1e-3, "ppo_epochs": 4},
    "separate, stopped": {"target_kl": 1e-3, "ppo_epochs": 4},
    "critic-free": {"estimator": "rewards_to_go", "baseline": "leave_one_out", "truncation": "mask"},
    "constrained": {
        "suppress_tokens": [2],
        "min_new_tokens": 2,
        "stop_token_ids": [5],
        "stop_strings": ["gh", "a"],
        "truncation": "penalty",
    },
}
COMMON = {
    "max_steps": 2, "rollout_batch_size": 16, "minibatch_size": 8, "micro_batch_size": 3, "save_steps": 1,
    "eval_steps": 2, "adam_epsilon": 1e-3, "num_generations": 2,
}  # fmt: skip


def note_lengths(prompts, completions, number, log_extra, log_metric, **kwargs):
    """Applies to every second prompt; logs a column and a metric."""
    log_extra("seen", [f"{n}:{len(c)}" for n, c in zip(number, completions, strict=True)])
    log_metric("mean_length", sum(map(len, completions)) / len(completions))
    return [0.1 * len(c) if n % 2 else None for n, c in zip(number, completions, strict=True)]


def arguments_of(name):
    """The models: heads that are trained by themselves, or by an adapter, among others."""
    adapter = LoraConfig(r=2, target_modules=["c_attn", "lm_head"], task_type="CAUSAL_LM")
    if name in ("untied", "head"):
        return {"model": gpt2(tie_word_embeddings=False), "peft_config": adapter if name == "head" else None}
    if name.startswith("lora critic"):  # with a head that no value depends on; with top layers alone
        top = replace(adapter, target_modules=["c_attn"], layers_to_transform=[1])
        return {"critic": "lora", "peft_config": adapter if name == "lora critic" else top}
    return build_policy_arguments(kind if (kind := name.split(",")[0]) in ("separate", "lora") else "shared")


def build(output_dir, name) -> PPOTrainer:
    data = [{"prompt": p, "number": i} for i, p in enumerate(PROMPTS)]
    settings = COMMON | arguments_of(name) | RUNS[name]
    return make_trainer(output_dir, reward=[count_a, note_lengths], dataset=data, eval_dataset=data[:3], **settings)


def train(root, name):
    """Train, and write down what this process sampled, saw and ended with."""
    trainer = build(root / name, name)
    seen = []
    collect = trainer.collector.collect

    def keep(*args, **kwargs):
        seen.append(collect(*args, **kwargs))
        return seen[-1]

    trainer.collector.collect = keep
    trainer.train()
    after = trainer.evaluate()  # the processes can still talk to each other when training is over
    rank = trainer.accelerator.process_index
    tensors = {f"weights/{n}": tensor for n, tensor in weights(trainer).items()}
    for i, scored in enumerate(seen):
        for field in ("prompt_ids", "completion_ids", "completion_mask", "logprobs", "ref_logprobs",
                      "ref_support_logprobs", "kl_penalty", "values", "scores", "ended"):  # fmt: skip
            record = scored.rollout.tokens if hasattr(scored.rollout.tokens, field) else scored.rollout
            tensors[f"rollout{i}/{field}"] = getattr(record, field).contiguous()
        tensors[f"rollout{i}/support"] = supports(scored.rollout).contiguous()
        tensors[f"rollout{i}/per_function"] = scored.per_function.contiguous()
    save_file({n: t.clone() for n, t in tensors.items()}, root / f"{name}-{rank}.safetensors")
    texts = [
        {"prompts": s.prompts, "completions": s.completions, "extras": s.extras, "metrics": s.metrics} for s in seen
    ]
    (root / f"{name}-{rank}.json").write_text(
        json.dumps({"texts": texts, "after": after, "processes": trainer.accelerator.num_processes})
    )


# The lengths of prompts and completions: those of the even rows, which process 0 has, and of the odd rows.
SHARES = {
    "different numbers of groups": [[(1, 1), (3, 6), (9, 20), (30, 20)], [(5, 7)] * 4],
    "nothing counts on one": [[(0, 0)] * 4, [(1, 1), (3, 6), (9, 20), (30, 20)]],
}


def shares_of(lengths):
    """What may be learned from completions of such lengths; 0: a row of which nothing counts."""
    generator = torch.Generator().manual_seed(0)
    rows = [pair for pairs in zip(*lengths, strict=True) for pair in pairs]
    prompts = [torch.randint(1, VOCAB, (n or 4,), generator=generator).tolist() for n, _ in rows]
    mask = torch.arange(20)[None] < torch.tensor([n for _, n in rows])[:, None]
    ids = torch.randint(VOCAB, mask.shape, generator=generator)
    numbers = [torch.randn(mask.shape, generator=generator) for _ in range(4)]
    old, ref, advantages, returns = numbers[0] - 2.5, numbers[1] - 2.5, numbers[2], numbers[3][..., None]
    return Experience(Tokens(*pad_left(prompts, 30), ids, mask), Support.of_all(*mask.shape), old, ref,
                      torch.zeros_like(old), torch.zeros_like(returns), advantages, returns)  # fmt: skip


def gradients(root):
    """The gradients of one minibatch, which the processes share unequally; on every process."""
    GROUP_COST["cpu"] = 1
    for name in ("shared", "separate", "untied", "head"):
        trainer = build(root / f"gradients-{name}", name)
        penalties = Penalties(kl_coef=0.2 if trainer.args.kl_in_loss else 0.0, reference=trainer.reference)
        world, generator = trainer.accelerator, torch.Generator().manual_seed(0)
        for n, parameter in trainer.actor_critic.named_parameters():
            if "lora_B" in n:  # 0 at first, and then lora_A has no gradient
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for share, lengths in SHARES.items():
            experience = shares_of(lengths)
            own = experience.rows(slice(world.process_index, None, world.num_processes))
            n_groups = len(list(own.micro_batches(trainer.args.micro_batch_size)))
            trainer.model.zero_grad()
            stats = accumulate_gradients(trainer.model, experience, trainer.args, world, penalties)
            found = {n: p.grad for n, p in trainer.actor_critic.named_parameters() if p.grad is not None}
            save_file(
                {n: g.clone() for n, g in found.items()}, root / f"{name}-{share}-{world.process_index}.safetensors"
            )
            notes = {"stats": stats, "groups": n_groups, "tokens": int(own.completion_mask.sum())}
            (root / f"{name}-{share}-{world.process_index}.json").write_text(json.dumps(notes))
    GROUP_COST["cpu"] = 128


def fail(root):
    """The reward function of the second process breaks at the second step."""

    def flaky(prompts, completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1 and not trainer_state.is_world_process_zero:
            raise ValueError("the second process is unwell")
        return count_a(prompts, completions)

    trainer = make_trainer(root / "fail", reward=flaky, max_steps=3)
    trainer.train()


class Ask(TrainerCallback):
    """Asks for something on the second process alone, and notes what was done."""

    def __init__(self):
        self.done = []

    def on_step_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            control.should_evaluate = control.should_save = control.should_log = state.global_step == 2
            control.should_training_stop = state.global_step == 3

    def on_evaluate(self, args, state, control, **kwargs):
        self.done.append(f"evaluate {state.global_step}")

    def on_save(self, args, state, control, **kwargs):
        self.done.append(f"save {state.global_step}")

    def on_log(self, args, state, control, **kwargs):
        self.done.append(f"log {state.global_step}")


def ask(root):
    """One process asks, both do; the best policy, completions and early stopping on two processes."""
    asking = Ask()
    settings = {
        "max_steps": 9,
        "logging_steps": 9,
        "eval_dataset": {"a": PROMPTS[:2], "b": PROMPTS[2:]},
        "eval_steps": 9,
    }
    settings |= {"log_completions": 2, "metric_for_best_model": "a_reward"}
    trainer = make_trainer(root / "ask", callbacks=[asking, EarlyStoppingCallback(5)], **settings)
    args, state = trainer.run.args, trainer.train()
    notes = {
        "done": asking.done, "step": state.global_step, "best": [state.best_global_step, state.best_metric],
        "world": [args.world_size, args.process_index, args.should_save, str(args.parallel_mode)],
    }  # fmt: skip
    (root / f"ask-{trainer.accelerator.process_index}.json").write_text(json.dumps(notes))


def note_the_group_at_exit(root):
    """Called when Python ends, after what lmppo does then."""
    (root / f"group-{os.environ['RANK']}").write_text("alive" if torch.distributed.is_initialized() else "ended")


def fail_in_callback(root):
    """A callback of the second process breaks."""

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not state.is_world_process_zero:
                raise ValueError("the callback is unwell")

    make_trainer(root / "fail", callbacks=[Break()]).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    atexit.register(note_the_group_at_exit, folder)
    if sys.argv[2] != "train":
        {"gradients": gradients, "fail": fail, "ask": ask, "fail_in_callback": fail_in_callback}[sys.argv[2]](folder)
    else:
        for run in RUNS:
            train(folder, run)
