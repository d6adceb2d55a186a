"""What lmppo asks of objects that other libraries make."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn


class Tokenizer(Protocol):
    """What lmppo uses of a tokenizer; every tokenizer of transformers has it."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
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

    def convert_ids_to_tokens(self, ids: list[int], **kwargs: Any) -> list[str]:
        """Names of the tokens in the vocabulary."""

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """The ids of tokens by their names."""

    def get_vocab(self) -> dict[str, int]:
        """The id of each token."""

    def get_added_vocab(self) -> dict[str, int]:
        """Those of them that were added to the vocabulary that the text was learned with."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write the tokenizer's files into a directory."""


class CausalLM(Protocol):
    """What lmppo uses of a policy or a reference: a causal language model of transformers, plain or with an adapter."""

    config: Any
    generation_config: Any

    def __call__(self, **inputs: Any) -> Any:
        """An output with ``logits (B, S, V)``."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights by name."""

    def get_input_embeddings(self) -> Any:
        """The module that embeds tokens."""

    def get_output_embeddings(self) -> Any:
        """The module that gives logits."""


class Optimizer(Protocol):
    """What lmppo uses of an optimizer, plain or wrapped by accelerate."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """Move the parameters along their gradients."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


class Stateful(Protocol):
    """What a checkpoint holds beside weights."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
