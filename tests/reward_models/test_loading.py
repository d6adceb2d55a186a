"""Command-line names of reward functions."""

import sys

import pytest
import torch
from fakes import tiny_gpt2, tiny_tokenizer
from transformers import GPT2ForSequenceClassification

from lmppo.rewards import ClassifierReward, RewardSet
from reward_models import load
from reward_models.lexicon import lexicon

SOURCE = """
from dataclasses import dataclass

@dataclass
class Scale:
    by: float = 2.0

def length(completions, **kwargs):
    return [Scale().by * len(c) for c in completions]

NUMBER = 3
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(SOURCE)
    return path


def called(reward, completions):
    return reward(prompts=[""] * len(completions), completions=completions, completion_ids=[[1]] * len(completions))


def test_lexicon_is_vaders_compound():
    assert load("lexicon") is lexicon and RewardSet(lexicon).names == ["lexicon"]
    good, bad, none = called(lexicon, ["A great, wonderful film!", "An awful, boring mess.", "The film is long."])
    assert -1 <= bad < -0.5 and 0.5 < good <= 1 and none == 0
    # The value VADER's authors print for this sentence in their documentation.
    assert called(lexicon, ["VADER is smart, handsome, and funny."]) == [0.8316]


def test_lexicon_reads_chat_messages():
    chat = [{"role": "assistant", "content": "A great, wonderful film!"}]
    assert called(lexicon, [chat]) == called(lexicon, ["A great, wonderful film!"])


def test_lexicon_without_its_package_names_the_extra(monkeypatch):
    from reward_models import lexicon as module

    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    module._analyzer.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lmppo\[data\]'"):
        called(lexicon, ["text"])


def test_a_function_of_a_file(source):
    reward = load(f"{source}:length")
    assert called(reward, ["ab", "c"]) == [4, 2]
    assert RewardSet(reward).names == ["length"]


def test_two_files_of_one_name_do_not_mix(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(f"def f(completions, **kwargs): return [{value}] * len(completions)")
    assert [called(load(f"{tmp_path}/{folder}/r.py:f"), ["x"]) for folder in "ab"] == [[1], [2]]


def test_a_function_of_a_package():
    assert load("reward_models.lexicon:lexicon") is lexicon


@pytest.mark.parametrize(
    ("output", "options"), [("log_odds", ""), ("probability", "?output=probability&label=NEGATIVE")]
)
def test_a_classifier(tmp_path, output, options):
    config = tiny_gpt2().config
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    reward = load(f"classifier:{tmp_path}/model{options}")
    assert isinstance(reward, ClassifierReward) and reward.output == output and reward.__name__ == "model"
    same = ClassifierReward(tmp_path / "model", output=output, label="NEGATIVE" if options else "POSITIVE")
    assert called(reward, ["abc", "d"]) == called(same, ["abc", "d"])


@pytest.mark.parametrize(
    ("options", "expected"), [("", False), ("?append_eos=true", True), ("?append_eos=false", False)]
)
def test_the_shipped_classifier_is_read_without_eos_unless_told(options, expected):
    assert load(f"classifier:tiny-reviews-sentiment{options}").append_eos is expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sentiment", "'sentiment' is none of: lexicon, classifier:<path or id>, toy:<name>=<number>"),
        ("", "is none of"),
        ("module:", "is none of"),
        (":function", "is none of"),
        ("classifier:", "must read classifier:<path or id>"),
        ("classifier:x?outputs=logit", "must read classifier:<path or id>"),
        ("classifier:x?append_eos=yes", "append_eos=true or false"),
        ("classifier:no/such/dir", "'no/such/dir' is not a model directory"),
        ("no/such/file.py:f", "the file 'no/such/file.py', which does not exist"),
        ("no_such_package.rewards:f", "'no_such_package' is not found"),
        ("reward_models.no_such_module:f", "'reward_models.no_such_module' is not found"),
        ("reward_models.lexicon:vader", "'vader' is not among lexicon"),
        ("math:cos(0)", r"'cos\(0\)' is not among"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_wrong_names_in_a_file(source):
    with pytest.raises(ValueError, match="'size' is not among Scale, length"):
        load(f"{source}:size")
    with pytest.raises(TypeError, match="is a int, not a function"):
        load(f"{source}:NUMBER")


def test_an_error_inside_the_module_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import a_missing_dependency\ndef f(**kwargs): ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_missing_dependency"):
        load("broken_rewards:f")
    with pytest.raises(ModuleNotFoundError, match="a_missing_dependency"):
        load(f"{tmp_path}/broken_rewards.py:f")
