"""From token ids to text, one id at a time, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from spikedecoder.data import Tokenizer


# For each tokenizer, the text that a token adds after another: decoding takes longer than drawing the token.
_PIECES: WeakKeyDictionary[Tokenizer, dict[tuple[int, ...], str]] = WeakKeyDictionary()
_MOST_PIECES = 1 << 16


class TextStream:
    """The text that each token adds after the ids `before`, up to the first stop string.

    A stop string is looked for in the new text only, across the borders of tokens, and is not part of the
    text. The first one to be complete ends the text; if several are complete at the same character, the
    longest. Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Iterable[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        # a token's text depends on its left neighbour at most (the space between two words)
        self._last = [i for i in before if i != tokenizer.pad_id][-1:]
        self._pieces = _PIECES.setdefault(tokenizer, {})
        self._held = ""

    def push(self, token: int) -> str:
        """Append a token; returns the text that is now certain. Sets `stopped` at a complete stop string."""
        text = self.take(token)
        if not self.stop:
            return text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text that was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def piece(self, token: int) -> str:
        """The text that a token would add, without appending it."""
        if token == self.tokenizer.pad_id:
            return ""
        key = (*self._last, token)
        piece = self._pieces.get(key)
        if piece is None:
            before = len(self.tokenizer.decode(self._last)) if self._last else 0
            piece = self.tokenizer.decode(key)[before:]
            if len(self._pieces) >= _MOST_PIECES:
                self._pieces.clear()
            self._pieces[key] = piece
        return piece

    def take(self, token: int) -> str:
        """Append a token and return its text: `push` without stop strings."""
        piece = self.piece(token)
        if token != self.tokenizer.pad_id:
            self._last = [token]
        return piece


def check_stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple; TypeError for anything but strings, ValueError for an empty one."""
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop: got {string!r}, takes strings")
        if not string:
            raise ValueError("stop: got an empty string, takes strings of at least one character")
    return strings


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
