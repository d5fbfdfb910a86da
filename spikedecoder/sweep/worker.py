"""One process of a sweep: runs trials until none is left."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spikedecoder.checkpoint import CheckpointError
from spikedecoder.data import Corpus, prepare_corpus
from spikedecoder.sweep.space import Search
from spikedecoder.sweep.study import (
    TRIALS,
    claim,
    claiming,
    folder_of,
    locked,
    open_study,
    optuna,
    trial_lock,
)
from spikedecoder.training import Evaluation, Reporter, RunInfo, TrainingError, train
from spikedecoder.training.checkpoints import drop
from spikedecoder.training.run_folder import RUN
from spikedecoder.training.signals import stop_on_signals
from spikedecoder.viz.reports import read_metrics

Say = Callable[[str], None]


def read_corpus(search: Search, texts: Sequence[str] | None, corpus: str | None) -> Corpus:
    settings = search.settings({})
    return prepare_corpus(
        texts,
        corpus=corpus,
        tokenizer=settings.tokenizer,
        min_count=settings.min_count,
        val_fraction=settings.val_fraction,
    )


def work(
    search: Search,
    out: Path,
    texts: Sequence[str] | None,
    corpus: str | None,
    threads: int | None,
    say: Say = print,
    alive: Callable[[], bool] = lambda: True,
) -> str | None:
    """Run trials of the study in `out` until none is left, or `alive`, asked between two of them, is False.

    Returns the name of the signal that ended it early, else None.
    """
    data = read_corpus(search, texts, corpus)
    study = open_study(out, search, data.fingerprint)
    with stop_on_signals() as stop:
        while alive() and stop.requested is None:
            with contextlib.ExitStack() as held:
                with claiming(out):
                    trial = claim(study, search)
                    if trial is None:
                        return None
                    trial.set_user_attr("folder", folder_of(trial))
                    # taken before another process can look for trials without a process
                    held.enter_context(locked(trial_lock(out, folder_of(trial))))
                interrupted = _run(study, trial, search, data, out, texts, corpus, threads, say)
                if interrupted:
                    return interrupted  # the trial stays "running" without a lock, so that it is resumed
                with claiming(out):
                    drop_checkpoints(study, out)
        return stop.requested


def _run(
    study: Any,
    trial: Any,
    search: Search,
    data: Corpus,
    out: Path,
    texts: Sequence[str] | None,
    corpus: str | None,
    threads: int | None,
    say: Say,
) -> str | None:
    """Run one trial; returns the name of the signal that interrupted it, or None if the trial is over."""
    o = optuna()
    state = o.trial.TrialState
    params = search.suggest(trial)
    name = f"trial {trial.number} ({describe(params)})"
    folder = out / TRIALS / folder_of(trial)
    try:
        settings = search.settings(params)
        if settings.threads is None and threads is not None:
            settings = settings.replace(threads=threads)
        config = search.config(params, data.tokenizer)
        resume = _can_resume(folder)
        reporter = _Watcher(trial, folder if resume else None)
        source = {"preset": search.preset, "text": list(texts) if texts else None, "corpus": corpus}
        result = train(config, data, settings, out=folder, resume=resume, reporter=reporter, source=source)
    except o.TrialPruned:
        study.tell(trial, state=state.PRUNED)
        say(f"{name}: stopped at step {reporter.at}, {reporter.bits:.3f} bits per token")
        return None
    except (ValueError, TypeError, CheckpointError, TrainingError, MemoryError) as error:
        trial.set_user_attr("error", " ".join(str(error).split()))
        study.tell(trial, state=state.FAIL)
        say(f"{name}: failed: {error}")
        return None
    if result.interrupted:
        trial.set_user_attr("stopped", True)  # in order, so this does not count as an attempt
        return result.interrupted
    bits = result.best["val_bits_per_token"]
    rates = list(result.evaluation.spike_rates.values()) if result.evaluation else []
    trial.set_user_attr("spike_rate", sum(rates) / len(rates) if rates else None)
    trial.set_user_attr("parameters", sum(p.numel() for p in result.model.parameters()))
    trial.set_user_attr("tokens_per_second", result.tokens_per_second)
    study.tell(trial, bits)
    say(f"{name}: {bits:.3f} bits per token")
    return None


def _can_resume(folder: Path) -> bool:
    """Whether there is a run to resume; what a process left that was killed before run.json is removed."""
    if not (folder / RUN).exists():
        shutil.rmtree(folder, ignore_errors=True)
        return False
    RunInfo.read(folder)  # CheckpointError: it may be another version's, so it is left alone
    return True


class _Watcher(Reporter):
    """Reports evaluations to the study, and ends the run if the study prunes the trial."""

    def __init__(self, trial: Any, resumed: Path | None) -> None:
        self.trial, self.resumed = trial, resumed
        self.at, self.bits = 0, math.nan
        self._prune = False

    def start(self, step: int, steps: int, baselines: dict[str, float]) -> None:
        self.steps = steps
        if self.resumed is None or step == 0:
            return
        try:
            lines = read_metrics(self.resumed)
        except (ValueError, FileNotFoundError):
            return  # the run ended before its first line
        for line in lines:
            if "val_bits_per_token" in line and line["step"] <= step:
                self.trial.report(line["val_bits_per_token"], line["step"])

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.at, self.bits = step, evaluation.bits
        self.trial.report(evaluation.bits, step)
        self._prune = step < self.steps and self.trial.should_prune()

    def tick(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        if self._prune:  # not raised in `evaluated`: the run's own files would miss the evaluation
            raise optuna().TrialPruned


def describe(params: dict[str, Any]) -> str:
    return ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in params.items())


def drop_checkpoints(study: Any, out: Path) -> None:
    """Delete the checkpoints of trials that are over, but for the best one's. Call under `claiming`."""
    o = optuna()
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    complete = [t for t in finished if t.state == o.trial.TrialState.COMPLETE]
    best = min(complete, key=lambda t: t.value, default=None)
    busy = {folder_of(t) for t in study.get_trials(deepcopy=False) if not t.state.is_finished()}
    for trial in finished:
        folder = folder_of(trial)
        if folder in busy or (best is not None and folder == folder_of(best)):
            continue
        drop(out / TRIALS / folder)
