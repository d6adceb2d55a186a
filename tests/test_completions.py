"""Completions that people look at: parquet files beside completions.jsonl, and tables in trackers."""

import html as escapes
import json
import math
import re
import subprocess
import sys
import types

import datasets
import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from accelerate.tracking import GeneralTracker
from builders import PROMPTS, count_a, make_trainer, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from transformers import TrainerCallback

from lmppo.run import completions as module
from lmppo.run.completions import send_table, write_parquet


def jsonl(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def parquet(folder):
    """All files, in the order of their names."""
    return [
        row for p in sorted((folder / "completions").iterdir()) for row in pyarrow.parquet.read_table(p).to_pylist()
    ]


def noted(prompts, completions, log_extra, **kwargs):
    """Does not apply to every second row; logs columns of several kinds."""
    log_extra("length", [len(c) for c in completions])
    log_extra("share", np.float32([len(c) / 8 for c in completions]))
    log_extra("mixed", [len(c) if i % 2 else c for i, c in enumerate(completions)])
    return [None if i % 2 else 1.0 for i, c in enumerate(completions)]


SETTINGS = {"log_completions": 3, "logging_steps": 2, "max_steps": 5, "save_steps": 2}


def test_parquet_has_the_rows_of_the_jsonl_a_file_for_each_logged_step(tmp_path):
    trained(tmp_path, reward=[count_a, noted], **SETTINGS)
    names = [p.name for p in sorted((tmp_path / "completions").iterdir())]
    assert names == ["completions_00002.parquet", "completions_00004.parquet", "completions_00005.parquet"]
    rows, lines = parquet(tmp_path), jsonl(tmp_path)
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4, 5, 5, 5]
    for row, line in zip(rows, lines, strict=True):
        assert list(row) == list(line)
        assert str(line.pop("mixed")) == row.pop("mixed"), "what has no type of its own is text"
        assert row == line
    assert [row["noted"] for row in rows[:3]] == [1.0, None, 1.0]
    frame = pandas.read_parquet(tmp_path / "completions")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "completions" / "*.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert len(frame) == len(loaded["train"]) == 9 and frame["count_a"].dtype == float


def test_without_the_setting_nothing_is_written(tmp_path):
    trained(tmp_path)
    assert not (tmp_path / "completions").exists() and not (tmp_path / "completions.jsonl").exists()


@pytest.mark.parametrize("event", ["on_step_begin", "on_save"])
def test_killed_and_resumed_has_every_row_once(tmp_path, event):
    class Die(TrainerCallback):
        pass

    def die(self, args, state, control, **kwargs):
        if state.global_step == {"on_save": 4, "on_step_begin": 3}[event]:
            raise KeyboardInterrupt

    setattr(Die, event, die)
    settings = SETTINGS | {"logging_steps": 1, "resume_from_checkpoint": "auto"}
    trained(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", callbacks=[Die], **settings)
    (tmp_path / "killed" / "completions" / ".tmp-completions_00009.parquet").write_bytes(b"half")
    (tmp_path / "killed" / "completions" / "completions_00009.parquet").write_bytes(b"of another run")
    (tmp_path / "killed" / "completions" / "completions_mine.parquet").write_bytes(b"mine")
    trained(tmp_path / "killed", **settings)
    assert (tmp_path / "killed" / "completions" / "completions_mine.parquet").read_bytes() == b"mine"
    (tmp_path / "killed" / "completions" / "completions_mine.parquet").unlink()
    assert parquet(tmp_path / "killed") == parquet(tmp_path / "whole")
    assert jsonl(tmp_path / "killed") == jsonl(tmp_path / "whole")


def test_chat_prompts_keep_their_messages(tmp_path):
    chat = [[{"role": "user", "content": "a"}], [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]]
    write_parquet(tmp_path / "x.parquet", {"prompt": chat})
    assert pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pylist() == [{"prompt": c} for c in chat]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1, 2.5], [1.0, 2.5]),
        ([1, None], [1, None]),
        ([True, 2], ["true", "2"]),
        ([{"a": 1}, "b"], ['{"a": 1}', "b"]),
        ([10**30, 1], [str(10**30), "1"]),
        (["\ud800", "ä"], ["\\ud800", "ä"]),
        ([torch, None], [json.dumps(str(torch)), None]),
    ],
    ids=str,
)
def test_any_column_can_be_written(tmp_path, column, expected):
    write_parquet(tmp_path / "x.parquet", {"x": column})
    written = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pydict()["x"]
    assert written == expected


class FakeTracker(GeneralTracker):
    """A tracker without a library."""

    name = "fake"
    requires_logging_directory = False

    def __init__(self):
        super().__init__(_blank=True)
        self.logged, self.tables = [], []

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **kwargs):
        self.logged.append((values, step))

    def finish(self):
        pass


class FakeTables(FakeTracker):
    """Takes tables, as accelerate's tracker for Weights & Biases does."""

    def log_table(self, table_name, columns=None, data=None, dataframe=None, step=None, **kwargs):
        self.tables.append((table_name, columns, data, step))


def trained_with(tracker, folder, **settings):
    """A run whose accelerator has one more tracker."""
    trainer = make_trainer(folder, **(SETTINGS | settings))
    trainer.accelerator.trackers.append(tracker)
    trainer.train()
    return trainer


def test_a_tracker_with_tables_gets_the_rows(tmp_path):
    tracker = FakeTables()
    chat = [{"prompt": p} for p in PROMPTS]
    trained_with(tracker, tmp_path, reward=[count_a, noted], dataset=chat)
    assert [(name, step) for name, _, _, step in tracker.tables] == [("completions", s) for s in (2, 4, 5)]
    tables = [dict(zip(columns, row, strict=True)) for _, columns, data, _ in tracker.tables for row in data]
    expected = [row | {"mixed": str(row["mixed"])} for row in jsonl(tmp_path)]
    assert tables == expected
    assert not [values for values, _ in tracker.logged if "completions" in values]


def test_trackio_gets_its_own_kind_of_table(monkeypatch):
    fake = types.ModuleType("trackio")
    fake.Table = lambda dataframe: ("table", dataframe)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tracker = FakeTracker()
    tracker.name = "trackio"
    send_table(tracker, {"step": [3, 3], "completion": ["a", "b"]}, 3)
    ((values, step),) = tracker.logged
    kind, frame = values["completions"]
    assert (kind, step) == ("table", 3)
    assert frame.to_dict("list") == {"step": [3, 3], "completion": ["a", "b"]}


def test_a_tracker_without_tables_is_named_once(capsys, monkeypatch):
    monkeypatch.setattr(module, "_SAID", set())
    for step in (1, 2):
        send_table(FakeTracker(), {"completion": ["a"]}, step)
    assert capsys.readouterr().out.count("fake takes no tables: completions are in completions.jsonl") == 1


def test_tensorboard_shows_the_table(tmp_path):
    trained(tmp_path, reward=[count_a, noted], report_to=["tensorboard"], **SETTINGS)
    shown = {}
    for folder in {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}:
        read = EventAccumulator(str(folder)).Reload()
        if "completions/text_summary" in read.Tags()["tensors"]:
            shown |= {e.step: e.tensor_proto.string_val[0] for e in read.Tensors("completions/text_summary")}
    assert sorted(shown) == [2, 4, 5]
    html = markdown_to_safe_html(shown[2])
    assert html.count("<tr>") == 1 + 3 and html.count("<th>") == len(jsonl(tmp_path)[0])
    for row in jsonl(tmp_path)[:3]:
        assert f"<td>{row['completion']}</td>" in html and f"<td>{row['prompt']}</td>" in html


def test_no_text_means_anything_to_tensorboard():
    texts = ["a|b", "<b>x</b>", "# x", "*x* _y_ `z`", "[a](http://b)", "two\nlines", "&lt;", "1. x", "ä 中 \u2028", ""]
    written = []

    class Writer:
        def add_text(self, tag, text, step):
            written.append(text)

        def flush(self):
            pass

    tracker = types.SimpleNamespace(name="tensorboard", tracker=Writer())
    send_table(tracker, {"completion": texts, "n": [math.pi] * len(texts)}, 1)
    html = markdown_to_safe_html(written[0])
    cells = [escapes.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", html, re.DOTALL)]
    assert [cell.strip() for cell in cells[::2]] == [text.strip() for text in texts]
    assert set(cells[1::2]) == {"3.142"}


def test_no_tracker_is_needed_for_import():
    """Neither Weights & Biases nor trackio nor pandas."""
    code = "import sys; sys.modules.update(dict.fromkeys(('wandb', 'trackio', 'tensorboard', 'clearml'))); import lmppo.run"
    subprocess.run([sys.executable, "-c", code], check=True)
