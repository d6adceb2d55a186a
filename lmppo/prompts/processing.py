"""The tokenizer of a run: loaded from beside a model, or that of the processor of a multimodal model."""

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

import lmppo.pretrained as pretrained
from lmppo.protocols import Tokenizer


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that lies beside a model's weights.

    Raises:
        UntrustedModelError: It needs code of its own, and ``trust_remote_code`` is not set.
        OSError: There is none.
    """
    try:
        return pretrained.load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    except pretrained.UntrustedModelError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer could be loaded from {name_or_path!r}: it must be a directory or a Hub id that holds one. "
            f"For a model without, pass processing_class. ({str(error).splitlines()[0]})"
        ) from error


def tokenizer_of(processing_class: Any) -> Tokenizer:
    """The tokenizer itself, or the one within the processor of a multimodal model.

    Raises:
        TypeError: ``processing_class`` is neither.
    """
    is_processor = isinstance(processing_class, ProcessorMixin)
    tokenizer = getattr(processing_class, "tokenizer", None) if is_processor else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}; expected a tokenizer of transformers, or the "
            f"processor of a multimodal model, which holds one."
        )
    return tokenizer


def template_owner(processing_class: Any) -> Any:
    """What renders chat messages: a processor with a chat template of its own, else the tokenizer."""
    own = isinstance(processing_class, ProcessorMixin) and getattr(processing_class, "chat_template", None)
    return processing_class if own else tokenizer_of(processing_class)
