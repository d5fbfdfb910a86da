"""A whole sweep: its processes, and the results of their trials."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from spikedecoder.sweep.results import BEST, RESULTS, best_toml, read_trials, to_csv
from spikedecoder.sweep.space import Search
from spikedecoder.sweep.study import claiming, fill_grid, open_study, requeue_stale
from spikedecoder.sweep.worker import Say, read_corpus, work
from spikedecoder.training import TrainingError


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    trials: a row per trial, see `spikedecoder.sweep.results.read_trials`.
    best: the complete one with the lowest held-out bits per token; None if none is complete.
    best_file: OUT/best.toml with its settings, for `train --config`; None like `best`.
    interrupted: whether the sweep was stopped before its last trial.
    """

    trials: list[dict[str, Any]]
    best: dict[str, Any] | None
    best_file: Path | None
    out: Path
    interrupted: bool = False


def sweep(
    search: Search,
    out: str | Path,
    *,
    texts: Sequence[str] | None = None,
    corpus: str | None = None,
    jobs: int = 1,
    say: Say = print,
) -> SweepResult:
    """Run the trials of a search that are not done yet, in `jobs` processes that share OUT/study.db.

    Called again with the same `out`, the sweep goes on: trials that were cut off resume from their last
    checkpoint. Writes OUT/results.csv and, if a trial is complete, OUT/best.toml. Ctrl-C lets running trials
    save, and returns. texts, corpus: see `prepare_corpus`. say: takes lines of progress.

    Raises ValueError (a bad search, or a study of another search, text or schema; Optuna is not installed),
    TrainingError (a process died), and what `prepare_corpus` raises.
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise ValueError(f"jobs: got {jobs!r}, takes an integer >= 1")
    out = Path(out)
    data = read_corpus(search, texts, corpus)
    search.config({}, data.tokenizer)  # checks the settings that all trials share
    study = open_study(out, search, data.fingerprint)
    with claiming(out):
        stale = requeue_stale(study, out)
        if search.sampler == "grid":
            fill_grid(study, search)
    if stale:
        say(f"taken up again where a process had ended: trial {', '.join(map(str, stale))}")
    if jobs == 1:
        stopped = work(search, out, texts, corpus, None, say) is not None
    else:
        stopped = _in_processes(search, out, texts, corpus, jobs, say)
    return finish(study, search, out, stopped)


def _in_processes(
    search: Search, out: Path, texts: Sequence[str] | None, corpus: str | None, jobs: int, say: Say
) -> bool:
    """Run the trials in `jobs` processes; returns whether any of them was stopped."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    workers: list[BaseProcess] = []
    lines: list[Connection] = []
    for i in range(jobs):
        line, end = context.Pipe(duplex=False)  # a pipe each: a killed process holds no lock of the others'
        arguments = (search, out, texts, corpus, threads, end)
        workers.append(context.Process(target=_entry, args=arguments, name=f"sweep-{i}"))
        workers[-1].start()
        end.close()  # the process has its own
        lines.append(line)
    try:
        asked = _wait_for(workers, lines, say)
    except BaseException:  # of `say`, such as nobody reading its output any more
        for worker in workers:
            worker.terminate()
        raise
    codes = [worker.exitcode for worker in workers]
    killed = [code for code in codes if code not in (0, _STOPPED, *([-signal.SIGTERM] if asked else []))]
    if killed:
        raise TrainingError(
            f"sweep: a process ended with code {killed[0]}; the same command takes up again what it had begun"
        )
    return asked or _STOPPED in codes


def _wait_for(workers: list[BaseProcess], lines: list[Connection], say: Say) -> bool:
    """Wait until the processes have ended, passing on what they say; returns whether they were asked to."""
    asked = False
    with _sigterm_as_sigint():
        while lines or any(worker.is_alive() for worker in workers):
            try:
                while lines:
                    _pass_on(lines, say)
                for worker in workers:
                    worker.join()
            except KeyboardInterrupt:
                asked = True
                for worker in workers:
                    if worker.is_alive():
                        worker.terminate()  # the first time it saves and ends, the second time at once
    return asked


_STOPPED = 3


def _pass_on(lines: list[Connection], say: Say) -> None:
    """Wait for lines of progress and pass them on; connections whose process has ended are removed."""
    ready = wait(lines)
    for line in [line for line in lines if line in ready]:
        try:
            said = line.recv_bytes()
        except (EOFError, OSError):
            lines.remove(line)
        else:
            say(said.decode(errors="replace"))


def _entry(
    search: Search, out: Path, texts: Sequence[str] | None, corpus: str | None, threads: int, line: Connection
) -> None:
    import torch

    if hasattr(os, "setsid"):
        os.setsid()  # a terminal's Ctrl-C then reaches the parent alone, which tells each worker once
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    alive = (lambda: True) if parent is None else parent.is_alive

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # the parent is gone
            line.send_bytes(text.encode(errors="backslashreplace"))

    if work(search, out, texts, corpus, threads, say, alive) is not None:
        raise SystemExit(_STOPPED)


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def finish(study: Any, search: Search, out: Path, interrupted: bool = False) -> SweepResult:
    """Write the table and the best settings."""
    from spikedecoder._files import write_bytes

    trials = read_trials(study)
    write_bytes(out / RESULTS, to_csv(trials, search).encode())
    complete = [t for t in trials if t["state"] == "complete"]
    best = min(complete, key=lambda t: t["bits"], default=None)
    file = None
    if best is not None:
        file = out / BEST
        write_bytes(file, best_toml(search, best).encode())
    return SweepResult(trials, best, file, out, interrupted)
