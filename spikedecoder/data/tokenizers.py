"""Character and word tokenizers: text to token ids and back.

Ids are numpy arrays of the smallest of uint8, uint16, uint32 that holds the vocabulary. Encoding a stream
chunk by chunk gives exactly the ids of the whole text, wherever the chunks are cut.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from spikedecoder.fields import is_integer

from ._files import atomic_writer
from .text import clean_words, iter_clean_characters, iter_clean_words, lost_letters

PAD = "<pad>"
UNKNOWN = "<unk>"
ORIGINAL_ALPHABET = "abcdefghijklmnopqrstuvwxyz.'P "
ERRORS = ("replace", "strict", "drop")

_FORMAT = "spikedecoder-tokenizer"
_CODE_POINTS = 0x110000
_NAMED = 5  # how many unknown tokens an error message names


class Tokenizer(ABC):
    """A vocabulary and the rules that turn text into its ids.

    Attributes:
        kind: "char", "original-char", "word" or "original-word".
        tokens: the vocabulary; a token's id is its index in the list.
        vocab_size: the number of tokens.
        pad_id: id of the padding token; text never encodes to it, and decoding leaves it out.
        unk_id: id of the token that stands for anything outside the vocabulary; None in the original's
            vocabularies, which drop it instead.
        dtype: the integer type of encoded ids.
    """

    kind: str
    pad_id: int
    unk_id: int | None

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.dtype: np.dtype[Any] = np.min_scalar_type(len(self.tokens) - 1)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def encode(self, text: str, errors: str = "replace") -> np.ndarray:
        """Ids of ``text``, a 1-D array of ``self.dtype``.

        ``errors`` says what to do with characters or words outside the vocabulary: "replace" gives the
        unknown token (the original's vocabularies have none and drop them), "drop" leaves them out, "strict"
        raises a ValueError that names them and their positions.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        parts = list(self.encode_stream([text], errors))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_stream(self, chunks: Iterable[str], errors: str = "replace") -> Iterator[np.ndarray]:
        """Yield ids of a text given in chunks; concatenated, they equal ``encode`` of the joined text."""
        if errors not in ERRORS:
            raise ValueError(f"errors: expected one of {', '.join(ERRORS)}, got {errors!r}")
        return self._encode_stream(chunks, errors)

    def decode(self, ids: Any) -> str:
        """The text of ``ids`` (any sequence, array or tensor of integers); padding is left out.

        Raises TypeError if they are not integers, ValueError if one is outside the vocabulary.
        """
        array = np.asarray(ids).reshape(-1)
        if array.size == 0:
            return ""
        if array.dtype.kind not in "iu":
            raise TypeError(f"ids: expected integers, got {array.dtype}")
        bad = (array < 0) | (array >= self.vocab_size)
        if bad.any():
            value = int(array[bad][0])
            raise ValueError(f"ids: expected 0 to {self.vocab_size - 1} (the vocabulary), got {value}")
        return self._decode(array[array != self.pad_id])

    @abstractmethod
    def unknown(self, text: str) -> list[str]:
        """The characters or words of ``text`` outside the vocabulary, each once, in order."""

    @abstractmethod
    def _encode_stream(self, chunks: Iterable[str], errors: str) -> Iterator[np.ndarray]: ...

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> str: ...

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as plain data; :func:`tokenizer_from_dict` is the inverse."""
        return {"format": _FORMAT, "version": 1, "kind": self.kind, "tokens": list(self.tokens)}

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON; the file appears whole or not at all."""
        with atomic_writer(path) as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode("ascii"))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return self.kind == other.kind and self.tokens == other.tokens

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.tokens)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.kind!r}, vocab_size={self.vocab_size})"


class CharTokenizer(Tokenizer):
    """One token per character.

    ``CharTokenizer.from_text(text)`` takes the vocabulary from a text and loses nothing of it: padding
    (id 0), unknown (id 1), then the text's characters by code point. ``CharTokenizer.original()`` has the
    original's alphabet of 30 (``P`` is padding) and its cleaning. Cleaning maps every text into the alphabet,
    so there is no unknown token and "strict" never raises; ``unknown`` lists the characters it deletes.
    """

    def __init__(self, tokens: Sequence[str], kind: str = "char") -> None:
        super().__init__(tokens)
        self.kind = kind
        if kind == "original-char":
            if "".join(tokens) != ORIGINAL_ALPHABET:
                raise ValueError(f"tokens: the original's alphabet is {ORIGINAL_ALPHABET!r}, got {tokens!r}")
            self.pad_id, self.unk_id = self.tokens.index("P"), None
            first = 0
        elif kind == "char":
            _check_special(self.tokens)
            self.pad_id, self.unk_id = 0, 1
            first = 2
            _check_tokens(self.tokens[2:], "one character", lambda token: len(token) == 1)
        else:
            raise ValueError(f"kind: expected 'char' or 'original-char', got {kind!r}")
        codes = np.array([ord(token) for token in self.tokens[first:]], dtype=np.uint32)
        fallback = self.pad_id if self.unk_id is None else self.unk_id
        self._ids = np.full(_CODE_POINTS, fallback, dtype=self.dtype)
        self._ids[codes] = np.arange(first, len(self.tokens), dtype=self.dtype)
        self._codes = np.full(len(self.tokens), 0xFFFD, dtype="<u4")  # the unknown token becomes U+FFFD
        self._codes[first:] = codes

    @classmethod
    def original(cls) -> CharTokenizer:
        """The original's 30 characters and its cleaning (:func:`spikedecoder.data.clean_characters`)."""
        return cls(list(ORIGINAL_ALPHABET), "original-char")

    @classmethod
    def from_text(cls, text: Iterable[str]) -> CharTokenizer:
        """A tokenizer for all characters of a text (a str or an iterable of chunks).

        Raises ValueError for an empty text.
        """
        seen = np.zeros(_CODE_POINTS, dtype=bool)
        for chunk in [text] if isinstance(text, str) else text:
            seen[_code_points(chunk)] = True
        if not seen.any():
            raise ValueError("text: expected some to take the vocabulary from, got none")
        return cls([PAD, UNKNOWN, *(chr(code) for code in np.flatnonzero(seen))])

    def unknown(self, text: str) -> list[str]:
        if self.kind == "original-char":
            known = set(ORIGINAL_ALPHABET + "ABCDEFGHIJKLMNOPQRSTUVWXYZ!?;-")
            return [c for c in dict.fromkeys(text) if c not in known and not c.isspace()]
        ids = self._ids[_code_points(text)]
        return list(dict.fromkeys(text[i] for i in np.flatnonzero(ids == self.unk_id)))

    def _encode_stream(self, chunks: Iterable[str], errors: str) -> Iterator[np.ndarray]:
        if self.kind == "original-char":
            for data in iter_clean_characters(chunks):
                yield self._ids[np.frombuffer(data, dtype=np.uint8)]
            return
        before = 0
        for chunk in chunks:
            ids = self._ids[_code_points(chunk)]
            if errors != "replace":
                unknown = ids == self.unk_id
                if errors == "strict" and unknown.any():
                    places = np.flatnonzero(unknown)
                    raise _outside("character", [(chunk[i], before + int(i)) for i in places])
                ids = ids[~unknown]
            before += len(chunk)
            yield ids

    def _decode(self, ids: np.ndarray) -> str:
        return self._codes[ids].tobytes().decode("utf-32-le")


class WordTokenizer(Tokenizer):
    """One token per word; the full stop is a word of its own, and text is split by the original's rules.

    ``WordTokenizer.from_text(text, min_count)`` takes the vocabulary from a text: padding (id 0), unknown
    (id 1), then the words seen at least ``min_count`` times, sorted. ``WordTokenizer.original(dictionary)``
    has one of the original's dictionaries, in its order; words outside it are dropped.

    The rules keep only the letters a to z, full stops and apostrophes. White space, case and other
    punctuation are not restored. Other letters and digits are lost: ``unknown`` lists them, and "strict"
    raises for them. Decoding joins words by spaces, with none before a full stop.
    """

    def __init__(self, tokens: Sequence[str], kind: str = "word") -> None:
        super().__init__(tokens)
        self.kind = kind
        if kind == "original-word":
            _check_tokens(self.tokens, "a word", lambda token: len(token.split()) == 1)
            for needed in (".", "P"):
                if needed not in self.tokens:
                    raise ValueError(f"tokens: the original's dictionaries contain {needed!r}; this has none")
            self.pad_id, self.unk_id = self.tokens.index("P"), None
        elif kind == "word":
            _check_special(self.tokens)
            _check_tokens(self.tokens[2:], "a word", lambda token: len(token.split()) == 1)
            self.pad_id, self.unk_id = 0, 1
        else:
            raise ValueError(f"kind: expected 'word' or 'original-word', got {kind!r}")
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    @classmethod
    def original(cls, dictionary: Sequence[str]) -> WordTokenizer:
        """The original's tokenizer for a dictionary that contains ``.`` and the padding token ``P``."""
        return cls(dictionary, "original-word")

    @classmethod
    def from_text(cls, text: Iterable[str], min_count: int = 1) -> WordTokenizer:
        """A tokenizer for the words seen at least ``min_count`` times in a text (a str or chunks).

        Raises ValueError if there is no such word.
        """
        if not is_integer(min_count) or min_count < 1:
            raise ValueError(f"min_count: expected an integer of 1 or more, got {min_count!r}")
        counts: Counter[str] = Counter()
        for words in iter_clean_words([text] if isinstance(text, str) else text):
            counts.update(words)
        kept = sorted(word for word, count in counts.items() if count >= min_count)
        if not any(word.strip(".'") for word in counts):
            raise ValueError(
                "text: expected words of the letters a to z, got none; tokenizer 'char' takes every alphabet"
            )
        if not kept:
            raise ValueError(
                f"text: expected words seen at least {min_count} times, got {counts.total()} words of which "
                "none is; lower min_count or give more text"
            )
        return cls([PAD, UNKNOWN, *kept])

    def unknown(self, text: str) -> list[str]:
        words = [word for word in dict.fromkeys(clean_words(text)) if word not in self._ids]
        return words + list(dict.fromkeys(letter for letter, _ in lost_letters(text, words=True)))

    def encode(self, text: str, errors: str = "replace") -> np.ndarray:
        if errors == "strict" and isinstance(text, str):
            _check_kept(text)
            words = clean_words(text)  # of the whole text, so that the error counts all unknown words
            return self._encode_words(words, errors, 0)
        return super().encode(text, errors)

    def _encode_stream(self, chunks: Iterable[str], errors: str) -> Iterator[np.ndarray]:
        before = 0
        if errors == "strict":
            chunks = _all_kept(chunks)
        for words in iter_clean_words(chunks):
            yield self._encode_words(words, errors, before)
            before += len(words)

    def _encode_words(self, words: list[str], errors: str, before: int) -> np.ndarray:
        ids = np.fromiter(map(self._ids.get, words, repeat(-1)), dtype=np.int64, count=len(words))
        unknown = ids < 0
        if errors == "strict" and unknown.any():
            raise _outside("word", [(words[i], before + int(i)) for i in np.flatnonzero(unknown)])
        if errors == "drop" or self.unk_id is None:
            ids = ids[~unknown]
        else:
            ids[unknown] = self.unk_id
        return ids.astype(self.dtype)

    def _decode(self, ids: np.ndarray) -> str:
        return " ".join(self.tokens[i] for i in ids).replace(" .", ".")


def tokenizer_from_dict(data: Any) -> CharTokenizer | WordTokenizer:
    """The tokenizer that ``to_dict`` described; ValueError says what is wrong with any other data."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"tokenizer: expected a dict with format {_FORMAT!r}, got {_short(data)}")
    if data.get("version") != 1:
        raise ValueError(f"tokenizer: expected version 1, got {_short(data.get('version'))}")
    tokens, kind = data.get("tokens"), data.get("kind")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or not tokens:
        raise ValueError(f"tokenizer: expected 'tokens' to be a list of strings, got {_short(tokens)}")
    if kind in ("char", "original-char"):
        return CharTokenizer(tokens, kind)
    if kind in ("word", "original-word"):
        return WordTokenizer(tokens, kind)
    raise ValueError(f"tokenizer: expected a kind of char, original-char, word, original-word, got {kind!r}")


def check_known(tokenizer: object, name: str, also: str = "") -> None:
    """TypeError unless `tokenizer` is a CharTokenizer or WordTokenizer: files can restore no other."""
    if type(tokenizer) not in (CharTokenizer, WordTokenizer):
        raise TypeError(
            f"{name}: got {type(tokenizer).__name__}, takes {also}a CharTokenizer or a WordTokenizer: "
            "no other can be read back from a file"
        )


def load_tokenizer(path: str | Path) -> CharTokenizer | WordTokenizer:
    """Read a tokenizer that ``save`` wrote; a ValueError names the file and what is wrong with it."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer file: no valid JSON ({error})") from None
    try:
        return tokenizer_from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer file: {error}") from None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _check_special(tokens: list[str]) -> None:
    if tokens[:2] != [PAD, UNKNOWN]:
        raise ValueError(f"tokens: expected {PAD!r} and {UNKNOWN!r} first, got {tokens[:2]!r}")


def _check_tokens(tokens: list[str], what: str, valid: Callable[[str], bool]) -> None:
    for token in tokens:
        if not isinstance(token, str) or not valid(token):
            raise ValueError(f"tokens: expected each to be {what}, got {token!r}")
        if any("\ud800" <= c <= "\udfff" for c in token):
            raise ValueError(f"tokens: expected characters that UTF-8 can write, got {token!r}, a surrogate")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise ValueError(f"tokens: expected each once, got {twice!r} more than once")


def _all_kept(chunks: Iterable[str]) -> Iterator[str]:
    before = 0
    for chunk in chunks:
        _check_kept(chunk, before)
        before += len(chunk)
        yield chunk


def _check_kept(text: str, before: int = 0) -> None:
    lost = lost_letters(text, words=True)
    if lost:
        raise _outside("character", [(letter, before + position) for letter, position in lost])


def _outside(what: str, found: list[tuple[str, int]]) -> ValueError:
    named = ", ".join(f"{token!r} at {position}" for token, position in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ValueError(f"text: {len(found)} {what}(s) outside the vocabulary: {named}{more} (counted from 0)")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
