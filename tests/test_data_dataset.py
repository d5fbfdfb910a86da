"""The cached corpus, the split, training windows and held-out windows."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spikedecoder.data.dataset as dataset
from spikedecoder.data import (
    CharTokenizer,
    Corpus,
    Tokenizer,
    WindowSampler,
    WordTokenizer,
    builtin_text,
    check_context,
    clean_characters,
    held_out_batches,
    prepare_corpus,
)
from spikedecoder.data._files import atomic_writer

TEXT = "".join(f"The {i} cats saw {i * i} dogs; naïve dog{i % 7}!\n" for i in range(200))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.mark.parametrize("small_chunks", [False, True])
def test_characters(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: bool) -> None:
    if small_chunks:
        monkeypatch.setattr(dataset, "_CHUNK_CHARACTERS", 7)
        monkeypatch.setattr("spikedecoder.data.corpora.BLOCK_BYTES", 13)
    corpus = prepare_corpus([book], cache_dir=tmp_path, val_fraction=0.2)
    cut = len(TEXT) - round(0.2 * len(TEXT))
    assert corpus.name == "book.txt" and corpus.characters == len(TEXT)
    assert corpus.val_characters == len(TEXT) - cut
    assert corpus.tokenizer == CharTokenizer.from_text(TEXT)
    assert isinstance(corpus.train, np.memmap) and corpus.train.dtype == np.uint8
    assert corpus.tokenizer.decode(corpus.train) == TEXT[:cut]
    assert corpus.tokenizer.decode(corpus.val) == TEXT[cut:]
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        corpus.name = "x"  # type: ignore[misc]


def test_vocabularies(book: Path, tmp_path: Path) -> None:
    book.write_text(TEXT + "zebra Ω zebra", "utf-8")
    text = book.read_text("utf-8")
    cut = len(text) - round(0.1 * len(text))
    char = prepare_corpus([book], cache_dir=tmp_path)
    assert "Ω" in char.tokenizer.tokens and "Ω" not in char.tokenizer.decode(char.train)
    word = prepare_corpus([book], cache_dir=tmp_path, tokenizer="word")
    assert "zebra" not in word.tokenizer.tokens and word.tokenizer.unk_id in word.val
    assert word.tokenizer == WordTokenizer.from_text(text[:cut])
    original = prepare_corpus([book], cache_dir=tmp_path, tokenizer="original-word", min_count=2)
    assert "zebra" in original.tokenizer.tokens
    letters = prepare_corpus([book], cache_dir=tmp_path, tokenizer="original-char")
    assert letters.tokenizer.decode(letters.train) == clean_characters(text[:cut])
    assert letters.tokenizer.decode(letters.val) == clean_characters(text[cut:])
    others = sum(c.isalnum() and not (c.isascii() and c.isalpha()) for c in text)
    assert [c.lost for c in (char, word, original, letters)] == [0, *[others] * 3] and others > 1
    book.write_text(TEXT + "\u212a\u0130é", "utf-8")  # of which words keep a k and an i
    kinds: list[str | Tokenizer] = ["original-char", "word", "original-word", word.tokenizer]
    losses = [prepare_corpus([book], cache_dir=tmp_path, tokenizer=kind).lost for kind in kinds]
    assert losses == [losses[1] + 2, *[losses[1]] * 3]
    book.write_text(text, "utf-8")
    own = prepare_corpus([book], cache_dir=tmp_path, tokenizer=word.tokenizer)
    np.testing.assert_array_equal(own.val, word.val)
    prints = {c.fingerprint for c in (char, word, original, letters, own)}
    assert len(prints) == 5


def test_builtin_is_the_default_and_max_chars(tmp_path: Path) -> None:
    corpus = prepare_corpus(cache_dir=tmp_path, max_chars=5000)
    assert corpus.name == "builtin" and corpus.characters == 5000
    assert corpus.tokenizer.decode(corpus.train) == builtin_text()[:4500]
    assert (
        prepare_corpus(corpus="builtin", cache_dir=tmp_path, max_chars=5000).fingerprint == corpus.fingerprint
    )


def test_several_files_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tmp_path / "a.txt"
    a.write_text("file " * 20)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xef\xbb\xbfstdin " * 20)))
    corpus = prepare_corpus([a, "-"], cache_dir=tmp_path)
    assert corpus.name == "a.txt+stdin"
    whole = corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val]))
    assert whole.startswith("file file") and whole.endswith("stdin ") and whole.count("\n") == 1
    with pytest.raises(ValueError, match=r"'-' \(standard input\) at most once"):
        prepare_corpus(["-", "-"], cache_dir=tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_named_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('pipe ' * 100)"])
    try:
        assert prepare_corpus([pipe], cache_dir=tmp_path).characters == 500
    finally:
        writer.wait(10)


def files_of(corpus: Corpus, cache: Path) -> tuple[Path, Path]:
    stem = cache / "tokens" / corpus.fingerprint
    return stem.with_suffix(".bin"), stem.with_suffix(".json")


def test_cache_is_used(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_corpus([book], cache_dir=tmp_path)
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert names == sorted(path.name for path in files_of(first, tmp_path))

    def never(*args: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(dataset, "_write", never)
    copy = tmp_path / "elsewhere.txt"
    copy.write_bytes(book.read_bytes())
    again = prepare_corpus([copy], cache_dir=tmp_path)  # known by its content, not by its name
    assert again.fingerprint == first.fingerprint and again.tokenizer == first.tokenizer
    np.testing.assert_array_equal(again.train, first.train)
    for changed in ({"val_fraction": 0.2}, {"tokenizer": "word"}, {"max_chars": 999}):
        with pytest.raises(AssertionError, match="encoded again"):
            prepare_corpus([book], cache_dir=tmp_path, **changed)  # type: ignore[arg-type]
    book.write_text(TEXT + "x", "utf-8")
    with pytest.raises(AssertionError, match="encoded again"):
        prepare_corpus([book], cache_dir=tmp_path)


def test_cache_default_place(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKEDECODER_CACHE", str(tmp_path / "set"))
    corpus = prepare_corpus([book])
    assert files_of(corpus, tmp_path / "set")[0].is_file()


def damage_byte(ids: Path, description: Path) -> None:
    data = bytearray(ids.read_bytes())
    data[100] ^= 1
    ids.write_bytes(data)


def damage_length(ids: Path, description: Path) -> None:
    ids.write_bytes(ids.read_bytes()[:-1])


def damage_description(ids: Path, description: Path) -> None:
    description.write_bytes(description.read_bytes()[:-30])


def damage_dtype(ids: Path, description: Path) -> None:
    data = json.loads(description.read_text())
    description.write_text(json.dumps({**data, "dtype": "uint16"}))


def damage_missing(ids: Path, description: Path) -> None:
    description.unlink()


@pytest.mark.parametrize(
    "damage", [damage_byte, damage_length, damage_description, damage_dtype, damage_missing]
)
def test_damaged_cache_is_made_again(book: Path, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    first = prepare_corpus([book], cache_dir=tmp_path)
    expected, paths = first.train.tolist(), files_of(first, tmp_path)
    before = [path.read_bytes() for path in paths]
    damage(*paths)
    again = prepare_corpus([book], cache_dir=tmp_path)
    assert again.train.tolist() == expected
    assert [path.read_bytes() for path in paths] == before


def test_failure_leaves_nothing_behind(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSPC, errno.EFBIG, errno.EIO):

        def full(descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr("spikedecoder.data._files.os.fsync", full)
            with pytest.raises(OSError, match=rf"cannot write \({os.strerror(number)}\): .*tokens"):
                prepare_corpus([book], cache_dir=tmp_path)
        assert list((tmp_path / "tokens").iterdir()) == []


def test_an_error_that_is_not_of_writing_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^book: no such file$"), atomic_writer(tmp_path / "tokens"):
        raise FileNotFoundError("book: no such file")


def test_a_cache_that_cannot_be_written(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_corpus([book], cache_dir=tmp_path)
    monkeypatch.setattr("spikedecoder.data._files.os.access", lambda *_: False)
    prepare_corpus([book], cache_dir=tmp_path)  # it is there already
    with pytest.raises(OSError, match=r"set SPIKEDECODER_CACHE to another folder.*: .*tokens"):
        prepare_corpus([book], cache_dir=tmp_path, tokenizer="word")
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"set SPIKEDECODER_CACHE to another folder"):
        prepare_corpus([book], cache_dir=book)  # a file


def test_text_that_changes_meanwhile(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = dataset._tokenizer

    def change_then_make(*args):  # type: ignore[no-untyped-def]
        book.write_text(TEXT.replace("cats", "cows"), "utf-8")
        return make(*args)

    monkeypatch.setattr(dataset, "_tokenizer", change_then_make)
    with pytest.raises(ValueError, match="changed while it was being read"):
        prepare_corpus([book], cache_dir=tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_bad_arguments(book: Path, tmp_path: Path) -> None:
    def fails(message: str, *args, error: type[Exception] = ValueError, **kwargs) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(error, match=message):
            prepare_corpus(*args, cache_dir=tmp_path, **kwargs)

    fails("texts and corpus: expected one of them, got both", [book], corpus="builtin")
    fails("texts: expected at least one file, got none", [])
    fails("texts: expected paths of files, got a text, 'the cat", "the cat\nsat on the mat")
    for wrong in (b"the cat", iter([book]), [1]):
        with pytest.raises(TypeError, match="texts: expected paths of files, got "):
            prepare_corpus(wrong, cache_dir=tmp_path)  # type: ignore[arg-type]
    fails("corpus: expected one of builtin, war-and-peace, got 'bible'", corpus="bible")
    fails("tokenizer: expected one of char, .*, got 'bpe'", [book], tokenizer="bpe")
    takes = "takes a name, a CharTokenizer or a WordTokenizer: no other"
    fails(f"tokenizer: got int, {takes}", [book], tokenizer=3, error=TypeError)

    class Bytes(Tokenizer):  # of which a cache or a checkpoint could make no object again
        kind, pad_id, unk_id = "bytes", 0, 1

        def unknown(self, text: str) -> list[str]:
            return []

        def _encode_stream(self, chunks, errors):  # type: ignore[no-untyped-def]
            return (np.frombuffer(chunk.encode(), np.uint8).astype(self.dtype) for chunk in chunks)

        def _decode(self, ids: np.ndarray) -> str:
            return ids.astype(np.uint8).tobytes().decode()

    class Upper(CharTokenizer):  # whose ids would be taken for a CharTokenizer's
        pass

    fails(f"tokenizer: got Bytes, {takes}", [book], tokenizer=Bytes(list("abc") * 100), error=TypeError)
    upper = Upper(CharTokenizer.from_text(["ABC"]).tokens)
    fails(f"tokenizer: got Upper, {takes}", [book], tokenizer=upper, error=TypeError)
    fails("min_count: .* got 0", [book], min_count=0)
    fails("min_count: .* got True", [book], min_count=True)
    fails("max_chars: .* got True", [book], max_chars=True)
    fails("encoding: .* got NoneType", [book], encoding=None, error=TypeError)
    fails(r"val_fraction: .* got 1\.5", [book], val_fraction=1.5)
    fails("max_chars: .* got 0", [book], max_chars=0)
    fails("max_chars: .* got 'a'", [book], max_chars="a")
    fails("val_fraction: .* got 'a'", [book], val_fraction="a")
    fails("no such file", [tmp_path / "none"], error=FileNotFoundError)
    fails(r"book\.txt: not valid ascii text", [book], encoding="ascii")
    fails(r"book\.txt: 3 characters cannot be split with val_fraction=0\.1", [book], max_chars=3)
    assert not (tmp_path / "tokens").exists()


def test_check_context(book: Path, tmp_path: Path) -> None:
    corpus = prepare_corpus([book], cache_dir=tmp_path, max_chars=100)
    check_context(corpus, 89)
    with pytest.raises(ValueError, match=r"train part has 90 tokens, and a context of 90 needs at least 91"):
        check_context(corpus, 90)
    with pytest.raises(ValueError, match="held-out part has 1 tokens"):
        check_context(dataclasses.replace(corpus, val=corpus.val[:1]), 8)
    book.write_text("漢字漢字漢字漢字漢字漢字", "utf-8")
    nothing = prepare_corpus([book], cache_dir=tmp_path, tokenizer="original-char")
    with pytest.raises(ValueError, match="train part has 0 tokens"):
        check_context(nothing, 8)


STATUS = """
import sys
from spikedecoder.data import prepare_corpus

def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024

before = peak()
corpus = prepare_corpus([sys.argv[1]], cache_dir=sys.argv[2], tokenizer=sys.argv[3])
print(len(corpus.train) + len(corpus.val), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read the peak memory")
@pytest.mark.parametrize(("tokenizer", "limit"), [("char", 60), ("original-char", 60)])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, tokenizer: str, limit: float) -> None:
    """60 MB of text in less than 60 MiB on top of the interpreter and torch."""
    path = tmp_path / "large.txt"
    block = builtin_text().encode()
    with open(path, "wb") as file:
        while file.tell() < 60_000_000:
            file.write(block)
    run = subprocess.run(
        [sys.executable, "-c", STATUS, str(path), str(tmp_path), tokenizer],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    tokens, grown = run.stdout.split()
    assert int(tokens) > 45_000_000  # cleaning leaves out some characters
    assert float(grown) < limit


TOKENS = (np.arange(1000) * 7 % 251).astype(np.uint8)


def test_windows_are_a_function_of_seed_and_step() -> None:
    sampler = WindowSampler(TOKENS, seq_len=16, batch_size=4, seed=3)
    inputs, targets = sampler.batch(5)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for row, target in zip(inputs, targets, strict=True):
        window = [*row.tolist(), int(target[-1])]
        assert any(TOKENS[i : i + 17].tolist() == window for i in range(len(TOKENS) - 16))
    sampler.batch(9)
    again = WindowSampler(TOKENS, 16, 4, seed=3)
    assert torch.equal(again.batch(5)[0], inputs)
    assert not torch.equal(again.batch(6)[0], inputs)
    assert not torch.equal(WindowSampler(TOKENS, 16, 4, seed=4).batch(5)[0], inputs)


def test_windows_are_the_same_everywhere() -> None:
    """Fixed figures: a run resumed under another release of numpy sees the same batches."""
    tokens = np.arange(10_000, dtype=np.uint16)
    assert WindowSampler(tokens, 4, 3, seed=0).batch(0)[0][:, 0].tolist() == FIRST
    assert WindowSampler(tokens, 4, 3, seed=2**64 - 1).batch(10**12)[0][:, 0].tolist() == FAR


FIRST = [8891, 5210, 5781]
FAR = [8373, 2981, 1233]


def test_windows_cover_every_start() -> None:
    sampler = WindowSampler(np.arange(12), seq_len=4, batch_size=64)
    starts = torch.cat([sampler.batch(step)[0][:, 0] for step in range(40)])
    counts = torch.bincount(starts, minlength=8)
    assert len(counts) == 8  # starts 0 to 7: the last window's last target is the last token
    assert counts.min() > 0.75 * counts.float().mean()
    only = WindowSampler(np.arange(5), seq_len=4, batch_size=2).batch(0)
    assert only[0].tolist() == [[0, 1, 2, 3]] * 2 and only[1].tolist() == [[1, 2, 3, 4]] * 2


def test_processes_share_one_batch() -> None:
    whole = WindowSampler(TOKENS, 8, 6, seed=1).batch(2)
    parts = [WindowSampler(TOKENS, 8, 2, seed=1, rank=rank, world_size=3).batch(2) for rank in range(3)]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seq_len": 0}, "seq_len: expected an integer of 1 or more, got 0"),
        ({"seq_len": 2.5}, r"seq_len: expected an integer of 1 or more, got 2\.5"),
        ({"batch_size": 0}, "batch_size: expected an integer of 1 or more, got 0"),
        ({"batch_size": True}, "batch_size: expected an integer of 1 or more, got True"),
        ({"world_size": 0}, "world_size: expected an integer of 1 or more, got 0"),
        ({"rank": 2, "world_size": 2}, "rank: expected an integer from 0 to world_size - 1 = 1, got 2"),
        ({"rank": 0.5}, r"rank: expected an integer from 0 to world_size - 1 = 0, got 0\.5"),
        ({"seed": -1}, "seed: expected an integer from 0 to"),
        ({"seed": 1.5}, r"seed: expected an integer from 0 to 2\*\*64 - 1, got 1\.5"),
        ({"seq_len": 1000}, "a window of 1000 needs 1001 tokens, got 1000"),
    ],
)
def test_bad_sampler(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowSampler(TOKENS, **{"seq_len": 8, "batch_size": 2, **kwargs})


def test_steps_of_a_sampler() -> None:
    for step in (-1, 1.5):
        with pytest.raises(ValueError, match=f"step: expected an integer of 0 or more, got {step}"):
            WindowSampler(TOKENS, 8, 2).batch(step)  # type: ignore[arg-type]
    sampler = WindowSampler(TOKENS, np.int64(8), 2)  # type: ignore[arg-type]
    assert torch.equal(sampler.batch(np.int64(3))[0], WindowSampler(TOKENS, 8, 2).batch(3)[0])  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 4), st.none() | st.integers(1, 70))
def test_held_out_windows(length: int, seq_len: int, batch_size: int, max_tokens: int | None) -> None:
    tokens = np.arange(100, 100 + length).astype(np.uint8)
    seen: list[int] = []
    for inputs, targets in held_out_batches(tokens, seq_len, batch_size, max_tokens, pad_id=7):
        assert inputs.shape == targets.shape and inputs.shape[1] == seq_len
        assert 1 <= inputs.shape[0] <= batch_size
        assert inputs.dtype == targets.dtype == torch.int64
        real = targets != -100
        assert real.any(1).all()  # no row without a target
        assert torch.equal(inputs[real] + 1, targets[real])
        assert (inputs[~real] == 7).all()
        seen.extend(targets[real].tolist())
    assert seen == tokens[1:][:max_tokens].tolist()


def test_bad_held_out() -> None:
    with pytest.raises(ValueError, match=r"tokens: expected at least 2, .* got 1"):
        held_out_batches(TOKENS[:1], 8, 2)
    with pytest.raises(ValueError, match="seq_len: expected an integer of 1 or more, got 0"):
        held_out_batches(TOKENS, 0, 2)
    for tokens in (0, 2.5):
        with pytest.raises(ValueError, match=f"max_tokens: expected an integer of 1 or more, got {tokens}"):
            held_out_batches(TOKENS, 8, 2, max_tokens=tokens)  # type: ignore[arg-type]


def test_fingerprint_is_stable(book: Path, tmp_path: Path) -> None:
    """Documented as equal for equal text, tokenizer and split: nothing of the machine goes in."""
    corpus = prepare_corpus([book], cache_dir=tmp_path)
    text = hashlib.sha256(TEXT.encode()).hexdigest()
    cut = len(TEXT) - round(0.1 * len(TEXT))
    spec = json.dumps([1, text, cut, ["char"]])
    assert corpus.fingerprint == hashlib.sha256(spec.encode()).hexdigest()


def test_the_share_of_unknown_words_is_told(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c a b c a b c a b c a b c a b d e a", encoding="utf-8")
    corpus = prepare_corpus([text], tokenizer="word", val_fraction=0.25, cache_dir=tmp_path)
    assert corpus.tokenizer.decode(corpus.val).split() == ["a", "b", "<unk>", "<unk>", "a"]
    assert corpus.unknown == 2 / 5
    assert prepare_corpus([text], cache_dir=tmp_path).unknown == 0
