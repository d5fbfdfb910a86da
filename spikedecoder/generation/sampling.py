"""From logits to the next token, wherever the logits come from.

All of it runs on the CPU in float64, whatever the device and dtype of the logits: equal logits and an equal
seed give equal tokens everywhere.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikedecoder.fields import is_integer
from spikedecoder.ops._check import of_type, same_shape

_SEEDS = 2**63
_PENALTIES = 1e-6, 1e6  # within these, logits stay finite

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Applied in this order: repetition_penalty, temperature, top_k, top_p, min_p.

    temperature: the logits are divided by it. 0 is greedy: the most probable token (of ties the lowest id).
    top_k: choose among the k most probable tokens only (of ties the lowest ids); None: all.
    top_p: of those, keep the fewest most probable ones whose probabilities sum to at least top_p, in (0, 1];
        None: all.
    seed: sequence i of a batch draws from a generator seeded with ``seed + i``, so its text depends neither
        on its neighbours nor on the device. None: a fresh seed at each call.
    min_p: keep only tokens at least min_p times as probable as the most probable one, in [0, 1]; None or 0:
        all.
    repetition_penalty: for every token that the prompt or the generated text contains, however far back, a
        positive logit is divided by it and a negative one multiplied by it. 1e-6 to 1e6; 1 is off, above 1
        repeats less. Source: CTRL (Keskar et al., 2019).

    Raises ValueError naming the field that has an invalid value.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature: got {self.temperature!r}, takes a finite number >= 0, 0 being greedy"
            )
        if self.top_k is not None and (not is_integer(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k: got {self.top_k!r}, takes an integer >= 1, or None for all tokens")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ValueError(f"top_p: got {self.top_p!r}, takes a number in (0, 1], or None for all tokens")
        if self.seed is not None and (not is_integer(self.seed) or not 0 <= self.seed < _SEEDS):
            raise ValueError(f"seed: got {self.seed!r}, takes an integer from 0 to 2^63 - 1, or None")
        if self.min_p is not None and (not _is_number(self.min_p) or not 0 <= self.min_p <= 1):
            raise ValueError(f"min_p: got {self.min_p!r}, takes a number in [0, 1], or None for all tokens")
        least, most = _PENALTIES
        if not _is_number(self.repetition_penalty) or not least <= self.repetition_penalty <= most:
            raise ValueError(
                f"repetition_penalty: got {self.repetition_penalty!r}, takes a number from {least:g} to "
                f"{most:g}, 1 being off"
            )


class Prediction(NamedTuple):
    """A candidate for the next token and the probability that the model gives it."""

    token: int
    probability: float


def fresh_seed() -> int:
    """A seed from the operating system; torch's global generator stays as it is."""
    return secrets.randbelow(2**32)


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One generator per sequence, on the CPU whatever the model's device."""
    return [torch.Generator().manual_seed((seed + i) % _SEEDS) for i in range(n)]


def to_scores(logits: Tensor, suppress: Iterable[int] = ()) -> Floats:
    """Logits [B, V] copied to float64, `suppress` at -inf. ValueError if a row's maximum is not finite."""
    _check_logits(logits)
    scores: Floats = logits.detach().to("cpu", torch.float64, copy=True).numpy()
    suppressed = list(suppress)
    if suppressed:
        scores[:, suppressed] = -math.inf
    top = scores.max(axis=1)
    if not np.isfinite(top).all():  # max propagates NaN
        bad = float(top[~np.isfinite(top)][0])
        why = "no token is left to choose from" if bad == -math.inf else "the model is broken or has diverged"
        raise ValueError(f"logits: the greatest of a row is {bad}, takes a finite number; {why}")
    return scores


def _check_logits(logits: Tensor) -> None:
    of_type("logits", logits, Tensor)
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, takes [B, V] with B, V >= 1")


def distribution(scores: Floats, params: SamplingParams, seen: Any = None) -> Floats:
    """The probabilities [B, V] that `params` draws from; one-hot if greedy.

    seen: booleans [B, V], the tokens to which the repetition penalty applies; None: none.
    """
    if seen is not None and params.repetition_penalty != 1:
        r = params.repetition_penalty
        scores = np.where(seen, np.where(scores > 0, scores / r, scores * r), scores)
    if params.temperature == 0 or params.top_k == 1:
        greedy = np.zeros_like(scores)
        greedy[np.arange(len(scores)), scores.argmax(axis=1)] = 1.0
        return greedy
    # subtract the maximum before dividing, so that no temperature, however small, makes it infinite
    with np.errstate(over="ignore"):
        weights = np.exp((scores - scores.max(axis=1, keepdims=True)) / params.temperature)
    if params.top_k is not None or params.top_p is not None:
        ordered = np.sort(weights, axis=1)[:, ::-1]
        if params.top_k is not None:
            ordered = ordered[:, : params.top_k]
        count = np.full((len(weights), 1), ordered.shape[1])
        if params.top_p is not None:
            shares = ordered / ordered.sum(axis=1, keepdims=True)
            before = shares.cumsum(axis=1) - shares  # probability of all more probable tokens
            count = (before < params.top_p).sum(axis=1, keepdims=True)
        weights = _largest(weights, count, np.take_along_axis(ordered, count - 1, axis=1))
    if params.min_p:
        weights[weights < params.min_p] = 0.0  # the most probable one's weight is 1
    total: Floats = weights.sum(axis=1, keepdims=True)
    return weights / total


def uniform(generator: Sequence[torch.Generator]) -> list[float]:
    """The next number in [0, 1) of each generator."""
    return [torch.rand(1, generator=g, dtype=torch.float64, device=g.device).item() for g in generator]


def draw(probabilities: Floats, numbers: Sequence[float]) -> list[int]:
    """One id per row: the inverse of its cumulative distribution at its number in [0, 1)."""
    at = np.array(numbers)[:, None]
    cumulative = probabilities.cumsum(axis=1)
    ids: list[int] = (cumulative <= at * cumulative[:, -1:]).sum(axis=1).tolist()
    for row, i in enumerate(ids):
        if i == probabilities.shape[1]:
            # rounding put the number at the very end: take the last token that has a probability
            ids[row] = int(np.flatnonzero(probabilities[row])[-1])
    return ids


def _largest(weights: Floats, count: Any, smallest: Floats) -> Floats:
    """Zero all but the `count` largest of each row (of ties the first); `smallest` is the least of these."""
    above, equal = weights > smallest, weights == smallest
    room = count - above.sum(axis=1, keepdims=True)
    return np.where(above | (equal & (equal.cumsum(axis=1) <= room)), weights, 0.0)


def to_python(value: Any) -> Any:
    """A tensor or array as lists and numbers of Python; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_ids(name: str, ids: Any, vocabulary: int) -> list[int]:
    """Token ids (an iterable, tensor or array) as a list; TypeError or ValueError if they are not valid."""
    found = to_python(ids)
    if not isinstance(found, Iterable):
        raise TypeError(f"{name}: got {type(ids).__name__}, takes integers")
    found = list(found)
    for token in found:
        if not is_integer(token):
            raise TypeError(f"{name}: got {token!r}, takes integers")
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name}: got token {token}, takes 0 to {vocabulary - 1}")
    return list(map(int, found))


def sample(
    logits: Tensor,
    params: SamplingParams,
    generator: Sequence[torch.Generator] | None = None,
    suppress: Tensor | Sequence[int] | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next token of each sequence.

    Args:
        logits: [B, V].
        params: how to choose.
        generator: one per sequence; each is advanced by one uniform number per token (none at temperature 0).
            None: new ones from ``params.seed``, which makes sense for a single call only.
        suppress: ids that are never chosen.
        seen: booleans [B, V], the tokens to which the repetition penalty applies; None: none.

    Returns:
        ids [B] int64 and the probabilities [B, V] float64 they were drawn from, both on the logits' device.

    Raises TypeError or ValueError naming the argument.
    """
    of_type("params", params, SamplingParams)
    scores = _scores_without(logits, suppress)
    if seen is not None:
        of_type("seen", seen, Tensor)
        same_shape("logits", logits, "seen", seen)
    probabilities = distribution(scores, params, None if seen is None else seen.cpu().numpy())
    if params.temperature == 0:
        ids = probabilities.argmax(axis=1).tolist()
    else:
        if generator is None:
            generator = generators(fresh_seed() if params.seed is None else params.seed, len(logits))
        of_type("generator", generator, Sequence)
        for each in generator:
            of_type("generator", each, torch.Generator)
        if len(generator) != len(logits):
            raise ValueError(f"generator: got {len(generator)}, takes one per sequence, {len(logits)}")
        ids = draw(probabilities, uniform(generator))
    device = logits.device
    return torch.tensor(ids, device=device), torch.from_numpy(probabilities).to(device)


def log_normalizers(scores: Floats) -> Floats:
    """[B]: what log-softmax subtracts from the scores [B, V]."""
    top = scores.max(axis=1)
    total: Floats = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
    return total


def predictions(scores: Floats, normalizers: Floats, k: int) -> list[list[Prediction]]:
    """`top_predictions` from scores [B, V] and the `log_normalizers` [B] of all tokens' scores."""
    probabilities = np.exp(scores - normalizers[:, None])
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return [
        [Prediction(int(i), float(row[i])) for i in ids if row[i] > 0]
        for row, ids in zip(probabilities, order, strict=True)
    ]


def top_predictions(
    logits: Tensor, k: int, suppress: Tensor | Sequence[int] | None = None
) -> list[list[Prediction]]:
    """The k most probable tokens of each row of logits [B, V], best first (of ties the lowest id first).

    The probabilities are the model's own: at temperature 1, before any penalty or filter, over all tokens.
    Tokens in `suppress` are left out of the list but count in the normalisation. Tokens of probability 0 are
    not listed.
    """
    if not is_integer(k) or k < 0:
        raise ValueError(f"k: got {k!r}, takes an integer >= 0")
    return predictions(_scores_without(logits, suppress), log_normalizers(to_scores(logits)), k)


def _scores_without(logits: Tensor, suppress: Tensor | Sequence[int] | None) -> Floats:
    """`to_scores` with the ids that the caller wants suppressed, checked."""
    _check_logits(logits)
    return to_scores(logits, () if suppress is None else check_ids("suppress", suppress, logits.shape[1]))


def _is_number(value: object) -> bool:
    """Whether it is an int or a float (not a bool) within the range of floats."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    return isinstance(value, (int, float)) and not isinstance(value, bool)
