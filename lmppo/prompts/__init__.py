"""Prompts: a data set of text, chat messages or token ids becomes batches of tokens, in an order that resumes exactly."""

from lmppo.prompts.batch import PromptBatch, make_batch, pad_left
from lmppo.prompts.cutting import cut_prompts
from lmppo.prompts.encoder import PromptEncoder, make_prompt_encoder
from lmppo.prompts.forms import Prompt, check_prompt, is_conversational
from lmppo.prompts.processing import load_tokenizer, tokenizer_of
from lmppo.prompts.stream import PromptStream

__all__ = [
    "Prompt",
    "PromptBatch",
    "PromptEncoder",
    "PromptStream",
    "check_prompt",
    "cut_prompts",
    "is_conversational",
    "load_tokenizer",
    "make_batch",
    "make_prompt_encoder",
    "pad_left",
    "tokenizer_of",
]
