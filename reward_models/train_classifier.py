"""Train a sentiment classifier on labeled movie reviews, calibrate it, and measure it.

    python -m reward_models.train_classifier --config recipes/configs/sentiment_classifier.yaml
    accelerate launch reward_models/train_classifier.py --output_dir runs/sentiment

A language model gets a classification head and learns from passages of IMDb reviews and from Rotten Tomatoes
sentences. Its targets are mostly those of a teacher, linear models of words that judge each text unseen: a passage often
does not deserve its review's label. One temperature, fitted on a tenth of the reviews that was held out, is folded into
the head, so that plain transformers gives calibrated log-odds. Reviews that no training saw give the numbers of the
model card.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import TrlParser

from lmppo.rewards import ClassifierReward
from reward_models.bag_of_words import bag_of_words_log_odds, teacher_probabilities
from reward_models.calibration import fit_temperature, fold_temperature, report
from reward_models.model_card import sentiment_card
from reward_models.passages import labeled_passages, plain_spelling

LABELS = ("NEGATIVE", "POSITIVE")
# The shipped recipe; recipes/configs/sentiment_classifier.yaml says the same.
DEFAULTS = {
    "output_dir": "runs/tiny-reviews-sentiment",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "use_cpu": True,
    "bf16": True,
    "train_sampling_strategy": "group_by_length",
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
    dropout: float = field(default=0.1, metadata={"help": "Dropout while training; the saved config keeps its own."})
    min_words: int = field(default=10, metadata={"help": "Fewest words of a passage of an IMDb review."})
    max_words: int = field(default=45, metadata={"help": "Most words of a passage of an IMDb review."})
    plain_share: float = field(
        default=0.3, metadata={"help": "Share of IMDb passages spelled in lower case, punctuation apart."}
    )
    sentence_repeats: int = field(default=2, metadata={"help": "Times each Rotten Tomatoes sentence is in an epoch."})
    teacher_share: float = field(
        default=0.8,
        metadata={"help": "Share of the linear teacher's probability in each target; the label has the rest."},
    )
    token_dropout: float = field(
        default=0.05, metadata={"help": "Share of the tokens that are hidden (id 0) at each sight of a text."}
    )


def main(argv: list[str] | None = None) -> None:
    """Train, calibrate, save to ``--output_dir``, and measure what was saved."""
    parser = TrlParser((ClassifierArguments, TrainingArguments))
    parser.set_defaults_with_config(**DEFAULTS)
    arguments, args = parser.parse_args_and_config(argv)
    torch.manual_seed(args.seed)
    model = load_trunk(arguments.model_name_or_path, arguments.dropout)
    tokenizer = load_tokenizer(arguments.model_name_or_path, model)
    texts = classifier_texts(arguments, args.seed)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=training_rows(texts, arguments, tokenizer),
        data_collator=HidingCollator(tokenizer, share=arguments.token_dropout),
        compute_loss_func=soft_cross_entropy,
    )
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
        **asdict(arguments),
        "trunk": Path(arguments.model_name_or_path).name,
        "parameters": round(model.num_parameters() / 1e6, 2),
        "megabytes": round(weights.stat().st_size / 1e6, 2),
        "train_texts": len(texts) - len(held_out),
        "held_out_texts": len(held_out),
        "train_minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "temperature": round(temperature, 4),
        "evaluation": evaluate(args.output_dir, temperature, texts, args.seed),
    }
    Path(args.output_dir, "classifier_report.json").write_text(json.dumps(summary, indent=2) + "\n")
    Path(args.output_dir, "README.md").write_text(sentiment_card(summary, args.output_dir))
    print(json.dumps(summary, indent=2))


def load_trunk(name: str, dropout: float) -> PreTrainedModel:
    """The language model's trunk in float32 under a new two-label head; dropout is set on the modules alone."""
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        dtype=torch.float32,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def load_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The trunk's tokenizer, padding on the right; the model pools the last token that does not pad."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def classifier_texts(arguments: ClassifierArguments, seed: int) -> Dataset:
    """IMDb passages, some respelled, and Rotten Tomatoes sentences: columns ``text, label, held_out, source``."""
    passages = labeled_passages(
        "classifier", "imdb", seed=seed, min_words=arguments.min_words, max_words=arguments.max_words
    )
    n_plain = round(arguments.plain_share * len(passages))
    passages = passages.map(
        lambda text, i: {"text": plain_spelling(text) if i < n_plain else text}, input_columns="text", with_indices=True
    )
    return concatenate_datasets([passages, labeled_passages("classifier", "rotten_tomatoes", seed=seed)])


def training_rows(texts: Dataset, arguments: ClassifierArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids and target probabilities of all texts that are not held out, Rotten Tomatoes sentences several times."""
    kept = texts.filter(lambda held_out: not held_out, input_columns="held_out")
    targets = torch.tensor(kept["label"], dtype=torch.float64)
    if arguments.teacher_share > 0:
        weights = [3.0 if source == "rotten_tomatoes" else 1.0 for source in kept["source"]]
        teacher = teacher_probabilities(kept["text"], kept["label"], weights)
        targets += arguments.teacher_share * (teacher - targets)
    kept = kept.add_column("target", targets.tolist())
    sentences = kept.filter(lambda source: source == "rotten_tomatoes", input_columns="source")
    rows = concatenate_datasets([kept] + [sentences] * (arguments.sentence_repeats - 1))
    return rows.map(
        lambda batch: {
            "input_ids": tokenizer(batch["text"], truncation=True)["input_ids"],
            "labels": [[1 - target, target] for target in batch["target"]],
        },
        batched=True,
        remove_columns=rows.column_names,
    )


class HidingCollator(DataCollatorWithPadding):
    """Pads a batch, and hides a random share of its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, share: float) -> None:
        super().__init__(tokenizer)
        self.share = share

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        batch = super().__call__(features)
        hidden = torch.rand(batch["input_ids"].shape) < self.share
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden & batch["attention_mask"].bool(), 0)
        return batch


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy with target probabilities ``(B, labels)``."""
    return torch.nn.functional.cross_entropy(outputs.logits.float(), labels.float())


def log_odds(
    texts: list[str], model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Tensor:
    """``(N,)`` log-odds of POSITIVE, as the reward gives them."""
    reward = ClassifierReward(model, tokenizer, output="log_odds", batch_size=128)
    return torch.tensor(reward(prompts=[""] * len(texts), completions=list(texts)))


def evaluate(directory: str, temperature: float, texts: Dataset, seed: int) -> dict[str, Any]:
    """The saved classifier, the same before its temperature, and two bags of words, on the evaluation split."""
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
                "bag of words (sentences)": report(by_sentences[i], labels),
                "bag of words (all)": report(by_all[i], labels),
            },
        }
    return results


if __name__ == "__main__":
    main()
