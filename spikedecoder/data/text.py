"""The text cleaning of the original SpikeDecoder, usable on a whole text or on a stream of chunks.

Both cleaners are finite-state: they remember a few bytes between chunks, so feeding a text in pieces gives
exactly what feeding it whole gives, whatever the cuts, and memory does not grow with the text.

Characters (alphabet ``a-z . '`` and space), in this order:

1. runs of white space become one space, none at either end;
2. ``!`` and ``?`` become ``.``; ``;`` and ``--`` become a space; everything else outside ``a-zA-Z. '`` is
   deleted;
3. white space after a full stop becomes exactly one space, except after initials (a full stop directly
   after a single capital letter, as in ``U.S.A.``), which stay as they are;
4. ``. . .`` becomes ``...``; then lower case, and runs of spaces become one.

Words: lower case; ``!`` and ``?`` become ``.``; ``;`` is deleted; everything else outside the alphabet
becomes a space; each ``.`` is a word of its own; ``''`` becomes ``'``.

Both drop all letters and digits other than a to z; :func:`lost_letters` finds them. Words keep two more,
whose lower case has one of these letters: U+0130 (I with a dot), as an i, and U+212A (Kelvin sign), as a k.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_KEPT = LETTERS + LETTERS.upper() + b".' "


def _byte_table(changes: dict[bytes, bytes], kept: bytes | None = None) -> bytes:
    """A table for ``bytes.translate``: ``changes`` applied; with ``kept``, other bytes become a space."""
    table = bytearray(range(256))
    if kept is not None:
        table = bytearray(b if b in kept else 0x20 for b in range(256))
    for before, after in changes.items():
        table[before[0]] = after[0]
    return bytes(table)


_CHARACTER_TABLE = _byte_table({b"!": b".", b"?": b".", b";": b" "})
_CHARACTER_DELETE = bytes(b for b in range(256) if b not in _KEPT + b"!?;")
_WORD_TABLE = _byte_table({b"!": b"."}, kept=_KEPT)
_DICTIONARY_TABLE = _byte_table({}, kept=LETTERS + b"' ")

# The look-behind stands after the dot so that the regex engine can search for the literal dot first.
_FULL_STOP = re.compile(rb"\.(?<![^A-Za-z][A-Z]\.) *")
_SPACES = re.compile(rb"  +")
# Runs of letters and digits that are dropped, from characters and from words.
_LOST = re.compile(r"[^\W_a-zA-Z]+")
_LOST_OF_WORDS = re.compile(r"[^\W_a-zA-Z\u0130\u212a]+")
_ELLIPSIS = b". . ."
_ELLIPSIS_PREFIXES = (b". . ", b". .", b". ", b".")


class CharacterCleaner:
    """Streaming form of :func:`clean_characters`: ``feed`` chunks, then ``close``; both return bytes (ASCII).

    ``collapse_spaces=False`` leaves out the last step (runs of spaces become one).
    """

    def __init__(self, collapse_spaces: bool = True) -> None:
        self._collapse = collapse_spaces
        self._started = False  # something other than white space has been seen
        self._space = False  # white space is pending: it counts only if more text follows
        self._hyphen = ""  # an odd hyphen at the end of a chunk may be half of "--"
        self._context = b"  "  # the last two characters before the chunk, for the look-behind
        self._eat_spaces = False  # the text so far ends in a full stop whose space is already written
        self._held = b""  # what may be the beginning of ". . ."
        self._after_space = False  # the output ends in a space

    def feed(self, chunk: str) -> bytes:
        words = chunk.split()
        if not words:
            self._space = self._space or bool(chunk)
            return b""
        text = " ".join(words)
        if self._started and (self._space or chunk[0].isspace()):
            text = " " + text
        self._started = True
        self._space = chunk[-1].isspace()

        text = self._hyphen + text
        odd = (len(text) - len(text.rstrip("-"))) % 2
        self._hyphen = "-" if odd else ""
        text = text[: len(text) - odd].replace("--", " ")
        data = text.encode("ascii", "ignore").translate(_CHARACTER_TABLE, _CHARACTER_DELETE)
        return self._collapsed(self._joined_ellipses(self._spaced_full_stops(data)))

    def close(self) -> bytes:
        """Return what was held back. The cleaner cannot be used after this."""
        held, self._held = self._held, b""
        return self._collapsed(held)

    def _spaced_full_stops(self, data: bytes) -> bytes:
        if self._eat_spaces:
            data = data.lstrip(b" ")
        if not data:
            return b""
        both = self._context + data
        last = both.rstrip(b" ")
        self._eat_spaces = last.endswith(b".") and not (last[-2:-1].isupper() and not last[-3:-2].isalpha())
        # A full stop in the context has been dealt with; for the look-behind it is just not a letter.
        self._context = both[-2:].replace(b".", b" ")
        return _FULL_STOP.sub(b". ", both)[2:]

    def _joined_ellipses(self, data: bytes) -> bytes:
        parts = (self._held + data).split(_ELLIPSIS)
        self._held = next((p for p in _ELLIPSIS_PREFIXES if parts[-1].endswith(p)), b"")
        parts[-1] = parts[-1][: len(parts[-1]) - len(self._held)]
        return b"...".join(parts)

    def _collapsed(self, data: bytes) -> bytes:
        if self._collapse:
            if self._after_space:
                data = data.lstrip(b" ")
            data = _SPACES.sub(b" ", data)
            if data:
                self._after_space = data.endswith(b" ")
        return data.lower()


class WordCleaner:
    """Streaming form of :func:`clean_words`: ``feed`` chunks, then ``close``; both return lists of words."""

    def __init__(self) -> None:
        self._held = b""  # a word that the next chunk may continue

    def feed(self, chunk: str) -> list[str]:
        # Anything but ASCII becomes "?" and then, by the table, a space: replace the text's own "?" first.
        text = chunk.lower().replace(";", "").replace("?", ".")
        data = self._held + text.encode("ascii", "replace").translate(_WORD_TABLE)
        cut = max(data.rfind(b" "), data.rfind(b".")) + 1
        self._held = data[cut:]
        return _words(data[:cut])

    def close(self) -> list[str]:
        """Return the last word, if the text ends in one. The cleaner cannot be used after this."""
        held, self._held = self._held, b""
        return _words(held)


def _words(data: bytes) -> list[str]:
    return data.replace(b"''", b"'").replace(b".", b" . ").decode("ascii").split()


def iter_clean_characters(chunks: Iterable[str]) -> Iterator[bytes]:
    """Clean a stream of chunks for the original's alphabet; yields ASCII bytes."""
    cleaner = CharacterCleaner()
    for chunk in chunks:
        yield cleaner.feed(chunk)
    yield cleaner.close()


def iter_clean_words(chunks: Iterable[str]) -> Iterator[list[str]]:
    """Split a stream of chunks into the original's words; yields lists of words."""
    cleaner = WordCleaner()
    for chunk in chunks:
        yield cleaner.feed(chunk)
    yield cleaner.close()


def clean_characters(text: str, collapse_spaces: bool = True) -> str:
    """Clean ``text`` as the original's character dataset does (see the module's docstring).

    With ``collapse_spaces=False`` the last step is left out, which is how the original cleans single
    strings such as prompts.
    """
    cleaner = CharacterCleaner(collapse_spaces)
    return (cleaner.feed(_checked(text)) + cleaner.close()).decode("ascii")


def clean_words(text: str) -> list[str]:
    """Split ``text`` into words as the original's word dataset does, before its dictionary is applied."""
    return [word for words in iter_clean_words([_checked(text)]) for word in words]


def lost_letters(text: str, words: bool = False) -> list[tuple[str, int]]:
    """The letters and digits in ``text`` that :func:`clean_characters` drops, as (letter, position).

    With ``words``, those that :func:`clean_words` drops.
    """
    runs = (_LOST_OF_WORDS if words else _LOST).finditer(text)
    return [(letter, position) for run in runs for position, letter in enumerate(run.group(), run.start())]


def count_lost_letters(text: str, words: bool = False) -> int:
    """The number of ``lost_letters``, in a fraction of the time."""
    return sum(map(len, (_LOST_OF_WORDS if words else _LOST).findall(text)))


def original_dictionary(
    text: str | Iterable[str], min_count: int | None = None, max_words: int | None = None
) -> list[str]:
    """The dictionary that the original builds from a text (a str or an iterable of chunks).

    The text is lower-cased, and everything but ``a-z``, space and apostrophe becomes a space. The dictionary
    is the sorted list of the words seen at least ``min_count`` times (None: all), ``.`` and the padding token
    ``P``. If ``max_words`` is given, only the text's first ``max_words`` words are looked at.
    """
    counts: Counter[str] = Counter()
    left = max_words
    held = b""
    for chunk in _then_end([text] if isinstance(text, str) else text):
        data = held + chunk.lower().replace("?", " ").encode("ascii", "replace").translate(_DICTIONARY_TABLE)
        cut = data.rfind(b" ") + 1
        held = data[cut:]
        words = data[:cut].decode("ascii").split()
        if left is not None:
            words = words[:left]
            left -= len(words)
        counts.update(words)
        if left == 0:
            break
    least = 1 if min_count is None else min_count
    return sorted({word for word, count in counts.items() if count >= least} | {".", "P"})


def _then_end(chunks: Iterable[str]) -> Iterator[str]:
    yield from chunks
    yield " "


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {type(text).__name__}")
    return text
