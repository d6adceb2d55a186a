"""A task whose best answer is known: completions of a Markov chain, rewarded by a sum over their tokens.

A small Llama is trained on a sparse Markov chain and then is the policy and the reference. The reward of a completion is the
sum of its tokens' scores, standardized by what the chain itself earns: mean 0, standard deviation 1.5. All completions have
the same length, so nothing depends on how a system treats the end of a text. What the objective (the reward minus a price
for each nat of KL to the reference) can be at best is found by dynamic programming over the chain.

Imported under the packages of every system that is compared, and so without anything of lmppo.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SUCCESSORS = (0.4, 0.3, 0.15, 0.1, 0.05)  # of each token; a fiftieth of the probability goes to all tokens alike
SPREAD = 1.5  # standard deviation of the reward of the chain's completions
TRAINING, HELD_OUT = 100, 7  # seeds of the prompts


@dataclass(frozen=True)
class Task:
    """The chain, the model that learns it, and what an iteration is; the same for every system.

    Attributes:
        vocab: Number of tokens.
        prompt: Tokens of a prompt.
        length: Tokens of a completion.
        layers: Blocks of the model.
        width: Its hidden size.
        heads: Its attention heads.
        pretraining: Optimizer steps, of 64 sequences each, that teach it the chain.
        iterations: Iterations of a run.
        batch: Completions of an iteration.
        epochs: Passes over them.
        minibatch: Completions of an optimizer step.
        group: Completions of each prompt, where a system needs several.
    """

    vocab: int = 32
    prompt: int = 4
    length: int = 24
    layers: int = 2
    width: int = 64
    heads: int = 4
    pretraining: int = 400
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

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        """What is random in the chain: an order of the tokens after each token, and each token's score."""
        generator = torch.Generator().manual_seed(1)
        orders = torch.stack([torch.randperm(self.vocab, generator=generator) for _ in range(self.vocab)])
        return {"orders": orders, "scores": torch.randn(self.vocab, generator=generator).double()}

    @cached_property
    def transitions(self) -> Tensor:
        """``(V, V)`` probability of each next token after each token."""
        likely = torch.tensor(SUCCESSORS[: self.vocab], dtype=torch.float64)
        found = torch.full((self.vocab, self.vocab), 0.02 / self.vocab, dtype=torch.float64)
        return found.scatter_add(
            1, self.drawn["orders"][:, : len(likely)], 0.98 * (likely / likely.sum()).expand(self.vocab, -1)
        )

    @cached_property
    def last_of_prompts(self) -> Tensor:
        """``(V,)`` probability of each token at a prompt's end; its first token is uniform."""
        start = torch.full((self.vocab,), 1 / self.vocab, dtype=torch.float64)
        return start @ torch.linalg.matrix_power(self.transitions, self.prompt - 1)

    @cached_property
    def scores(self) -> Tensor:
        """``(V,)`` score of each token: what the chain's completions earn has mean 0 and standard deviation ``SPREAD``."""
        raw = self.drawn["scores"]
        mean, square = self._moments(raw)
        return (raw - mean / self.length) * SPREAD / (square - mean**2) ** 0.5

    def _moments(self, scores: Tensor) -> tuple[float, float]:
        """Mean and mean square of the sum of scores over the chain's completions."""
        mass = self.last_of_prompts
        mean, square = torch.zeros_like(mass), torch.zeros_like(mass)
        for _ in range(self.length):  # each is a sum over the completions that end at a token
            mass, mean, square = (part @ self.transitions for part in (mass, mean, square))
            square = square + 2 * scores * mean + scores**2 * mass
            mean = mean + scores * mass
        return mean.sum().item(), square.sum().item()

    def rewards(self, completions: Tensor) -> Tensor:
        """``(B,)`` the reward of each of ``(B, T)`` completions."""
        return self.scores.float()[completions].sum(dim=1)

    def prompts(self, number: int, seed: int) -> list[list[int]]:
        """Prompts from the chain."""
        return self.sequences(number, self.prompt, torch.Generator().manual_seed(seed)).tolist()

    def sequences(self, number: int, length: int, generator: torch.Generator) -> Tensor:
        """``(number, length)`` tokens of the chain, the first of them uniform."""
        tokens = [torch.randint(self.vocab, (number,), generator=generator)]
        while len(tokens) < length:
            tokens.append(torch.multinomial(self.transitions[tokens[-1]], 1, generator=generator)[:, 0])
        return torch.stack(tokens, dim=1)


def value_of(task: Task, price: Tensor) -> Tensor:
    """The most that the objective can be: the mean over prompts of price * log E[exp(reward / price)] under the chain."""
    value = torch.zeros(task.vocab, dtype=torch.float64)
    for _ in range(task.length):
        value = price * torch.logsumexp(task.transitions.log() + (task.scores + value) / price, dim=1)
    return task.last_of_prompts @ value


def optimum(task: Task, price: float) -> dict[str, float]:
    """Objective, KL and reward of the best policy: its KL is how much the objective falls with the price."""
    at = torch.tensor(price, dtype=torch.float64, requires_grad=True)
    objective = value_of(task, at)
    (slope,) = torch.autograd.grad(objective, at)
    kl = -slope.item()
    return {"objective": objective.item(), "kl": kl, "reward": objective.item() + price * kl}


def make_model(task: Task, folder: Path) -> float:
    """Train the model on the chain and save it; returns its loss in nats per token, which the chain's entropy bounds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=task.vocab,
        hidden_size=task.width,
        intermediate_size=11 * task.width // 4,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        num_key_value_heads=task.heads,
        max_position_embeddings=task.prompt + task.length,
        tie_word_embeddings=False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(2)
    for step in range(task.pretraining):
        tokens = task.sequences(64, task.prompt + task.length, generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / task.pretraining)
        optimizer.step()
    model.save_pretrained(folder)
    return loss.item()


def load_model(folder: str | Path) -> LlamaForCausalLM:
    """The model in a folder; nothing ends its completions."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model.eval()


def make_tokenizer(task: Task, *special: str) -> PreTrainedTokenizerFast:
    """One word per token; names of special tokens (``pad_token``) get ids that the model does not have, and cannot write."""
    words = {f"t{i}": i for i in range(task.vocab)} | {name: task.vocab + i for i, name in enumerate(special)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **{name: name for name in special})


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """``(B, P + T)`` the prompts with a completion each."""
    tokens, cache, read = prompts, None, prompts
    for _ in range(length):
        out = model(input_ids=read, past_key_values=cache, use_cache=True)
        cache, read = out.past_key_values, torch.multinomial(out.logits[:, -1].softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, read], dim=1)
    return tokens


@torch.no_grad()
def kl_along(model: LlamaForCausalLM, reference: LlamaForCausalLM, tokens: Tensor, prompt: int) -> Tensor:
    """``(B,)`` KL of the model to the reference: exact over the vocabulary at each token, summed over the completion."""
    new, old = (m(input_ids=tokens).logits[:, prompt - 1 : -1].log_softmax(dim=-1) for m in (model, reference))
    return (new.exp() * (new - old)).sum(dim=(1, 2))


def best_of(
    model: LlamaForCausalLM, task: Task, sizes: Sequence[int], n_prompts: int, seed: int = 0
) -> dict[int, float]:
    """Mean reward of the best of each n of the model's own completions, over all groups among the most that are drawn.

    Args:
        model: What is sampled: the reference, not the chain.
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
