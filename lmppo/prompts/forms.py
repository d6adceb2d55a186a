"""The forms that a prompt may have: text, chat messages, or token ids."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

Prompt = str | list

# A column, or a part of a message, that a model of text alone would leave out.
_IMAGE_COLUMNS = ("image", "images")
_OTHER_MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages, as trl tells them: by the ``role`` of the first."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


def check_prompt(prompt: Any, where: str) -> Prompt:
    """A prompt as text, a list of messages or a list of token ids, whatever held it: tuples, arrays, tensors.

    Args:
        prompt: A prompt from the data set.
        where: How messages name its row.

    Raises:
        ValueError: It is null, of another type, or not of text alone.
    """
    if prompt is None:
        raise ValueError(f"{where}: `prompt` is null. Remove the row, or give it a prompt.")
    prompt = plain(prompt)
    if isinstance(prompt, str):
        return prompt
    if is_conversational(prompt) and all(isinstance(message, dict) for message in prompt):
        _refuse_media(prompt, where)
        return prompt
    kind = type(prompt).__name__
    if isinstance(prompt, list):
        wrong = {type(token).__name__ for token in prompt if type(token) is not int}
        if not wrong:
            return prompt
        kind += f" holding {', '.join(sorted(wrong))}"
    raise ValueError(
        f"{where}: the prompt is a {kind}; expected text, a list of messages ({{'role': ..., 'content': ...}}), or a "
        f"list of token ids."
    )


def plain(value: Any) -> Any:
    """A value in Python's own lists, dicts and numbers, where arrays, tensors and tuples were."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [item if type(item) in (int, str) else plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def refuse_images(row: Mapping[str, Any], where: str) -> None:
    """A model of text would answer without its images.

    Raises:
        ValueError: The row has some.
    """
    for name in _IMAGE_COLUMNS:
        images = row.get(name)
        if images is not None and not (isinstance(images, list | tuple) and not any(i is not None for i in images)):
            raise ValueError(
                f"{where} has images, in its column `{name}`: lmppo trains on text alone. Remove the column, or rename "
                f"it if only the reward functions read it."
            )


def _refuse_media(messages: list[dict[str, Any]], where: str) -> None:
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    kind = next((part["type"] for part in parts if part.get("type") in _OTHER_MEDIA), None)
    if kind is not None:
        raise ValueError(
            f"{where}: its messages hold a part of the type {kind!r}: lmppo trains on text alone. Remove the part or the "
            f"row."
        )
