"""Tables for the terminal: prompts with their completions, and metrics side by side."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_completions(
    title: str, prompts: Sequence, completions: Sequence[str], columns: Mapping[str, Sequence], *, rows: int
) -> None:
    """Print the first rows of prompts and completions with columns of numbers or text beside them.

    Args:
        title: Title of the table.
        prompts: Text, or chat messages (their contents are shown).
        completions: Text; control characters are escaped.
        columns: Additional columns; numbers are rounded.
        rows: Maximum number of rows.
    """
    table = Table(title=title, show_lines=True, expand=False)
    for name in ("prompt", "completion", *columns):
        table.add_column(name, overflow="fold")
    for i in range(min(rows, len(completions))):
        cells = [
            _printable(prompt_text(prompts[i])),
            _printable(completions[i]),
            *(_cell(column[i]) for column in columns.values()),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)


def prompt_text(prompt: str | Sequence[Mapping]) -> str:
    """A prompt as text: of chat messages, their contents."""
    return prompt if isinstance(prompt, str) else " ".join(str(message["content"]) for message in prompt)


def print_metrics(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print several dictionaries of metrics side by side, one column each; what one of them lacks is ``nan`` there."""
    table = Table("", *columns, title=title)
    for name in dict.fromkeys(name for metrics in columns.values() for name in metrics):
        table.add_row(name, *(f"{metrics.get(name, math.nan):.4g}" for metrics in columns.values()))
    Console().print(table)


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else _printable(str(value))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\n" if c == "\n" else repr(c)[1:-1] for c in text)
