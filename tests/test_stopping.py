"""Stop strings: found at the token that completes one, in the text as it is written; against the definition."""

import pytest
import torch
from builders import EOS, MODELS, gpt2, make_trainer, trained
from fakes import letter_tokenizer, tiny_gpt2, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmppo.models import ActorCritic
from lmppo.prompts import pad_left
from lmppo.sampling import SamplingParams, sample, uniform_noise
from lmppo.stopping import StopStrings


def byte_level():
    """Bytes, and pieces of several: letters, spaces, a character of two bytes and one of three in pieces."""
    base = dict(enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]))
    pieces = ["ab", "ba", "Ġa", "ĠĠ", "abba", "bab" * 20, "ĊĊ", "aĊ", "Ã©b", "âĤ", "¬a"]
    vocab = {token: i for i, token in base.items()} | {p: len(base) + i for i, p in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sentencepiece():
    """As Llama 2 writes: a space is part of the token after it, the first one is dropped, unknown bytes are tokens."""
    pieces = ["▁", "▁a", "a", "b", "ab", "▁ba", "ba", "▁▁", "\n", "b\n", "aé", "é", "bab" * 20]
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def interesting(tokenizer):
    """Ids whose texts are made of a few characters, pieces of characters among them; and one that is no token."""
    names = {"a", "b", "Ġ", "Ċ", "Ã", "©", "â", "Ĥ", "¬", "<0xC3>", "<0xA9>", "<0x61>", "\n", "é"}
    known = tokenizer.get_vocab()
    return [i for token, i in known.items() if token in names or i > 256 or i == 0] + [len(known) + 3]


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}
STRINGS = st.text(alphabet="ab \né€", min_size=1, max_size=6) | st.sampled_from(["<s>", "t|>a", "b" + "ab" * 20])


def first_end(tokenizer, strings, prompt, ids):
    """The number of tokens up to the first one with which a stop string is in the text behind the prompt's; or None."""

    def text(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts = [text(prompt + ids[: n + 1])[len(text(prompt)) :] for n in range(len(ids))]
    return next((n + 1 for n, written in enumerate(texts) if any(s in written for s in strings)), None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_first_token_that_completes_a_string_ends_the_completion(name):
    tokenizer = TOKENIZERS[name]
    ids_of = st.lists(st.sampled_from(interesting(tokenizer)), min_size=1, max_size=60)
    letter = tokenizer.get_vocab()["a"]

    @settings(max_examples=300, deadline=None)
    @given(ids_of, st.lists(STRINGS, min_size=1, max_size=3))
    def check(ids, strings):
        watch = StopStrings(tuple(strings), tokenizer).watch([letter, letter])
        found = next((n + 1 for n, token in enumerate(ids) if watch.completes(token)), None)
        assert found == first_end(tokenizer, strings, [letter, letter], ids)

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("late", [0, 1, 2, 3, 50, 51, 52, 53])
def test_a_string_of_many_tokens_is_found_however_long_the_text_before(name, late):
    """Most of the text is no longer looked at, so that a token costs no more at the end than at the beginning."""
    tokenizer = TOKENIZERS[name]
    vocab = tokenizer.get_vocab()
    a, b, nothing = vocab["a"], vocab["b"], len(vocab) + 3
    wanted = [a, b, nothing, nothing, a, a, b, b]
    watch = StopStrings(("abaabb",), tokenizer).watch([b])
    assert not any(watch.completes(token) for token in [b, a] * 200 + [nothing] * late + wanted[:-1])
    assert watch.start > 250
    assert watch.completes(b)


@pytest.mark.parametrize(
    ("prompt", "completion", "strings", "length"),
    [
        ("xa", "bab", ["ab"], 3),  # not the one that begins in the prompt
        ("a", "cab", ["cab", "a"], 2),
        ("a", "b\n\nc", ["\n\n"], 3),
        ("a", "é", ["é"], 2),  # two bytes
        ("a", "é", ["Ã"], None),  # no half of a character is one
        ("a", "b b", [" "], 2),
    ],
)
def test_by_hand(prompt, completion, strings, length):
    tokenizer = tiny_tokenizer()
    watch = StopStrings(tuple(strings), tokenizer).watch(tokenizer(prompt)["input_ids"])
    ids = tokenizer(completion)["input_ids"]
    assert next((n + 1 for n, token in enumerate(ids) if watch.completes(token)), None) == length


def test_the_space_before_the_first_token_is_written():
    """Llama's tokenizer drops it where a text begins; behind a prompt it is there."""
    tokenizer = TOKENIZERS["sentencepiece"]
    vocab = tokenizer.get_vocab()
    assert tokenizer.decode([vocab["▁a"]]) == "a"
    assert StopStrings((" a",), tokenizer).watch([vocab["b"]]).completes(vocab["▁a"])


# --- in the sampler --------------------------------------------------------------------------------------------------

PROMPTS = ["a", "hello there", "no", "Yes it is!", "ab"]


def samples_of(model, tokenizer, strings, rows=range(5), n_time=24, seed=0, **distribution):
    prompts = [tokenizer(PROMPTS[row])["input_ids"] for row in rows]
    ids, mask = pad_left(prompts, max(map(len, prompts)))
    noise = uniform_noise(seed, 0, range(5), n_time)[list(rows)]
    stop = StopStrings(tuple(strings), tokenizer) if strings else None
    return sample(model, ids, mask, noise, SamplingParams(n_time, (), stop_strings=stop, **distribution))


def likely_pieces(family):
    """A model of bytes that mostly writes a few of them, so that strings of two or three occur."""
    model = ActorCritic(MODELS[family](vocab_size=257) if family == "llama" else tiny_gpt2())
    tokenizer = tiny_tokenizer()
    chosen = torch.tensor(tokenizer("ab \n")["input_ids"])

    def favor(module, arguments, output):
        output.logits[..., chosen] += 30.0

    model.policy.register_forward_hook(favor)
    return model, tokenizer


@pytest.mark.parametrize("strings", [["ab", "bb"], ["a b", "\n", "é"], ["b ", "ba"]], ids=str)
def test_a_row_ends_where_its_text_does_and_others_do_not_move(strings):
    """Against the same noise without stop strings, cut by the definition; alone, in other orders and beside others."""
    model, tokenizer = likely_pieces("gpt2")
    free, stopped = (samples_of(model, tokenizer, s) for s in (None, strings))
    lengths = []
    for row, prompt in enumerate(PROMPTS):
        ids = free.tokens.completion_ids[row].tolist()
        end = first_end(tokenizer, strings, tokenizer(prompt)["input_ids"], ids)
        lengths.append(end or 24)
        assert stopped.completion_mask[row].sum() == lengths[-1] and bool(stopped.ended[row]) == (end is not None)
        counted = stopped.completion_mask[row]
        assert stopped.tokens.completion_ids[row][counted].tolist() == ids[: lengths[-1]]
        torch.testing.assert_close(stopped.logprobs[row][counted], free.logprobs[row][counted], atol=5e-6, rtol=1e-5)
    assert len(set(lengths)) > 2
    for rows in ([3], [4, 3, 2, 1, 0], [1, 4]):
        part = samples_of(model, tokenizer, strings, rows)
        assert part.completion_mask.equal(stopped.completion_mask[rows])
        assert part.tokens.completion_ids.equal(stopped.tokens.completion_ids[rows])
        assert part.ended.equal(stopped.ended[rows])


@pytest.mark.parametrize("row", range(5))
def test_it_ends_where_generate_ends(row):
    """Greedily, with strings that are there; a prompt of one token, since generate() looks into the prompt as well."""
    model, tokenizer = likely_pieces("gpt2")
    ids = torch.tensor([tokenizer(PROMPTS[row][:1])["input_ids"]])

    def generated(strings):
        return model.policy.generate(
            ids, attention_mask=torch.ones_like(ids), stop_strings=strings, tokenizer=tokenizer, do_sample=False,
            max_new_tokens=24, pad_token_id=0, eos_token_id=None,
        )[0, 1:].tolist()  # fmt: skip

    strings = [tokenizer.decode(generated(None))[5:8], "\n\nq"]
    params = SamplingParams(24, (), top_k=1, stop_strings=StopStrings(tuple(strings), tokenizer))
    ours = sample(model, ids, torch.ones_like(ids, dtype=torch.bool), uniform_noise(0, 0, range(1), 24), params)
    assert ours.tokens.counted_ids()[0] == generated(strings)
    assert ours.ended[0]


def test_a_string_before_the_minimum_ends_as_in_generate():
    model, tokenizer = likely_pieces("gpt2")
    early = samples_of(model, tokenizer, ["a", "b"], min_new_tokens=20)
    assert early.ended.any() and early.completion_mask.sum(1)[early.ended].min() < 20


def test_a_string_completed_by_the_last_token_is_an_end():
    model, tokenizer = likely_pieces("gpt2")
    free = samples_of(model, tokenizer, None)
    text = tokenizer.decode(free.tokens.completion_ids[0, :1])
    assert samples_of(model, tokenizer, [text], n_time=1).ended[0]


# --- in a run --------------------------------------------------------------------------------------------------------


def test_everything_that_depends_on_the_end_follows(tmp_path):
    """`ended`, eos_rate, what truncation makes of cut completions; and the string stays in the text."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(completions)
        return [1.0] * len(completions)

    settings_ = {"stop_strings": ["d", "ef"], "truncation": "penalty", "truncation_penalty": 3.0, "kl_coef": 0.0}
    trainer = trained(tmp_path, reward=reward, model=gpt2(), max_steps=1, max_completion_length=5, **settings_)
    rollout, rewards = trainer.last_step.scored.rollout, trainer.last_step.rewards
    for row, text in enumerate(seen):
        by_eos = EOS in rollout.tokens.completion_ids[row][rollout.completion_mask[row]].tolist()
        stopped = text.endswith(("d", "ef"))
        assert not any(s in text[:-1] for s in ("d", "ef"))
        assert bool(rollout.ended[row]) == (by_eos or stopped)
        assert rewards[row].sum().item() == pytest.approx(1.0 if by_eos or stopped else -2.0)
    assert 0 < rollout.ended.float().mean() < 1 and any(text.endswith(("d", "ef")) for text in seen)
    assert trainer.state.log_history[0]["eos_rate"] == rollout.ended.float().mean().item()


def test_a_stop_token_that_is_no_eos_ends_and_stays(tmp_path):
    trainer = make_trainer(tmp_path, tokenizer=letter_tokenizer(), stop_token_ids=[4, 5])
    assert trainer.collector.params.eos_token_ids == (EOS, 4, 5)
    rollout = trainer.collector.collect(trainer.prompts.next_batch(8), 0)
    assert any(text.endswith(("d", "e")) for text in rollout.completions)
    for row, ids in enumerate(rollout.rollout.tokens.counted_ids()):
        assert not {EOS, 4, 5} & set(ids[:-1]) and bool(rollout.rollout.ended[row]) == (ids[-1] in (EOS, 4, 5))
