r"""The main-job table of docs/results.md: the tuned policy against the reference and best-of-n, over several seeds.

    python benchmarks/main_job.py --seeds 0 1 2
    python benchmarks/main_job.py --seeds 0 1 2 --name without-warmup --flags "--critic_warmup_steps 0"

Each seed is one run of the recipe, launched as a user would. Then both policies complete the same held-out prompts.
Prints a table and writes runs/benchmarks/<name>.json.
"""

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lmppo.metrics import distinct_n
from lmppo.models import ActorCritic, Reference, load_weights, score_tokens
from lmppo.plots import read_metrics
from lmppo.prompts import cut_prompts, load_tokenizer, pad_left
from lmppo.sampling import EVALUATION, SamplingParams, sample, uniform_noise
from lmppo.texts import decode_completions, decode_whole
from reward_models import load
from reward_models.sentiment.reviews import load_reviews

REFERENCE = "recipes/models/tiny-reviews-gpt2"
CONFIG = "recipes/configs/tiny_reviews.yaml"


def launch(seed: int, output_dir: Path, flags: list[str]) -> float:
    """Run the recipe; returns the seconds it took, everything included."""
    started = time.perf_counter()
    command = ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "recipes/ppo_sentiment.py"]
    command += ["--config", CONFIG, "--seed", str(seed), "--output_dir", str(output_dir), *flags]
    subprocess.run(command, check=True)
    return time.perf_counter() - started


@torch.no_grad()
def complete(policy: str, prompts: list[list[int]], tokens: int, seed: int) -> tuple[list[str], dict]:
    """One completion per prompt: the texts, and sequence KL to the reference and distinct-2."""
    tokenizer = load_tokenizer(REFERENCE)
    reference = Reference(load_weights(AutoModelForCausalLM, REFERENCE))
    model = ActorCritic(load_weights(AutoModelForCausalLM, policy))
    params = SamplingParams(tokens, eos_token_ids=(tokenizer.eos_token_id,))
    texts, kl, ids, masks = [], [], [], []
    for start in range(0, len(prompts), 256):
        rows = prompts[start : start + 256]
        noise = uniform_noise(seed, 0, range(start, start + len(rows)), tokens, purpose=EVALUATION)
        samples = sample(model, *pad_left(rows, max(map(len, rows))), noise, params)
        ref_logprobs = score_tokens(reference.logits, samples, 1.0, 64)
        kl += (samples.logprobs - ref_logprobs).sum(dim=1).tolist()
        texts += decode_completions(tokenizer, rows, samples.tokens.counted_ids())
        ids.append(samples.tokens.completion_ids)
        masks.append(samples.completion_mask)
    distinct = distinct_n(torch.cat(ids)[:512], torch.cat(masks)[:512], 2)
    return texts, {"kl": sum(kl) / len(kl), "distinct_2": distinct}


def judge(prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
    """The reward (log-odds), its probability, and VADER, which nothing was trained on."""
    log_odds = load("classifier:tiny-reviews-sentiment")(prompts=prompts, completions=completions, completion_ids=[])
    vader = load("lexicon")(prompts=prompts, completions=completions, completion_ids=[])
    return {"reward": log_odds, "p_positive": [1 / (1 + math.exp(-x)) for x in log_odds], "vader": vader}


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def best_of(n: int, rewards: list[float], per_prompt: int) -> float:
    """Mean over prompts and disjoint groups of the best reward of n samples."""
    groups = [rewards[i : i + n] for i in range(0, len(rewards), n)]
    assert per_prompt % n == 0
    return mean([max(group) for group in groups])


def main() -> None:
    """Run the seeds, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="main-job")
    parser.add_argument("--flags", default="", help="further flags for the recipe")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()

    tokenizer = load_tokenizer(REFERENCE)
    held_out = cut_prompts(load_reviews("evaluation"), tokenizer, 8)["prompt"][: args.prompts]
    held_out = [list(row) for row in held_out]
    texts = decode_whole(tokenizer, held_out)

    best_prompts = [row for row in held_out[:128] for _ in range(64)]
    completions, _ = complete(REFERENCE, best_prompts, args.tokens, seed=1)
    rewards = judge([text for text in texts[:128] for _ in range(64)], completions)["reward"]
    rows = {}
    for n in (1, 4, 16, 64):
        rows[f"best of {n}"] = {"kl": math.log(n) - (n - 1) / n, "reward": best_of(n, rewards, 64)}
    completions, numbers = complete(REFERENCE, held_out, args.tokens, seed=0)
    rows["reference"] = numbers | {k: mean(v) for k, v in judge(texts, completions).items()}
    for seed in args.seeds:
        run = Path("runs/benchmarks") / f"{args.name}-{seed}"
        seconds = launch(seed, run, shlex.split(args.flags))
        completions, numbers = complete(str(run / "final"), held_out, args.tokens, seed=0)
        rows[f"PPO, seed {seed}"] = numbers | {k: mean(v) for k, v in judge(texts, completions).items()}
        rows[f"PPO, seed {seed}"] |= {"seconds": seconds, "steps": read_metrics(run)[-1]["step"]}

    columns = ["kl", "reward", "p_positive", "vader", "distinct_2", "seconds"]
    print("| policy | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.3g}" if c in row else "" for c in columns) + " |")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}: {shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}")
    Path(f"runs/benchmarks/{args.name}.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
