"""Completions that people look at: printed, in ``completions.jsonl`` and ``completions/``, and as tables in trackers."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from lmppo.collector import ScoredRollout
from lmppo.metrics import completion_columns
from lmppo.models.loading import print_once
from lmppo.run.metrics_file import MetricsFile
from lmppo.tables import print_completions, prompt_text

if TYPE_CHECKING:
    import pyarrow


class CompletionsLog:
    """The first completions of every logged step.

    Args:
        directory: The run directory. Rows go to ``completions.jsonl``, all steps in one file, and to
            ``completions/completions_00012.parquet``, a file for each step.
        accelerator: Its trackers get the same rows as a table named ``completions``.
        n_rows: How many completions.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, n_rows: int) -> None:
        self.rows_file = MetricsFile(directory / "completions.jsonl")
        self.folder = directory / "completions"
        self.accelerator = accelerator
        self.n_rows = n_rows

    def write(self, step: int, scored: ScoredRollout) -> None:
        """Show and keep the completions of a step; a file of the same step is replaced."""
        shown = completion_columns(scored)
        print_completions(f"Step {step}", scored.prompts, scored.completions, shown, rows=self.n_rows)
        columns = {"prompt": scored.prompts, "completion": scored.completions, **shown}
        columns = {name: [_plain(value) for value in column[: self.n_rows]] for name, column in columns.items()}
        columns = {"step": [step] * len(columns["prompt"]), **columns}
        for values in zip(*columns.values(), strict=True):
            self.rows_file.append(dict(zip(columns, values, strict=True)))
        write_parquet(self.folder / f"completions_{step:05d}.parquet", columns)
        columns["prompt"] = [prompt_text(prompt) for prompt in scored.prompts[: self.n_rows]]
        for tracker in self.accelerator.trackers:
            send_table(tracker, {name: _cells(column) for name, column in columns.items()}, step)

    def cut_after(self, step: int) -> None:
        """Drop what later steps wrote, and what a killed run left half-written: a resumed run writes it anew."""
        self.rows_file.cut_after(step)
        for path in self.folder.glob(".tmp-*"):
            path.unlink()
        for path in self.folder.glob("completions_*.parquet"):
            number = path.stem.removeprefix("completions_")
            if number.isdecimal() and int(number) > step:
                path.unlink()


def write_parquet(path: Path, columns: Mapping[str, list]) -> None:
    """Write columns of one length as a parquet file, whole or not at all; what has no type of parquet becomes text."""
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    parquet.write_table(_arrow_table(columns), temporary)
    temporary.replace(path)


def send_table(tracker: GeneralTracker, columns: Mapping[str, list], step: int) -> None:
    """Send a table named ``completions`` to a tracker; a line says so if the tracker takes none.

    Args:
        tracker: One of accelerate's, or one like them.
        columns: Columns of text or of numbers, of one length.
        step: The step.
    """
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    if hasattr(tracker, "log_table"):  # Weights & Biases, ClearML
        tracker.log_table("completions", columns=list(columns), data=rows, step=step)
    elif tracker.name == "trackio":
        table = sys.modules["trackio"].Table  # imported by accelerate, where the tracker was started
        tracker.log({"completions": table(dataframe=_arrow_table(columns).to_pandas())}, step=step)
    elif hasattr(tracker.tracker, "add_text"):  # TensorBoard
        lines = [list(columns), ["---"] * len(columns), *([_escaped(cell) for cell in row] for row in rows)]
        tracker.tracker.add_text("completions", "\n".join(f"| {' | '.join(cells)} |" for cells in lines), step)
        tracker.tracker.flush()
    elif tracker.name not in _SAID:
        _SAID.add(tracker.name)
        print_once(f"{tracker.name} takes no tables: completions are in completions.jsonl and completions/ only.")


_SAID: set[str] = set()  # trackers of which the line was printed


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; what is not finite as None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(column: list) -> list:
    """A column of numbers as it is, any other as text."""
    if all(value is None or isinstance(value, int | float) for value in column):
        return column
    return [_text(value) for value in column]


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode(errors="backslashreplace").decode()


def _arrow_table(columns: Mapping[str, list]) -> "pyarrow.Table":
    import pyarrow

    return pyarrow.table({name: _arrow_column(column) for name, column in columns.items()})


def _arrow_column(values: list) -> "pyarrow.Array":
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeError):  # mixed kinds, objects, broken Unicode
        return pyarrow.array([_text(value) for value in values])


def _escaped(cell: Any) -> str:
    """A cell of a Markdown table in which no character means anything to Markdown or HTML."""
    text = "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return "".join(c if c.isalnum() or c == " " or ord(c) > 127 else f"&#{ord(c)};" for c in text)
