"""Stage one: make a tiny GPT-2 that writes movie-review English, from scratch, with trl's SFTTrainer.

    accelerate launch --config_file accelerate_config.yaml recipes/sft.py --config recipes/configs/sft_tiny_reviews.yaml

A byte-level BPE is trained on the ``sft`` split of the reviews, then a small GPT-2 on the same texts, packed into
blocks. The held-out ``evaluation`` split gives bits per byte, and a few samples are shown.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tiny_gpt2 import build_model, publish, train_tokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from lmppo.pretrained import check_template_path
from lmppo.redaction import scrubbed, scrubbed_stderr
from reward_models.sentiment.reviews import load_splits


@dataclass
class TinyGPT2Arguments:
    """The size of the model and its vocabulary, and the amount of held-out text to score."""

    vocab_size: int = field(default=8192, metadata={"help": "Size of the byte-level BPE vocabulary."})
    n_embd: int = field(default=192, metadata={"help": "Width of the model."})
    n_layer: int = field(default=4, metadata={"help": "Number of transformer blocks."})
    n_head: int = field(default=6, metadata={"help": "Number of attention heads."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout during training; the saved configuration has none."})
    eval_reviews: int = field(default=400, metadata={"help": "Held-out reviews to score in bits per byte."})


@scrubbed
def main() -> None:
    """Train the tokenizer and the model, score both, and write them to ``--output_dir``."""
    with scrubbed_stderr():
        arguments, args = TrlParser((TinyGPT2Arguments, SFTConfig)).parse_args_and_config()
    check_template_path(args.chat_template_path)
    torch.manual_seed(args.seed)
    reviews = load_splits("sft", "evaluation")
    texts = reviews["sft"]["text"]
    held_out = reviews["evaluation"]["text"][: arguments.eval_reviews]

    tokenizer = train_tokenizer(list(texts), arguments.vocab_size, args.max_length)
    model = build_model(arguments.vocab_size, args.max_length, arguments.n_embd, arguments.n_layer, arguments.n_head)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.endswith("attn_dropout"):
            module.p = arguments.dropout
    print(f"{model.num_parameters() / 1e6:.2f} million parameters, {len(texts)} reviews")
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(args.output_dir)
    Path(args.output_dir, "training_args.bin").unlink(missing_ok=True)  # a pickle, with the same content as the YAML
    if not trainer.is_world_process_zero():
        return

    report = {
        "parameters": model.num_parameters(),
        "train_reviews": len(texts),
        "tokens_seen": trainer.state.max_steps * args.train_batch_size * args.max_length,
        "train_minutes": round(seconds / 60, 1),
    }
    print(json.dumps(publish(args.output_dir, report, list(held_out), args.max_length), indent=2))


if __name__ == "__main__":
    main()
