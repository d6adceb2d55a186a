"""Best-of-n sampling from the main job's reference: what choosing among n samples gives without any training.

For main_job.py. The prompts, the length and the sampling are those of the recipe's evaluation: the first draw of seed 0 is
what the recipe reports before training. Of every n draws of a prompt the one with the highest reward is kept.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from measuring import HERE
from torch import Tensor
from transformers import AutoModelForCausalLM

from lmppo.metrics import distinct_n
from lmppo.models import ActorCritic, load_weights
from lmppo.prompts import cut_prompts, load_tokenizer, pad_left
from lmppo.sampling import EVALUATION, SamplingParams, sample, uniform_noise
from lmppo.texts import decode_completions, decode_whole
from reward_models import load
from reward_models.sentiment.reviews import load_reviews

ROOT = HERE.parent
REFERENCE = ROOT / "recipes/models/tiny-reviews-gpt2"
CONFIG = ROOT / "recipes/configs/tiny_reviews.yaml"
COLUMNS = ("kl", "reward", "objective", "p_positive", "vader", "distinct_2")


def prompts_of(split: str, number: int | None = None) -> list[list[int]]:
    """The first (or all) of the recipe's prompts: to train on (``prompts``) or to evaluate with (``evaluation``)."""
    cut = cut_prompts(load_reviews(split), load_tokenizer(str(REFERENCE)), job()["prompt_tokens"])
    return [list(row) for row in cut["prompt"][:number]]


def job() -> dict[str, Any]:
    """The main job's settings."""
    return yaml.safe_load(CONFIG.read_text())


def judge(prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
    """The reward (log-odds), its probability, and VADER, which nothing was trained on."""
    log_odds = load("classifier:tiny-reviews-sentiment")(prompts=prompts, completions=completions, completion_ids=[])
    vader = load("lexicon")(prompts=prompts, completions=completions, completion_ids=[])
    return {"reward": log_odds, "p_positive": [1 / (1 + math.exp(-x)) for x in log_odds], "vader": vader}


def kl_bound(n: int) -> float:
    """Nats that best-of-n is away from the distribution it samples, at most."""
    return math.log(n) - (n - 1) / n


def best_draws(rewards: Tensor, n: int) -> Tensor:
    """``(D // n, B)`` the number of the best draw in each group of n, of ``(D, B)`` rewards."""
    groups = rewards.unflatten(0, (-1, n))
    return groups.argmax(dim=1) + n * torch.arange(len(groups))[:, None]


def measure(
    sizes: Sequence[int], prompts: list[list[int]], tokens: int, kl_coef: float, seed: int, by: str = "reward"
) -> dict[int, dict]:
    """The row of each n: means over the prompts, and over all groups of n draws among as many as the largest n.

    Args:
        sizes: Each n; they divide the largest.
        prompts: Token ids.
        tokens: Most tokens of a completion.
        kl_coef: Price of a nat.
        seed: Of the sampling.
        by: What the best are chosen by, and what the objective is made of: a name that :func:`judge` gives.
    """
    tokenizer = load_tokenizer(str(REFERENCE))
    model = ActorCritic(load_weights(AutoModelForCausalLM, str(REFERENCE)))
    params = SamplingParams(tokens, eos_token_ids=(tokenizer.eos_token_id,))
    padded, n_draws = pad_left(prompts, max(map(len, prompts))), max(sizes)
    ids, masks, texts = [], [], []
    for k in range(n_draws):
        noise = uniform_noise(seed, k, range(len(prompts)), tokens, purpose=EVALUATION)
        drawn = sample(model, *padded, noise, params, values=False)
        ids.append(drawn.tokens.completion_ids)
        masks.append(drawn.completion_mask)
        texts += decode_completions(tokenizer, prompts, drawn.tokens.counted_ids())
    judged = judge(decode_whole(tokenizer, prompts) * n_draws, texts)
    scores = {name: torch.tensor(values).view(n_draws, -1) for name, values in judged.items()}
    rows = {}
    for n in sizes:
        best = best_draws(scores[by], n)
        row = {name: values.gather(0, best).mean().item() for name, values in scores.items()}
        one = best[0], torch.arange(len(prompts))  # as many completions for every n: distinct_2 falls with their number
        row["distinct_2"] = distinct_n(torch.stack(ids)[one], torch.stack(masks)[one], 2)
        rows[n] = row | {"kl": kl_bound(n), "objective": row[by] - kl_coef * kl_bound(n)}
    return rows
