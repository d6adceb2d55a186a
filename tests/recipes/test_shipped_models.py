"""The weights in this repository: they load with plain transformers, and score what their model cards say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lmppo.rewards import ClassifierReward
from reward_models import load
from reward_models.sentiment.calibration import report
from reward_models.sentiment.reviews import load_reviews

ROOT = Path(__file__).parents[2]
LANGUAGE_MODEL = ROOT / "recipes" / "models" / "tiny-reviews-gpt2"
CLASSIFIER = ROOT / "reward_models" / "tiny-reviews-sentiment"
sys.path.insert(0, str(ROOT / "recipes"))


@pytest.mark.parametrize("directory", [LANGUAGE_MODEL, CLASSIFIER], ids=lambda path: path.name)
def test_weights_are_small_and_safe(directory):
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 12e6
    assert {path.suffix for path in directory.iterdir()} <= {".safetensors", ".json", ".md"}


def test_language_model_codes_held_out_reviews_as_its_card_says():
    from tiny_gpt2 import bits_per_byte

    claimed = json.loads((LANGUAGE_MODEL / "sft_report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    assert 3e6 <= model.num_parameters() <= 6e6
    texts = list(load_reviews("evaluation")["text"][: claimed["held_out_reviews"]])
    measured = bits_per_byte(model, tokenizer, texts, tokenizer.model_max_length)
    assert measured == pytest.approx(claimed["bits_per_byte"], abs=1e-4)
    assert str(claimed["bits_per_byte"]) in (LANGUAGE_MODEL / "README.md").read_text()


def test_classifier_judges_held_out_sentences_as_its_card_says():
    claimed = json.loads((CLASSIFIER / "classifier_report.json").read_text())["evaluation"]["Rotten Tomatoes sentences"]
    sentences = load_reviews("evaluation", "rotten_tomatoes")
    reward = ClassifierReward(str(CLASSIFIER), output="log_odds")
    scores = reward(prompts=[""] * len(sentences), completions=list(sentences["text"]))
    measured = report(torch.tensor(scores), torch.tensor(sentences["label"]))
    for name, value in claimed["models"]["this classifier"].items():
        assert measured[name] == pytest.approx(value, abs=2e-3), name  # the report is rounded, and a tie may flip
    assert AutoModelForSequenceClassification.from_pretrained(CLASSIFIER).config.id2label == {
        0: "NEGATIVE",
        1: "POSITIVE",
    }


def test_shipped_classifier_loads_by_its_bare_name_and_tells_good_from_bad():
    good, bad = load("classifier:tiny-reviews-sentiment")(
        prompts=["This film is"] * 2,
        completions=[" wonderful, a great and moving story.", " awful, boring and a waste."],
    )
    assert good > 1 and bad < -1
