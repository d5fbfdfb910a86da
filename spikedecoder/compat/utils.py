"""The original's text readers, datasets and checkpoint functions under their old names.

Differences from the original: any path is accepted; a text is kept once and its windows are cut on access,
where the original kept every window; checkpoints are folders that the rest of this package reads, too.

The split is the original's: the first 90 % of all windows train, the rest test. Neighbouring windows overlap
in all but one token, so the last training windows and the first test windows share text, which makes the test
loss near that border a little too low. `spikedecoder.data.prepare_corpus` splits the text itself instead.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from torch.utils.data import Dataset

from spikedecoder.checkpoint import CONFIG, CheckpointError, load_state, read_config
from spikedecoder.compat.convert import convert_original
from spikedecoder.compat.model import _Config, _Shim
from spikedecoder.data import clean_characters, original_dictionary, read_text_files
from spikedecoder.data.text import iter_clean_characters, iter_clean_words
from spikedecoder.model import SpikeDecoder

DEFAULT_PATH = "literature/leo tolstoy - war and peace.txt"
SPLITS = ("train", "test")
_RANDOM = "abcdefghijklmnopqrstuvwxyz' ."


class Text(Protocol):
    """A cleaned text, of characters or words."""

    def __len__(self) -> int: ...

    def cut(self, start: int, stop: int) -> Any: ...


class Characters:
    def __init__(self, text: bytes) -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self.text)

    def cut(self, start: int, stop: int) -> str:
        return self.text[start:stop].decode("ascii")


class Words:
    """Words stored as numbers: a few bytes each, and equal words share one string."""

    def __init__(self, words: Iterator[list[str]], dictionary: Sequence[str] | None) -> None:
        self.words = [] if dictionary is None else list(dictionary)
        known = {word: i for i, word in enumerate(self.words)}
        ids = array("I")
        for part in words:
            if dictionary is None:
                ids.extend(known.setdefault(word, len(known)) for word in part)
            else:
                ids.extend(known[word] for word in part if word in known)
        if dictionary is None:
            self.words = list(known)
        self.ids = np.frombuffer(ids, dtype=np.uint32) if ids else np.zeros(0, np.uint32)

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> list[str]:
        return [self.words[i] for i in self.ids[start:stop]]


class Windows(Sequence[Any]):
    """Windows of `length` tokens of a text, cut on access: strings, or lists of words."""

    def __init__(self, text: Text, length: int, starts: range | np.ndarray, shift: int = 0) -> None:
        self.text, self.length, self.starts, self.shift = text, length, starts, shift

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Windows: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return type(self)(self.text, self.length, self.starts[index], self.shift)
        start = int(self.starts[index]) + self.shift
        return self.text.cut(start, start + self.length)


class Reader:
    """Reads texts. `dictionary`: the last one that it made, or None."""

    def __init__(self) -> None:
        self.dictionary: list[str] | None = None

    def read(self, path: str | Path = DEFAULT_PATH, sampleLength: int = 10) -> tuple[Windows, Windows]:
        """Every window of `sampleLength` characters of the cleaned text, and the same windows one character
        later. Raises ValueError if the text has at most `sampleLength` characters."""
        text = Characters(b"".join(iter_clean_characters(read_text_files([path]))))
        return _windows(text, sampleLength, str(path), "characters")

    def readWords(self, path: str | Path = DEFAULT_PATH, sampleLength: int = 10) -> tuple[Windows, Windows]:
        """Every window of `sampleLength` words of the cleaned text, and the same windows one word later.
        Words that are not in `dictionary` are left out first; with None all are kept. Raises as `read`."""
        text = Words(iter_clean_words(read_text_files([path])), self.dictionary)
        return _windows(text, sampleLength, str(path), "words of the dictionary")

    def createDictionary(
        self, path: str | Path = DEFAULT_PATH, prune_level: int | None = None, srcLength: int = 0
    ) -> list[str]:
        """Sorted list of the words seen at least `prune_level` times, "." and "P" (padding); kept in
        `dictionary`.

        prune_level: None keeps every word. srcLength: look at only the first so many words; 0 is all.
        """
        if not isinstance(srcLength, int) or srcLength < 0:
            raise ValueError(f"srcLength: got {srcLength!r}, takes an integer >= 0 (0 is all words)")
        self.dictionary = original_dictionary(read_text_files([path]), prune_level, srcLength or None)
        return self.dictionary

    def clean(self, x: str) -> str:
        """`x` cleaned to the original's alphabet of characters."""
        return clean_characters(x, collapse_spaces=False)


class _WindowDataset(Dataset[tuple[Any, Any]]):
    """Item i is (fdata[i], ftargets[i]): a window of this split, and the same window one token on."""

    alphabet: Sequence[str]

    def __init__(
        self,
        data: Windows,
        targets: Windows,
        split: str,
        splitFactor: float,
        seed: int | None,
        randomTest: bool,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, takes one of {', '.join(SPLITS)}")
        if not 0 < splitFactor < 1:
            raise ValueError(f"splitFactor: got {splitFactor!r}, takes a number between 0 and 1")
        self.split, self.data, self.targets = split, data, targets
        n = len(data)
        if randomTest:
            draw = np.random.RandomState(seed).rand if seed else np.random.rand
            train = draw(n) <= splitFactor
            kept: Any = np.flatnonzero(train if split == "train" else ~train)
        else:
            border = round(n * splitFactor)
            kept = slice(0, border) if split == "train" else slice(border, n)
        starts = np.asarray(data.starts)[kept] if randomTest else data.starts[kept]
        if not len(starts):
            raise ValueError(
                f"split: {split!r} has none of the {n} windows; takes a longer text, another splitFactor"
            )
        self.fdata = Windows(data.text, data.length, starts)
        self.ftargets = Windows(data.text, data.length, starts, shift=1)

    def __len__(self) -> int:
        return len(self.fdata)

    def __getitem__(self, idx: int) -> tuple[Any, Any]:
        return self.fdata[idx], self.ftargets[idx]

    def get_vocab_size(self) -> int:
        return len(self.alphabet)


class charDataset(_WindowDataset):
    """Windows of characters of a text file.

    Args:
        src: a path; or "alphabet" (the 26 windows of the endlessly repeated alphabet, in an order drawn from
            seed), or "random" (`fullLength` random characters, the same at each call).
        split: "train" or "test".
        inputLength: characters per window.
        fullLength: use only the first so many windows; 0 is all.
        seed: for randomTest and "alphabet"; None or 0 takes numpy's global generator.
        splitFactor: share of the windows that train, between 0 and 1.
        randomTest: draw the split window by window instead of cutting once.
        fullwords: windows of words instead, with a dictionary of all words of the text.
    """

    def __init__(
        self,
        src: str | Path,
        split: str,
        inputLength: int = 6,
        fullLength: int = 130,
        seed: int | None = None,
        splitFactor: float = 0.9,
        randomTest: bool = False,
        fullwords: bool = False,
    ) -> None:
        _check_limit(fullLength)
        self.src, self.inputLength, self.fullLength, self.reader = src, inputLength, fullLength, Reader()
        self.alphabet = "abcdefghijklmnopqrstuvwxyz.'P "
        if src == "alphabet":
            text = Characters((self.alphabet[:26] * (inputLength // 26 + 2)).encode())
            order = np.random.RandomState(seed).permutation(26) if seed else np.random.permutation(26)
            data, targets = (Windows(text, inputLength, order, shift) for shift in (0, 1))
        elif src == "random":
            draw = random.Random(7)
            text = Characters("".join(draw.choice(_RANDOM) for _ in range(fullLength)).encode())
            data, targets = _windows(text, inputLength, "random", "characters")
        elif fullwords:
            self.alphabet = self.reader.createDictionary(src)
            data, targets = _limited(self.reader.readWords(src, inputLength), fullLength)
        else:
            data, targets = _limited(self.reader.read(src, inputLength), fullLength)
        super().__init__(data, targets, split, splitFactor, seed, randomTest)


class wordDataset(_WindowDataset):
    """Windows of words of a text file; other arguments are as in `charDataset`.

    reader: provides the dictionary. Without a reader, or if it has none yet, the dictionary is made of the
    first `fullLength` words of `src` (0: of all).
    """

    def __init__(
        self,
        src: str | Path,
        split: str,
        inputLength: int = 6,
        fullLength: int = 130,
        seed: int | None = None,
        splitFactor: float = 0.9,
        randomTest: bool = False,
        reader: Reader | None = None,
    ) -> None:
        _check_limit(fullLength)
        self.src, self.inputLength, self.fullLength = src, inputLength, fullLength
        self.reader = Reader() if reader is None else reader
        dictionary = self.reader.dictionary
        self.alphabet = (
            self.reader.createDictionary(src, srcLength=fullLength) if dictionary is None else dictionary
        )
        data, targets = _limited(self.reader.readWords(src, inputLength), fullLength)
        super().__init__(data, targets, split, splitFactor, seed, randomTest)


def _windows(text: Text, length: int, name: str, unit: str) -> tuple[Windows, Windows]:
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"sampleLength: got {length!r}, takes an integer >= 1")
    if len(text) <= length:
        raise ValueError(f"{name}: has {len(text)} {unit}, takes more than the {length} of one window")
    starts = range(len(text) - length)
    return Windows(text, length, starts), Windows(text, length, starts, shift=1)


def _check_limit(limit: int) -> None:
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"fullLength: got {limit!r}, takes an integer >= 0 (0 is all windows)")


def _limited(windows: tuple[Windows, Windows], limit: int) -> tuple[Windows, Windows]:
    data, targets = windows
    return (data[:limit], targets[:limit]) if limit else (data, targets)


def save_model_to_checkpoint(
    model: _Shim,
    batch_size: int,
    dataSize: int,
    path_to_checkpoint: str | Path = "checkpoints",
    epoch: int = 0,
) -> Path:
    """Save into a new folder in `path_to_checkpoint`, named by epoch, batch size, data size and time.

    Returns the folder. It holds config.json, model.safetensors and, if the model has a tokenizer,
    tokenizer.json; `SpikeDecoder.from_pretrained` and ``spikedecoder generate --checkpoint`` load it.
    """
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"checkpoint_epoch-{epoch}B{batch_size}_DS{dataSize}_{time}"
    folder, n = Path(path_to_checkpoint) / name, 1
    while folder.exists():
        n += 1
        folder = Path(path_to_checkpoint) / f"{name}_{n}"
    model.decoder.save_pretrained(folder)
    print(f"model saved in {folder}")
    return folder


def load_model_from_checkpoint(
    model_class: type[_Shim], path_to_checkpoint: str | Path = "checkpoints", **kwargs: Any
) -> _Shim:
    """``model_class(**kwargs)`` with the weights of a checkpoint.

    path_to_checkpoint: a folder that `save_model_to_checkpoint` wrote (or that of any model of this package),
    a ``.pt`` file of the original, or the original's path without its ``state_dict.pt``.

    Raises CheckpointError if it is none of these, or has the weights of another model.
    """
    shim = model_class(**kwargs)
    path = Path(path_to_checkpoint)
    if (path / CONFIG).is_file():
        saved, own = read_config(path / CONFIG), shim.decoder.config
        different = [k for k, v in saved.to_dict().items() if v != own.to_dict()[k]]
        if different:
            name, more = different[0], len(different) - 1
            raise CheckpointError(
                f"{path}: {name} is {getattr(saved, name)!r} there, {getattr(own, name)!r} in the given "
                f"config{f' (and {more} fields more differ)' if more else ''}"
            )
        tensors = SpikeDecoder.from_pretrained(path).state_dict()
    else:
        original = path if path.is_file() else Path(f"{path_to_checkpoint}state_dict.pt")
        if not original.is_file():
            raise CheckpointError(f"{path}: neither a folder with {CONFIG} nor a checkpoint of the original")
        config: _Config = shim.config
        dim_hid = shim.decoder.config.mlp_ratio
        tensors = convert_original(original, config.options, kind=config.kind, dim_hid=dim_hid).state_dict()
    load_state(shim.decoder, tensors, path)
    return shim
