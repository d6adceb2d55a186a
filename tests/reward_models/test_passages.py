"""Passages of reviews."""

from random import Random

import pytest

from reward_models.sentiment.passages import (
    cut_passages,
    labeled_passages,
    plain_spelling,
    remix_sentences,
    repeated_words,
    split_sentences,
    swap_words,
)
from reward_models.sentiment.reviews import load_reviews

REVIEW = 'I saw it. It was "great!" (Really?) My wife slept... Then 3.5 hours later it ended'


def test_sentences():
    sentences = ["I saw it.", 'It was "great!"', "(Really?)", "My wife slept...", "Then 3.5 hours later it ended"]
    assert split_sentences(REVIEW) == sentences
    assert split_sentences("") == []


def test_passages_take_whole_sentences_up_to_a_length():
    text = "a b c. d e. f g h i j k. l."
    assert cut_passages(text, Random(0), min_words=4, max_words=4) == ["a b c. d", "f g h i"]
    assert cut_passages(text, Random(0), min_words=1, max_words=1) == ["a", "d", "f", "l."]
    assert cut_passages(text, Random(0), min_words=20, max_words=20) == []


@pytest.mark.parametrize("seed", range(5))
def test_passages_start_at_sentences_and_keep_their_lengths(seed):
    rng = Random(seed)
    sentences = [" ".join(f"w{rng.randrange(100)}" for _ in range(rng.randint(1, 12))) + "." for _ in range(40)]
    text = " ".join(sentences)
    passages = cut_passages(text, rng, min_words=5, max_words=15)
    position = 0
    for passage in passages:
        assert 5 <= len(passage.split()) <= 15
        position = text.index(passage, position)
        assert position == 0 or text[position - 2 : position] == ". "
        position += len(passage)


def test_plain_spelling_is_that_of_rotten_tomatoes():
    spelled = 'however , it\'s " good " . . . or ( maybe ) not !'
    assert plain_spelling('However, it\'s "good". . .  or (maybe) not!') == spelled
    sentences = load_reviews("evaluation", "rotten_tomatoes")["text"]
    kept = sum(plain_spelling(sentence) == sentence for sentence in sentences)
    assert kept / len(sentences) > 0.9  # hardly anything of theirs is spelled otherwise


def test_labeled_passages_keep_reviews_on_one_side():
    passages = labeled_passages("evaluation", "imdb", seed=0)
    assert passages.column_names == ["text", "label", "held_out", "source"]
    assert 0.07 < sum(passages["held_out"]) / len(passages) < 0.13
    assert 0.45 < sum(passages["label"]) / len(passages) < 0.55
    assert passages[:50] == labeled_passages("evaluation", "imdb", seed=0)[:50]
    assert passages["text"][:50] != labeled_passages("evaluation", "imdb", seed=1)["text"][:50]
    sentences = labeled_passages("evaluation", "rotten_tomatoes", seed=0)["text"]
    assert sorted(sentences) == sorted(load_reviews("evaluation", "rotten_tomatoes")["text"])


def test_held_out_is_decided_by_the_review_alone():
    by_text = []
    for seed in (0, 1):
        rows = labeled_passages("evaluation", "rotten_tomatoes", seed=seed)
        by_text.append(dict(zip(rows["text"], rows["held_out"], strict=True)))
    assert by_text[0] == by_text[1]


def test_remixed_sentences_are_made_of_their_words_in_order():
    sentences = ["a b c d e f g h", "i j k l m n", "o p"]
    words = [sentence.split() for sentence in sentences]
    order = {word: i for i, word in enumerate(w for row in words for w in row)}
    rng, kinds = Random(0), set()
    for _ in range(2000):
        text = remix_sentences(sentences, rng).split()
        assert text and set(text) <= set(order)
        places = [order[word] for word in text]
        sources = [next(i for i, row in enumerate(words) if word in row) for word in text]
        jumps = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1 or sources[i] != sources[i - 1]]
        if len(set(sources)) == 2:
            assert len(jumps) == 1, "one cut: a start and an end"
            assert text[0] == words[sources[0]][0] and text[-1] == words[sources[-1]][-1]
            kinds.add("spliced")
        elif not jumps:
            kinds.add("piece" if len(text) < len(words[sources[0]]) else "whole")
        elif places == sorted(places):
            kinds.add("thinned")
    assert kinds == {"spliced", "piece", "whole", "thinned"}


def test_one_word_can_be_remixed():
    assert {remix_sentences(["a"], Random(i)) for i in range(50)} == {"a", "a a"}


def test_repeated_words_stand_in_two_texts():
    assert repeated_words(["The film, the film", "A film isn't the end.", "x isn't 12"]) == ["film", "isn't", "the"]


def test_swapped_words_are_the_share_that_was_asked_for_and_each_as_likely():
    text = " ".join(["old"] * 20_000)
    swapped = swap_words(text, ["new", "rare"], 0.15, Random(0)).split()
    counts = {word: swapped.count(word) / 20_000 for word in set(swapped)}
    assert counts == pytest.approx({"old": 0.85, "new": 0.075, "rare": 0.075}, abs=0.01)
    assert swap_words("a b c", ["x"], 0.0, Random(0)) == "a b c"
    assert swap_words("a b c", ["x"], 1.0, Random(0)) == "x x x"
