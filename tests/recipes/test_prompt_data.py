"""The recipes' prompts: every kind of source, split once, and bad data named by the row of the user's own file."""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from lmppo.prompts import PromptEncoder, PromptStream
from tests.fakes import LETTERS, letter_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from prompt_data import load_prompts  # noqa: E402


def load(source, prompt_tokens=2):
    return load_prompts(str(source), letter_tokenizer(), prompt_tokens)


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(dataset) -> list:
    return dataset["prompt"][:]


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rows", "held_out"), [(2, 1), (11, 2)])
def test_a_tenth_is_held_out_and_at_least_one_row(tmp_path, n_rows, held_out):
    train, test = load(jsonl(tmp_path / "p.jsonl", *({"prompt": f"a{i}"} for i in range(n_rows))))
    assert len(test) == held_out
    assert sorted([*texts(train), *texts(test)]) == sorted(f"a{i}" for i in range(n_rows))


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"text": "abc"}])
def test_a_single_row_serves_as_both(tmp_path, row):
    train, held_out = load(jsonl(tmp_path / "p.jsonl", row))
    assert texts(train) == texts(held_out) == (["a"] if "prompt" in row else [[1, 2]])


def test_rows_are_held_out_of_those_that_are_long_enough(tmp_path):
    rows = [{"text": "a"}] * 30 + [{"text": "abc"}, {"text": "bcd"}]
    train, held_out = load(jsonl(tmp_path / "p.jsonl", *rows))
    assert sorted([*texts(train), *texts(held_out)]) == [[1, 2], [2, 3]]


def test_a_test_split_is_held_out_but_never_the_split_that_is_trained_on(tmp_path):
    data = Dataset.from_list([{"prompt": p} for p in LETTERS])
    DatasetDict(train=data.select(range(3)), test=data.select([5])).save_to_disk(tmp_path / "both")
    train, held_out = load(tmp_path / "both")
    assert (texts(train), texts(held_out)) == (["a", "b", "c"], ["f"])
    DatasetDict(test=data).save_to_disk(tmp_path / "test only")
    train, held_out = load(tmp_path / "test only")
    assert sorted([*texts(train), *texts(held_out)]) == list(LETTERS)


def test_a_directory_of_files_and_one_written_by_save_to_disk(tmp_path):
    data = Dataset.from_list([{"prompt": p} for p in LETTERS])
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "train.parquet")
    for folder in ("saved", "files"):
        train, held_out = load(tmp_path / folder)
        assert sorted([*texts(train), *texts(held_out)]) == list(LETTERS)


# --- bad data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"prompt": None}, "`prompt` is null"),
        ({"prompt": 5}, "the prompt is a int; expected text"),
        ({"prompt": [True, False]}, "the prompt is a list holding bool; expected text"),
        ({"text": None}, "`text` is null; expected text"),
        ({"text": 5}, "`text` is a int; expected text"),
        ({"text": ["abc"]}, "`text` is a list; expected text"),
    ],
    ids=str,
)
def test_an_unusable_row_has_the_number_it_has_in_the_file(tmp_path, bad, complaint):
    rows = [{name: "abc"} for name in bad] * 20
    rows[17] = bad
    with pytest.raises(ValueError, match=rf"p\.jsonl', split 'train': Row 17: {complaint}"):
        load(jsonl(tmp_path / "p.jsonl", *rows))


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_the_trainer_knows_each_rows_number_in_the_file(tmp_path, column):
    """Texts too short for a prompt are left out, and the rest is shuffled and split: the numbers stay the file's."""
    rows = [{column: "a"}] * 3 + [{column: letter * 2} for letter in LETTERS]
    train, held_out = load(jsonl(tmp_path / "p.jsonl", *rows))
    for part, name in ((train, "train_dataset"), (held_out, "eval_dataset")):
        for row, prompt in enumerate(texts(part)):
            written = prompt if column == "prompt" else letter_tokenizer().decode(prompt)
            assert rows[part.row_numbers[row]] == {column: written}
        encoder = PromptEncoder(letter_tokenizer(), vocab_size=1, max_positions=None, max_completion_length=1)
        number = part.row_numbers[0]
        with pytest.raises(ValueError, match=rf"Row {number} of the original data \(row 0 of {name}\): token id"):
            PromptStream(part, encoder, name=name)


def test_a_bad_or_empty_held_out_split_is_named(tmp_path):
    good = [{"prompt": "a"}, {"prompt": "b"}]
    bad = Dataset.from_list([*good, {"prompt": None}])
    DatasetDict(train=Dataset.from_list(good), test=bad).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match="split 'test': Row 2: `prompt` is null"):
        load(tmp_path / "bad")
    (tmp_path / "files").mkdir()
    Dataset.from_list(good).to_parquet(tmp_path / "files" / "train.parquet")
    bad.select([]).to_parquet(tmp_path / "files" / "validation.parquet")
    with pytest.raises(ValueError, match="a split of it is empty.*validation"):
        load(tmp_path / "files")
    DatasetDict(train=Dataset.from_list(good), test=bad.select([])).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty': the data set or a split of it is empty"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", ""), ("p.jsonl", "\n"), ("p.json", "[]"), ("p.csv", ""), ("p.csv", "prompt,label\n")],
)
def test_an_empty_file_is_called_empty(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"dataset_name='.*{name}': the (file|data set or a split of it) is empty"):
        load(tmp_path / name)


def test_an_empty_file_in_a_directory_is_called_empty(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="files': the data set or a split of it is empty"):
        load(tmp_path / "files")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"\n{"prompt": "d"}\n',
            r"Missing a comma.*in row 2",
        ),
        ("p.csv", "prompt,label\na,1\nb,2,3\n", r"Expected 2 fields in line 3, saw 3\)$"),
    ],
)
def test_a_malformed_file_gives_line_and_cause(tmp_path, name, content, cause):
    (tmp_path / name).write_text(content)
    with pytest.raises(OSError, match=rf"dataset_name='.*{name}'.*{cause}"):
        load(tmp_path / name)


def test_a_split_that_is_loaded_without_rows_is_empty(monkeypatch):
    splits = DatasetDict(train=Dataset.from_list([{"text": "abc"}]), test=Dataset.from_dict({"text": []}))
    monkeypatch.setattr("prompt_data.load_dataset", lambda name: splits)
    with pytest.raises(ValueError, match="dataset_name='hub/name', split 'test': the data set is empty"):
        load("hub/name")


def test_what_is_not_there_or_has_no_prompts_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="neither a `prompt` nor a `text` column"):
        load(jsonl(tmp_path / "p.jsonl", {"body": "a"}))
