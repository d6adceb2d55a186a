"""What is measured: models with random weights, prompts of random tokens, and a reward that costs nothing.

Imported under the transformers of every system that is measured, and so without anything of lmppo.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
LEARNING_RATE = 1e-10  # the optimizer does all its work, and the lengths of completions stay as they are


@dataclass(frozen=True)
class Workload:
    """One PPO iteration on a GPT-2 of some shape; a minibatch is the whole batch.

    Attributes:
        layers: Number of blocks.
        width: Hidden size.
        heads: Attention heads.
        vocab: Vocabulary.
        positions: Longest sequence that the model can read.
        batch: Completions per iteration, each of a prompt of its own.
        prompt: Shortest and longest prompt, in tokens.
        length: Longest completion, in tokens.
        epochs: Passes over the batch, and so optimizer steps.
        eos_probability: Of ending a completion at each token; 0: all have the full length.
        unfrozen: Number of top blocks that are trained, with the final norm; None: everything is.
        critic: Whether the critic is a model of its own.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    vocab: int = 4096
    positions: int = 256
    batch: int = 64
    prompt: tuple[int, int] = (8, 16)
    length: int = 32
    epochs: int = 4
    eos_probability: float = 0.0
    unfrozen: int | None = None
    critic: bool = False

    @property
    def config(self) -> GPT2Config:
        """The shape as a configuration of transformers."""
        sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads, "n_positions": self.positions}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(vocab_size=self.vocab, **sizes, **ends, **dropout)


GPT2_124M: dict[str, Any] = {"layers": 12, "width": 768, "heads": 12, "vocab": 50257, "positions": 1024, "batch": 16}
WORKLOADS = {
    "W1": Workload(**GPT2_124M),
    "W2": Workload(),
    "W3": Workload(eos_probability=1 / 14),
    "W4": Workload(**GPT2_124M, unfrozen=2),
    "W2-critic": Workload(critic=True),
}
GPU_WORKLOADS = {"W5": Workload(**GPT2_124M | {"batch": 128, "length": 128})}


def make_model(work: Workload) -> GPT2LMHeadModel:
    """The policy."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(work.config)
    if work.eos_probability:
        odds = work.vocab * work.eos_probability / (1 - work.eos_probability)
        direction = torch.nn.functional.normalize(torch.randn(work.width), dim=0)
        with torch.no_grad():  # the final norm's bias gives the logit of EOS at every position
            model.transformer.wte.weight[0] = direction
            model.transformer.ln_f.bias.copy_(direction * math.log(odds))
    return model


def freeze(model: Any, unfrozen: int | None) -> None:
    """Train the top blocks of a GPT-2 and its final norm alone (and a head of its own, if it has one)."""
    if unfrozen is not None:
        model.transformer.requires_grad_(False)
        for part in (*model.transformer.h[-unfrozen:], model.transformer.ln_f):
            part.requires_grad_(True)


def make_tokenizer(work: Workload, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one word per id; ``special`` are its special tokens."""
    words = {EOS: 0, **{f"w{i}": i for i in range(1, work.vocab)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=EOS)), **special)


def make_prompts(work: Workload, iterations: int) -> list[list[int]]:
    """Prompts for a number of iterations, the same for every system."""
    generator = torch.Generator().manual_seed(0)
    shortest, longest = work.prompt
    lengths = torch.randint(shortest, longest + 1, (iterations * work.batch,), generator=generator).tolist()
    return [torch.randint(1, work.vocab, (n,), generator=generator).tolist() for n in lengths]


def share_of_even(ids: Sequence[int]) -> float:
    """The reward: which share of the tokens is even."""
    return sum(i % 2 == 0 for i in ids) / len(ids)


def counted(ids: Sequence[int], work: Workload) -> int:
    """The tokens of a completion, its end included and what follows left out."""
    return list(ids).index(0) + 1 if work.eos_probability and 0 in ids else len(ids)


def useful_flops(work: Workload) -> dict[str, float]:
    """Multiplications and additions of an iteration without waste, by phase.

    No padding, logits of the states before completion tokens only, the last token is never read; a backward pass costs
    two forward passes. To sample is to read every token once over a cache, which is the same arithmetic. Frozen layers are
    read once, by the sampler; a frozen head costs one more pass backward, not two. A critic of its own reads the
    sampled tokens once, and has no head to speak of.
    """
    prompt, end = sum(work.prompt) / 2, work.eos_probability
    length = (1 - (1 - end) ** work.length) / end if end else work.length
    layer = 24 * work.width**2 + 4 * work.width * (prompt + length) / 2
    head = work.batch * length * 2 * work.vocab * work.width
    top = work.layers if work.unfrozen is None else work.unfrozen
    whole, trained = (work.batch * (prompt + length - 1) * layers * layer for layers in (work.layers, top))
    critic = whole if work.critic else 0.0
    update = 3 * (trained + critic) + (3 if work.unfrozen is None else 2) * head
    return {"generate": whole + head + critic, "reference": trained + head, "update": work.epochs * update}
