"""The study file: one SQLite database that several processes share, and which of them runs which trial.

    OUT/study.db             every trial: its values, its evaluations, its end
    OUT/trials/0007/         the training run of trial 7 (once over, only the best trial keeps checkpoints)
    OUT/trials/0007.lock     held by the process that trains it; the system drops it with the process

A trial that is "running" while nobody holds its lock was killed. It is closed and queued again with its
folder, so that its training resumes from its last checkpoint.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from spikedecoder.sweep.space import Search
from spikedecoder.training.run_folder import RUN

STUDY, TRIALS = "study.db", "trials"
_NAME, _VERSION = "spikedecoder-sweep", 1
_ATTEMPTS = 3  # at a trial whose process dies


def optuna() -> Any:
    try:
        import optuna as module
    except ImportError:
        raise ValueError(
            "sweep needs optuna, which is not installed: pip install 'spikedecoder[sweep]'"
        ) from None
    module.logging.set_verbosity(module.logging.WARNING)
    return module


def open_study(out: Path, search: Search, fingerprint: str) -> Any:
    """The study in `out`, created if there is none; ValueError if it is not this search's.

    fingerprint: of the text and its tokens.
    """
    o, path = optuna(), out / STUDY
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file, takes a folder")
    new = not path.exists()
    if new and (out / TRIALS).exists():
        raise ValueError(f"{out}: holds trials but no {STUDY}; takes a new folder, or the study file back")
    if new and (out / RUN).exists():
        raise ValueError(f"{out}: holds a training run; takes a new folder, or that of a study")
    if not new:
        _check_file(path)
    out.mkdir(parents=True, exist_ok=True)
    storage = _storage(o, path)
    names = o.study.get_all_study_names(storage)
    if names and names != [_NAME]:
        raise ValueError(f"{path}: holds the study {names[0]!r}, takes one that spikedecoder sweep made")
    study = o.create_study(storage=storage, study_name=_NAME, direction="minimize", load_if_exists=True)
    wanted = {"version": _VERSION, **search.identity(), "text": fingerprint}
    found = study.user_attrs.get(_NAME)
    if found is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"{path}: holds trials that spikedecoder sweep did not make; takes a new folder")
        study.set_user_attr(_NAME, wanted)
    else:
        _check_same(path, found, wanted)
    study.pruner = (
        o.pruners.MedianPruner(n_startup_trials=search.startup) if search.prune else o.pruners.NopPruner()
    )
    return study


def _storage(o: Any, path: Path) -> Any:
    def connect() -> sqlite3.Connection:
        return _connect(path.resolve())

    try:
        # `connect` knows the path: in the address, ?, % and { of a folder's name would mean something
        return o.storages.RDBStorage(f"sqlite:///{STUDY}", engine_kwargs={"creator": connect})
    except Exception as error:  # of optuna, SQLAlchemy or sqlite, depending on versions
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: a study file of another schema, or broken ({reason}); takes one that this version of "
            "optuna reads, or a new --out"
        ) from None


def _connect(database: str | Path, uri: bool = False) -> sqlite3.Connection:
    # other processes write too: wait for them
    return sqlite3.connect(database, timeout=100, check_same_thread=False, uri=uri)


def _check_file(path: Path) -> None:
    """ValueError if the file is not an SQLite database of Optuna."""
    try:
        # not read-only: what a process was writing when it was killed has to be undone first
        with _connect(f"{path.resolve().as_uri()}?mode=rw", uri=True) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master")}
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: not a study file ({error}); takes a new --out") from None
    if tables and not {"studies", "trials", "version_info"} <= tables:
        raise ValueError(f"{path}: a database of another schema, not a study; takes a new --out")


def _check_same(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    known = found if isinstance(found, dict) else {}
    if known.get("version") != _VERSION:
        raise ValueError(
            f"{path}: a study of schema {known.get('version')!r}, takes {_VERSION}; choose a new --out"
        )
    for name, value in wanted.items():
        theirs = known.get(name)
        if theirs == value:
            continue
        if name == "text":
            raise ValueError(f"{path}: the study is of another text; give that one, or a new --out")
        if isinstance(value, dict) and isinstance(theirs, dict):
            for part in dict.fromkeys((*value, *theirs)):
                if value.get(part) != theirs.get(part):
                    raise ValueError(
                        f"{path}: the study has {name}: {part} = {_short(theirs.get(part))}, the search file "
                        f"{_short(value.get(part))}; keep the study's, or choose a new --out"
                    )
        raise ValueError(
            f"{path}: the study has {name} = {theirs!r}, the search file {value!r}; keep the study's, or "
            "choose a new --out"
        )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        if value.get("choices"):
            return str(value["choices"])
        return f"{value['low']} to {value['high']}{' (log)' if value.get('log') else ''}"
    return "nothing" if value is None else repr(value)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file. Yields False if another process holds it and `wait` is not set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        yield _lock(file, wait)  # closing the file drops the lock


def _lock(file: TextIO, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows: there one process at a time
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def claiming(out: Path) -> Any:
    """The lock under which trials are handed out."""
    return locked(out / ".claim")


def trial_lock(out: Path, folder: str) -> Path:
    return out / TRIALS / f"{folder}.lock"


def folder_of(trial: Any) -> str:
    """The name of a trial's run in OUT/trials: its own number, or that of the trial it continues."""
    name = trial.user_attrs.get("folder") or f"{trial.number:04d}"
    assert isinstance(name, str)
    return name


def counted(study: Any) -> list[Any]:
    """The trials, without those that another one continues and those cut off before they had any value."""
    return [t for t in study.get_trials(deepcopy=False) if not t.user_attrs.get("went_on")]


def requeue_stale(study: Any, out: Path) -> list[int]:
    """Close trials whose process is gone and queue them again, up to 3 attempts; returns their numbers.

    Call under `claiming`.
    """
    o = optuna()
    found = []
    for trial in study.get_trials(deepcopy=False, states=(o.trial.TrialState.RUNNING,)):
        folder = folder_of(trial)
        with locked(trial_lock(out, folder), wait=False) as free:
            if not free:
                continue
            attempt = int(trial.user_attrs.get("attempt", 1)) + (not trial.user_attrs.get("stopped"))
            own = o.trial.Trial(study, trial._trial_id)
            own.set_user_attr("error", "its process ended before it did")
            # of a grid's point all values are known, even if the process died before it had asked for them
            params = trial.system_attrs.get("fixed_params") or trial.params
            # one that had not chosen any left nothing to continue
            if params and attempt <= _ATTEMPTS:
                own.set_user_attr("went_on", True)
                study.enqueue_trial(params, user_attrs={"folder": folder, "attempt": attempt})
            elif not params:
                own.set_user_attr("went_on", True)
            study.tell(trial.number, state=o.trial.TrialState.FAIL)
            found.append(trial.number)
    return found


def fill_grid(study: Any, search: Search) -> None:
    """Queue every point of the grid, once. Call under `claiming`."""
    names = [dimension.name for dimension in search.space]
    trials = study.get_trials(deepcopy=False)  # fetched once, not for each point
    queued = [trial.system_attrs.get("fixed_params", trial.params) for trial in trials]
    known = {tuple(params.get(name) for name in names) for params in queued}
    for point in search.grid():
        if tuple(point.values()) not in known:
            study.enqueue_trial(point)


def claim(study: Any, search: Search) -> Any:
    """The next trial, or None if all have been handed out. Call under `claiming`."""
    o = optuna()
    trials = counted(study)
    waiting = any(t.state == o.trial.TrialState.WAITING for t in trials)
    if not waiting and (search.sampler == "grid" or len(trials) >= search.trials):
        return None
    # seeded for each trial: a study that was stopped goes on like one that was not
    seed = (search.seed * 1_000_003 + len(trials)) % 2**32
    if search.sampler == "tpe":
        study.sampler = o.samplers.TPESampler(seed=seed, n_startup_trials=search.startup)
    else:
        study.sampler = o.samplers.RandomSampler(seed=seed)
    return study.ask()
