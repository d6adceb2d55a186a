"""Where a completion ends: with an end-of-text or stop token, or with the token that completes a stop string."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmppo.protocols import Tokenizer

# Characters by which the text of some last tokens may be off at its start: a piece of a character, a space left out.
_MARGIN = 4


@dataclass(frozen=True)
class StopStrings:
    """Strings that end a completion, found in its text as it is written behind the prompt, special tokens included.

    Attributes:
        strings: The strings, none of them empty.
        tokenizer: What writes tokens as text.
    """

    strings: tuple[str, ...]
    tokenizer: Tokenizer

    def watch(self, prompt_ids: list[int]) -> "_Watch":
        """What reads one completion of a prompt, token by token."""
        return _Watch(self, prompt_ids)

    def text_behind(self, before: list[int], ids: list[int]) -> str:
        """What ``ids`` add to the text of ``before``: some tokenizers drop the space of a token that stands first."""
        return self._decode(before + ids)[len(self._decode(before)) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class _Watch:
    """One completion as it grows; ``ids[start:]`` are the tokens whose text can still be part of a stop string."""

    def __init__(self, stop: StopStrings, prompt_ids: list[int]) -> None:
        self.stop = stop
        self.ids = list(prompt_ids)
        self.start = len(prompt_ids)
        self.reach = max(map(len, stop.strings)) + _MARGIN

    def completes(self, token: int) -> bool:
        """Whether a stop string is there with one more token."""
        self.ids.append(token)
        text = self._text_from(self.start)
        if any(string in text for string in self.stop.strings):
            return True
        half = (self.start + len(self.ids)) // 2
        if len(text) > 2 * self.reach and len(self._text_from(half)) >= self.reach:
            self.start = half
        return False

    def _text_from(self, start: int) -> str:
        return self.stop.text_behind(self.ids[start - 1 : start], self.ids[start:])


class Endings:
    """Tells, token by token, which rows of a batch end.

    Args:
        prompt_ids: ``(B, P)`` left-padded.
        prompt_mask: ``(B, P)``, no row empty.
        eos_token_ids: Tokens that end a completion.
        stop_strings: Strings that end it.
    """

    def __init__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, eos_token_ids: tuple[int, ...], stop_strings: StopStrings | None
    ) -> None:
        self.eos = torch.tensor(eos_token_ids, dtype=torch.long).to(prompt_ids.device)
        self.watches: list[_Watch] = []
        if stop_strings is not None:
            prompts = zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)
            self.watches = [stop_strings.watch(ids[mask].tolist()) for ids, mask in prompts]

    def of(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """``(b,)`` True on the rows that end with their new token.

        Args:
            rows: ``(b,)`` numbers of the rows that have not ended before.
            tokens: ``(b,)`` the token that each of them goes on with.
        """
        ends = torch.isin(tokens, self.eos)
        if not self.watches:
            return ends
        pairs = zip(rows.tolist(), tokens.tolist(), strict=True)
        return ends | torch.tensor([self.watches[row].completes(token) for row, token in pairs]).to(ends.device)
