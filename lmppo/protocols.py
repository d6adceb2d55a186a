"""What lmppo asks of objects that other libraries make."""

from collections.abc import Mapping
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What lmppo uses of a tokenizer; every tokenizer of transformers has it."""

    eos_token_id: int | None
    chat_template: Any
    model_max_length: int
    truncation_side: str

    def __len__(self) -> int:
        """The number of tokens, added ones included."""

    def __call__(self, text: str | list[str], **kwargs: Any) -> Mapping[str, Any]:
        """``input_ids`` of a text, or of each text."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """Chat messages as text or as token ids."""

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """The text of token ids."""

    def batch_decode(self, sequences: list[list[int]], **kwargs: Any) -> list[str]:
        """The text of each row of token ids."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Names of the tokens in the vocabulary."""

    def get_vocab(self) -> dict[str, int]:
        """The id of each token."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write the tokenizer's files into a directory."""
