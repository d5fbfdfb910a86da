"""The cleaning of the original, against a plain step-by-step implementation of what it computes."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedecoder.data import builtin_text, clean_characters, clean_words, original_dictionary
from spikedecoder.data.text import count_lost_letters, iter_clean_characters, iter_clean_words, lost_letters

# Whatever a rule looks at: initials, stops, hyphens, quotes, spaces of several kinds, and lower() oddities.
ALPHABET = "aAbBI.. !?;--' ',5(é漢 \n\t\r\u00a0\u2003\u0085ΣKİ\ufeff\ud800_"
TRICKY = [
    "",
    " ",
    "\n\n",
    ".",
    "...",
    "Well... yes",
    "Well.... yes..... ......",
    "!?!? What?!",
    "a;b ; c;",
    "a--b --- c - d ---- -\n-",
    "3.14 and 2,718.5 or 1.",
    "U.S.A. is",
    "U.S.A.is U.S.A.",
    "xU.S. Ab.C. A.Bc A..B. I. I... J. . . .",
    "U. 5 . .",
    "U. . . 5 . . .",
    "5 a",
    "a 5",
    "'tis ''quoted'' '''thrice''' ';'",
    "naïve café — “quoted” …",
    "漢字 かな \u212aelvin İstanbul ΟΔΟΣ",
    "tabs\tand\u2003spaces\u00a0here\x1cthere",
    "no end",
    "end.",
    "end. ",
    "P is padding, p is not",
]
texts = st.text(st.sampled_from(ALPHABET), max_size=40)


def spaced_punctuation(text: str) -> str:
    pattern = r"(\d+\.\d+|\b[A-Z](?:\.[A-Z])*\b\.?)|([.,;:!?)])\s*"
    return re.sub(pattern, lambda m: m[1] or m[2] + " ", text).replace(". . .", "...")


def plain_clean_characters(text: str, collapse_spaces: bool = True) -> str:
    text = " ".join(text.split())
    for before, after in (("!", "."), ("?", "."), (";", " "), ("--", " ")):
        text = text.replace(before, after)
    text = spaced_punctuation(re.sub("[^a-zA-Z. ']", "", text)).lower()
    return re.sub(" +", " ", text) if collapse_spaces else text


def plain_clean_words(text: str) -> list[str]:
    text = text.lower()
    for before, after in (("!", "."), ("?", "."), (";", "")):
        text = text.replace(before, after)
    text = spaced_punctuation(re.sub("[^a-zA-Z. ']+", " ", text))
    return text.replace(".", " .").replace("''", "'").split()


def plain_dictionary(text: str, min_count: int | None) -> list[str]:
    words = Counter(re.sub("[^a-z ']+", " ", text.lower()).split())
    return sorted({w for w in words if words[w] >= (min_count or 0)} | {".", "P"})


def cut(text: str, places: list[int]) -> list[str]:
    places = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def long_texts() -> list[tuple[str, str]]:
    found = [("builtin", builtin_text())]
    book = os.environ.get("SPIKEDECODER_BOOK")
    if book:
        found.append(("book", Path(book).read_text("utf-8")))
    return found


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_strings(text: str) -> None:
    assert clean_characters(text) == plain_clean_characters(text)
    assert clean_characters(text, collapse_spaces=False) == plain_clean_characters(text, False)
    assert clean_words(text) == plain_clean_words(text)


def test_known_results() -> None:
    """Literal results, so that an error shared with the plain implementation would show."""
    assert clean_characters("Well!Is   he--the U.S.A. man;  old? 7") == "well. is he the u.s.a. man old. "
    assert clean_characters("Wait . . . so") == "wait ... so"
    assert clean_words("Well!Is he--the ''old''; 7?") == ["well", ".", "is", "he", "the", "'old'", "."]
    assert original_dictionary("The man's the-man 7 times.") == [".", "P", "man", "man's", "the", "times"]
    assert original_dictionary("The man's the-man 7 times.", min_count=2) == [".", "P", "the"]


@pytest.mark.parametrize(("name", "text"), long_texts())
def test_long_texts(name: str, text: str) -> None:
    assert clean_characters(text) == plain_clean_characters(text)
    assert clean_words(text) == plain_clean_words(text)
    assert original_dictionary(text, 6) == plain_dictionary(text, 6)


@settings(max_examples=400, deadline=None)
@given(texts, st.lists(st.integers(0, 1000), max_size=8))
def test_cuts_do_not_matter(text: str, places: list[int]) -> None:
    chunks = cut(text, places)
    assert b"".join(iter_clean_characters(chunks)).decode() == plain_clean_characters(text)
    assert [word for words in iter_clean_words(chunks) for word in words] == plain_clean_words(text)
    assert original_dictionary(chunks, 2) == plain_dictionary(text, 2)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    assert clean_characters(text) == plain_clean_characters(text)
    assert clean_characters(text, collapse_spaces=False) == plain_clean_characters(text, False)
    assert clean_words(text) == plain_clean_words(text)
    for words in (False, True):
        assert count_lost_letters(text, words) == len(lost_letters(text, words))


@pytest.mark.parametrize(
    ("letter", "as_characters", "as_words"),
    [("\u0130", "", "i"), ("\u212a", "", "k"), ("é", "", ""), ("7", "", ""), ("B", "b", "b")],
)
def test_lost_letters_are_those_that_leave_nothing(letter: str, as_characters: str, as_words: str) -> None:
    """Words are lower-cased before all but ASCII goes, characters after it."""
    assert clean_characters(letter) == as_characters and "".join(clean_words(letter)) == as_words
    text = f"a {letter}{letter}"
    for words, kept in ((False, as_characters), (True, as_words)):
        assert lost_letters(text, words) == ([] if kept else [(letter, 2), (letter, 3)])


def test_dictionary_of_the_first_words() -> None:
    assert original_dictionary(["one tw", "o three one"], max_words=2) == [".", "P", "one", "two"]
    assert original_dictionary("one two one", min_count=2, max_words=2) == [".", "P"]


def test_not_a_string() -> None:
    with pytest.raises(TypeError, match="text: expected a str, got bytes"):
        clean_characters(b"abc")  # type: ignore[arg-type]
