"""Rows of numbers in a file: metrics.jsonl and completions.jsonl."""

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """``metrics.jsonl``: one row per iteration, flushed as it is written; NaN and infinity become null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Write one row."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(clean, default=_plain) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop the rows of later iterations, and what a killed run left half-written: a resumed run writes them anew."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
        rewritten = self.path.with_name(f".tmp-{self.path.name}")
        rewritten.write_text("".join(line + "\n" for line in kept))
        rewritten.replace(self.path)


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; anything else a reward function logged as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
