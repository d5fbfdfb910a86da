"""Continuous batching: one thread draws tokens for all sequences, which join and leave between two tokens."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from spikedecoder.generation.batch import Batch, Continuation, GeneratedToken
from spikedecoder.generation.generate import suppressed_ids
from spikedecoder.generation.native import open_source

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder

# Most prompt tokens to read between two tokens of the running sequences; one prompt is read in any case.
PREFILL = 512


class EngineError(Exception):
    """The sequences could not be finished."""


class QueueFull(EngineError):
    """The engine has no room for these sequences."""


class Stopping(EngineError):
    """The engine takes no more work."""


# Called on the engine's thread with a listener's tokens of one step, or with the error that ends them.
Listener = Callable[["list[GeneratedToken] | EngineError"], None]


class Engine:
    """Runs at most `max_batch` sequences at once, keeps at most `max_queue` waiting; first come first served.

    `start` it, `submit` sequences with a listener, `cancel` those that are no longer wanted, `close` it. All
    methods may be called from any thread. A sequence's tokens are those that `generate` gives with its seed.
    past: see `generate`.
    """

    def __init__(
        self, model: SpikeDecoder, max_batch: int = 16, max_queue: int = 64, past: str = "slide"
    ) -> None:
        for name, value, least in (("max_batch", max_batch, 1), ("max_queue", max_queue, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: got {value!r}, takes an integer >= {least}")
        self.model, self.max_batch, self.max_queue, self.past = model, max_batch, max_queue, past
        self.numbers = itertools.count()  # for `Continuation.number`
        self._batch = self._fresh_batch()
        self._changed = threading.Condition()
        # guards all below, which `alive` alone reads without it
        self._waiting: deque[Continuation] = deque()
        self._listeners: dict[int, Listener] = {}  # of every sequence that is waiting or running
        self._cancelled: set[int] = set()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> int:
        with self._changed:
            return len(self._listeners) - len(self._waiting)

    @property
    def waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the engine is running and takes work."""
        thread = self._thread
        return thread is not None and thread.is_alive() and self._deadline is None

    def start(self) -> Engine:
        """Start the thread that generates; returns the engine."""
        self._thread = threading.Thread(target=self._run, name="spikedecoder-engine", daemon=True)
        self._thread.start()
        return self

    def submit(self, sequences: Sequence[Continuation], listener: Listener) -> None:
        """Take all of the sequences, or none and raise QueueFull or Stopping."""
        with self._changed:
            if self._deadline is not None:
                raise Stopping("the server is stopping")
            capacity = self.max_batch + self.max_queue
            if len(self._listeners) + len(sequences) > capacity:
                raise QueueFull(
                    f"{len(self._listeners)} of {capacity} places are taken, {len(sequences)} more asked for"
                )
            self._waiting += sequences
            self._listeners |= dict.fromkeys((c.number for c in sequences), listener)
            self._changed.notify()

    def cancel(self, numbers: Iterable[int]) -> None:
        """Free the places of these sequences; their listeners hear no more. Unknown numbers are ignored."""
        with self._changed:
            known = {n for n in numbers if self._listeners.pop(n, None) is not None}
            waiting = {c.number for c in self._waiting}
            self._waiting = deque(c for c in self._waiting if c.number not in known)
            self._cancelled |= known - waiting
            self._changed.notify()

    def close(self, grace: float = 0.0) -> None:
        """Take no more work; listeners of sequences unfinished after `grace` seconds get `Stopping`."""
        with self._changed:
            deadline = time.monotonic() + grace
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait until that thread has ended, but no longer than `timeout` seconds; `close` first."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _fresh_batch(self) -> Batch:
        return Batch(open_source(self.model, past=self.past), suppressed_ids(self.model))

    def _run(self) -> None:
        while self._take_turns():
            try:
                drawn = self._batch.step()
            except Exception as error:  # whatever it is, no client may wait for ever
                traceback.print_exc(file=sys.stderr)
                self._give_up(EngineError(f"generation failed: {error}"), waiting_too=False)
                self._batch = self._fresh_batch()
            else:
                self._tell(drawn)
        self._give_up(Stopping("the server has stopped"), waiting_too=True)

    def _take_turns(self) -> bool:
        """Let sequences leave and join; wait while there is nothing to do. False if the engine is to end."""
        with self._changed:
            while not (self._listeners or self._cancelled):
                if self._deadline is not None:
                    return False
                self._changed.wait()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return False
            cancelled, self._cancelled = self._cancelled, set()
            admitted: list[Continuation] = []
            places, tokens = self.max_batch - len(self._batch) + self._of_batch(cancelled), 0
            while self._waiting and len(admitted) < places:
                tokens += len(self._waiting[0].prompt)
                if admitted and tokens > PREFILL:
                    break
                admitted.append(self._waiting.popleft())
        if cancelled:
            self._batch.remove(cancelled)
        self._batch.add(admitted)
        return True

    def _of_batch(self, numbers: set[int]) -> int:
        return sum(c.number in numbers for c in self._batch.running)

    def _tell(self, drawn: list[GeneratedToken]) -> None:
        heard: dict[Listener, list[GeneratedToken]] = {}
        with self._changed:
            for new in drawn:
                listener = self._listeners.get(new.sequence)
                if listener is None:  # cancelled meanwhile
                    continue
                heard.setdefault(listener, []).append(new)
                if new.finish is not None:
                    del self._listeners[new.sequence]
        for listener, tokens in heard.items():
            listener(tokens)

    def _give_up(self, error: EngineError, waiting_too: bool) -> None:
        with self._changed:
            spared = set() if waiting_too else {c.number for c in self._waiting}
            lost = {n: listener for n, listener in self._listeners.items() if n not in spared}
            for number in lost:
                del self._listeners[number]
            self._cancelled.clear()
            if waiting_too:
                self._waiting.clear()
        for listener in set(lost.values()):
            listener(error)
