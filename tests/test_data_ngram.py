"""The n-gram baselines against brute force over every probability."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import spikedecoder.data.ngram as ngram_module
from spikedecoder.data import CharTokenizer, NGramModel, ngram_bits

D = 0.75


def brute_force(train: list[int], vocab_size: int):  # type: ignore[no-untyped-def]
    """p(token, history) by the equations, with dictionaries."""
    counts = [Counter(zip(*(train[i:] for i in range(n)), strict=False)) for n in (1, 2, 3)]

    def p(w: int, history: tuple[int, ...]) -> float:
        if not history:
            return (counts[0][(w,)] + 1) / (len(train) + vocab_size)
        lower = p(w, history[1:])
        follow = {key: c for key, c in counts[len(history)].items() if key[:-1] == history}
        if not follow:
            return lower
        discounted = max(follow.get((*history, w), 0) - D, 0)
        return (discounted + D * len(follow) * lower) / sum(follow.values())

    return p


@pytest.mark.parametrize("block", [3, 7, 1 << 22])
@pytest.mark.parametrize("size", [2, 3, 60])
def test_equations(size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_module, "_BLOCK", block)
    random = np.random.default_rng(size)
    vocab_size = 5
    train = random.integers(0, 4, size).astype(np.uint8)  # token 4 is never seen
    val = random.integers(0, vocab_size, 40).astype(np.uint8)
    p = brute_force(train.tolist(), vocab_size)
    v = val.tolist()
    expected = {
        name: -sum(math.log2(p(v[i], tuple(v[max(i - n, 0) : i]))) for i in range(1, len(v))) / (len(v) - 1)
        for n, name in enumerate(("unigram", "bigram", "trigram"))
    }
    assert ngram_bits(train, val, vocab_size) == pytest.approx(expected, rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    vocab_size = 4
    train = np.random.default_rng(0).integers(0, 3, 30)
    model = NGramModel(train, vocab_size)
    for u, v in itertools.product(range(vocab_size), repeat=2):
        rows = [model.probabilities(np.array([u, v, w])) for w in range(vocab_size)]
        for order in range(3):
            each = [row[order][2] for row in rows]
            assert min(each) > 0
            assert sum(each) == pytest.approx(1.0, abs=1e-12)


def test_large_vocabulary_does_not_overflow() -> None:
    vocab_size = 3_000_000  # its cube is beyond int64
    base = np.array([2_999_999, 5, 2_999_998, 2_999_999, 5, 2_999_998, 7], dtype=np.uint32)
    small = np.array([0, 1, 2, 0, 1, 2, 3])
    big = NGramModel(base, vocab_size).probabilities(base.astype(np.int64))
    p = brute_force(small.tolist(), vocab_size)
    expected = [p(int(small[i]), tuple(small[max(i - 2, 0) : i].tolist())) for i in range(len(small))]
    np.testing.assert_allclose(big[2], expected, rtol=1e-12)


def test_longer_histories_help_on_english() -> None:
    from spikedecoder.data import builtin_text

    text = builtin_text()
    ids = CharTokenizer.original().encode(text)
    cut = int(0.9 * len(ids))
    bits = ngram_bits(ids[:cut], ids[cut:], 30)
    assert bits["trigram"] + 0.5 < bits["bigram"] and bits["bigram"] + 0.5 < bits["unigram"] < math.log2(30)


@pytest.mark.skipif("SPIKEDECODER_BOOK" not in os.environ, reason="SPIKEDECODER_BOOK names no book")
def test_book() -> None:
    ids = CharTokenizer.original().encode(Path(os.environ["SPIKEDECODER_BOOK"]).read_text("utf-8"))
    cut = int(0.9 * len(ids))
    bits = ngram_bits(ids[:cut], ids[cut:], 30)
    assert bits["bigram"] == pytest.approx(3.35, abs=0.02)
    assert bits["trigram"] == pytest.approx(2.70, abs=0.02)


def test_bad_input() -> None:
    good = np.array([0, 1, 2])
    with pytest.raises(ValueError, match="train: expected ids 0 to 1, got 0 to 2"):
        ngram_bits(good, good, 2)
    with pytest.raises(ValueError, match="val: expected ids 0 to 2, got -1 to 2"):
        ngram_bits(good, np.array([-1, 2]), 3)
    with pytest.raises(ValueError, match="val: expected a 1-D array of at least 2 integers"):
        ngram_bits(good, good[:1], 3)
    with pytest.raises(ValueError, match=r"train: expected a 1-D array .* float64"):
        ngram_bits(good / 2, good, 3)
