"""A dozen families that differ in kind, each with right numbers or refused by name; `make families` has them all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "families"))
import sweep

RIGHT = {
    "gpt2": "learned positions, tied head",
    "mistral": "rotary positions, a window",
    "bloom": "ALiBi",
    "gemma2": "soft-caps, a window in every other layer",
    "gemma3n_text": "several streams of hidden states",
    "mixtral": "experts",
    "deepseek_v3": "compressed keys and values",
    "opt:350m": "a projection before the head",
    "roberta": "positions after the padding's",
    "mamba": "no attention; its cache has another name",
    "lfm2": "convolutions and attention",
    "qwen3_next": "linear attention",
}
REFUSED = {
    "bart": "with its cache",
    "openai-gpt": "no cache",
    "xlnet": "reads later tokens",
}


@pytest.mark.parametrize("family", RIGHT)
def test_right(family):
    results = sweep.run_family(family, "abe")
    assert {state for state, _ in results.values()} <= {"ok", "-"}, results
    assert results["a"][0] == results["b"][0] == "ok"


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    results = sweep.run_family(family, "ab")
    state, message = results["a"]
    assert state == "refused", results
    assert REFUSED[family] in message


def test_adapters_critics_and_resume_are_checked_as_well():
    results = sweep.run_family("llama", "cdf")
    assert results.keys() >= set("cdf") and {state for state, _ in results.values()} == {"ok"}, results
