"""The report of saved rollouts: each token's numbers with their meanings, as JSON values, as tables, or for the page."""

import json
import math
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmppo.explain.page import cell, in_one_line, label, render_page, stream_facts
from lmppo.explain.saved import TEXTS, SavedRollouts, load_saved_rollouts
from lmppo.run.checkpoint import CheckpointError, checkpoint_dir, list_checkpoints

# Settings shown beside the numbers, where a run has them.
_SHOWN_SETTINGS = (
    "estimator", "baseline", "gamma", "lam", "critic_lam", "adaptive_lam_alpha", "whiten_advantages", "objective",
    "clip_range", "clip_range_high", "dual_clip", "kl_coef", "kl_form", "truncation", "temperature",
    "top_k", "top_p", "min_p", "min_new_tokens", "suppress_tokens", "bad_words_ids", "stop_token_ids", "stop_strings",
    "ppo_epochs", "learning_rate",
)  # fmt: skip

_TOKEN_WIDTH = 20  # in a terminal table; longer tokens are folded

# Columns defined only for tokens that the update learned from.
_OF_THE_UPDATE = ("new", "ratio", "outside", "clipped")

_WEIGHTS = {
    "gae": "TD residual + gamma × lam × the next token's advantage, 0 after the last",
    "rewards_to_go": "reward to go − baseline",
    "total_return": "the whole completion's return − baseline",
    "immediate_rewards": "the token's own reward − baseline",
}


def explain(
    run: str | Path,
    *,
    step: int | None = None,
    rows: list[int] | None = None,
    format: str = "html",
    html: str | Path | None = None,
) -> Path | None:
    """Show the completions saved with a checkpoint: write a page, or print a table or JSON.

    Args:
        run: A run directory, or the directory of a checkpoint.
        step: The checkpoint's step; None: the newest with saved rollouts.
        rows: The completions to show, counted from 0; None: all.
        format: ``html``, ``table`` or ``json``.
        html: Where to write the page; None: ``explain-step-N.html`` in the run directory.

    Returns:
        The page's path, or None for the printed formats.

    Raises:
        CheckpointError: There is no such run, checkpoint or row, or nothing was saved.
        OSError: The page cannot be written.
    """
    checkpoint = find_saved(Path(run), step)
    report = make_report(load_saved_rollouts(checkpoint), checkpoint, rows)
    if format == "json":
        print(json.dumps(report, indent=2, allow_nan=False))
    elif format == "table":
        print_report(report)
    else:
        folder = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
        path = folder / f"explain-{checkpoint.name}.html" if html is None else Path(html)
        path.write_text(render_page(report), encoding="utf-8")
        return path
    return None


def find_saved(run: Path, step: int | None = None) -> Path:
    """The checkpoint to explain.

    Args:
        run: A run directory, or the directory of a checkpoint (recognized by saved rollouts or a manifest).
        step: The checkpoint's step; None: the newest with saved rollouts.

    Raises:
        CheckpointError: There is no such directory, or no such checkpoint in it.
    """
    if not run.is_dir():
        raise CheckpointError(f"There is no run {str(run)!r}: give a run's output_dir, or one of its checkpoints.")
    if (run / TEXTS).exists() or (run / "MANIFEST.json").exists():
        if step is not None:
            raise CheckpointError(f"{run} is a checkpoint: omit --step, or give the run's directory.")
        return run
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(
            f"{run} has no checkpoint. Checkpoints are written every save_steps and at the end of a run."
        )
    if step is not None:
        wanted = checkpoint_dir(run, step)
        if wanted not in found:
            raise CheckpointError(
                f"{run} has no checkpoint for step {step}. It has {', '.join(p.name for p in found)}."
            )
        return wanted
    saved = [p for p in found if (p / TEXTS).exists()]
    if not saved:
        raise CheckpointError(
            f"None of the {len(found)} checkpoints in {run} has saved rollouts: train with save_rollouts=N to save "
            f"N completions with each."
        )
    return saved[-1]


def make_report(saved: SavedRollouts, checkpoint: Path, rows: list[int] | None = None) -> dict[str, Any]:
    """Everything that is shown, as JSON values: the settings, the meaning of each column, and each completion's tokens.

    Raises:
        CheckpointError: A row was not saved.
    """
    known = range(len(saved.completions))
    for row in rows or []:
        if row not in known:
            raise CheckpointError(
                f"{checkpoint} has no row {row}: it has {len(known)} saved rows, 0 to {len(known) - 1}."
            )
    columns, with_lam = _columns(saved), saved.settings["estimator"] == "gae"
    completions = []
    for row in known if rows is None else rows:
        completions.append(
            {
                "row": row,
                "prompt": saved.prompts[row],
                "completion": saved.completions[row],
                "ended": bool(saved.ended[row]),
                "score": _number(saved.scores[row][saved.mask[row]].sum().item()),
                "kl": _number(saved.kl_to_ref[row].sum().item()),
                "tokens": _tokens(saved, row, columns),
            }
        )
    return {
        "checkpoint": str(checkpoint),
        "name": checkpoint.name,
        "settings": {
            name: saved.settings[name]
            for name in _SHOWN_SETTINGS
            if saved.settings.get(name) is not None and (with_lam or name != "lam")
        },
        "streams": {
            stream.name: {"gamma": stream.gamma} | ({"lam": stream.lam} if with_lam else {}) | {"weight": stream.weight}
            for stream in saved.each_stream
        },
        "columns": {name: meaning for name, (meaning, _) in columns.items()},
        "completions": completions,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print tables of each completion's tokens, no wider than the terminal: the totals, then each reward stream."""
    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(Text(f"{report['checkpoint']}  {report['settings']}"))
    console.print(Text(f"reward streams: {in_one_line(stream_facts(report['streams']))}"))
    streams: dict[str, dict[str, str]] = {}  # stream -> quantity -> column; the totals are under an empty name
    for name in report["columns"]:
        quantity, _, stream = name.partition(" ")
        streams.setdefault(stream, {})[quantity] = name
    for completion in report["completions"]:
        title = f"row {completion['row']}: score {cell(completion['score'])}, kl {cell(completion['kl'])}"
        console.print(Text(f"\n{title}", style="bold"))
        console.print(Text(f"prompt: {completion['prompt']!r}"))
        console.print(Text(f"completion: {completion['completion']!r}"))
        for stream, columns in streams.items():
            if stream:
                console.print(Text(f"stream {in_one_line(stream)}", style="bold"))
            for table in _tables(completion["tokens"], columns, console.width):
                console.print(table)


def _tables(tokens: list[dict[str, Any]], columns: dict[str, str], width: int) -> list[Table]:
    """Columns (heading -> name) side by side, in as many tables as needed to show every number in full."""
    labels = [in_one_line(label(token)) for token in tokens]
    frame = 3  # two spaces and a line per column
    start = len(str(len(tokens))) + min(_TOKEN_WIDTH, max(map(cell_len, ["token", *labels]))) + 2 * frame + 1
    groups: list[dict[str, list[str]]] = []
    used = width
    for heading, name in columns.items():
        cells = [cell(token[name]) for token in tokens]
        wide = max(map(len, [heading, *cells])) + frame
        if used + wide > width:
            groups.append({})
            used = start
        groups[-1][heading] = cells
        used += wide
    tables = []
    for group in groups:
        table = Table()
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("token", overflow="fold", max_width=_TOKEN_WIDTH)
        for heading in group:
            table.add_column(heading, justify="right", no_wrap=True)
        for i, (text, *cells) in enumerate(zip(labels, *group.values(), strict=True)):
            table.add_row(str(i), Text(text), *cells)
        tables.append(table)
    return tables


def _columns(saved: SavedRollouts) -> dict[str, tuple[str, Any]]:
    """Name -> its meaning, and its ``(N, T)`` numbers; the totals first, then each stream."""
    several = len(saved.streams) > 1
    total = ", summed over the streams" if several else ""
    columns = {
        "old": (
            "log-probability of the token under the policy that sampled it, among the tokens that it could sample",
            saved.logprobs,
        ),
        "new": ("log-probability after this iteration's update", saved.new_logprobs),
        "ref": ("log-probability under the reference, among all tokens", saved.ref_logprobs),
        "kl": ("old − ref, in nats: this token's part of the KL estimate k1", saved.kl_to_ref),
        "reward": (
            "the token's score, minus the KL penalty where that is in the reward: the token's own, or on the last "
            "token that of all (kl_form k1_end, the default where nothing is discounted)" + total,
            saved.rewards.sum(-1),
        ),
        "value": (
            "the critic's estimate of the reward to go, before the token; 0 without a critic" + total,
            saved.values.sum(-1),
        ),
        "td": ("TD residual: reward + gamma × next value − value" + total, saved.td_residuals.sum(-1)),
        "advantage": (_advantage_meaning(saved.settings, total), saved.advantages),
        "return": ("the critic's training target" + total, saved.returns.sum(-1)),
        "to_go": ("reward to go: reward + gamma × the next token's reward to go" + total, saved.rewards_to_go.sum(-1)),
        "ratio": ("probability after the update over probability at sampling: exp(new − old)", saved.ratio),
        "outside": ("whether the ratio has left the band that the clip allows", saved.outside_band),
        "clipped": (
            "whether clipping has made the gradient 0: the ratio is outside the band on the side the advantage pushes it to",
            saved.clipped,
        ),
    }
    if saved.settings["kl_form"] not in (None, "k1_reward", "k1_end"):
        columns["kl_penalty"] = ("the KL to the reference, as kl_form measures it", saved.kl_penalty)
    for stream in saved.each_stream if several else []:
        alone = f"of the stream {stream.name!r} alone, its weight included"
        for quantity, numbers in (("reward", stream.rewards), ("value", stream.values), ("return", stream.returns)):
            columns[f"{quantity} {stream.name}"] = (f"{quantity} {alone}", numbers)
        columns[f"td {stream.name}"] = (f"TD residual {alone}", stream.td_residuals)
    return columns


def _advantage_meaning(settings: dict[str, Any], total: str) -> str:
    weight = _WEIGHTS.get(settings["estimator"], settings["estimator"]) + total
    meaning = f"the token's weight in the policy's gradient: {weight}"
    if settings["baseline"] == "auto":
        meaning += " (if the critic explains nothing in the batch: reward to go − the batch mean)"
    if settings["whiten_advantages"]:
        meaning += "; shown as the update used it, whitened: minus the batch mean, over the batch standard deviation"
    return meaning


def _tokens(saved: SavedRollouts, row: int, columns: dict[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    """One record per token; numbers that do not exist, such as those of a token that does not count, are None."""
    numbers = {name: values[row].tolist() for name, (_, values) in columns.items()}
    mask, learned, ids = (tensor[row].tolist() for tensor in (saved.mask, saved.learned, saved.completion_ids))

    def known(name: str, t: int) -> bool:
        return learned[t] if name in _OF_THE_UPDATE else mask[t]

    return [
        {"token": token, "text": text, "id": ids[t], "learned": learned[t]}
        | {name: _number(column[t]) if known(name, t) else None for name, column in numbers.items()}
        for t, (token, text) in enumerate(zip(saved.tokens[row], saved.texts[row], strict=True))
    ]


def _number(value: float | bool) -> float | bool | None:
    """The value, or None where JSON cannot represent it."""
    return value if math.isfinite(value) else None
