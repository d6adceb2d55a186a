"""Token ids as the text that was written: prompt and completion are decoded together, then split.

Decoded alone, a completion loses the space before its first word (SentencePiece), and a character whose bytes are divided
between prompt and completion becomes U+FFFD, the replacement character.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from os.path import commonprefix

from lmppo.protocols import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# How vocabularies name bytes: "<0xE2>" where bytes are a fallback; else GPT-2's letters, which are the bytes themselves
# (as Latin-1) where those can be printed, and U+0100, U+0101, ... for the others.
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(b): bytes([b]) for b in _PRINTABLE} | {chr(256 + i): bytes([b]) for i, b in enumerate(_OTHERS)}


def decode_whole(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of token ids, without special tokens; a character that is not whole at its end is left out.

    Args:
        tokenizer: The policy's tokenizer.
        rows: Token ids.
    """
    if not rows:
        return []  # of no rows, batch_decode makes one empty text
    ids = [list(row) for row in rows]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [_whole(tokenizer, row, text) if REPLACEMENT in text else text for row, text in zip(ids, texts, strict=True)]


def decode_completions(
    tokenizer: Tokenizer, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> list[str]:
    """What each completion adds to the text of its prompt; a character divided between the two belongs to the completion.

    Args:
        tokenizer: The policy's tokenizer.
        prompt_ids: The prompts' tokens.
        completion_ids: The completions' tokens.
    """
    both = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    pairs = zip(decode_whole(tokenizer, prompt_ids), decode_whole(tokenizer, both), strict=True)
    return [text[len(commonprefix([head, text])) :] for head, text in pairs]


def warn_of_second_bos(tokenizer: Tokenizer, ids: list[int], where: str) -> bool:
    """Warn of a prompt that begins with two BOS tokens; returns whether it does.

    Args:
        tokenizer: The policy's tokenizer.
        ids: The prompt's tokens.
        where: How messages name it.
    """
    if tokenizer.bos_token_id is None or ids[:2] != [tokenizer.bos_token_id] * 2:
        return False
    bos = tokenizer.bos_token
    warnings.warn(
        f"{where}: the prompt begins with two BOS tokens, as where a text begins with {bos!r} and the tokenizer adds one "
        f"too. Remove it from the texts: text.removeprefix({bos!r}). (Further rows of the data set are not named.)",
        stacklevel=2,
    )
    return True


def _whole(tokenizer: Tokenizer, ids: list[int], text: str) -> str:
    """The text without replacement characters at its end, but for those that were themselves written."""
    names = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    if any(map(_FALLBACK.fullmatch, names)):
        mended = tokenizer.convert_tokens_to_ids(list(_with_valid_runs(names)))
        text = tokenizer.decode(mended, clean_up_tokenization_spaces=False)
    written = b"".join(map(_bytes, names)).decode(errors="ignore")
    n_written = len(written) - len(written.rstrip(REPLACEMENT))
    return text.rstrip(REPLACEMENT) + REPLACEMENT * n_written


def _with_valid_runs(names: Iterable[str]) -> Iterator[str]:
    """Tokens with U+FFFD in place of bytes that are no character: a single one would spoil its whole run of bytes.

    Languages that a SentencePiece vocabulary lacks are written as such runs from one end to the other.
    """
    for are_bytes, run in groupby(names, key=lambda name: bool(_FALLBACK.fullmatch(name))):
        if are_bytes:
            run = (f"<0x{byte:02X}>" for byte in b"".join(map(_bytes, run)).decode(errors="replace").encode())
        yield from run


def _bytes(name: str) -> bytes:
    """The bytes that a token stands for, by its name in the vocabulary."""
    if match := _FALLBACK.fullmatch(name):
        return bytes.fromhex(match[1])
    return b"".join(_BYTE_OF.get(letter) or letter.encode() for letter in name)
