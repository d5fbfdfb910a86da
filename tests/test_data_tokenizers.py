"""Tokenizers: round trips, streams, unknown text, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikedecoder.data import (
    ORIGINAL_ALPHABET,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    builtin_text,
    clean_characters,
    clean_words,
    load_tokenizer,
    original_dictionary,
    tokenizer_from_dict,
)

SAMPLE = "The man's dog. The dog--a good dog!--ran; I saw the U.S.A. . . . Ünï\n漢字 \U0001f600 'so' "
MAKERS: dict[str, Callable[[str], Tokenizer]] = {
    "char": CharTokenizer.from_text,
    "original-char": lambda text: CharTokenizer.original(),
    "word": WordTokenizer.from_text,
    "original-word": lambda text: WordTokenizer.original(original_dictionary(text, 2)),
}
KINDS = list(MAKERS)
STREAMED = {kind: make(SAMPLE) for kind, make in MAKERS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_shared_contract(kind: str) -> None:
    tokenizer = MAKERS[kind](SAMPLE)
    ids = tokenizer.encode(SAMPLE)
    assert tokenizer.kind == kind
    assert tokenizer.vocab_size == len(tokenizer.tokens) == len(set(tokenizer.tokens))
    assert ids.ndim == 1 and ids.dtype == tokenizer.dtype == np.uint8 and len(ids) > 10
    assert tokenizer.pad_id not in ids
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.uint8
    assert tokenizer.decode([]) == ""
    # The original's cleaning is not idempotent: initials, lower-cased, are initials no more.
    ids = tokenizer.encode("The man's dog. The good dog. I saw the man 'so'")
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    padded = [tokenizer.pad_id, *ids.tolist(), tokenizer.pad_id]
    assert tokenizer.decode(padded) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_stream_equals_whole(data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from(SAMPLE + "xyzXYZ\t5"), max_size=60))
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    errors = data.draw(st.sampled_from(["replace", "drop"]))
    for tokenizer in STREAMED.values():
        parts = list(tokenizer.encode_stream(iter(chunks), errors))
        np.testing.assert_array_equal(np.concatenate(parts), tokenizer.encode(text, errors))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))  # surrogates are refused
def test_characters_lose_nothing(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text, errors="strict")) == text
    assert tokenizer.tokens == ["<pad>", "<unk>", *sorted(set(text))]
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_surrogates_and_wide_vocabularies() -> None:
    text = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 72048) if not 0xD800 <= code < 0xE000)
    tokenizer = CharTokenizer.from_text([text[:100], text[100:]])
    assert tokenizer.dtype == np.uint32
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert CharTokenizer.from_text(text[:254]).dtype == np.uint8
    assert CharTokenizer.from_text(text[:255]).dtype == np.uint16
    assert CharTokenizer.from_text("ab").encode("a\ud800b").tolist() == [2, 1, 3]
    with pytest.raises(ValueError, match=r"tokens: .* got '\\ud800', a surrogate"):
        CharTokenizer.from_text("a\ud800b")


def test_original_characters() -> None:
    tokenizer = CharTokenizer.original()
    assert tokenizer.vocab_size == 30 and "".join(tokenizer.tokens) == ORIGINAL_ALPHABET
    assert tokenizer.pad_id == 28 and tokenizer.tokens[28] == "P" and tokenizer.unk_id is None
    assert tokenizer.encode("a z'.").tolist() == [0, 29, 25, 27, 26, 29]
    text = builtin_text()[:50000]
    assert tokenizer.decode(tokenizer.encode(text)) == clean_characters(text)
    assert tokenizer.encode("Pp").tolist() == [15, 15]
    assert tokenizer.encode("漢字", errors="strict").tolist() == []
    assert tokenizer.unknown("Ab-c; 漢7, 漢") == ["漢", "7", ","]


def test_original_words() -> None:
    tokenizer = WordTokenizer.original([".", "P", "dog", "the"])
    assert tokenizer.encode("The red DOG ran! the").tolist() == [3, 2, 0, 3]
    assert tokenizer.decode([3, 2, 0, 3]) == "the dog. the"
    assert (tokenizer.pad_id, tokenizer.unk_id) == (1, None)
    assert tokenizer.unknown("the red dog, the red cat") == ["red", "cat"]
    with pytest.raises(ValueError, match=r"2 word\(s\) outside the vocabulary: 'red' at 1, 'cat' at 3"):
        tokenizer.encode("the red dog, cat", errors="strict")


def test_words() -> None:
    tokenizer = WordTokenizer.from_text(["the dog. the c", "at. the end"], min_count=2)
    assert tokenizer.tokens == ["<pad>", "<unk>", ".", "the"]
    assert tokenizer.encode("The dog.").tolist() == [3, 1, 2]
    assert tokenizer.encode("The dog.", errors="drop").tolist() == [3, 2]
    text = builtin_text()
    whole = WordTokenizer.from_text(text)
    ids = whole.encode(text)
    assert whole.unk_id not in ids
    assert [whole.tokens[i] for i in ids] == clean_words(text)
    assert whole.dtype == np.uint16


def test_letters_that_words_lose_are_named() -> None:
    tokenizer = WordTokenizer.from_text("the cat\u0301 is at a bar. tr mit")
    assert tokenizer.unknown("the cat, at 12 Bär!") == ["b", "r", "1", "2", "ä"]
    assert tokenizer.unknown("\u212a\u0130 (cat)_\u0301 \u2014 \u20ac") == ["ki"]  # the Kelvin sign is a k
    with pytest.raises(ValueError, match=r"2 character\(s\) outside the vocabulary: '1' at 4, 'ö' at 6"):
        tokenizer.encode("the 1 öat", errors="strict")
    with pytest.raises(ValueError, match="'7' at 5"):
        list(tokenizer.encode_stream(["cat ", "a7"], errors="strict"))
    assert tokenizer.encode("the 1 cat").tolist() == tokenizer.encode("the cat").tolist()
    with pytest.raises(ValueError, match=r"words of the letters a to z, got none; tokenizer 'char'"):
        WordTokenizer.from_text("Съ 1812. И '")


def test_characters_outside_the_vocabulary() -> None:
    tokenizer = CharTokenizer.from_text("abc ")
    assert tokenizer.encode("aéb").tolist() == [3, 1, 4]
    assert tokenizer.encode("aéb", errors="drop").tolist() == [3, 4]
    assert tokenizer.unknown("xaéx") == ["x", "é"]
    assert tokenizer.decode([3, 1, 4]) == "a\ufffdb"
    with pytest.raises(ValueError, match=r"2 character\(s\) outside the vocabulary: 'x' at 1, 'é' at 3"):
        tokenizer.encode("axbé", errors="strict")
    with pytest.raises(ValueError, match="'x' at 4"):  # positions count from the start of the stream
        list(tokenizer.encode_stream(["abc", "ax"], errors="strict"))
    with pytest.raises(ValueError, match="and 3 more"):
        tokenizer.encode("xxxxxxxx", errors="strict")


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments(kind: str) -> None:
    tokenizer = MAKERS[kind](SAMPLE)
    with pytest.raises(ValueError, match="errors: expected one of replace, strict, drop, got 'ignore'"):
        tokenizer.encode("a", errors="ignore")
    with pytest.raises(TypeError, match="text: expected a str, got bytes"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"ids: expected 0 to {tokenizer.vocab_size - 1} .* got {bad}"):
            tokenizer.decode([0, bad])
    with pytest.raises(TypeError, match="ids: expected integers, got float64"):
        tokenizer.decode([0.5])


def test_vocabulary_from_nothing() -> None:
    with pytest.raises(ValueError, match="text: expected some to take"):
        CharTokenizer.from_text([])
    with pytest.raises(ValueError, match="text: expected words seen at least 3 times, got 2 words"):
        WordTokenizer.from_text("one one", min_count=3)
    for bad in (0, True, 1.0):
        with pytest.raises(ValueError, match=f"min_count: expected an integer of 1 or more, got {bad}"):
            WordTokenizer.from_text("one", min_count=bad)


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[kind](SAMPLE)
    path = tmp_path / "deep" / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert loaded == tokenizer and type(loaded) is type(tokenizer) and hash(loaded) == hash(tokenizer)
    np.testing.assert_array_equal(loaded.encode(SAMPLE), tokenizer.encode(SAMPLE))
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


GOOD = CharTokenizer.from_text("ab").to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a dict with format"),
        ({**GOOD, "format": "other"}, "expected a dict with format"),
        ({**GOOD, "version": 2}, "expected version 1, got 2"),
        ({**GOOD, "kind": "bpe"}, "expected a kind of .* got 'bpe'"),
        ({**GOOD, "kind": "original-char"}, "the original's alphabet is"),
        ({**GOOD, "kind": "original-word"}, "contain '.'"),
        ({**GOOD, "tokens": "ab"}, "list of strings, got 'ab'"),
        ({**GOOD, "tokens": ["a", 1]}, "list of strings"),
        ({**GOOD, "tokens": ["a", "b"]}, "expected '<pad>' and '<unk>' first"),
        ({**GOOD, "tokens": ["<pad>", "<unk>", "ab"]}, "expected each to be one character, got 'ab'"),
        ({**GOOD, "tokens": ["<pad>", "<unk>", "\ud800"]}, r"got '\\ud800', a surrogate"),
        ({**GOOD, "kind": "word", "tokens": ["<pad>", "<unk>", "a\udfff"]}, r"got 'a\\udfff', a surrogate"),
        ({**GOOD, "tokens": ["<pad>", "<unk>", "a", "b", "a"]}, "got 'a' more than once"),
        ({**GOOD, "kind": "word", "tokens": ["<pad>", "<unk>", "a b"]}, "expected each to be a word"),
    ],
)
def test_bad_data(data: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_dict(data)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"t\.json: not a tokenizer file: .*{message}"):
        load_tokenizer(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    CharTokenizer.original().save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.json: not a tokenizer file: no valid JSON"):
        load_tokenizer(path)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "none.json")


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    CharTokenizer.original().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spikedecoder.data._files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        CharTokenizer.from_text("other").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
