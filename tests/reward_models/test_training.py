"""The training scripts, run for a few steps on tiny random models: what they save is a reward."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from fakes import tiny_gpt2, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lmppo.rewards import ClassifierReward, RewardSet
from reward_models import load, train_classifier, train_preference
from reward_models.bag_of_words import teacher_probabilities
from reward_models.calibration import report

RECIPE = Path(__file__).parents[2] / "recipes" / "configs" / "sentiment_classifier.yaml"
WORDS = ("awful", "fine")
CPU = ["--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A language model whose tokenizer pads with EOS, as GPT-2's does."""
    path = tmp_path_factory.mktemp("trunk") / "lm"
    tiny_gpt2(n_positions=128, initializer_range=0.02).save_pretrained(path)
    tiny_tokenizer(model_max_length=128).save_pretrained(path)
    return str(path)


@pytest.fixture
def few_texts(monkeypatch):
    """Forty reviews whose first word tells their label, in place of the thousands of the package."""

    def labeled_passages(split, source, *, seed, min_words=10, max_words=45):
        rows = [{"text": f"{WORDS[i % 2]} {source} {split} {i}", "label": i % 2} for i in range(40)]
        rows = [{**row, "held_out": i % 10 < 2, "source": source} for i, row in enumerate(rows)]
        return Dataset.from_list(rows)

    monkeypatch.setattr(train_classifier, "labeled_passages", labeled_passages)
    monkeypatch.setattr(train_preference, "labeled_passages", labeled_passages)


def test_the_classifier_that_is_saved_is_calibrated_and_reported(trunk, few_texts, tmp_path):
    out = tmp_path / "clf"
    flags = ["--model_name_or_path", trunk, "--output_dir", str(out), "--max_steps", "3", "--warmup_steps", "1"]
    train_classifier.main([*flags, "--per_device_train_batch_size", "8", *CPU])

    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert all(p.dtype == torch.float16 for p in AutoModelForSequenceClassification.from_pretrained(out).parameters())
    assert AutoTokenizer.from_pretrained(out).pad_token_id == model.config.pad_token_id == 0

    saved = json.loads((out / "classifier_report.json").read_text())
    assert saved["train_texts"] == 64 and saved["held_out_texts"] == 16
    evaluated = saved["evaluation"]["IMDb passages"]
    texts = [f"{WORDS[i % 2]} imdb evaluation {i}" for i in range(40)]
    labels = torch.tensor([i % 2 for i in range(40)])
    with torch.no_grad():  # plain transformers, one text at a time
        logits = [model(**AutoTokenizer.from_pretrained(out)(t, return_tensors="pt")).logits[0] for t in texts]
    by_hand = report(torch.tensor([(x[1] - x[0]).item() for x in logits]), labels)
    assert evaluated["texts"] == 40
    assert evaluated["models"]["this classifier"] == pytest.approx(by_hand, abs=2e-4)
    assert evaluated["models"]["bag of words (sentences)"]["accuracy"] > 0.9  # it does see the first word

    card = (out / "README.md").read_text()
    assert f"T = {saved['temperature']}" in card and "{" not in card
    assert f"| {by_hand['accuracy']:.3f} |" in card
    assert load(f"classifier:{out}")(prompts=["a "], completions=["imdb"]) == pytest.approx(
        ClassifierReward(model, tiny_tokenizer(), output="log_odds")(prompts=["a "], completions=["imdb"]), abs=1e-5
    )


def test_the_temperature_is_that_of_the_held_out_texts(trunk, few_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(train_classifier, "fit_temperature", lambda log_odds, labels: 4.0)
    args = ["--model_name_or_path", trunk, "--max_steps", "1", *CPU, "--output_dir"]
    train_classifier.main([*args, str(tmp_path / "four")])
    monkeypatch.setattr(train_classifier, "fit_temperature", lambda log_odds, labels: 1.0)
    train_classifier.main([*args, str(tmp_path / "one")])
    four, one = (ClassifierReward(tmp_path / name, output="log_odds") for name in ("four", "one"))
    texts = {"prompts": ["a", "b"], "completions": ["b", "c"]}
    assert four(**texts) == pytest.approx([z / 4 for z in one(**texts)], abs=1e-3)  # float16 weights
    z = json.loads((tmp_path / "four" / "classifier_report.json").read_text())["evaluation"]["IMDb passages"]["models"]
    assert z["before temperature"]["auc"] == z["this classifier"]["auc"]
    assert z["before temperature"]["nll"] != z["this classifier"]["nll"]


def test_dropout_is_on_in_training_and_not_in_what_is_saved(trunk):
    model = train_classifier.load_trunk(trunk, dropout=0.25)
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops and set(drops) == {0.25}
    assert (model.config.resid_pdrop, model.config.attn_pdrop) == (0.1, 0.1)  # the trunk's own, as it came


def test_no_held_out_text_is_trained_on(few_texts):
    texts = train_classifier.classifier_texts(train_classifier.ClassifierArguments(), seed=0)
    arguments = train_classifier.ClassifierArguments(sentence_repeats=3)
    rows = train_classifier.training_rows(texts, arguments, tiny_tokenizer())
    assert len(rows) == 32 + 3 * 32
    trained = set(tiny_tokenizer().batch_decode(list(rows["input_ids"])))
    assert not trained & set(texts.filter(lambda held_out: held_out, input_columns="held_out")["text"])
    assert set(rows.column_names) == {"input_ids", "labels"}


def test_the_teacher_has_not_seen_the_text_it_judges():
    """A word that stands in one text only, and decides its label, tells a model without that text nothing."""
    texts = [f"{WORDS[i % 2]} film number{i}" for i in range(200)]
    labels = [i % 2 for i in range(200)]
    labels[0] = 1 - labels[0]  # a wrong label
    judged = teacher_probabilities(texts, labels, [1.0] * 200)
    assert ((judged > 0.5) == torch.tensor([i % 2 == 1 for i in range(200)])).all(), "by the word, not by the label"
    assert judged[0] < 0.2


def test_weights_decide_whom_the_teacher_believes():
    texts = [f"{word} {i}" for i in range(100) for word in ("fine", "fine")]
    labels = [0, 1] * 100
    low = teacher_probabilities(texts, labels, [3.0, 1.0] * 100)
    high = teacher_probabilities(texts, labels, [1.0, 3.0] * 100)
    assert (low < high).all()


def test_targets_are_between_label_and_teacher(few_texts, monkeypatch):
    texts = train_classifier.classifier_texts(train_classifier.ClassifierArguments(), seed=0)
    monkeypatch.setattr(train_classifier, "teacher_probabilities", lambda t, labels, w: torch.full((len(t),), 0.6))
    for share, expected in ((0.0, {0.0, 1.0}), (0.5, {0.3, 0.8}), (1.0, {0.6})):
        arguments = train_classifier.ClassifierArguments(teacher_share=share)
        rows = train_classifier.training_rows(texts, arguments, tiny_tokenizer())
        targets = torch.tensor(rows["labels"])
        assert {round(t, 4) for t in targets[:, 1].tolist()} == expected
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)))


def test_hidden_tokens_are_the_share_that_was_asked_for_and_padding_is_left_alone():
    collate = train_classifier.HidingCollator(tiny_tokenizer(), share=0.25)
    features = [{"input_ids": [5] * n, "labels": [0.5, 0.5]} for n in (4000, 2000)]
    torch.manual_seed(0)
    batch = collate(features)
    counted = batch["attention_mask"].bool()
    assert counted.sum(dim=1).tolist() == [4000, 2000]
    assert (batch["input_ids"][counted] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert set(batch["input_ids"][counted].tolist()) == {0, 5}


def test_the_recipe_and_the_defaults_say_the_same():
    recipe = yaml.safe_load(RECIPE.read_text())
    arguments = vars(train_classifier.ClassifierArguments())
    assert recipe == {**arguments, **train_classifier.DEFAULTS}


def test_a_preference_model_from_a_file_is_a_reward(trunk, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Well: ", "chosen": f"{i} fine", "rejected": f"{i} awful"} for i in range(64)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "rm")
    flags = ["--model_name_or_path", trunk, "--dataset_name", str(pairs), "--output_dir", out, "--max_steps", "20"]
    train_preference.main([*flags, "--per_device_train_batch_size", "16", "--learning_rate", "1e-2", *CPU])
    scores = RewardSet(out).score(["Well: "] * 2, ["7 fine", "7 awful"], [[1], [1]], {}, None, 1).per_function[:, 0]
    assert scores[0] > scores[1] + 0.1
    assert load(f"classifier:{out}?output=logit")(prompts=["Well: "], completions=["7 fine"]) == [scores[0].item()]


def test_a_preference_model_from_the_reviews(trunk, few_texts, tmp_path):
    out = str(tmp_path / "rm")
    train_preference.main(["--model_name_or_path", trunk, "--output_dir", out, "--max_steps", "1", *CPU])
    assert len(ClassifierReward(out)(prompts=["a"], completions=["b"])) == 1


def test_pairs_prefer_positive_passages():
    passages = Dataset.from_dict({"text": ["n1", "p1", "p2", "n2", "p3"], "label": [0, 1, 1, 0, 1]})
    pairs = train_preference.pair_passages(passages)
    assert pairs.to_dict() == {"chosen": ["p1", "p2"], "rejected": ["n1", "n2"]}


def test_pairs_without_their_columns_are_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("chosen,worse\na,b\n")
    with pytest.raises(ValueError, match="has the columns chosen, worse; rejected missing"):
        train_preference.load_pairs(str(tmp_path / "pairs.csv"), "train", 0)
    with pytest.raises(ValueError, match="there is no such file"):
        train_preference.load_pairs(str(tmp_path / "none.jsonl"), "train", 0)


def test_unknown_flags_are_errors(trunk):
    with pytest.raises((ValueError, SystemExit)):
        train_classifier.main(["--model_name_or_path", trunk, "--dropuot", "0.1"])
