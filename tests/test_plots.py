"""Curves of a run: what they need, and what they are drawn from."""

import importlib
import sys

import pytest

from lmppo.plots import plot_run, read_metrics


def test_without_matplotlib_the_import_says_what_to_install(monkeypatch):
    """So a recipe that will draw fails before it trains."""
    monkeypatch.delitem(sys.modules, "lmppo.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lmppo\[plots\]'"):
        importlib.import_module("lmppo.plots")


def test_a_run_is_drawn_gaps_and_all(tmp_path):
    rows = ['{"step": 1, "reward": 0.5, "kl_to_ref": 0.0, "value_loss": null, "rewards/count_a/mean": 0.5}']
    rows += ['{"step": 2, "reward": 1.0, "kl_to_ref": 2.0, "value_loss": 0.1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert plot_run(tmp_path).stat().st_size > 10_000
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no metrics.jsonl"):
        plot_run(tmp_path)
