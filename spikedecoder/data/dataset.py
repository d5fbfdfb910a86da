"""From text to training windows: tokens in a memory-mapped file, split into train and held-out parts."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikedecoder.fields import is_integer

from ._files import atomic_writer, default_cache_dir, make_cache_dir, sha256_of_file
from .corpora import CORPORA, STDIN, builtin_text, download_corpus, read_text_files
from .text import count_lost_letters, original_dictionary
from .tokenizers import CharTokenizer, Tokenizer, WordTokenizer, check_known, tokenizer_from_dict

TOKENIZER_KINDS = ("char", "original-char", "word", "original-word")
IGNORED = -100  # a target that torch's cross_entropy leaves out of the loss
BUILTIN = "builtin"

_VERSION = 1  # of the cached files; part of their key
_CHUNK_CHARACTERS = 1 << 20
_LONGEST_PATH = 4096

Chunks = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Corpus:
    """A text as token ids, split into a train part and a held-out part.

    Attributes:
        name: the text's name (file names, or the name of the corpus).
        tokenizer: the tokenizer that made the ids.
        train, val: 1-D arrays of ids, mapped from the cache file, read-only.
        characters: length of the text in characters; the last ``val_characters`` of them are held out.
        fingerprint: SHA-256 over text, tokenizer and split; equal fingerprints mean equal ids.
        lost: how many letters and digits of the text the tokenizer's rules leave out: those other than a to
            z. 0 for kind "char", which keeps everything.
    """

    name: str
    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    characters: int
    val_characters: int
    fingerprint: str
    lost: int = 0

    @property
    def unknown(self) -> float:
        """The share of the held-out tokens that are the unknown token; 0 if the tokenizer has none."""
        unk = self.tokenizer.unk_id
        return 0.0 if unk is None else float(np.count_nonzero(self.val == unk) / len(self.val))

    @property
    def left_out(self) -> str:
        """In words, what the tokenizer left out of the text."""
        return (
            f"the tokenizer {self.tokenizer.kind} leaves out {self.lost:,} letters and digits of the text "
            f"({self.lost / self.characters:.1%} of its characters), all but a to z"
        )


def prepare_corpus(
    texts: Sequence[str | Path] | None = None,
    *,
    corpus: str | None = None,
    tokenizer: str | Tokenizer = "char",
    min_count: int = 1,
    val_fraction: float = 0.1,
    cache_dir: str | Path | None = None,
    max_chars: int | None = None,
    encoding: str = "utf-8",
) -> Corpus:
    """Encode a text, or find it encoded in the cache.

    The text is ``texts`` (paths, joined; ``-`` is standard input; in ``encoding``) or ``corpus`` ("builtin"
    or a name in ``CORPORA``); if neither is given, the built-in text. ``max_chars`` keeps only its beginning.

    The text is split before anything else, by characters: the last ``val_fraction`` is held out, and windows
    are cut from each part separately, so that no training window contains held-out text.

    ``tokenizer`` is a ``CharTokenizer`` or ``WordTokenizer``, which is used as it is, or a name that says
    where the vocabulary comes from:

    * "char": the whole text. The vocabulary only says which characters exist; otherwise one that occurs in
      the held-out part alone would be an unknown token there, and the text could not be restored.
    * "word": the train part. A model has to cope with whatever words the held-out part uses; a vocabulary
      that included them would hide the unknown words and flatter the held-out figures.
    * "original-char": the fixed alphabet of the original.
    * "original-word": the whole text, as in the original.

    With "word" and "original-word", words seen less than ``min_count`` times are not in the vocabulary.

    The text is streamed, never held in memory, into a file in ``cache_dir`` (None: ``default_cache_dir()``)
    named by a hash of content, tokenizer and split. A cached file is used only if its length and checksum are
    right; otherwise it is made again.

    Raises ValueError (bad argument; empty, binary or wrongly encoded file; text with nothing to hold out),
    TypeError, FileNotFoundError, DownloadError.
    """
    if texts is not None and corpus is not None:
        raise ValueError("texts and corpus: expected one of them, got both")
    if isinstance(texts, (str, Path)):
        texts = [texts]
    if texts is not None:
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, (str, Path)) for t in texts):
            raise TypeError(f"texts: expected paths of files, got {type(texts).__name__}")
        if not texts:
            raise ValueError("texts: expected at least one file, got none")
        for given in map(str, texts):
            if "\n" in given or len(given) > _LONGEST_PATH:
                raise ValueError(f"texts: expected paths of files, got a text, {given[:30]!r}...")
    if not isinstance(tokenizer, str):
        check_known(tokenizer, "tokenizer", also="a name, ")
    elif tokenizer not in TOKENIZER_KINDS:
        raise ValueError(f"tokenizer: expected one of {', '.join(TOKENIZER_KINDS)}, got {tokenizer!r}")
    min_count = _count("min_count", min_count)
    if not isinstance(val_fraction, (int, float)) or not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction: expected a number between 0 and 1, got {val_fraction!r}")
    if max_chars is not None:
        max_chars = _count("max_chars", max_chars)

    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    with ExitStack() as stack:
        name, source = _text_source(texts, corpus, folder, encoding, stack)

        def chunks(start: int = 0, stop: int | None = max_chars) -> Iterator[str]:
            return _characters(source(), start, stop)

        digest = hashlib.sha256()
        characters = lost = 0
        kind = tokenizer if isinstance(tokenizer, str) else tokenizer.kind
        for chunk in _hashed(chunks(), digest):
            characters += len(chunk)
            lost += 0 if kind == "char" else count_lost_letters(chunk, words="word" in kind)
        val_characters = round(characters * val_fraction)
        cut = characters - val_characters
        if cut == 0 or val_characters == 0:
            raise ValueError(
                f"{name}: {characters} characters cannot be split with val_fraction={val_fraction}: "
                f"expected a longer text"
            )

        key = _key(digest.hexdigest(), cut, tokenizer, min_count)
        path = folder / "tokens" / f"{key}.bin"
        found = _load(path)
        if found is None:
            make_cache_dir(path.parent)
            made = _tokenizer(tokenizer, min_count, chunks, cut)
            _write(path, made, (chunks(0, cut), chunks(cut, characters)), digest.hexdigest())
            found = _load(path)
            if found is None:
                raise OSError(f"{path}: what was just written cannot be read back; is the disk failing?")
    made, train, val = found
    return Corpus(name, made, train, val, characters, val_characters, key, lost)


def check_context(corpus: Corpus, seq_len: int) -> None:
    """ValueError if the train part has no window of ``seq_len`` tokens, or the held-out part no target."""
    if len(corpus.train) < seq_len + 1:
        raise ValueError(
            f"{corpus.name}: the text is shorter than the context: its train part has {len(corpus.train)} "
            f"tokens, and a context of {seq_len} needs at least {seq_len + 1}; give more text or a shorter "
            f"context" + (f"; {corpus.left_out}" if corpus.lost else "")
        )
    if len(corpus.val) < 2:
        raise ValueError(
            f"{corpus.name}: the held-out part has {len(corpus.val)} tokens, and at least 2 are needed to "
            f"predict one (the context is {seq_len}); give more text or a larger val_fraction"
        )


class WindowSampler:
    """Random training windows as a pure function of (seed, step).

    The windows of a step come from a counter-based generator (Philox: key = seed, counter = step), so there
    is no state to save: a resumed run gets the same windows for step n. Window starts are uniform (64-bit
    draws modulo the number of windows). With ``world_size`` processes, process ``rank`` gets its share of one
    common batch of ``world_size * batch_size`` windows. Raises ValueError naming the bad argument.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        seq_len, batch_size = _count("seq_len", seq_len), _count("batch_size", batch_size)
        world_size = _count("world_size", world_size)
        if not is_integer(rank) or not 0 <= rank < world_size:
            raise ValueError(
                f"rank: expected an integer from 0 to world_size - 1 = {world_size - 1}, got {rank!r}"
            )
        if not is_integer(seed) or not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
        if len(tokens) < seq_len + 1:
            raise ValueError(f"tokens: a window of {seq_len} needs {seq_len + 1} tokens, got {len(tokens)}")
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._offsets = np.arange(seq_len + 1)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, int64 ``[batch_size, seq_len]``; targets are one token ahead."""
        if not is_integer(step) or step < 0:
            raise ValueError(f"step: expected an integer of 0 or more, got {step!r}")
        # `step` is the second word of the counter: each step has 2**64 draws before it reaches the next.
        generator = np.random.Philox(key=self.seed, counter=[0, step, 0, 0])
        draws = generator.random_raw(self.batch_size * self.world_size)
        mine = draws[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        starts = (mine % np.uint64(len(self.tokens) - self.seq_len)).astype(np.int64)
        windows = torch.from_numpy(self.tokens[starts[:, None] + self._offsets].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def held_out_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, max_tokens: int | None = None, pad_id: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of consecutive, non-overlapping windows, in batches of at most ``batch_size``.

    Every token but the first (nothing precedes it) is a target exactly once; ``max_tokens`` stops after that
    many targets. In the last window, positions beyond the end hold ``pad_id`` as input and -100, which
    cross-entropy ignores, as target. Both are int64 ``[<= batch_size, seq_len]``.
    """
    seq_len, batch_size = _count("seq_len", seq_len), _count("batch_size", batch_size)
    if len(tokens) < 2:
        raise ValueError(f"tokens: expected at least 2, one to predict the other from, got {len(tokens)}")
    count = len(tokens) - 1
    if max_tokens is not None:
        count = min(count, _count("max_tokens", max_tokens))
    return _held_out(tokens, count, seq_len, batch_size, pad_id)


def _held_out(
    tokens: np.ndarray, count: int, seq_len: int, batch_size: int, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, count, seq_len * batch_size):
        length = min(seq_len * batch_size, count - start)
        rows = -(-length // seq_len)
        inputs = np.full(rows * seq_len, pad_id, dtype=np.int64)
        targets = np.full(rows * seq_len, IGNORED, dtype=np.int64)
        inputs[:length] = tokens[start : start + length]
        targets[:length] = tokens[start + 1 : start + 1 + length]
        shape = (rows, seq_len)
        yield torch.from_numpy(inputs.reshape(shape)), torch.from_numpy(targets.reshape(shape))


def _count(what: str, value: Any) -> int:
    """``value`` as an int; ValueError unless it is an integer of 1 or more."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{what}: expected an integer of 1 or more, got {value!r}")
    return int(value)


def _text_source(
    texts: Sequence[str | Path] | None, corpus: str | None, cache_dir: Path, encoding: str, stack: ExitStack
) -> tuple[str, Chunks]:
    """A name for the text, and a function that streams it from the beginning each time it is called."""
    if texts is None and corpus in (None, BUILTIN):
        text = builtin_text()
        return BUILTIN, lambda: iter([text])
    if texts is None:
        if corpus not in CORPORA:
            known = ", ".join([BUILTIN, *CORPORA])
            raise ValueError(f"corpus: expected one of {known}, got {corpus!r}")
        downloaded = download_corpus(corpus, cache_dir)
        return corpus, lambda: read_text_files([downloaded])
    paths = list(texts)
    if sum(str(path) == STDIN for path in paths) > 1:
        raise ValueError("texts: expected '-' (standard input) at most once")
    name = "+".join("stdin" if str(path) == STDIN else Path(path).name for path in paths)
    if any(str(path) == STDIN or _is_stream(path) for path in paths):
        # A stream can be read only once, but the text is read several times.
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spikedecoder-"))) / "text"
        with atomic_writer(spool) as file:
            for chunk in read_text_files(paths, encoding):
                file.write(chunk.encode("utf-8"))
        return name, lambda: read_text_files([spool])
    return name, lambda: read_text_files(paths, encoding)


def _is_stream(path: str | Path) -> bool:
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def _characters(chunks: Iterable[str], start: int, stop: int | None) -> Iterator[str]:
    """Characters ``start`` to ``stop`` of a stream, in chunks of bounded size."""
    position = 0
    for chunk in chunks:
        if stop is not None and position >= stop:
            return
        first = max(start - position, 0)
        last = len(chunk) if stop is None else min(len(chunk), stop - position)
        for i in range(first, last, _CHUNK_CHARACTERS):
            yield chunk[i : min(i + _CHUNK_CHARACTERS, last)]
        position += len(chunk)


def _tokenizer(
    wanted: str | Tokenizer, min_count: int, chunks: Callable[..., Iterator[str]], cut: int
) -> Tokenizer:
    if isinstance(wanted, Tokenizer):
        return wanted
    if wanted == "char":
        return CharTokenizer.from_text(chunks())
    if wanted == "original-char":
        return CharTokenizer.original()
    if wanted == "word":
        return WordTokenizer.from_text(chunks(0, cut), min_count)
    return WordTokenizer.original(original_dictionary(chunks(), min_count))


def _key(text_sha256: str, cut: int, tokenizer: str | Tokenizer, min_count: int) -> str:
    spec: Any = tokenizer.to_dict() if isinstance(tokenizer, Tokenizer) else [tokenizer]
    if spec in (["word"], ["original-word"]):
        spec.append(min_count)
    return hashlib.sha256(json.dumps([_VERSION, text_sha256, cut, spec]).encode("ascii")).hexdigest()


def _hashed(chunks: Iterable[str], digest: Any) -> Iterator[str]:
    for chunk in chunks:
        digest.update(chunk.encode("utf-8", "surrogatepass"))
        yield chunk


def _write(path: Path, tokenizer: Tokenizer, parts: Sequence[Iterable[str]], text_sha256: str) -> None:
    digest, text_digest = hashlib.sha256(), hashlib.sha256()
    lengths = []
    with atomic_writer(path) as file:
        for part in parts:
            lengths.append(0)
            for ids in tokenizer.encode_stream(_hashed(part, text_digest)):
                data = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
                file.write(data)
                digest.update(data)
                lengths[-1] += len(ids)
        if text_digest.hexdigest() != text_sha256:  # the tokens would not match their key in the cache
            raise ValueError("texts: the text changed while it was being read; try again when it is complete")
    description = {
        "dtype": tokenizer.dtype.name,
        "train": lengths[0],
        "val": lengths[1],
        "sha256": digest.hexdigest(),
        "tokenizer": tokenizer.to_dict(),
    }
    # Written last: a token file without its description is ignored.
    with atomic_writer(path.with_suffix(".json")) as file:
        file.write(json.dumps(description).encode("ascii"))


def _load(path: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray] | None:
    """What ``_write`` wrote, or None if it is missing or not whole."""
    try:
        description = json.loads(path.with_suffix(".json").read_bytes())
        dtype = np.dtype(description["dtype"]).newbyteorder("<")
        train, val = int(description["train"]), int(description["val"])
        tokenizer = tokenizer_from_dict(description["tokenizer"])
        if path.stat().st_size != (train + val) * dtype.itemsize:
            return None
        if sha256_of_file(path) != description["sha256"]:
            return None
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
    if train + val == 0:  # an empty file cannot be mapped
        return tokenizer, np.zeros(0, dtype), np.zeros(0, dtype)
    ids = np.memmap(path, dtype=dtype, mode="r")
    return tokenizer, ids[:train], ids[train:]
