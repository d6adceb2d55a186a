"""The labeled movie reviews: which texts are one, and which split they are in."""

import re
import sys
import unicodedata

import pytest

from reward_models.sentiment import reviews
from reward_models.sentiment.reviews import clean_text, load_reviews, load_splits, normal_form

WHITE = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace())


TEXTS = ["", " <br />", f"a{WHITE}b{WHITE}", "<br>Ä_ﬁ\u00a0x<br  />\n1½ ’s", "\u0308 a\u0308", "日本 語"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_cleaned_and_compared_as_the_regular_expressions_say(text):
    clean = re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", text)).strip()
    assert clean_text(text) == clean
    assert normal_form(text) == re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", clean).casefold()).strip()


def test_splits_made_together_are_those_made_one_by_one_in_one_pass(monkeypatch):
    names = ("evaluation", "classifier")
    alone = [load_reviews(name, "rotten_tomatoes") for name in names]
    read = []
    monkeypatch.setattr(reviews, "normal_form", lambda text: read.append(text) or normal_form(text))
    together = load_splits(*names, source="rotten_tomatoes")
    assert len(read) == 8530, "every sentence is looked at once"
    assert [together[name].to_dict() for name in names] == [split.to_dict() for split in alone]


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="no split 'sft': choose one of classifier, evaluation"):
        load_splits("evaluation", "sft", source="rotten_tomatoes")
    with pytest.raises(ValueError, match="source='imbd' is unknown"):
        load_splits("evaluation", source="imbd")
