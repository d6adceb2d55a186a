"""Train a sentiment classifier on labeled movie reviews, calibrate it, and measure it.

    python -m reward_models.train_classifier --config recipes/configs/sentiment_classifier.yaml
    accelerate launch reward_models/train_classifier.py --output_dir runs/sentiment

A language model gets a classification head and learns from a teacher: a larger encoder, fine-tuned on the labels first,
judges hundreds of thousands of passages of IMDb reviews and pieces of Rotten Tomatoes sentences, for labels are few, and a
passage often does not deserve its review's. It judges beginnings of each text as well, and the classifier, whose trunk is
causal, learns them all in one pass. One temperature, fitted on a tenth of the reviews that was held out, is folded into
the head, so that plain transformers gives calibrated log-odds. Reviews that no training saw give the numbers of the model
card.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import TrlParser

import lmppo.pretrained as pretrained
from lmppo.redaction import scrub, scrubbed, scrubbed_stderr
from lmppo.rewards import ClassifierReward
from reward_models.sentiment.bag_of_words import bag_of_words_log_odds
from reward_models.sentiment.calibration import fit_temperature, fold_temperature, report
from reward_models.sentiment.model_card import sentiment_card
from reward_models.sentiment.passages import (
    labeled_passages,
    plain_spelling,
    remix_sentences,
    repeated_words,
    swap_words,
)
from reward_models.sentiment.teacher import LABELS, MINI_LM, judge, make_teacher

# The shipped recipe; recipes/configs/sentiment_classifier.yaml says the same.
DEFAULTS = {
    "output_dir": "runs/tiny-reviews-sentiment",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 64,
    "learning_rate": 1.5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 200,
    "weight_decay": 0.05,
    "use_cpu": True,
    "bf16": True,
    "train_sampling_strategy": "group_by_length",
    "adam_beta2": 0.98,
    "logging_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
}


@dataclass
class ClassifierArguments:
    """What to train, and on which passages."""

    model_name_or_path: str = field(
        default="recipes/models/tiny-reviews-gpt2", metadata={"help": "Language model whose trunk is trained."}
    )
    min_words: int = field(default=5, metadata={"help": "Fewest words of a passage of an IMDb review."})
    max_words: int = field(default=45, metadata={"help": "Most words of a passage of an IMDb review."})
    plain_share: float = field(
        default=0.5, metadata={"help": "Share of IMDb passages spelled in lower case, punctuation apart."}
    )
    teacher_model_name_or_path: str = field(
        default=MINI_LM, metadata={"help": "Encoder to fine-tune as the teacher, or a sentiment classifier."}
    )
    sentence_repeats: int = field(
        default=3, metadata={"help": "Times the teacher reads each Rotten Tomatoes sentence."}
    )
    rounds: int = field(default=2, metadata={"help": "Times all reviews are cut into passages, each time anew."})
    remixed_sentences: int = field(
        default=45_000, metadata={"help": "Texts made of pieces of Rotten Tomatoes sentences, in each round."}
    )
    prefixes: int = field(
        default=1, metadata={"help": "Beginnings of each text, each up to the end of a random word, judged besides it."}
    )
    swapped_share: float = field(
        default=0.3, metadata={"help": "Random words replace a share of each second text's words, from 0 to this."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model, if loading it needs that."}
    )


@scrubbed
def main(argv: list[str] | None = None) -> None:
    """Train, calibrate, save to ``--output_dir``, and measure what was saved."""
    parser = TrlParser((ClassifierArguments, TrainingArguments))
    parser.set_defaults_with_config(**DEFAULTS)
    with scrubbed_stderr():
        arguments, args = parser.parse_args_and_config(argv)
    torch.manual_seed(args.seed)
    model = load_trunk(arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code)
    tokenizer = load_tokenizer(arguments.model_name_or_path, model, trust_remote_code=arguments.trust_remote_code)
    texts = classifier_texts(arguments, args.seed)
    kept = texts.filter(lambda held_out: not held_out, input_columns="held_out")
    teacher = make_teacher(
        arguments.teacher_model_name_or_path,
        kept,
        args,
        sentence_repeats=arguments.sentence_repeats,
        trust_remote_code=arguments.trust_remote_code,
    )
    rows = training_rows(teacher, arguments, tokenizer, args)
    trainer = Trainer(model=PrefixScores(model), args=args, train_dataset=rows, data_collator=PrefixCollator(tokenizer))
    started = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - started) / 60
    if not trainer.is_world_process_zero():
        return
    held_out = texts.filter(lambda held_out: held_out, input_columns="held_out")
    temperature = fit_temperature(log_odds(held_out["text"], model, tokenizer), torch.tensor(held_out["label"]))
    fold_temperature(model, temperature)
    model.half().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)

    weights = Path(args.output_dir, "model.safetensors")
    summary = {
        **scrub(asdict(arguments)),
        "trunk": Path(scrub(arguments.model_name_or_path)).name,
        "parameters": round(model.num_parameters() / 1e6, 2),
        "megabytes": round(weights.stat().st_size / 1e6, 2),
        "labeled_texts": len(kept),
        "judged_texts": len(rows),
        "judged_tokens": sum(rows["length"]),
        "held_out_texts": len(held_out),
        "train_minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "temperature": round(temperature, 4),
        "evaluation": evaluate(args.output_dir, temperature, texts, teacher, args.seed),
    }
    Path(args.output_dir, "classifier_report.json").write_text(json.dumps(summary, indent=2) + "\n")
    Path(args.output_dir, "README.md").write_text(sentiment_card(summary, args.output_dir))
    print(json.dumps(summary, indent=2))


def load_trunk(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The language model's trunk in float32 under a new two-label head.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code that is not trusted.
        ValueError: The model does not score its last token, as a causal one does.
    """
    model = pretrained.load_pretrained(
        AutoModelForSequenceClassification,
        name,
        trust_remote_code=trust_remote_code,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        dtype=torch.float32,
    )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ValueError(
            f"model_name_or_path={name!r} is a {type(model).__name__}, which has no `score` of its last token: the "
            "classifier's trunk must be a causal language model, such as a GPT-2."
        )
    return model


def load_tokenizer(name: str, model: PreTrainedModel, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The trunk's tokenizer, padding on the right; the model pools the last token that does not pad."""
    tokenizer = pretrained.load_tokenizer(name, trust_remote_code=trust_remote_code, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def classifier_texts(arguments: ClassifierArguments, seed: int) -> Dataset:
    """IMDb passages, some respelled, and Rotten Tomatoes sentences: the columns of ``labeled_passages``."""
    passages = labeled_passages(
        "classifier", "imdb", seed=seed, min_words=arguments.min_words, max_words=arguments.max_words
    )
    n_plain = round(arguments.plain_share * len(passages))
    passages = passages.map(
        lambda text, i: {"text": plain_spelling(text) if i < n_plain else text}, input_columns="text", with_indices=True
    )
    return concatenate_datasets([passages, labeled_passages("classifier", "rotten_tomatoes", seed=seed)])


def training_rows(
    teacher: ClassifierReward,
    arguments: ClassifierArguments,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
) -> Dataset:
    """What the classifier reads: every round's texts, with the teacher's probabilities.

    Args:
        teacher: Gives the log-odds of POSITIVE of texts.
        arguments: How many rounds, of what.
        tokenizer: The trunk's.
        args: Gives the seed (each round cuts the reviews by another) and the teacher's precision.

    Returns:
        The columns ``input_ids``, ``length`` (tokens) and ``labels``: for each token the probability of POSITIVE of the
        text up to it, NaN where the teacher was not asked.
    """
    rng, rounds = Random(args.seed), []
    for i in range(arguments.rounds):
        texts = round_texts(arguments, args.seed + 1 + i)
        words = repeated_words(texts)
        shares = [arguments.swapped_share * max(0.0, 2 * rng.random() - 1) for _ in texts]
        texts = [swap_words(text, words, share, rng) for text, share in zip(texts, shares, strict=True)]
        rounds.append(judged_texts(texts, teacher, tokenizer, arguments.prefixes, rng, bf16=args.bf16))
    return concatenate_datasets(rounds)


def judged_texts(
    texts: list[str],
    teacher: ClassifierReward,
    tokenizer: PreTrainedTokenizerBase,
    n_prefixes: int,
    rng: Random,
    *,
    bf16: bool = False,
) -> Dataset:
    """Token ids, and the teacher's probability of POSITIVE after the tokens that end a judged prefix, NaN elsewhere."""
    encoded = tokenizer(texts, truncation=True, return_offsets_mapping=True)
    places: list[list[int]] = []
    prefixes: list[str] = []
    for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
        ends = [i for i, (_, end) in enumerate(offsets) if text[end : end + 1] in ("", " ")]
        *inner, last = ends or [len(offsets) - 1]  # a word longer than the model's context has no end
        places.append([*sorted(rng.sample(inner, min(n_prefixes, len(inner)))), last])
        prefixes += [text[: offsets[i][1]] for i in places[-1]]
    probabilities = iter(judge(teacher, prefixes, bf16=bf16).sigmoid().tolist())
    labels = [[math.nan] * len(ids) for ids in encoded["input_ids"]]
    for row, ends in zip(labels, places, strict=True):
        for i in ends:
            row[i] = next(probabilities)
    return Dataset.from_dict(
        {"input_ids": encoded["input_ids"], "length": [len(row) for row in labels], "labels": labels}
    )


def round_texts(arguments: ClassifierArguments, seed: int) -> list[str]:
    """The reviews that are not held out, cut anew, and texts made of pieces of sentences."""
    texts = classifier_texts(arguments, seed).filter(lambda held_out: not held_out, input_columns="held_out")
    sentences = texts.filter(lambda source: source == "rotten_tomatoes", input_columns="source")["text"][:]
    rng = Random(seed)
    return [*texts["text"], *(remix_sentences(sentences, rng) for _ in range(arguments.remixed_sentences))]


class PrefixCollator(DataCollatorWithPadding):
    """Pads a batch on the right, its labels with NaN."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        batch = super().__call__([{"input_ids": row["input_ids"]} for row in features])
        labels = [torch.tensor(row["labels"], dtype=torch.float32) for row in features]
        return {**batch, "labels": pad_sequence(labels, batch_first=True, padding_value=math.nan)}


class PrefixScores(torch.nn.Module):
    """A classifier's log-odds of POSITIVE after every token: those of the text so far, for a causal trunk saw no more."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Log-odds ``(B, T)``, and their mean cross entropy with those labels, probabilities ``(B, T)``, that are not NaN."""
        hidden = self.classifier.base_model(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        negative, positive = self.classifier.score(hidden).float().unbind(-1)
        log_odds, judged = positive - negative, ~labels.isnan()
        return {"loss": binary_cross_entropy_with_logits(log_odds[judged], labels[judged]), "log_odds": log_odds}


def log_odds(
    texts: list[str], model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Tensor:
    """``(N,)`` log-odds of POSITIVE, as the reward gives them."""
    reward = ClassifierReward(model, tokenizer, output="log_odds", batch_size=128)
    return torch.tensor(reward(prompts=[""] * len(texts), completions=list(texts)))


def evaluate(
    directory: str, temperature: float, texts: Dataset, teacher: ClassifierReward, seed: int
) -> dict[str, Any]:
    """The saved classifier, the same before its temperature, its teacher and two bags of words, on the evaluation split."""
    tests = {
        "Rotten Tomatoes sentences": labeled_passages("evaluation", "rotten_tomatoes", seed=seed),
        "IMDb passages": labeled_passages("evaluation", "imdb", seed=seed),
    }
    sentences = texts.filter(lambda source: source == "rotten_tomatoes", input_columns="source")
    unseen = [test["text"] for test in tests.values()]
    by_sentences = bag_of_words_log_odds(sentences["text"], sentences["label"], unseen)
    by_all = bag_of_words_log_odds(texts["text"], texts["label"], unseen)
    results = {}
    for i, (name, test) in enumerate(tests.items()):
        labels, calibrated = torch.tensor(test["label"]), log_odds(test["text"], directory)
        results[name] = {
            "texts": len(test),
            "models": {
                "this classifier": report(calibrated, labels),
                "before temperature": report(calibrated * temperature, labels),
                "its teacher": report(judge(teacher, list(test["text"])), labels),
                "bag of words (sentences)": report(by_sentences[i], labels),
                "bag of words (all)": report(by_all[i], labels),
            },
        }
    return results
