"""Tiny models and tokenizers built in code: nothing is downloaded, nothing is larger than a few kilobytes."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def tiny_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token per byte and ``<|endoftext|>`` (id 0), which also pads, as in GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {END_OF_TEXT: 0, **{char: i + 1 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_gpt2(vocab_size: int = 257, *, seed: int = 0, **kwargs) -> GPT2LMHeadModel:
    """A random GPT-2 with GPT-2's own dropout of 0.1 in its config, as real checkpoints have it."""
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2, **kwargs}
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    return GPT2LMHeadModel(config)


def tiny_llama(vocab_size: int = 257, *, seed: int = 0, **kwargs) -> LlamaForCausalLM:
    """A random Llama: rotary positions, grouped heads, untied head."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2, **kwargs}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config)


LETTERS = "abcdefghijk"


def letter_tokenizer(letters: str = LETTERS, **kwargs) -> PreTrainedTokenizerFast:
    """Twelve tokens: ``<|endoftext|>`` (id 0), which also pads, and eleven letters. Random models end texts early."""
    tokenizer = Tokenizer(models.BPE(vocab={END_OF_TEXT: 0, **{c: i + 1 for i, c in enumerate(letters)}}, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
