"""Ctrl-C that lets a step finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether someone asked the run to end: the signal's name, else None."""

    def __init__(self) -> None:
        self.requested: str | None = None


_outer: Stop | None = None  # of the main thread


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request; a second signal acts as if this were not here.

    Inside of another one it is that one's request, so that who runs several runs learns of it, too. Off the
    main thread, where Python delivers no signals, nothing is installed.
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
