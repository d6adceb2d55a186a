"""Prompts: every form of data set, each row once per epoch, resumable anywhere, and errors that name the row."""

import datasets
import numpy as np
import pytest
import torch
from builders import PROMPTS, assert_same, count_a, make_trainer, trained, weights
from fakes import END_OF_TEXT, LETTERS, letter_tokenizer
from torch.utils import data
from trl import data_utils

from lmppo.prompts import PromptEncoder, PromptStream, cut_prompts, is_conversational, pad_left
from lmppo.rewards import REWARD_ARGUMENTS

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}k{% endif %}"


def encoder(tokenizer=None, *, vocab_size=12, max_positions=16, max_completion_length=8):
    return PromptEncoder(tokenizer or letter_tokenizer(), vocab_size, max_positions, max_completion_length)


def encode(row, using=None):
    """The prompt of one row, and its tokens."""
    return (using or encoder()).encode([row], ["Row 0"])[0]


def rows_of(*prompts):
    return [{"prompt": p} for p in prompts]


def stream(rows, **kwargs):
    return PromptStream(rows, encoder(), **kwargs)


def letters(n):
    """n one-letter prompts, all different."""
    return rows_of(*LETTERS[:n])


class Restartable:
    """An iterable without a length whose every iter() starts over, fed by a generator."""

    def __init__(self, rows):
        self.rows, self.starts = rows, 0

    def __iter__(self):
        self.starts += 1
        return (row for row in self.rows)


# --- what a prompt may be --------------------------------------------------------------------------------------------


def test_left_padding():
    ids, mask = pad_left([[7], [3, 4, 5]], 4)
    assert ids.tolist() == [[0, 0, 0, 7], [0, 3, 4, 5]]
    assert mask.tolist() == [[False, False, False, True], [False, True, True, True]]
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)


def test_text_is_tokenized_and_kept_as_text():
    assert encode({"prompt": "abk"}) == ("abk", [1, 2, 11])


@pytest.mark.parametrize(
    "prompt",
    ["text", [1, 2], [{"role": "user", "content": "a"}], [{"role": "user"}, 1], [{"from": "user", "value": "a"}],
     ["a"], [["role"]], ["role"], [None], {"role": "user"}],
    ids=str,
)  # fmt: skip
def test_chat_messages_are_what_trl_takes_for_them(prompt):
    assert is_conversational(prompt) == data_utils.is_conversational({"prompt": prompt})
    assert not is_conversational([]) and not is_conversational("")


def test_token_ids_are_kept_and_shown_as_text():
    assert encode({"prompt": [1, 2, 11]}) == ("abk", [1, 2, 11])
    assert encode({"prompt": [0, 1]})[1] == [0, 1], "the end-of-text token is an id like any other"


def test_token_ids_may_be_numpys():
    prompt, ids = encode({"prompt": [np.int64(1), np.int32(2)]})
    assert (prompt, ids) == ("ab", [1, 2]) and all(type(token) is int for token in ids)


def test_messages_go_through_the_chat_template_and_stay_messages():
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]
    prompt, ids = encode({"prompt": messages}, encoder(letter_tokenizer(chat_template=CHAT_TEMPLATE)))
    assert prompt == messages
    assert ids == [1, 2, 3, 11], "with the generation prompt"


def test_a_data_set_may_be_a_plain_list_of_prompts():
    assert stream(["a", "bc"], shuffle=False).next_batch(2).input_ids == [[1], [2, 3]]


def test_other_columns_and_generations():
    rows = [{"prompt": "a", "label": 1, "note": "x"}, {"prompt": "bc", "label": 0, "note": "y"}]
    batch = stream(rows, shuffle=False).next_batch(2, num_generations=3)
    assert batch.prompts == ["a"] * 3 + ["bc"] * 3
    assert batch.input_ids == [[1]] * 3 + [[2, 3]] * 3
    assert batch.columns == {"label": [1, 1, 1, 0, 0, 0], "note": ["x"] * 3 + ["y"] * 3}
    part = batch.rows(range(2, 4))
    assert (part.prompts, part.input_ids) == (["a", "bc"], [[1], [2, 3]])
    assert part.columns == {"label": [1, 0], "note": ["x", "y"]}
    assert len(batch) == 6 and len(part) == 2


def test_bare_prompts_have_no_columns():
    assert stream(["a"]).next_batch(1).columns == {}


# --- F50: every unusable prompt is named before training -------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ({"text": "a", "id": 3}, r"no `prompt` \(found: text, id\).*cut_prompts"),
        ({"prompt": None}, r"`prompt` is null.*Remove the row"),
        ({"prompt": ""}, r"no tokens.*Remove the row"),
        ({"prompt": []}, r"no tokens"),
        ({"prompt": "abcdefghi"}, r"9 tokens and max_completion_length=8 exceed the model's context of 16.*Shorten"),
        ({"prompt": [1, 12]}, r"token id 12 is outside the model's vocabulary of 12"),
        ({"prompt": [1, -1]}, r"token id -1 is outside the model's vocabulary of 12"),
        ({"prompt": 5}, r"the prompt is a int; expected text, a list of messages"),
        ({"prompt": ["a", "b"]}, r"the prompt is a list holding str; expected text"),
        ({"prompt": [True, False]}, r"the prompt is a list holding bool; expected text"),
        ({"prompt": [1, np.True_, None]}, r"the prompt is a list holding NoneType, bool; expected text"),
        *(
            ({"prompt": "a", name: "x"}, rf"has a column `{name}`.*Rename the column .*'my_{name}'")
            for name in REWARD_ARGUMENTS
        ),
        ({"prompt": [{"role": "user", "content": "a"}]}, r"chat messages, but the tokenizer has no chat template"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_unusable_row_is_named_before_anything_is_sampled(bad, complaint):
    good = rows_of("a", "b")
    with pytest.raises(ValueError, match=rf"(?s)^Row 2 of train_dataset\b.*{complaint}"):
        stream([*good, bad])
    streaming = stream(Restartable([*good, bad]), name="eval_dataset")
    streaming.next_batch(2)
    with pytest.raises(ValueError, match=rf"(?s)^Row 2 of eval_dataset\b.*{complaint}"):
        streaming.next_batch(1)


def test_a_misnamed_prompt_column_is_told_to_be_named_prompt():
    with pytest.raises(ValueError, match=r"no `prompt` \(found: prompts\).*Name the column `prompt`"):
        stream([{"prompts": "a"}])


def test_rows_of_a_part_have_the_numbers_that_it_says():
    part = datasets.Dataset.from_list(rows_of("a", ""))
    part.row_numbers = [5, 17]
    with pytest.raises(ValueError, match=r"^Row 17 of the original data \(row 1 of eval_dataset\): .*no tokens"):
        stream(part, name="eval_dataset")


def test_a_prompt_that_just_fits_the_context_is_accepted():
    assert stream(rows_of("abcdefgh")).next_batch(1).input_ids == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_a_model_without_a_limit_takes_any_length():
    assert PromptStream(rows_of("a" * 500), encoder(max_positions=None)).next_batch(1)


# --- F49: any size of data set ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5, 11])
@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, Restartable], ids=["list", "Dataset", "streaming"])
def test_each_row_comes_once_per_epoch_whatever_the_sizes(size, batch, kind):
    """Smaller than a batch, no multiple of it: no row is left out, none comes twice, nothing hangs."""
    prompts = stream(kind(letters(size)))
    n_batches = 3 * size  # 3 * batch whole epochs
    drawn = [p for _ in range(n_batches) for p in prompts.next_batch(batch).prompts]
    for start in range(0, len(drawn), size):
        assert sorted(drawn[start : start + size]) == list(LETTERS[:size])


@pytest.mark.parametrize("empty", [[], datasets.Dataset.from_list([])])
def test_an_empty_data_set_is_refused(empty):
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"{name}: the data set is empty"):
            stream(empty, name=name)


@pytest.mark.parametrize(
    "rows", [Restartable([]), datasets.Dataset.from_list(letters(3)).to_iterable_dataset().skip(3)]
)
def test_an_empty_stream_is_refused_when_it_is_read(rows):
    with pytest.raises(ValueError, match="eval_dataset: .* no row after row 0: it is empty"):
        stream(rows, name="eval_dataset").next_batch(1)


@pytest.mark.parametrize(
    "nonsense",
    ["a path", {"prompt": ["a", "b"]}, (row for row in letters(3)), 7, datasets.DatasetDict(train=letters(2))],
    ids=["text", "columns", "generator", "number", "DatasetDict"],
)
def test_what_is_no_data_set_is_refused(nonsense):
    """A generator could be read once only: its second epoch and its resumed run would be empty."""
    complaint = rf"eval_dataset: the data set is a {type(nonsense).__name__}; expected a Dataset"
    with pytest.raises(ValueError, match=complaint):
        stream(nonsense, name="eval_dataset")


def test_a_data_frame_is_told_to_become_a_data_set():
    frame = datasets.Dataset.from_list(letters(3)).to_pandas()
    with pytest.raises(ValueError, match=r"the data set is a DataFrame.*Dataset\.from_pandas"):
        stream(frame)
    assert draw(stream(datasets.Dataset.from_pandas(frame), shuffle=False), 3) == list("abc")


# --- the columns of a batch ------------------------------------------------------------------------------------------

RAGGED = [{"prompt": "a", "answer": "x"}, {"prompt": "b"}, "c", {"prompt": "d", "id": 3}]


class Mapped(data.Dataset):
    """A map-style data set of torch."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class AtOnce(Mapped):
    """One that reads several rows at once."""

    def __getitems__(self, indices):
        return [self.rows[i] for i in indices]


class Sized(data.IterableDataset):
    """A streaming data set of torch that knows its length."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("kind", [list, Mapped, AtOnce])
@pytest.mark.parametrize("seed", range(4))
def test_every_batch_has_the_columns_of_the_whole_data_set(kind, seed):
    prompts = stream(kind(RAGGED), seed=seed)
    by_prompt = {"a": ("x", None), "b": (None, None), "c": (None, None), "d": (None, 3)}
    for _ in range(8):
        batch = prompts.next_batch(1, num_generations=2)
        assert list(zip(batch.columns["answer"], batch.columns["id"], strict=True)) == [by_prompt[batch.prompts[0]]] * 2


@pytest.mark.parametrize("kind", [Restartable, Sized])
def test_a_stream_has_the_columns_that_its_rows_have_had(kind):
    prompts = stream(kind(RAGGED))
    assert not prompts.is_map_style
    columns = [prompts.next_batch(1).columns for _ in range(5)]
    assert columns[:2] == [{"answer": ["x"]}, {"answer": [None]}]
    assert columns[3:] == [{"answer": [None], "id": [3]}, {"answer": ["x"], "id": [None]}]
    assert stream(kind(RAGGED)).next_batch(4).columns == {
        "answer": ["x", None, None, None],
        "id": [None, None, None, 3],
    }


@pytest.mark.parametrize("cursor", range(6))
def test_a_resumed_stream_has_the_same_columns(cursor):
    whole, before, after = (stream(Restartable(RAGGED)) for _ in range(3))
    expected = [whole.next_batch(1).columns for _ in range(9)]
    for _ in range(cursor):
        before.next_batch(1)
    after.next_batch(4)  # whatever it has read before
    after.load_state_dict(before.state_dict())
    assert [after.next_batch(1).columns for _ in range(9 - cursor)] == expected[cursor:]


def test_a_stream_that_declares_its_columns_has_them_all():
    rows = datasets.Dataset.from_list([{"prompt": "a", "answer": None, "id": 1}]).to_iterable_dataset()
    assert stream(rows).columns == ["answer", "id"]
    with pytest.raises(ValueError, match=r"^f needs the argument `key`, and train_dataset .*\(it has: answer, id\)"):
        stream(rows, needed={"key": "f"})


def strict(completions, answer, **kwargs):
    return [0.0 if a is None else float(a in text) for a, text in zip(answer, completions, strict=True)]


def test_an_argument_that_no_row_of_a_stream_has_had_is_none(tmp_path):
    rows = [*rows_of(*"abcdefgh" * 2), {"prompt": "a", "answer": "b"}]
    seen = []

    def reward(answer, **kwargs):
        seen.append(answer)
        return strict(answer=answer, **kwargs)

    trained(tmp_path, reward=reward, dataset=Restartable(rows), max_steps=3)
    assert seen == [[None] * 8, [None] * 8, ["b", *[None] * 7]]


def test_a_killed_and_resumed_stream_trains_the_same_policy(tmp_path):
    """A reward that looks at which columns are there at all."""
    rows = [{"prompt": "a", "bonus": 1.0}, *rows_of(*"bcdefgh" * 6)]

    def reward(completions, **columns):
        return [count + ("bonus" in columns) * 3 * count for count in count_a(None, completions)]

    kwargs = {"reward": reward, "dataset": Restartable(rows), "save_steps": 1}
    whole = trained(tmp_path / "whole", max_steps=3, **kwargs)
    trained(tmp_path / "killed", max_steps=1, **kwargs)
    resumed = trained(tmp_path / "killed", max_steps=3, resume_from_checkpoint="true", **kwargs)
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_an_argument_that_no_row_has_is_refused_before_training(tmp_path, part, watch):
    rows = {"train_dataset": [{"prompt": "a", "answer": "b"}], "eval_dataset": [{"prompt": "a", "answer": "b"}]}
    rows[part] = [{"prompt": "a", "id": 1}]
    functions = {"watch_funcs": [strict]} if watch else {"reward": strict}
    kind = "watch function" if watch else "reward function"
    with pytest.raises(
        ValueError, match=rf"^{kind} 'strict' needs the argument `answer`, and {part} has no such column"
    ):
        make_trainer(tmp_path, dataset=rows["train_dataset"], eval_dataset=rows["eval_dataset"], **functions)


# --- values of other libraries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "numpy", None])
def test_formatted_data_sets_give_the_same_prompts(form):
    ids = datasets.Dataset.from_list([{"prompt": [1, 2, 3], "n": 1}, {"prompt": [4], "n": 2}]).with_format(form)
    assert stream(ids, shuffle=False).next_batch(2).input_ids == [[1, 2, 3], [4]]
    texts = datasets.Dataset.from_list(rows_of("ab", "c")).with_format(form)
    assert stream(texts, shuffle=False).next_batch(2).prompts == ["ab", "c"]
    chats = datasets.Dataset.from_list(rows_of([{"role": "user", "content": "ab"}])).with_format(form)
    batch = PromptStream(chats, encoder(letter_tokenizer(chat_template=CHAT_TEMPLATE))).next_batch(1)
    assert (batch.prompts, batch.input_ids) == ([[{"role": "user", "content": "ab"}]], [[1, 2, 11]])


@pytest.mark.parametrize("ids", [(1, 2), np.array([1, 2]), torch.tensor([1, 2]), [torch.tensor(1), 2]], ids=repr)
def test_token_ids_may_be_held_by_anything(ids):
    assert encode({"prompt": ids}) == ("ab", [1, 2])


@pytest.mark.parametrize("bad", [np.array([1.0]), torch.tensor([[1]]), [{"content": "a"}]], ids=repr)
def test_other_arrays_and_dicts_are_refused(bad):
    with pytest.raises(ValueError, match=r"^Row 0: the prompt is a list holding (float|list|dict); expected text"):
        encode({"prompt": bad})


def test_a_data_set_of_several_parts_is_refused_with_their_names():
    with pytest.raises(
        ValueError, match=r"is a DatasetDict; expected a Dataset \(one split of it\).* It has: train, test"
    ):
        stream(datasets.DatasetDict(train=letters(2), test=letters(2)))


def test_a_null_row_of_a_stream_is_named():
    with pytest.raises(ValueError, match="Row 1 of train_dataset: `prompt` is null"):
        stream(Restartable(["a", None, "b"])).next_batch(3)


# --- many rows at once -----------------------------------------------------------------------------------------------


class Counting:
    """Calls of a tokenizer, and the texts in them."""

    def __init__(self, tokenizer, monkeypatch):
        self.texts, call = [], type(tokenizer).__call__

        def counted(this, text, **kwargs):
            self.texts.append(text)
            return call(this, text, **kwargs)

        monkeypatch.setattr(type(tokenizer), "__call__", counted)


@pytest.mark.parametrize("chat", [False, True])
def test_texts_are_tokenized_together_and_once(chat, monkeypatch, tmp_path):
    tokenizer = letter_tokenizer(chat_template=CHAT_TEMPLATE)
    prompts = [LETTERS[i % 11] * (1 + i % 3) for i in range(3000)]
    rows = rows_of(*([{"role": "user", "content": p}] for p in prompts) if chat else prompts)
    counted = Counting(tokenizer, monkeypatch)
    trainer = make_trainer(tmp_path, dataset=rows, eval_dataset=Restartable(rows), tokenizer=tokenizer, eval_steps=1)
    assert sum(map(len, counted.texts)) == 3000 and len(counted.texts) == 3, "batches of a thousand"
    trainer.train()
    assert sum(map(len, counted.texts)) == 3008, "and once for the two evaluations"
    letter = {c: i + 1 for i, c in enumerate(LETTERS)}
    suffix = [11] if chat else []
    encoded = [ids for _, ids in trainer.prompts._encoded]
    assert encoded == [[letter[c] for c in prompt] + suffix for prompt in prompts]


def test_a_row_far_down_is_named():
    rows = rows_of(*"a" * 2500)
    rows[2345] = {"prompt": ""}
    with pytest.raises(ValueError, match="^Row 2345 of train_dataset: the prompt has no tokens"):
        stream(rows)


# --- order and resuming ----------------------------------------------------------------------------------------------


def draw(prompts, n):
    return prompts.next_batch(n).prompts


def test_the_order_is_a_new_permutation_each_epoch_and_of_each_seed():
    prompts = stream(letters(11), seed=3)
    epochs = [draw(prompts, 11) for _ in range(4)]
    assert all(sorted(epoch) == list(LETTERS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(LETTERS), draw(stream(letters(11), seed=4), 11)]}) == 6


def test_without_shuffling_the_order_is_the_data_sets():
    assert draw(stream(letters(5), shuffle=False), 12) == list("abcdeabcdeab")


@pytest.mark.parametrize(
    "kind",
    [list, datasets.Dataset.from_list, Restartable, lambda r: datasets.Dataset.from_list(r).to_iterable_dataset()],
    ids=["list", "Dataset", "streaming", "IterableDataset"],
)
@pytest.mark.parametrize("cursor", [0, 1, 4, 5, 7, 13])
def test_it_goes_on_from_any_prompt(kind, cursor):
    """In the middle of an epoch, at its end, in a later one; whatever the sizes of the batches before."""
    whole = draw(stream(kind(letters(5)), seed=9), 20)
    before = stream(kind(letters(5)), seed=9)
    for _ in range(cursor):
        before.next_batch(1)
    after = stream(kind(letters(5)), seed=9)
    after.load_state_dict(before.state_dict())
    assert draw(after, 20 - cursor) == whole[cursor:]
    assert draw(before, 20 - cursor) == whole[cursor:]


def test_a_stream_is_read_as_it_is_needed():
    rows = Restartable(letters(6))
    prompts = stream(rows)
    assert rows.starts == 0
    assert draw(prompts, 4) == list("abcd")
    assert draw(prompts, 4) == list("efab")
    assert rows.starts == 2


# --- cutting prompts from texts --------------------------------------------------------------------------------------


def test_prompts_are_cut_from_texts():
    data = datasets.Dataset.from_list([{"text": t, "label": i} for i, t in enumerate(["abcdef", "ab", "kjihg"])])
    cut = cut_prompts(data, letter_tokenizer(), 4)
    assert cut.to_list() == [{"label": 0, "prompt": [1, 2, 3, 4]}, {"label": 2, "prompt": [11, 10, 9, 8]}]
    assert cut.row_numbers == [0, 2]


@pytest.mark.parametrize(
    "column, n_tokens, complaint", [("body", 2, r"neither a `prompt` nor a `text` column \(found: \['body'\]\)"),
                                    ("text", 9, "No text of the data set has prompt_tokens=9 tokens: lower it")]
)  # fmt: skip
def test_texts_that_cannot_be_cut(column, n_tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        cut_prompts(datasets.Dataset.from_list([{column: "abc"}]), letter_tokenizer(), n_tokens)


@pytest.mark.parametrize(
    "texts, complaint", [(["abc", None], "Row 1: `text` is null"), ([1, 2], "Row 0: `text` is a int; expected text")]
)
def test_a_row_that_is_not_text_is_named(texts, complaint):
    with pytest.raises(ValueError, match=complaint):
        cut_prompts(datasets.Dataset.from_dict({"text": texts}), letter_tokenizer(), 2)


def test_the_test_tokenizer_is_what_these_tests_take_it_for():
    tokenizer = letter_tokenizer()
    assert tokenizer(PROMPTS[1])["input_ids"] == [2, 3, 4]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer(END_OF_TEXT)["input_ids"][0] == 0
