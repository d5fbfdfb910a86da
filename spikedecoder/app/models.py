"""The trained models on this disk, and those of them that are in memory."""

from __future__ import annotations

import copy
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spikedecoder.checkpoint import CONFIG, TOKENIZER, WEIGHTS, CheckpointError, read_config, read_json
from spikedecoder.kinds import kind_of
from spikedecoder.model import SpikeDecoder

TOKENS = ("characters", "words")
_DEPTH = 4  # levels of folders to search below a root
_IN_MEMORY = 6


@dataclass(frozen=True)
class Found:
    """A model on disk: its folder, what to call it, its kind, and what it reads (one of TOKENS)."""

    path: str
    label: str
    kind: str
    tokens: str


@dataclass
class Loaded:
    """A model in memory. `watched` is a copy for hooks, to be used under `lock`: hooks see every call."""

    model: SpikeDecoder
    watched: SpikeDecoder
    path: str
    label: str
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def about(self) -> str:
        """A one-line description of the model."""
        c = self.model.config
        parts = [
            kind_of(c),
            tokens_of(self.model.tokenizer.kind),
            f"{c.blocks} blocks of {c.embed_dim} channels",
            *([f"T = {c.binary_timesteps}"] if c.spiking_attention else []),
            f"context {c.max_len}",
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters",
        ]
        return ", ".join(parts)


class Library:
    """The models below some folders, searched for at each call; keeps the last few in memory. Thread-safe."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self.roots = [Path(root) for root in roots]
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, tuple[tuple[int, ...], Loaded]] = OrderedDict()

    def find(self, kind: str | None = None, tokens: str | None = None) -> list[Found]:
        """The models on disk now; if given, only those of one kind, or of characters or words."""
        found: dict[str, Found] = {}
        for root in self.roots:
            for folder in _model_folders(root, _DEPTH):
                model = _look(folder, root)
                if model is not None:
                    found.setdefault(model.path, model)
        same = Counter(m.label for m in found.values())  # two roots may each have a folder of that name
        named = (replace(m, label=m.path) if same[m.label] > 1 else m for m in found.values())
        models = sorted(named, key=lambda m: m.label)
        return [m for m in models if kind in (None, m.kind) and tokens in (None, m.tokens)]

    def get(self, path: str | None) -> Loaded:
        """The model in that folder, as it is on disk now; ValueError if there is none (any more)."""
        if not path:
            raise ValueError("checkpoint: none chosen; take one from the list, or train one first")
        with self._lock:
            folder = model_folder(Path(path))
            known = self._loaded.get(path)
            if folder is None:
                self._loaded.pop(path, None)
                was = " any more" if known else ""
                raise ValueError(
                    f"checkpoint: {path} holds no model{was}; takes a folder with {CONFIG} and {WEIGHTS}, "
                    "or a training run's"
                )
            stamp = _stamp(folder)
            if known is None or known[0] != stamp:
                model = SpikeDecoder.from_pretrained(folder)
                if model.tokenizer is None:
                    raise ValueError(
                        f"checkpoint: {folder} has no {TOKENIZER}, so its tokens cannot become text"
                    )
                label = next((_label(Path(path), root) for root in self.roots if _below(path, root)), path)
                label = next((m.label for m in self.find() if m.path == path), label)
                known = stamp, Loaded(model, copy.deepcopy(model), path, label)
            self._loaded[path] = known
            self._loaded.move_to_end(path)
            while len(self._loaded) > _IN_MEMORY:
                self._loaded.popitem(last=False)
            return known[1]


def model_folder(folder: Path) -> Path | None:
    """The folder with the model: `folder` itself, or best/ or last/ of a run; None if there is none."""
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    return None


def tokens_of(kind: str) -> str:
    return "words" if "word" in kind else "characters"


def _model_folders(root: Path, depth: int, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    try:
        real = root.resolve()
        if real in above:  # a link that leads back
            return
        if model_folder(root) is not None:
            yield root
            return
        if depth == 0:
            return
        entries = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return
    for entry in entries:
        if not Path(entry).name.startswith("."):
            yield from _model_folders(Path(entry), depth - 1, (*above, real))


def _look(folder: Path, root: Path) -> Found | None:
    """The model in a folder; None if its description cannot be read (it may be being written)."""
    where = model_folder(folder)
    if where is None:
        return None
    try:
        config = read_config(where / CONFIG)
        tokens = tokens_of(str(read_json(where / TOKENIZER).get("kind")))
    except CheckpointError:
        return None
    return Found(str(folder), _label(folder, root), kind_of(config), tokens)


def _below(path: str, root: Path) -> bool:
    return Path(path).resolve().is_relative_to(root.resolve())


def _label(folder: Path, root: Path) -> str:
    if not _below(str(folder), root):  # a link to elsewhere: use its name here
        return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)
    inside = folder.resolve().relative_to(root.resolve())
    return str(inside) if str(inside) != "." else folder.resolve().name


def _stamp(folder: Path) -> tuple[int, ...]:
    return tuple((folder / name).stat().st_mtime_ns for name in (CONFIG, WEIGHTS))
