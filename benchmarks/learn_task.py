"""What the systems of learn.py are given: a task, its model, and what is measured while they run.

Imported under the packages of every system that is compared, and so without anything of lmppo.
"""

import abc
import dataclasses
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TRAINING, HELD_OUT = 100, 7  # seeds of the prompts


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Prompts and rewards, and what an iteration is; the same for every system.

    All prompts have the same length, and so have all completions: nothing depends on how a system treats the end of a text.

    Attributes:
        kind: The module of the task, ``<kind>_task.py``, whose class ``TASK`` it is.
        vocab: Number of tokens.
        prompt: Tokens of a prompt.
        length: Tokens of a completion.
        iterations: Iterations of a run.
        batch: Completions of an iteration.
        epochs: Passes over them.
        minibatch: Completions of an optimizer step.
        group: Completions of each prompt, where a system needs several.
    """

    kind: ClassVar[str]
    vocab: int
    prompt: int
    length: int = 24
    iterations: int = 60
    batch: int = 64
    epochs: int = 4
    minibatch: int = 16
    group: int = 8

    @property
    def samples(self) -> int:
        """Completions of a whole run."""
        return self.iterations * self.batch

    @property
    def optimizer_steps(self) -> int:
        """Of a whole run."""
        return self.iterations * self.epochs * (self.batch // self.minibatch)

    @property
    def job(self) -> dict[str, Any]:
        """The task as :func:`task_of` reads it."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @abc.abstractmethod
    def rewards(self, completions: Tensor) -> Tensor:
        """``(B,)`` the reward of each of ``(B, T)`` completions."""

    @abc.abstractmethod
    def prompts(self, number: int, seed: int) -> list[list[int]]:
        """Prompts to train on (seed ``TRAINING``) or to measure with (``HELD_OUT``)."""

    @abc.abstractmethod
    def make_model(self, folder: Path) -> None:
        """Save the policy that every system starts from."""

    def optimum(self, price: float) -> dict[str, float] | None:
        """Objective, KL and reward of the best policy at a price of a nat, where it is known."""
        return None


def task_of(job: dict[str, Any]) -> Task:
    """The task of a job."""
    fields = dict(job)
    return importlib.import_module(f"{fields.pop('kind')}_task").TASK(**fields)


def load_model(folder: str | Path) -> PreTrainedModel:
    """The model in a folder; nothing ends its completions."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model.eval()


def make_tokenizer(task: Task, *special: str) -> PreTrainedTokenizerFast:
    """One word per token; names of special tokens (``pad_token``) get ids that the model does not have, and cannot write."""
    words = {f"t{i}": i for i in range(task.vocab)} | {name: task.vocab + i for i, name in enumerate(special)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **{name: name for name in special})


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """``(B, P + T)`` the prompts with a completion each."""
    tokens, cache, read = prompts, None, prompts
    for _ in range(length):
        out = model(input_ids=read, past_key_values=cache, use_cache=True)
        cache, read = out.past_key_values, torch.multinomial(out.logits[:, -1].softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, read], dim=1)
    return tokens


@torch.no_grad()
def kl_along(model: PreTrainedModel, reference: PreTrainedModel, tokens: Tensor, prompt: int) -> Tensor:
    """``(B,)`` KL of the model to the reference: exact over the vocabulary at each token, summed over the completion."""
    new, old = (m(input_ids=tokens).logits[:, prompt - 1 : -1].log_softmax(dim=-1) for m in (model, reference))
    return (new.exp() * (new - old)).sum(dim=(1, 2))


def best_of(
    model: PreTrainedModel, task: Task, sizes: Sequence[int], n_prompts: int, seed: int = 0
) -> dict[int, float]:
    """Mean reward of the best of each n of the model's own completions, over all groups among the most that are drawn.

    Args:
        model: What is sampled: the reference.
        task: The task.
        sizes: Each n; they divide the largest.
        n_prompts: Held-out prompts.
        seed: Of the sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.tensor(task.prompts(n_prompts, HELD_OUT))
    drawn = [sample(model, prompts, task.length, generator)[:, task.prompt :] for _ in range(max(sizes))]
    rewards = torch.stack([task.rewards(completions) for completions in drawn])
    return {n: rewards.unflatten(0, (-1, n)).amax(dim=1).mean().item() for n in sizes}


class Curve:
    """What the completions of each iteration earn, and how far their policy is from the reference.

    The clock stands still while this is measured.

    Args:
        task: The task.
        folder: The reference.
    """

    def __init__(self, task: Task, folder: str) -> None:
        self.task, self.reference, self.policy = task, load_model(folder), load_model(folder)
        self.rows: list[dict[str, float]] = []
        self.steps, self.paused = 0, 0.0
        self.hook = register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def start(self) -> None:
        """The training begins."""
        self.started, self.steps = time.perf_counter(), 0

    def elapsed(self) -> float:
        """Seconds of training."""
        return time.perf_counter() - self.started - self.paused

    def note(self, policy: torch.nn.Module, tokens: Tensor) -> list[float]:
        """The rewards of an iteration's prompts with completions, which are kept with the policy's KL along them."""
        assert tokens.shape == (self.task.batch, self.task.prompt + self.task.length), tokens.shape
        entered, seconds = time.perf_counter(), self.elapsed()
        rewards = self.task.rewards(tokens[:, self.task.prompt :])
        self.policy.load_state_dict(policy.state_dict())
        kl = kl_along(self.policy, self.reference, tokens, self.task.prompt)
        self.rows.append({"seconds": seconds, "reward": rewards.mean().item(), "kl": kl.mean().item()})
        self.paused += time.perf_counter() - entered
        return rewards.tolist()

    def result(self, policy: torch.nn.Module, output: str, *, steps: str = "same") -> dict[str, Any]:
        """What a run returns; its policy is saved.

        Args:
            policy: As it is at the end.
            output: Where it is saved.
            steps: How many optimizer steps the run must have had: the "same" as the task's, "no more", or "any".

        Raises:
            RuntimeError: The run had other numbers of samples or optimizer steps than the task's.
        """
        found, expected = (len(self.rows), self.steps), (self.task.iterations, self.task.optimizer_steps)
        allowed = {"same": found[1] == expected[1], "no more": found[1] <= expected[1], "any": True}
        if found[0] != expected[0] or not allowed[steps]:
            raise RuntimeError(f"iterations and optimizer steps were {found}; expected {expected}.")
        seconds = self.elapsed()
        self.hook.remove()
        self.policy.load_state_dict(policy.state_dict())
        self.policy.save_pretrained(output)
        return {"seconds": seconds, "samples": self.task.samples, "optimizer_steps": self.steps, "curve": self.rows}
