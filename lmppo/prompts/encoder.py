"""Prompts to tokens: many rows at once, each checked, and named where it cannot be sampled from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from lmppo.context import usable_context
from lmppo.models import vocab_size_of
from lmppo.prompts.forms import Prompt, check_prompt, is_conversational, plain, refuse_images
from lmppo.prompts.processing import template_owner, tokenizer_of
from lmppo.rewards.protocol import REWARD_ARGUMENTS
from lmppo.settings import EncoderSettings
from lmppo.texts import decode_whole


class Text(NamedTuple):
    """A text to tokenize.

    Attributes:
        text: The text.
        special_tokens: Whether the tokenizer adds its special tokens: not to what a chat template has rendered.
    """

    text: str
    special_tokens: bool


class PromptEncoder:
    """Turns the prompts of data rows into tokens, and refuses prompts that cannot be sampled from.

    Args:
        processing_class: The policy's tokenizer, or the processor that holds it.
        vocab_size: Rows of the policy's embedding.
        max_positions: The shortest context among the models that read prompt and completion, or None for no limit.
        max_completion_length: Positions that the completion needs.
        chat_template_kwargs: Arguments of the chat template; those in a row's own column win.
        reader: How messages name the model with that context.
        reason: What limits it, for messages.
    """

    def __init__(
        self,
        processing_class: Any,
        vocab_size: int,
        max_positions: int | None,
        max_completion_length: int,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reader: str = "model",
        reason: str = "",
    ) -> None:
        self.tokenizer = tokenizer_of(processing_class)
        self.template_owner = template_owner(processing_class)
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.max_completion_length = max_completion_length
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.reader = reader
        self.reason = reason

    def encode(self, rows: Sequence[Any], where: Sequence[str]) -> list[tuple[Prompt, list[int]]]:
        """The prompt of each row as reward functions receive it, and its tokens.

        Text gets the tokenizer's special tokens. Chat messages are rendered by ``trl.data_utils.apply_chat_template``: the
        assistant gets a turn, or its last message is continued if it has the last word.

        Args:
            rows: Rows of the data set, or bare prompts.
            where: How messages name each of them.

        Raises:
            ValueError: A row has no prompt, or one that is empty, too long, or not text, messages or token ids; its
                chat messages cannot be rendered; it has images; or it has a column with the name of an argument of
                reward functions.
        """
        prompts = [self._prompt(row, place) for row, place in zip(rows, where, strict=True)]
        texts = [self._text(*one) for one in zip(rows, prompts, where, strict=True)]
        tokens: list[Any] = list(prompts)
        for special_tokens in (True, False):
            chosen = [i for i, text in enumerate(texts) if text is not None and text.special_tokens is special_tokens]
            if chosen:
                batch = [texts[i].text for i in chosen]  # type: ignore[union-attr]
                found = self.tokenizer(batch, add_special_tokens=special_tokens, return_attention_mask=False)[
                    "input_ids"
                ]
                for i, ids in zip(chosen, found, strict=True):
                    tokens[i] = ids
        for ids, place in zip(tokens, where, strict=True):
            self._check(ids, place)
        given_ids = [i for i, text in enumerate(texts) if text is None]
        for i, text in zip(given_ids, decode_whole(self.tokenizer, [tokens[i] for i in given_ids]), strict=True):
            prompts[i] = text
        return list(zip(prompts, tokens, strict=True))

    def _prompt(self, row: Any, where: str) -> Prompt:
        """The prompt of a row that can be used."""
        if not isinstance(row, Mapping):
            return check_prompt(row, where)
        if "prompt" not in row:
            raise ValueError(
                f"{where} has no `prompt` (found: {', '.join(map(str, row))}). Name the column `prompt`, or cut "
                f"prompts from a `text` column with lmppo.prompts.cut_prompts (--prompt_tokens in the recipes)."
            )
        prompt = check_prompt(row["prompt"], where)
        clash = next((name for name in REWARD_ARGUMENTS if name in row), None)
        if clash:
            raise ValueError(
                f"{where} has a column `{clash}`, a name that reward functions use for an argument from the "
                f"rollout. Rename the column (dataset.rename_column({clash!r}, 'my_{clash}')) or remove it."
            )
        refuse_images(row, where)
        return prompt

    def _text(self, row: Any, prompt: Prompt, where: str) -> Text | None:
        """What is to be tokenized; None for a prompt of token ids."""
        if isinstance(prompt, str):
            return Text(prompt, special_tokens=True)
        if not is_conversational(prompt):
            return None
        text = self._render(row if isinstance(row, Mapping) else {}, prompt, where)
        bos = getattr(self.tokenizer, "bos_token", None)
        adds_bos = self.template_owner is not self.tokenizer and bos is not None and not text.startswith(bos)
        return Text(text, special_tokens=adds_bos)  # a processor adds what its template leaves out

    def _render(self, row: Mapping[str, Any], messages: list, where: str) -> str:
        """Chat messages as text."""
        from trl.data_utils import apply_chat_template, prepare_multimodal_messages  # brings datasets and pandas

        if not getattr(self.template_owner, "chat_template", None):
            raise ValueError(
                f"{where}: the prompt is a list of chat messages, but the tokenizer has no chat template. "
                f"Set tokenizer.chat_template, or give the prompts as text."
            )
        own = row.get("chat_template_kwargs")
        if own is not None and not isinstance(own, Mapping):
            raise ValueError(f"{where}: `chat_template_kwargs` is a {type(own).__name__}; expected a dict, or null.")
        given = {name: value for name, value in plain(own or {}).items() if value is not None}  # a Dataset's fillers
        try:
            tools = row.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else plain(tools)
            if self.template_owner is not self.tokenizer:
                messages = prepare_multimodal_messages(messages)
            example = {"prompt": messages, "chat_template_kwargs": self.chat_template_kwargs | given}
            return apply_chat_template(example, self.template_owner, tools=tools)["prompt"]
        except Exception as error:  # whatever a template, or trl's rules for messages, object to
            raise ValueError(
                f"{where}: the chat template cannot render its messages: {type(error).__name__}: {error}"
            ) from error

    def _check(self, ids: Sequence[int], where: str) -> None:
        if not ids:
            raise ValueError(
                f"{where}: the prompt has no tokens, and a language model needs at least one to continue. Remove "
                f"the row, or give it the beginning-of-text token."
            )
        if max(ids) >= self.vocab_size or min(ids) < 0:
            raise ValueError(
                f"{where}: token id {max(ids) if max(ids) >= self.vocab_size else min(ids)} is outside the "
                f"model's vocabulary of {self.vocab_size}."
            )
        if self.max_positions is not None and len(ids) + self.max_completion_length > self.max_positions:
            reason = f" ({self.reason})" if self.reason else ""
            raise ValueError(
                f"{where}: a prompt of {len(ids)} tokens and max_completion_length="
                f"{self.max_completion_length} exceed the {self.reader}'s context of {self.max_positions}"
                f"{reason}. Shorten the prompt (--prompt_tokens) or lower max_completion_length."
            )


def make_prompt_encoder(processing_class: Any, readers: dict[str, Any], args: EncoderSettings) -> PromptEncoder:
    """The encoder of prompts.

    Args:
        processing_class: The policy's tokenizer, or the processor that holds it.
        readers: The models that read prompt and completion (None: not there), by their names as arguments; the policy is
            ``"model"``. The shortest context decides how long a prompt may be.
        args: Gives the longest completion, and the arguments of the chat template.

    Raises:
        ValueError: The tokenizer has tokens that the policy does not know.
    """
    tokenizer, vocab_size = tokenizer_of(processing_class), vocab_size_of(readers["model"])
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model's embedding {vocab_size} rows: they do not "
            f"belong together, or the model needs model.resize_token_embeddings({len(tokenizer)})."
        )
    contexts = {name: usable_context(model) for name, model in readers.items() if model is not None}
    limits = [(context.length, name, context.reason) for name, context in contexts.items() if context is not None]
    length, reader, reason = min(limits, key=lambda limit: limit[0], default=(None, "model", ""))
    return PromptEncoder(
        processing_class,
        vocab_size,
        length,
        args.max_completion_length,
        chat_template_kwargs=cast(dict[str, Any], args.chat_template_kwargs or {}),  # a text was read into a dict
        reader=reader,
        reason=reason,
    )
