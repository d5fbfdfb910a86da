"""Ctrl-C lets the current step finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """A request to end the run. requested: the signal's name, or "reporter"; None if there is no request."""

    def __init__(self) -> None:
        self.requested: str | None = None


_outer: Stop | None = None  # the outermost one that is active, on the main thread


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request to stop; a second signal acts as it would without this.

    A nested call yields the outer request, so that code that starts several runs learns of it too. No handler
    is installed off the main thread, where Python delivers no signals.
    """
    global _outer
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    if _outer is not None:
        yield _outer
        return
    stop = _outer = Stop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.requested = signal.Signals(number).name
        restore()

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        _outer = None
        restore()
