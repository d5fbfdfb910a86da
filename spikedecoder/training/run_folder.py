"""The output folder of a run: who may write into it, and what run.json says."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikedecoder.checkpoint import CheckpointError, read_json, write_json
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.training.checkpoints import CHECKPOINTS, latest
from spikedecoder.training.config import TrainConfig
from spikedecoder.training.report import METRICS, TENSORBOARD

RUN, _LOCK = "run.json", ".lock"
_FORMAT = "spikedecoder-run"


@dataclass(frozen=True)
class RunInfo:
    """The description of a run, kept in run.json.

    fingerprint: of the corpus. threads: CPU threads of torch. source: set by the caller, so that the text can
    be found again.
    """

    config: SpikeDecoderConfig
    train: TrainConfig
    fingerprint: str
    threads: int
    processes: int
    source: dict[str, Any] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        write_json(
            out / RUN,
            {
                "format": _FORMAT,
                "version": 1,
                "model": self.config.to_dict(),
                "train": self.train.to_dict(),
                "fingerprint": self.fingerprint,
                "threads": self.threads,
                "processes": self.processes,
                "source": self.source,
            },
        )

    @classmethod
    def read(cls, out: Path) -> RunInfo:
        """The run in the folder `out`; CheckpointError if there is none or it cannot be read."""
        if not out.is_dir():
            raise CheckpointError(f"{out}: no such folder; takes the output folder of a run")
        path = out / RUN
        if not path.is_file():
            raise CheckpointError(
                f"{out}: holds no run (there is no {RUN} in it); takes the --out of a training run"
            )
        values = read_json(path)
        if values.get("format") != _FORMAT or values.get("version") != 1:
            raise CheckpointError(f"{path}: not the description of a training run")
        try:
            return cls(
                SpikeDecoderConfig.from_dict(values["model"]),
                TrainConfig.from_dict(values["train"]),
                str(values["fingerprint"]),
                int(values["threads"]),
                int(values["processes"]),
                dict(values["source"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None


def check_unused(out: Path) -> None:
    """FileExistsError if `out` is a file or holds any but hidden files: a run is never overwritten."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is a file; takes a folder that is new or empty")
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        if (out / RUN).is_file():
            raise FileExistsError(
                f"{out}: holds a run already; go on with --resume {out}, or choose another --out"
            )
        raise FileExistsError(f"{out}: is not empty; choose another --out")


def free_folder(preset: str, text: str, parent: Path = Path("runs")) -> Path:
    """The first of <parent>/<preset>-<text>-1, -2, ... that does not exist."""
    text = re.sub(r"[^A-Za-z0-9]+", "-", text.removesuffix(".txt")).strip("-")[:40] or "text"
    n = 1
    while (parent / f"{preset}-{text}-{n}").exists():
        n += 1
    return parent / f"{preset}-{text}-{n}"


@contextmanager
def made(out: Path) -> Iterator[None]:
    """Make and lock the folder `out` for a new run.

    If the run fails before it has written a checkpoint or metrics, its files are removed again.
    """
    existed = out.is_dir()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the run's folder ({error.strerror})", str(out)) from None
    with locked(out):
        check_unused(out)  # again: another process may have begun a run, and ended, since
        try:
            yield
        except BaseException:
            with suppress(OSError):
                figures = out / METRICS
                if latest(out) is None and not (figures.exists() and figures.stat().st_size):
                    for name in (RUN, METRICS, _LOCK):
                        (out / name).unlink(missing_ok=True)
                    for name in (CHECKPOINTS, TENSORBOARD):
                        shutil.rmtree(out / name, ignore_errors=True)
                    if not existed:
                        out.rmdir()
            raise


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second process from training into `out` (FileExistsError); the lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{out}: another process is training into it; choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


# the settings that a resumed run may change: how long, how often, where
CHANGEABLE = (
    "steps",
    "eval_every",
    "eval_tokens",
    "save_every",
    "log_every",
    "device",
    "threads",
    "cuda_graph",
    "tensorboard",
)


def check_same(
    out: Path, info: RunInfo, config: SpikeDecoderConfig, train: TrainConfig, fingerprint: str
) -> None:
    """ValueError if the run to be resumed is not the one in `out`."""
    for ours, theirs, free in (
        (info.config.to_dict(), config.to_dict(), ()),
        (info.train.to_dict(), train.to_dict(), CHANGEABLE),
    ):
        for name, value in ours.items():
            if name not in free and theirs[name] != value:
                raise ValueError(
                    f"{name}: got {theirs[name]!r}, but the run in {out} has {value!r}; resuming can "
                    f"change only {', '.join(CHANGEABLE)}"
                )
    if fingerprint != info.fingerprint:
        raise ValueError(
            f"text: not the one that the run in {out} began with (its tokens differ); give that text, or "
            "start a new run"
        )
