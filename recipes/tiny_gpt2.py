"""The tiny GPT-2 of stage one: its tokenizer, its architecture, and how it is scored and published."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from model_card import model_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lmppo.pretrained import load_pretrained, load_tokenizer
from lmppo.texts import decode_whole

END_OF_TEXT = "<|endoftext|>"
SAMPLE_PROMPTS = ("This movie", "The acting was", "I watched this with my family and", "One of the")


def train_tokenizer(texts: list[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's; ``<|endoftext|>`` is its only special token, and also the padding token."""
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


def build_model(vocab_size: int, n_positions: int, n_embd: int, n_layer: int, n_head: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights; exact GELU, which costs a third of the tanh form on a CPU, and no dropout."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
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


def show_samples(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, n_tokens: int = 48) -> list[str]:
    """One continuation of each sample prompt, drawn from the model's whole distribution."""
    texts = []
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=n_tokens, pad_token_id=0
        )
        texts += decode_whole(tokenizer, out.tolist())
    return texts


def publish(directory: str, report: dict[str, Any], held_out: list[str], block: int) -> dict[str, Any]:
    """Score the trained model, halve its precision, score it again, and write both numbers into a model card.

    Args:
        directory: Holds the trained model and its tokenizer; the 16-bit weights replace the 32-bit ones.
        report: Facts about the training.
        held_out: Texts not used in training.
        block: Tokens per forward pass.

    Returns:
        The report with the scores and samples.
    """
    tokenizer = load_tokenizer(directory)
    model = load_pretrained(GPT2LMHeadModel, directory, dtype=torch.float32)
    report = report | {"bits_per_byte_32_bit": round(bits_per_byte(model, tokenizer, held_out, block), 4)}
    model.half().save_pretrained(directory)
    model = load_pretrained(GPT2LMHeadModel, directory, dtype=torch.float32)
    torch.manual_seed(0)
    report |= {
        "held_out_reviews": len(held_out),
        "bits_per_byte": round(bits_per_byte(model, tokenizer, held_out, block), 4),
        "samples": show_samples(model, tokenizer),
    }
    Path(directory, "sft_report.json").write_text(json.dumps(report, indent=2) + "\n")
    Path(directory, "README.md").write_text(model_card(report))
    return report
