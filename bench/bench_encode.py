"""How fast text becomes token ids, in characters per second, compared with plain Python.

Plain Python is the obvious code: cleaning by one ``str.replace`` and ``re.sub`` after the other, then a
dictionary look-up per character or word. (The original is slower still: it encodes every window anew, and
looks words up in a list.)

    python -m pytest bench/bench_encode.py --benchmark-columns=median,ops

The text is the file named by SPIKEDECODER_BOOK, or the built-in text seven times over (about 3.2 million
characters). ``extra_info`` of each row has the characters per second of its median round. Each benchmark
first checks that the fast and the slow path agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikedecoder.data import (
    ORIGINAL_ALPHABET,
    CharTokenizer,
    WordTokenizer,
    builtin_text,
    original_dictionary,
)


@pytest.fixture(scope="module")
def text() -> str:
    book = os.environ.get("SPIKEDECODER_BOOK")
    return Path(book).read_text("utf-8-sig") if book else builtin_text() * 7


def plain_stops(text: str) -> str:
    initials_or_stop = re.compile(r"(\b[A-Z](?:\.[A-Z])*\b\.?)|(\.)\s*")
    return initials_or_stop.sub(lambda m: m[1] or ". ", text).replace(". . .", "...")


def plain_characters(text: str) -> str:
    text = " ".join(text.split())
    for before, after in (("!", "."), ("?", "."), (";", " "), ("--", " ")):
        text = text.replace(before, after)
    return re.sub(" +", " ", plain_stops(re.sub("[^a-zA-Z. ']", "", text)).lower())


def plain_words(text: str) -> list[str]:
    text = text.lower()
    for before, after in (("!", "."), ("?", "."), (";", "")):
        text = text.replace(before, after)
    return plain_stops(re.sub("[^a-z. ']+", " ", text)).replace(".", " .").replace("''", "'").split()


def loop_char(text: str) -> Callable[[], Any]:
    ids = {token: i for i, token in enumerate(CharTokenizer.from_text(text).tokens)}
    return lambda: [ids[character] for character in text]


def loop_original_char(text: str) -> Callable[[], Any]:
    ids = {token: i for i, token in enumerate(ORIGINAL_ALPHABET)}
    return lambda: [ids[character] for character in plain_characters(text)]


def loop_word(text: str) -> Callable[[], Any]:
    ids = {token: i for i, token in enumerate(WordTokenizer.from_text(text).tokens)}
    return lambda: [ids[word] for word in plain_words(text)]


def fast_char(text: str) -> Callable[[], Any]:
    tokenizer = CharTokenizer.from_text(text)
    return lambda: tokenizer.encode(text)


def fast_original_char(text: str) -> Callable[[], Any]:
    tokenizer = CharTokenizer.original()
    return lambda: tokenizer.encode(text)


def fast_word(text: str) -> Callable[[], Any]:
    tokenizer = WordTokenizer.from_text(text)
    return lambda: tokenizer.encode(text)


def fast_original_word(text: str) -> Callable[[], Any]:
    tokenizer = WordTokenizer.original(original_dictionary(text, 6))
    return lambda: tokenizer.encode(text)


def loop_original_word(text: str) -> Callable[[], Any]:
    ids = {token: i for i, token in enumerate(original_dictionary(text, 6))}
    return lambda: [ids[word] for word in plain_words(text) if word in ids]


PATHS = {
    "char": (fast_char, loop_char),
    "original-char": (fast_original_char, loop_original_char),
    "word": (fast_word, loop_word),
    "original-word": (fast_original_word, loop_original_word),
}


@pytest.mark.parametrize("path", ["tokenizer", "plain Python"])
@pytest.mark.parametrize("kind", PATHS)
def test_encode(benchmark: Any, text: str, kind: str, path: str) -> None:
    fast, loop = (make(text) for make in PATHS[kind])
    np.testing.assert_array_equal(fast(), loop())
    benchmark.group = f"encode {kind}"
    benchmark.extra_info["characters"] = len(text)
    benchmark.pedantic(fast if path == "tokenizer" else loop, rounds=5, warmup_rounds=1)
    rate = len(text) / benchmark.stats.stats.median
    benchmark.extra_info["million_characters_per_second"] = round(rate / 1e6, 2)
