"""The original's readers and datasets under their names: the same windows, the same return values."""

from pathlib import Path

import numpy as np
import pytest
from test_compat import SENTENCES

from spikedecoder.compat.utils import Reader, charDataset, wordDataset


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "a book.txt"
    path.write_text((SENTENCES + "\n") * 6, encoding="utf-8")
    return str(path)


def plain_characters(text):
    """The cleaning as the documentation says it, one rule after the other, on the whole text."""
    text = " ".join(text.split())
    text = text.translate(str.maketrans({"!": ".", "?": ".", ";": " "})).replace("--", " ")
    text = "".join(c for c in text if c.isascii() and (c.isalpha() or c in ".' "))
    out = ""
    for i, c in enumerate(text):
        initial = i >= 1 and text[i - 1].isupper() and (i == 1 or not text[i - 2].isalpha())
        if c == " " and out.endswith(". ") and (out[-2:] == ". "):
            continue
        out += ". " if c == "." and not initial else c
    out = out.replace(". . .", "...").lower()
    while "  " in out:
        out = out.replace("  ", " ")
    return out


def plain_words(text):
    text = text.lower().translate(str.maketrans({"!": ".", "?": ".", ";": ""}))
    text = "".join(c if c.isascii() and (c.isalpha() or c in ".' ") else " " for c in text)
    return text.replace("''", "'").replace(".", " . ").split()


def plain_split(items, length, limit, split):
    windows = []
    for start in range(len(items)):
        if start + length + 1 <= len(items):
            windows.append((items[start : start + length], items[start + 1 : start + length + 1]))
    windows = windows[:limit] if limit else windows
    border = round(len(windows) * 0.9)
    return windows[:border] if split == "train" else windows[border:]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("length, limit", [(1, 0), (6, 130), (17, 0), (17, 10**6)])
def test_character_windows(book, split, length, limit):
    dataset = charDataset(book, split, inputLength=length, fullLength=limit, seed=7070)
    expected = plain_split(plain_characters(Path(book).read_text()), length, limit, split)
    assert len(dataset) == len(expected) > 0
    assert [dataset[i] for i in range(len(dataset))] == expected
    assert list(dataset.fdata) == [x for x, _ in expected] and list(dataset.ftargets) == [
        y for _, y in expected
    ]
    assert dataset.get_vocab_size() == 30
    assert dataset[-1] == expected[-1] and dataset.fdata[2:5][1] == expected[3][0]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("length, limit, prune", [(6, 0, 7), (3, 90, None)])
def test_word_windows(book, split, length, limit, prune):
    words = plain_words(Path(book).read_text())
    reader = Reader()
    if prune is not None:
        # letters and apostrophes only make a word here; a full stop parts two
        plain = "".join(
            c if c.isascii() and (c.isalpha() or c in "' ") else " " for c in Path(book).read_text().lower()
        ).split()
        expected = sorted({w for w in plain if plain.count(w) >= prune} | {".", "P"})
        assert reader.createDictionary(book, prune_level=prune) == reader.dictionary == expected
        assert 5 < len(expected) < len(set(plain))
        words = [w for w in words if w in expected]
    dataset = wordDataset(book, split, inputLength=length, fullLength=limit, seed=7070, reader=reader)
    if prune is None:  # made from the first `fullLength` words
        assert len(dataset.alphabet) < 60 and dataset.alphabet == reader.dictionary
        words = [w for w in words if w in dataset.alphabet]
    expected = plain_split(words, length, limit, split)
    assert [dataset[i] for i in range(len(dataset))] == expected and len(expected) > 0
    assert dataset.get_vocab_size() == len(dataset.alphabet)


def test_reader_and_other_sources(book, monkeypatch):
    reader = Reader()
    assert reader.dictionary is None
    data, targets = reader.read(book, sampleLength=9)
    assert len(data) == len(targets) and data[5][1:] == targets[5][:-1]
    data, targets = reader.readWords(book, sampleLength=4)
    assert data[0] == ["well", "prince", "so", "genoa"] and targets[0][-1] == "and"
    assert reader.clean("Well,  Prince; SO?") == "well prince  so. "
    assert len(reader.createDictionary(book, srcLength=3)) == 5
    # every letter once, in a drawn order, targets one letter on
    alphabet = charDataset("alphabet", "train", inputLength=30, seed=1)
    rest = charDataset("alphabet", "test", inputLength=30, seed=1)
    windows = [*alphabet.fdata, *rest.fdata]
    assert len({w[0] for w in windows}) == 26 and all(len(w) == 30 for w in windows)
    assert all(y[:-1] == x[1:] for x, y in alphabet)
    noise = charDataset("random", "train", inputLength=5, fullLength=130)
    assert len(noise) == round(125 * 0.9) and noise[0] == charDataset("random", "train", inputLength=5)[0]
    words = charDataset(book, "train", inputLength=5, fullLength=0, fullwords=True)
    assert words[0][0] == ["well", "prince", "so", "genoa", "and"]


def test_random_split_is_numpys(book):
    train = charDataset(book, "train", 6, 500, seed=3, randomTest=True)
    test = charDataset(book, "test", 6, 500, seed=3, randomTest=True)
    np.random.seed(3)
    mask = np.random.rand(500) <= 0.9
    everything = Reader().read(book, 6)[0]
    assert list(train.fdata) == [everything[i] for i in range(500) if mask[i]]
    assert list(test.fdata) == [everything[i] for i in range(500) if not mask[i]] and len(test) > 10


def test_windows_are_not_stored(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a word and another " * 50_000)
    dataset = charDataset(path, "train", inputLength=256, fullLength=0)
    assert len(dataset) > 800_000  # as strings: 250 MB
    assert len(dataset.fdata.text) < 10**6 and isinstance(dataset.fdata.starts, range)


def test_bad_input_of_datasets(book, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text("")
    binary.write_bytes(b"\0\1\2")
    (tmp_path / "short.txt").write_text("abc")
    for arguments, error, why in (
        ((tmp_path / "none.txt", "train"), FileNotFoundError, "no such file"),
        ((empty, "train"), ValueError, "empty"),
        ((binary, "train"), ValueError, "binary"),
        (
            (tmp_path / "short.txt", "train", 3),
            ValueError,
            "has 3 characters, takes more than the 3 of one window",
        ),
        ((book, "valid"), ValueError, "split: got 'valid'"),
        ((book, "train", 0), ValueError, "takes an integer >= 1"),
        ((book, "train", 6, -1), ValueError, "fullLength: got -1"),
        ((book, "test", 6, 1), ValueError, "'test' has none of the 1 windows"),
        ((book, "train", 6, 0, None, 1.0), ValueError, "splitFactor: got 1.0"),
    ):
        for cls in (charDataset, wordDataset):
            with pytest.raises(
                error,
                match=why.replace("characters", "(characters|words of the dictionary)").replace("3 (", ". ("),
            ):
                cls(*arguments)
