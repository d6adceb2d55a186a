"""Stage one: make a tiny GPT-2 that writes movie-review English, from scratch, with trl's SFTTrainer.

    accelerate launch --config_file accelerate_config.yaml recipes/sft.py --config recipes/configs/sft_tiny_reviews.yaml

A byte-level BPE is trained on the ``sft`` split of the reviews, then a small GPT-2 on the same texts, packed into
blocks. The held-out ``evaluation`` split gives bits per byte, and a few samples are shown.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, TrlParser

from reward_models.reviews import load_reviews

END_OF_TEXT = "<|endoftext|>"


@dataclass
class TinyGPT2Arguments:
    """The size of the model and of its vocabulary, and how much held-out text is scored."""

    vocab_size: int = field(default=8192, metadata={"help": "Size of the byte-level BPE vocabulary."})
    n_embd: int = field(default=192, metadata={"help": "Width of the model."})
    n_layer: int = field(default=4, metadata={"help": "Number of transformer blocks."})
    n_head: int = field(default=6, metadata={"help": "Number of attention heads."})
    eval_reviews: int = field(default=400, metadata={"help": "Held-out reviews scored for bits per byte."})


def train_tokenizer(texts: list[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in GPT-2's manner; ``<|endoftext|>`` is its only special token and pads as well."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model_max_length,
    )


def build_model(arguments: TinyGPT2Arguments, n_positions: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights; exact GELU, which costs a third of the tanh form on a CPU, and no dropout."""
    config = GPT2Config(
        vocab_size=arguments.vocab_size,
        n_positions=n_positions,
        n_embd=arguments.n_embd,
        n_layer=arguments.n_layer,
        n_head=arguments.n_head,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


@torch.no_grad()
def bits_per_byte(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> float:
    """Code length of the texts under the model, in bits per UTF-8 byte.

    Each text starts after ``<|endoftext|>`` and is cut into blocks of ``length`` tokens; each block after the first
    is given the last token of the one before, so that every token of the text is scored exactly once.
    """
    nats, n_bytes = 0.0, 0
    model.eval()
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        n_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, length - 1):
            block = torch.tensor([ids[start : start + length]], device=model.device)
            logits = model(block, use_cache=False).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, block[0, 1:], reduction="sum").item()
    return nats / math.log(2) / n_bytes


def main() -> None:
    """Train the tokenizer and the model, score both, and write them to ``--output_dir``."""
    arguments, args = TrlParser((TinyGPT2Arguments, SFTConfig)).parse_args_and_config()
    torch.manual_seed(args.seed)
    texts = load_reviews("sft")["text"]
    held_out = load_reviews("evaluation")["text"][: arguments.eval_reviews]

    tokenizer = train_tokenizer(list(texts), arguments.vocab_size, args.max_length)
    model = build_model(arguments, args.max_length)
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
    if not trainer.is_world_process_zero():
        return

    model = GPT2LMHeadModel.from_pretrained(args.output_dir, dtype="float32")
    report = {
        "parameters": model.num_parameters(),
        "train_reviews": len(texts),
        "tokens_seen": trainer.state.max_steps * args.train_batch_size * args.max_length,
        "train_minutes": round(seconds / 60, 1),
        "held_out_reviews": len(held_out),
        "bits_per_byte": round(bits_per_byte(model, tokenizer, list(held_out), args.max_length), 4),
    }
    Path(args.output_dir, "sft_report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    for prompt in ("This movie", "The acting was", "I watched this with my family and"):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=48, pad_token_id=0
        )
        print(repr(tokenizer.decode(out[0])))


if __name__ == "__main__":
    main()
