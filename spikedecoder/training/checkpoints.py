"""Checkpoints of a run. Each one is whole or absent, at whatever point the process ends.

    OUT/run.json                    what the run is: model, settings, text
    OUT/metrics.jsonl               a line per `log_every` steps and per evaluation
    OUT/checkpoints/step-00000400/  config.json, model.safetensors, tokenizer.json,
                                    optimizer.safetensors, trainer.json
    OUT/last, OUT/best              links to folders in checkpoints/

A checkpoint is written into a hidden folder, forced to disk and renamed. Then its link is replaced, in one
atomic step; only after that are the folders deleted that no link points to. On file systems without links,
`last` and `best` are copies, and the folder in checkpoints/ is kept until they are whole.
Nothing in a checkpoint depends on the time, so equal runs write equal bytes.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikedecoder._files import temporary_folder
from spikedecoder.checkpoint import (
    WEIGHTS,
    CheckpointError,
    load_state,
    read_json,
    read_tensors,
    save_folder,
    write_json,
    write_tensors,
)
from spikedecoder.model import SpikeDecoder
from spikedecoder.training.evaluate import Evaluation

CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"
OPTIMIZER, TRAINER = "optimizer.safetensors", "trainer.json"
_WRITING = ".writing-"
_NAMES = re.compile(rf"step-\d{{8,}}(\.\d+)?|{re.escape(_WRITING)}[0-9a-f]{{8}}")
_FORMAT = "spikedecoder-trainer"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def save_checkpoint(
    out: Path, step: int, model: SpikeDecoder, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write a checkpoint of `step` and return its folder; no link points to it yet."""
    parent = out / CHECKPOINTS
    parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(parent, _WRITING)
    try:
        save_folder(model, temporary)
        write_tensors(temporary / OPTIMIZER, optimizer_tensors(model, optimizer), {"step": str(step)})
        write_json(temporary / TRAINER, {"format": _FORMAT, "version": 1, "step": step, **state})
        _sync(temporary)
        folder = _free(parent, f"step-{step:08d}")
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(parent)
    return folder


def publish(out: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Point `names` (of "last", "best") to the checkpoint `folder`, then `collect`."""
    for name in names:
        _link(out / name, folder)
    _sync(out)
    collect(out)


def collect(out: Path) -> None:
    """Delete checkpoints that neither link points to, and those that a killed process left unfinished."""
    kept = {(out / name).resolve() for name in (LAST, BEST)}
    if (out / LAST).exists():
        _delete(folder for folder in _own(out) if folder.resolve() not in kept)


def drop(out: Path) -> None:
    """Delete all checkpoints of a run, and the links to them."""
    for link in (out / BEST, out / LAST):
        if link.is_symlink():
            link.unlink()
        else:
            shutil.rmtree(link, ignore_errors=True)
    _delete(_own(out))
    with suppress(OSError):  # holds more than checkpoints, or is not there
        (out / CHECKPOINTS).rmdir()


def _own(out: Path) -> list[Path]:
    """The folders that `save_checkpoint` made; nothing else in there is the run's to delete."""
    parent = out / CHECKPOINTS
    if parent.is_symlink() or not parent.is_dir():  # a link may lead to another run's
        return []
    return [folder for folder in parent.iterdir() if _NAMES.fullmatch(folder.name)]


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def latest(out: Path) -> Path | None:
    """The folder of the last checkpoint; None if the run has none yet. CheckpointError if it is gone."""
    last = out / LAST
    if last.exists():
        return last.resolve()
    whole = sorted((out / CHECKPOINTS).glob("step-*"))  # killed between writing and linking
    if last.is_symlink() and not whole:
        raise CheckpointError(
            f"{last}: leads to {os.readlink(last)}, which is not there; put it back, or start anew"
        )
    return whole[-1] if whole else None


def read_step(folder: Path) -> int:
    """How many steps the run had done at this checkpoint."""
    step = _read_state(folder)["step"]
    assert isinstance(step, int)
    return step


def _read_state(folder: Path) -> dict[str, Any]:
    state = read_json(folder / TRAINER)
    if state.get("format") != _FORMAT or state.get("version") != 1:
        raise CheckpointError(f"{folder / TRAINER}: not the state of a training run")
    for name, (fits, takes) in _STATE.items():
        if name not in state:
            raise CheckpointError(f"{folder / TRAINER}: {name} is missing")
        if not fits(state[name]):
            got = reprlib.repr(state[name])
            raise CheckpointError(f"{folder / TRAINER}: {name}: got {got}, takes {takes}")
    return state


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _has_numbers(value: object, *names: str) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in names or value)


def _is_evaluation(value: Any) -> bool:
    try:
        own = vars(Evaluation(**value))
    except TypeError:
        return False
    numbers = ("loss", "bits", "accuracy", "tokens", "of_tokens")
    return _has_numbers(own, *numbers) and all(_has_numbers(own[name]) for name in own.keys() - {*numbers})


_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_STATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a number of steps"),
    "recent_losses": (lambda v: isinstance(v, list) and all(map(_is_number, v)), "a list of numbers"),
    "best": (
        lambda v: v == {} or _has_numbers(v, "step", "val_loss", "val_bits_per_token"),
        "numbers as step, val_loss and val_bits_per_token, or none of them",
    ),
    "evaluated": (lambda v: _is_count(v, -1), "a number of steps, or -1"),
    "evaluation": (lambda v: v is None or _is_evaluation(v), "the fields of an Evaluation, or null"),
    "warnings": (lambda v: isinstance(v, list) and all(isinstance(w, str) for w in v), "a list of strings"),
    "scaler": (lambda v: not v or _has_numbers(v, *_SCALER), f"numbers as {', '.join(_SCALER)}, or null"),
}


def load_checkpoint(folder: Path, model: SpikeDecoder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights and optimiser state in place; returns the content of trainer.json."""
    state = _read_state(folder)
    load_state(model, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    restore_optimizer(model, optimizer, read_tensors(folder / OPTIMIZER), folder / OPTIMIZER)
    return state


def optimizer_tensors(model: SpikeDecoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state under the parameters' names: "exp_avg/blocks.0. ...", "step/..."."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{kind}/{names[id(p)]}": value.detach().clone()
        for p, entry in optimizer.state.items()
        for kind, value in entry.items()
    }


def restore_optimizer(
    model: SpikeDecoder, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: Path
) -> None:
    """The inverse of `optimizer_tensors`; CheckpointError if a tensor is missing or does not fit."""
    parameters = dict(model.named_parameters())
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters or kind not in ("step", "exp_avg", "exp_avg_sq"):
            raise CheckpointError(f"{source}: unknown tensor {key}")
        takes = () if kind == "step" else tuple(parameters[name].shape)
        if value.shape != takes:
            raise CheckpointError(f"{source}: {key} has shape {tuple(value.shape)}, takes {takes}")
        by_name.setdefault(name, {})[kind] = value
    for name, entry in by_name.items():
        if len(entry) != 3:
            raise CheckpointError(f"{source}: incomplete state of {name}: got only {', '.join(entry)}")
    description = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in parameters.items()}
    description["state"] = {i: by_name[names[id(p)]] for i, p in enumerate(order) if names[id(p)] in by_name}
    optimizer.load_state_dict(description)


def _free(parent: Path, name: str) -> Path:
    candidate, n = parent / name, 1
    while candidate.exists():
        candidate, n = parent / f"{name}.{n}", n + 1
    return candidate


def _link(link: Path, folder: Path) -> None:
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(Path(CHECKPOINTS) / folder.name, temporary, target_is_directory=True)
    except OSError as error:
        if error.errno not in _NO_LINKS and os.name != "nt":
            raise
        _copy(link, folder)
        return
    os.replace(temporary, link)


def _copy(target: Path, folder: Path) -> None:
    """For file systems without links. Meanwhile `folder` stays whole, so that `latest` finds it."""
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(folder, new)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Force a folder's entries to disk, if the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
