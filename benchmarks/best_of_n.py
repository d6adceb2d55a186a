r"""Best-of-n sampling from the main job's reference: what choosing among n samples gives without any training.

    python benchmarks/best_of_n.py --seeds 0 1 2 --markdown docs/results.md

The prompts, the length and the sampling are those of the recipe's evaluation: the first draw of seed 0 is what the recipe
reports before training. Of every n draws of a prompt the one with the highest reward is kept.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from main_job import CONFIG, REFERENCE, judge
from measuring import HERE, default_threads, origin, spread, table, write
from torch import Tensor
from transformers import AutoModelForCausalLM

from lmppo.metrics import distinct_n
from lmppo.models import ActorCritic, load_weights
from lmppo.prompts import cut_prompts, load_tokenizer, pad_left
from lmppo.sampling import EVALUATION, SamplingParams, sample, uniform_noise
from lmppo.texts import decode_completions, decode_whole
from reward_models.sentiment.reviews import load_reviews

ROOT = HERE.parent
COLUMNS = ("kl", "reward", "objective", "p_positive", "vader", "distinct_2")


def kl_bound(n: int) -> float:
    """Nats that best-of-n is away from the distribution it samples, at most."""
    return math.log(n) - (n - 1) / n


def best_draws(rewards: Tensor, n: int) -> Tensor:
    """``(D // n, B)`` the number of the best draw in each group of n, of ``(D, B)`` rewards."""
    groups = rewards.unflatten(0, (-1, n))
    return groups.argmax(dim=1) + n * torch.arange(len(groups))[:, None]


def measure(sizes: Sequence[int], prompts: list[list[int]], tokens: int, kl_coef: float, seed: int) -> dict[int, dict]:
    """The row of each n: means over the prompts, and over all groups of n draws among as many as the largest n.

    Args:
        sizes: Each n; they divide the largest.
        prompts: Token ids.
        tokens: Most tokens of a completion.
        kl_coef: Price of a nat.
        seed: Of the sampling.
    """
    tokenizer = load_tokenizer(str(ROOT / REFERENCE))
    model = ActorCritic(load_weights(AutoModelForCausalLM, str(ROOT / REFERENCE)))
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
        best = best_draws(scores["reward"], n)
        row = {name: values.gather(0, best).mean().item() for name, values in scores.items()}
        one = best[0], torch.arange(len(prompts))  # as many completions for every n: distinct_2 falls with their number
        row["distinct_2"] = distinct_n(torch.stack(ids)[one], torch.stack(masks)[one], 2)
        rows[n] = row | {"kl": kl_bound(n), "objective": row["reward"] - kl_coef * kl_bound(n)}
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, choose, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="each n")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--markdown", type=Path, help="the page whose table is replaced")
    parser.add_argument("--smoke", action="store_true", help="four prompts, n of 1 and 4: tries the script")
    args = parser.parse_args(argv)
    sizes = [1, 4] if args.smoke else args.sizes
    if any(n < 1 or max(sizes) % n for n in sizes):
        parser.error(f"--sizes {sizes}: each must be 1 or more and divide the largest.")
    torch.set_num_threads(args.threads)
    job = yaml.safe_load((ROOT / CONFIG).read_text())
    n_prompts = 4 if args.smoke else job["eval_completions"]
    reviews = load_reviews("evaluation")
    cut = cut_prompts(reviews, load_tokenizer(str(ROOT / REFERENCE)), job["prompt_tokens"])
    prompts = [list(row) for row in cut["prompt"][:n_prompts]]
    results = {}
    for seed in args.seeds:
        print(f"seed {seed}", file=sys.stderr, flush=True)
        results[seed] = measure(sizes, prompts, job["max_completion_length"], job["kl_coef"], seed)
    cells = [[str(n), *(spread([rows[n][c] for rows in results.values()]) for c in COLUMNS)] for n in sizes]
    text = [table(["n", *COLUMNS], cells)]
    text.append(f"{n_prompts} held-out prompts, seeds: {', '.join(map(str, args.seeds))}; {origin(args.threads)}")
    write("best-of-n", results, "\n\n".join(text), args.markdown)


if __name__ == "__main__":
    main()
