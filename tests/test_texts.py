"""What is shown of a completion is what was written, whatever the tokenizer does to spaces, bytes and special tokens."""

import json
import warnings

import pytest
from builders import make_trainer
from datasets import Dataset, IterableDataset
from fakes import END_OF_TEXT, letter_tokenizer, tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmppo.explain import find_saved, load_saved_rollouts, token_texts
from lmppo.prompts import PromptEncoder, PromptStream, cut_prompts
from lmppo.texts import decode_completions, decode_whole

BROKEN = "\N{REPLACEMENT CHARACTER}"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = ["the", "cat", "sat", "on", "a", "mat"]
LETTERS = "abcdefghijklmnopqrstuvwxyz<>/.,!?'"


def made(backend, *, bos=False, **special):
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL | special)
    assert len(tokenizer) == backend.get_vocab_size()
    return tokenizer


def byte_fallback(**kwargs):
    """As Llama 2's: words with the space before them, letters, and bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "é"]
    scores = [(piece, -10.0 if piece not in SPECIAL.values() else -1000.0) for piece in pieces]
    scores += [(f"▁{word}", -1.0) for word in WORDS]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return made(backend, **kwargs)


def metaspace(**kwargs):
    """The same without bytes, and the decoder that came with older tokenizers."""
    scores = [
        *((piece, -1000.0) for piece in SPECIAL.values()),
        *((piece, -10.0) for piece in ["▁", *LETTERS, "é", BROKEN]),
    ]
    backend = Tokenizer(models.Unigram(scores + [(f"▁{word}", -1.0) for word in WORDS], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made(backend, **kwargs)


def word_piece(**kwargs):
    """As BERT's: pieces within a word are marked, and spaces before punctuation are no part of the text."""
    pieces = ["<unk>", "<s>", "</s>", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS, "##s", "##ted"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return made(backend, clean_up_tokenization_spaces=True, **kwargs)


def merged_bytes():
    """A byte-level vocabulary in which a space, or a letter, is one token with the first bytes of a character."""
    letters = {byte: letter for byte, letter in zip("\x20\xf0\x9f".encode("latin-1"), "ĠðŁ", strict=True)}
    space, first, second = letters[0x20], letters[0xF0], letters[0x9F]
    vocab = {END_OF_TEXT: 0, **{c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    vocab |= {space + first: 257, space + first + second: 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(space, first), (space + first, second)]))
    backend.add_special_tokens([END_OF_TEXT])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


KINDS = {"bytes": tiny_tokenizer, "merged bytes": merged_bytes, "fallback": byte_fallback, "metaspace": metaspace}
WITH_BYTES = [tiny_tokenizer, merged_bytes, byte_fallback]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def completion(tokenizer, prompt_ids, ids):
    (text,) = decode_completions(tokenizer, [prompt_ids], [ids])
    assert "".join(token_texts(tokenizer, prompt_ids, ids)) == text, "the tokens' texts are the completion's"
    return text


@pytest.mark.parametrize("text", ["the cat sat on a mat", "a cat  sat", "<s>the cat</s>."])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_the_text_wherever_it_is_cut(kind, text):
    """A literal "<s>" is spelled out: as a special token it would be no text."""
    tokenizer = KINDS[kind]()
    tokenizer.split_special_tokens = True
    ids = ids_of(tokenizer, text)
    for cut in range(1, len(ids)):
        head = decode_whole(tokenizer, [ids[:cut]])[0]
        assert head + completion(tokenizer, ids[:cut], ids[cut:]) == text
        assert completion(tokenizer, ids[:cut], [*ids[cut:], tokenizer.eos_token_id]) == text[len(head) :]


def test_word_pieces_are_joined_to_the_prompts_last_word():
    tokenizer = word_piece(bos=True)
    prompt = tokenizer("the cat")["input_ids"]
    pieces = {name: tokenizer.convert_tokens_to_ids(name) for name in ("##s", "##ted", "sat", "!", "'", "##n")}
    for names, expected in ([["##s", "sat", "!"], "s sat!"], [["sat", "##ted", "!"], " satted!"], [["!"], "!"]):
        assert completion(tokenizer, prompt, [pieces[name] for name in names]) == expected


def test_spaces_before_punctuation_stay_where_they_were_written():
    tokenizer = metaspace(clean_up_tokenization_spaces=True)
    assert tokenizer.decode(ids_of(tokenizer, "the cat !")) == "the cat!", "what cleaning up makes of it"
    assert completion(tokenizer, ids_of(tokenizer, "the"), ids_of(tokenizer, "cat ! ' a '")) == " cat ! ' a '"


@pytest.mark.parametrize("make", WITH_BYTES)
@pytest.mark.parametrize("text", ["a 🙂 b", "🙂🙂", "the 漢字", "ทดสอบ"])
def test_a_character_divided_between_prompt_and_completion_belongs_to_the_completion(make, text):
    tokenizer = make()
    ids = ids_of(tokenizer, text)
    for cut in range(1, len(ids)):
        head = decode_whole(tokenizer, [ids[:cut]])[0]
        assert text.startswith(head) and head + completion(tokenizer, ids[:cut], ids[cut:]) == text


@pytest.mark.parametrize("make", WITH_BYTES)
@pytest.mark.parametrize("text", ["a 🙂", "🙂🙂", "the 漢字", "ทดสอบ", f"a {BROKEN}🙂"])
def test_a_character_that_never_becomes_whole_is_left_out(make, text):
    """What stays are the whole characters of the text, read byte by byte."""
    tokenizer = make()
    ids, n_bytes = ids_of(tokenizer, text), len(text.encode())
    prompt = ids_of(tokenizer, "the")
    of_last = len(text[-1].encode())
    for dropped in range(1, of_last if make is not merged_bytes else 3):
        expected = text.encode()[: n_bytes - dropped].decode(errors="ignore")
        for end in ([], [tokenizer.eos_token_id]):
            written = completion(tokenizer, prompt, ids[:-dropped] + end)
            assert written.removeprefix(" ") == expected.removeprefix(" ")


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_fallback])
def test_bytes_that_are_no_character_spoil_no_other(make):
    tokenizer = make()
    prompt, piece = ids_of(tokenizer, "ทดสอบ"), ids_of(tokenizer, "é")[-1]
    stray = ids_of(tokenizer, "漢")[-2:-1]
    letter = ids_of(tokenizer, "ab")[-1]
    assert piece != letter
    assert completion(tokenizer, prompt, [*stray, letter]) == f"{BROKEN}b"
    assert completion(tokenizer, prompt, stray) == ""
    assert completion(tokenizer, prompt, [letter, *stray]) == "b"


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_character_that_was_written_stays(kind):
    tokenizer = KINDS[kind]()
    prompt, ids = ids_of(tokenizer, f"the{BROKEN}"), ids_of(tokenizer, f"a{BROKEN}{BROKEN}")
    assert decode_whole(tokenizer, [prompt]) == [f"the{BROKEN}"]
    assert completion(tokenizer, prompt, ids).removeprefix(" ") == f"a{BROKEN}{BROKEN}"
    assert completion(tokenizer, prompt, [*ids, tokenizer.eos_token_id]).endswith(BROKEN)


def test_of_no_rows_there_are_no_texts():
    assert decode_whole(tiny_tokenizer(), []) == decode_completions(tiny_tokenizer(), [], []) == []


def test_it_takes_two_calls_whatever_the_number_of_rows():
    tokenizer, calls = tiny_tokenizer(), []

    class Counted:
        def batch_decode(self, *args, **kwargs):
            calls.append(args)
            return tokenizer.batch_decode(*args, **kwargs)

    assert decode_completions(Counted(), [[5], [6], [7]], [[8]] * 3) == [tokenizer.decode([8])] * 3
    assert len(calls) == 2


# Through the trainer


def seen_by(reward_calls):
    def reward(prompts, completions, completion_ids, **kwargs):
        reward_calls.extend(zip(prompts, completions, completion_ids, strict=True))
        return [float(len(text)) for text in completions]

    return reward


def bytes_by_id(tokenizer):
    """The byte of each token of the byte-level vocabulary, found by encoding; those of no character all as 0xFF."""
    texts = [chr(code) for code in [*range(0x800), *range(0x1000, 0xD000, 0x1000), 0x800, 0xE000, 0x10000, 0x40000]]
    texts += [chr(code) for code in (0x80000, 0xC0000, 0x100000)]
    found = {i: byte for text in texts for i, byte in zip(ids_of(tokenizer, text), text.encode(), strict=True)}
    return {i: found.get(i, 0xFF) for i in range(len(tokenizer))}


def test_rewards_and_tables_get_what_was_written(tmp_path):
    """Random tokens of a byte-level vocabulary, against Python's own decoder of UTF-8."""
    tokenizer, calls = tiny_tokenizer(), []
    data = [{"prompt": text} for text in ("a", "the 🙂", f"no{BROKEN}", "x")]
    data.append({"prompt": [tokenizer.bos_token_id, *ids_of(tokenizer, "so 🙂")[:-2]]})
    trainer = make_trainer(
        tmp_path, model=tiny_gpt2(), reward=seen_by(calls), dataset=data, tokenizer=tokenizer, rollout_batch_size=20,
        save_rollouts=20, log_completions=20, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert {prompt for prompt, _, _ in calls} == {"a", "the 🙂", f"no{BROKEN}", "x", "so "}
    byte = bytes_by_id(tokenizer)
    for prompt, text, ids in calls:
        start = "so 🙂".encode()[:-2] if prompt == "so " else prompt.encode()
        written = start + bytes(byte[i] for i in ids if i != tokenizer.eos_token_id)
        assert text == written.decode(errors="replace").removeprefix(prompt).rstrip(BROKEN)
    texts = [text for _, text, _ in calls]
    assert len({*texts}) > 10 and trainer.last_step.scored.completions == texts
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["completion"]) for row in rows] == [(prompt, text) for prompt, text, _ in calls]
    saved = load_saved_rollouts(find_saved(tmp_path))
    assert saved.prompts == [prompt for prompt, _, _ in calls] and saved.completions == texts
    assert ["".join(row) for row in saved.texts] == texts


def test_the_first_space_of_sentencepiece_reaches_the_reward(tmp_path):
    tokenizer, calls = metaspace(bos=True), []
    model = tiny_llama(len(tokenizer))
    texts = Dataset.from_dict({"text": ["the cat sat on a mat, the mat"]})
    data = [*cut_prompts(texts, tokenizer, 4), {"prompt": "the cat"}, {"prompt": "a mat ?"}]
    assert data[0]["prompt"][0] == tokenizer.bos_token_id
    make_trainer(tmp_path, model=model, reward=seen_by(calls), dataset=data, tokenizer=tokenizer, max_steps=3).train()
    assert {prompt for prompt, _, _ in calls} == {"the cat sat", "the cat", "a mat ?"}
    n_spaces = 0
    for prompt, text, ids in calls:
        assert prompt + text == tokenizer.decode([*ids_of(tokenizer, prompt), *ids], skip_special_tokens=True)
        n_spaces += text.startswith(" ")
    assert n_spaces


def test_chat_completions_are_decoded_as_trl_does(tmp_path):
    tokenizer, calls = byte_fallback(), []
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    data = [{"prompt": [{"role": "user", "content": "the cat"}]}]
    trainer = make_trainer(tmp_path, model=tiny_llama(len(tokenizer)), reward=seen_by(calls), dataset=data,
                           tokenizer=tokenizer, max_steps=1)  # fmt: skip
    trainer.train()
    contents = tokenizer.batch_decode([ids for _, _, ids in calls], skip_special_tokens=True)
    assert [reply for _, reply, _ in calls] == [[{"role": "assistant", "content": text}] for text in contents]
    assert trainer.last_step.scored.completions == contents


# A second BOS


def stream(tokenizer, data, **kwargs):
    return PromptStream(data, PromptEncoder(tokenizer, len(tokenizer), None, 8), **kwargs)


def warnings_of(tokenizer, data, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = stream(tokenizer, data, **kwargs)
        prompts.next_batch(4)
    return [str(warning.message) for warning in caught]


TWICE = [{"prompt": "the cat"}, {"prompt": "<s>the cat"}, {"prompt": "<s> a mat"}]


@pytest.mark.parametrize("data", [TWICE, IterableDataset.from_generator(lambda: iter(TWICE))], ids=["list", "stream"])
def test_a_second_bos_is_warned_of_once(data):
    (message,) = warnings_of(byte_fallback(bos=True), data)
    assert message.startswith("Row 1 of train_dataset: the prompt begins with two BOS tokens")
    assert "text.removeprefix('<s>')" in message


def test_a_second_bos_of_a_cut_text_is_warned_of_by_its_row():
    tokenizer = byte_fallback(bos=True)
    texts = Dataset.from_dict({"text": ["a", "<s>the cat sat on a mat"]})
    (message,) = warnings_of(tokenizer, cut_prompts(texts, tokenizer, 5))
    assert message.startswith("Row 1 of the original data (row 0 of train_dataset): the prompt begins with two BOS")


def test_each_data_set_is_warned_of():
    tokenizer = byte_fallback(bos=True)
    assert len(warnings_of(tokenizer, TWICE)) == len(warnings_of(tokenizer, TWICE, name="eval_dataset")) == 1


@pytest.mark.parametrize("tokenizer", [byte_fallback(), byte_fallback(bos=True), letter_tokenizer()], ids=[0, 1, 2])
def test_one_bos_is_right(tokenizer):
    chat = [{"role": "user", "content": "the cat"}]
    if tokenizer.bos_token == "<s>":
        tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
        assert warnings_of(tokenizer, [{"prompt": chat}]) == []
        assert stream(tokenizer, [{"prompt": chat}]).next_batch(1).input_ids[0].count(tokenizer.bos_token_id) == 1
    assert warnings_of(tokenizer, [{"prompt": "a"}, {"prompt": [0, 1, 1]}]) == []
