"""A task whose best answer is known: completions of a Markov chain, rewarded by a sum over their tokens.

A small Llama is trained on a sparse Markov chain and then is the policy and the reference. The reward of a completion is the
sum of its tokens' scores, standardized by what the chain itself earns: mean 0, standard deviation 1.5. All completions have
the same length, so nothing depends on how a system treats the end of a text. What the objective (the reward minus a price
for each nat of KL to the reference) can be at best is found by dynamic programming over the chain.

Imported under the packages of every system that is compared, and so without anything of lmppo.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from learn_task import Task
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SUCCESSORS = (0.4, 0.3, 0.15, 0.1, 0.05)  # of each token; a fiftieth of the probability goes to all tokens alike
SPREAD = 1.5  # standard deviation of the reward of the chain's completions


@dataclass(frozen=True, kw_only=True)
class Chain(Task):
    """The chain, and the model that learns it.

    Attributes:
        layers: Blocks of the model.
        width: Its hidden size.
        heads: Its attention heads.
        pretraining: Optimizer steps, of 64 sequences each, that teach it the chain.
    """

    kind: ClassVar[str] = "chain"
    vocab: int = 32
    prompt: int = 4
    layers: int = 2
    width: int = 64
    heads: int = 4
    pretraining: int = 400

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
        """The sum of their tokens' scores."""
        return self.scores.float()[completions].sum(dim=1)

    def prompts(self, number: int, seed: int) -> list[list[int]]:
        """Sequences of the chain."""
        return self.sequences(number, self.prompt, torch.Generator().manual_seed(seed)).tolist()

    def sequences(self, number: int, length: int, generator: torch.Generator) -> Tensor:
        """``(number, length)`` tokens of the chain, the first of them uniform."""
        tokens = [torch.randint(self.vocab, (number,), generator=generator)]
        while len(tokens) < length:
            tokens.append(torch.multinomial(self.transitions[tokens[-1]], 1, generator=generator)[:, 0])
        return torch.stack(tokens, dim=1)

    def value_of(self, price: Tensor) -> Tensor:
        """The most that the objective can be: the mean over prompts of price * log E[exp(reward / price)] under the chain."""
        value = torch.zeros(self.vocab, dtype=torch.float64)
        for _ in range(self.length):
            value = price * torch.logsumexp(self.transitions.log() + (self.scores + value) / price, dim=1)
        return self.last_of_prompts @ value

    def optimum(self, price: float) -> dict[str, float]:
        """Objective, KL and reward of the best policy: its KL is how much the objective falls with the price."""
        at = torch.tensor(price, dtype=torch.float64, requires_grad=True)
        objective = self.value_of(at)
        (slope,) = torch.autograd.grad(objective, at)
        kl = -slope.item()
        return {"objective": objective.item(), "kl": kl, "reward": objective.item() + price * kl}

    def make_model(self, folder: Path) -> None:
        """Train the model on the chain and save it."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=11 * self.width // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.prompt + self.length,
            tie_word_embeddings=False,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        )
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator = torch.Generator().manual_seed(2)
        for step in range(self.pretraining):
            tokens = self.sequences(64, self.prompt + self.length, generator)
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / self.pretraining)
            optimizer.step()
        model.save_pretrained(folder)


TASK = Chain
