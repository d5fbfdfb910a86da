"""Unigram, bigram and trigram models: baselines that a language model has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

DISCOUNT = 0.75
_BLOCK = 1 << 22  # tokens per block: memory then grows with the distinct n-grams, not with the text


def ngram_bits(train: np.ndarray, val: np.ndarray, vocab_size: int) -> dict[str, float]:
    r"""Mean bits per token, :math:`-\log_2 p`, of n-gram models fitted on ``train`` and evaluated on ``val``.

    Targets are all tokens of ``val`` but the first, as for a language model. The models are proper
    distributions over ``vocab_size`` tokens, interpolated by absolute discounting with d = 0.75:

    .. math::
        p_1(w) &= (c(w) + 1) / (N + V) \\
        p_2(w \mid v) &= (\max(c(vw) - d, 0) + d \, D(v) \, p_1(w)) / c(v) \\
        p_3(w \mid uv) &= (\max(c(uvw) - d, 0) + d \, D(uv) \, p_2(w \mid v)) / c(uv)

    with ``c`` the counts in ``train`` (for a history, only occurrences that a token follows), ``N`` its
    length, ``V`` the vocabulary size and ``D(h)`` the number of distinct tokens that follow the history
    ``h``; a history that was never seen falls back to the shorter one. The second token of ``val`` has only
    one token before it; for it the trigram model uses the bigram probability.

    Returns a dict with keys "unigram", "bigram", "trigram". Raises ValueError if ``train`` or ``val`` is not
    a 1-D array of at least 2 integers from 0 to ``vocab_size`` - 1. Source: H. Ney, U. Essen and R. Kneser,
    Computer Speech and Language 8(1), 1994. A fixed d is used because it does well for characters and words
    alike.
    """
    train, val = _checked("train", train, vocab_size), _checked("val", val, vocab_size)
    model = NGramModel(train, vocab_size)
    bits = np.zeros(3)
    for start in range(1, len(val), _BLOCK):
        # The first target of all has one token before it; any other has two.
        block = val[max(start - 2, 0) : start + _BLOCK].astype(np.int64)
        for i, p in enumerate(model.probabilities(block)):
            bits[i] -= np.log2(p[1 if start == 1 else 2 :]).sum()
    bits /= len(val) - 1
    return dict(zip(("unigram", "bigram", "trigram"), (float(b) for b in bits), strict=True))


class NGramModel:
    """Unigram, bigram and trigram counts; see :func:`ngram_bits` for the equations."""

    def __init__(self, train: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._unigram = np.zeros(vocab_size, dtype=np.int64)
        for block in _blocks(train, 0):
            self._unigram += np.bincount(block, minlength=vocab_size)
        self._total = len(train)
        # A bigram's key is v * V + w, a trigram's (index of uv among the bigrams) * V + w: no overflow.
        self._bigram = _Counts(
            (block[:-1] * vocab_size + block[1:] for block in _blocks(train, 1)), vocab_size
        )
        self._trigram = _Counts(
            (
                self._bigram.find(block[:-2] * vocab_size + block[1:-1]) * vocab_size + block[2:]
                for block in _blocks(train, 2)
            ),
            vocab_size,
        )

    def probabilities(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability of each token given those before it in ``tokens`` (int64), for the three models.

        A token with fewer tokens before it than a model looks at gets the shorter model's probability.
        """
        v = self.vocab_size
        p1 = (self._unigram[tokens] + 1) / (self._total + v)
        p2 = p1.copy()
        p2[1:] = self._bigram.interpolate(tokens[:-1], tokens[1:], p1[1:])
        p3 = p2.copy()
        history = self._bigram.find(tokens[:-2] * v + tokens[1:-1])
        p3[2:] = self._trigram.interpolate(history, tokens[2:], p2[2:])
        return p1, p2, p3


class _Counts:
    """Counts of (history, token) pairs with key ``history * V + token``, and sums per history."""

    def __init__(self, keys: Iterator[np.ndarray], vocab_size: int) -> None:
        self._v = vocab_size
        self.keys, self._counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        for block in keys:
            new, counts = np.unique(block, return_counts=True)
            if len(self.keys):
                both = np.concatenate([self.keys, new])
                new, places = np.unique(both, return_inverse=True)
                weights = np.concatenate([self._counts, counts])
                counts = np.bincount(places, weights=weights).astype(np.int64)
            self.keys, self._counts = new, counts
        self._histories, first = np.unique(self.keys // vocab_size, return_index=True)
        self._sums = np.add.reduceat(self._counts, first) if len(first) else first
        self._distinct = np.diff(np.append(first, len(self.keys)))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The index of each key; -1 for a key that was never seen."""
        return _find(self.keys, keys)

    def interpolate(self, history: np.ndarray, token: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """``(max(c(h w) - d, 0) + d D(h) lower) / c(h)``, and ``lower`` where h was never seen."""
        place = _find(self._histories, history)
        seen = place >= 0
        pair = _find(self.keys, np.where(seen, history, 0) * self._v + token)
        if not seen.any():
            return lower
        count = np.where(seen & (pair >= 0), self._counts[pair] - DISCOUNT, 0.0)
        return np.where(seen, (count + DISCOUNT * self._distinct[place] * lower) / self._sums[place], lower)


def _find(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(table):
        return np.full(len(keys), -1, dtype=np.int64)
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[place] == keys, place, -1)


def _blocks(tokens: np.ndarray, overlap: int) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens) - overlap, _BLOCK):
        yield tokens[start : start + _BLOCK + overlap].astype(np.int64)


def _checked(name: str, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) < 2:
        raise ValueError(
            f"{name}: expected a 1-D array of at least 2 integers, got {tokens.dtype} {tokens.shape}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name}: expected ids 0 to {vocab_size - 1}, got {low} to {high}")
    return tokens
