"""Passages of reviews."""

from random import Random

import pytest

from reward_models.passages import cut_passages, labeled_passages, plain_spelling, split_sentences
from reward_models.reviews import load_reviews

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
    by_text = [
        dict(zip(rows["text"], rows["held_out"], strict=True))
        for rows in (labeled_passages("evaluation", "rotten_tomatoes", seed=s) for s in (0, 1))
    ]
    assert by_text[0] == by_text[1]
