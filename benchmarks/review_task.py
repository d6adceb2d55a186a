"""The main job's policy, whose completions VADER scores.

The policy is the recipe's GPT-2 with a vocabulary of 8192, the prompts are those of its reviews, and the reward of a
completion is VADER's compound score of its text, -1 to 1. Nothing ends a completion before its last token.

Imported under the packages of every system that is compared, and so without anything of lmppo.
"""

import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from learn_task import HELD_OUT, TRAINING, Task
from measuring import HERE
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

POLICY = HERE.parent / "recipes/models/tiny-reviews-gpt2"


@dataclass(frozen=True, kw_only=True)
class Reviews(Task):
    """Beginnings of reviews.

    Attributes:
        folder: Where the prompts are, by their seed, in ``prompts.json``.
    """

    kind: ClassVar[str] = "review"
    vocab: int = 8192
    prompt: int = 8
    folder: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The policy's."""
        return Tokenizer.from_file(str(POLICY / "tokenizer.json"))

    @cached_property
    def analyzer(self) -> SentimentIntensityAnalyzer:
        """VADER."""
        return SentimentIntensityAnalyzer()

    @cached_property
    def kept_prompts(self) -> dict[str, list[list[int]]]:
        """By their seed."""
        return json.loads((Path(self.folder) / "prompts.json").read_text())

    def rewards(self, completions: Tensor) -> Tensor:
        """VADER's scores of their texts."""
        texts = self.tokenizer.decode_batch(completions.tolist())
        return torch.tensor([self.analyzer.polarity_scores(text)["compound"] for text in texts])

    def prompts(self, number: int, seed: int) -> list[list[int]]:
        """The first of those that are kept, and from the first one on again if they are too few."""
        return list(itertools.islice(itertools.cycle(self.kept_prompts[str(seed)]), number))

    def make_model(self, folder: Path) -> None:
        """Save the policy in float32, and keep the recipe's prompts, whose order is random already."""
        from best_of_n import prompts_of  # needs lmppo

        found = {TRAINING: prompts_of("prompts"), HELD_OUT: prompts_of("evaluation")}
        prompts = {seed: [ids for ids in part if len(ids) == self.prompt] for seed, part in found.items()}
        (Path(self.folder) / "prompts.json").write_text(json.dumps(prompts))
        AutoModelForCausalLM.from_pretrained(POLICY).float().save_pretrained(folder)


TASK = Reviews
