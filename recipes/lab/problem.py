"""The lab's task: a one-layer GPT-2 of four tokens writes at most five, so that every answer is a finite sum.

The tokens are the end and the letters a, b and c. A "b" pays 1 where it follows an "a", a "c" always pays 0.3, and all
else nothing: an "a" earns nothing itself, and is what makes a "b" worth writing. The same pay is given dense (each token
its own) or sparse (the whole at the end), so that both have the same true gradient.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import GPT2Config, GPT2ForTokenClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from lmppo.functional.exact import (
    enumerate_completions,
)

TOKENS = ("<end>", "a", "b", "c")
END, A, B, C = range(4)
HORIZON = 5
KL_COEF = 0.1
PROMPT = "c"
COMPLETIONS = enumerate_completions(vocab_size=len(TOKENS), horizon=HORIZON, eos=END)
MASK = COMPLETIONS.mask


def pay_pairs(ids: list[int]) -> list[float]:
    """1 for each b after an a, on the b."""
    return [float((before, token) == (A, B)) for before, token in zip([END, *ids], ids, strict=False)]


def pay_cs(ids: list[int]) -> list[float]:
    """0.3 for each c."""
    return [0.3 * (token == C) for token in ids]


def pay(ids: list[int]) -> list[float]:
    """What each token of a completion earns."""
    return [x + y for x, y in zip(pay_pairs(ids), pay_cs(ids), strict=True)]


def pairs(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    """A reward function for the trainer: the pairs alone."""
    return [pay_pairs(ids) for ids in completion_ids]


def cs(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    """A reward function for the trainer: the c's alone."""
    return [pay_cs(ids) for ids in completion_ids]


def dense(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    """A reward function for the trainer: each token its own pay."""
    return [pay(ids) for ids in completion_ids]


def sparse(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The same pay, on the last token."""
    return [sum(pay(ids)) for ids in completion_ids]


def on_grid(earned: Any) -> Tensor:
    """``(N, T)`` float64 what ``earned(ids)`` gives the tokens of every completion."""
    return torch.where(MASK, torch.tensor([earned(ids) for ids in COMPLETIONS.ids.tolist()]).double(), 0.0)


def at_the_end(rewards: Tensor) -> Tensor:
    """``(N, T)`` the same rewards, all of a completion's on its last token."""
    last = MASK & (MASK.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last, rewards.sum(dim=1, keepdim=True), 0.0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The four tokens; ``<end>`` (id 0) also pads."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.add_special_tokens([TOKENS[END]])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TOKENS[END], pad_token=TOKENS[END])


def make_config(**kwargs: Any) -> GPT2Config:
    """One layer, 16 dimensions, no dropout."""
    sizes = {"vocab_size": len(TOKENS), "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    return GPT2Config(**sizes, **still, bos_token_id=END, eos_token_id=END, pad_token_id=END, **kwargs)


def make_model(seed: int = 0) -> GPT2LMHeadModel:
    """The language model, of random weights."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(make_config(attn_implementation="eager"))


def make_critic(n_streams: int, seed: int = 1) -> GPT2ForTokenClassification:
    """A critic that is a model of its own."""
    torch.manual_seed(seed)
    return GPT2ForTokenClassification(make_config(num_labels=n_streams, classifier_dropout=0.0))


def next_logits(model: GPT2LMHeadModel, prefixes: Tensor) -> Tensor:
    """``(B, V)`` logits after the prompt and these prefixes ``(B, t)``."""
    prompt = torch.full((len(prefixes), 1), TOKENS.index(PROMPT))
    return model(torch.cat([prompt, prefixes], dim=1)).logits[:, -1]
