"""From logits to the next token. Knows nothing of where the logits came from."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SEEDS = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, in this order: temperature, then top_k, then top_p.

    temperature: logits are divided by it; 0 is greedy (the most probable token, of equals the lowest id).
    top_k: only the k most probable tokens (of equals the lowest ids); None is all.
    top_p: only the fewest tokens, most probable first, whose probabilities sum to at least this; None is all.
    seed: sequence i of a batch draws from a generator seeded with ``seed + i``, so its text depends neither
        on its neighbours nor on the device. None: a fresh seed at each call.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature: got {self.temperature!r}, takes a finite number >= 0, 0 being greedy"
            )
        if self.top_k is not None and (not _is_integer(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k: got {self.top_k!r}, takes an integer >= 1, or None for all tokens")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ValueError(f"top_p: got {self.top_p!r}, takes a number in (0, 1], or None for all tokens")
        if self.seed is not None and (not _is_integer(self.seed) or not 0 <= self.seed < _SEEDS):
            raise ValueError(f"seed: got {self.seed!r}, takes an integer from 0 to 2^63 - 1, or None")


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


def mask_logits(logits: Tensor, suppress: Tensor | None = None) -> Tensor:
    """logits [B, V] in float32 or better, the tokens in `suppress` (ids) at -inf. ValueError for NaN."""
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, takes [B, V] with B, V >= 1")
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    if suppress is not None and suppress.numel():
        logits = logits.index_fill(1, suppress.to(logits.device), -math.inf)
    top = logits.max(dim=1).values
    if not bool(torch.isfinite(top).all()):  # max passes NaN on
        bad = top[~torch.isfinite(top)][0].item()
        why = "no token is left to choose from" if bad == -math.inf else "the model is broken or has diverged"
        raise ValueError(f"logits: the greatest of a row is {bad}, takes a finite number; {why}")
    return logits


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities [B, V], float64, that `params` draws from: one-hot where greedy."""
    if params.temperature == 0 or params.top_k == 1:
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    # the greatest is 0 before the division, so that no temperature, however small, makes an infinity of it
    scaled = (logits.double() - logits.double().max(1, keepdim=True).values) / params.temperature
    if params.top_k is None and params.top_p is None:
        return scaled.softmax(1)
    ordered, ids = scaled.sort(dim=1, descending=True, stable=True)
    if params.top_k is not None:
        ordered[:, params.top_k :] = -math.inf
    probabilities = ordered.softmax(1)
    if params.top_p is not None:
        before = probabilities.cumsum(1) - probabilities  # mass of the more probable ones
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(1, ids, probabilities)


def sample(
    logits: Tensor,
    params: SamplingParams,
    generator: Sequence[torch.Generator] | None = None,
    suppress: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next token of each sequence.

    Args:
        logits: [B, V].
        params: what to choose by.
        generator: one per sequence, each advanced by one uniform number per token (by none if greedy);
            None: those of ``params.seed``, which fits a single call only.
        suppress: ids that are never chosen.

    Returns:
        ids [B] int64 and the probabilities [B, V] float64 they were drawn from, both on the logits' device.
    """
    probabilities = distribution(mask_logits(logits, suppress), params)
    if params.temperature == 0:
        return probabilities.argmax(1), probabilities
    if generator is None:
        generator = generators(fresh_seed() if params.seed is None else params.seed, len(logits))
    if len(generator) != len(logits):
        raise ValueError(f"generator: got {len(generator)}, takes one per sequence, {len(logits)}")
    # inverse of the cumulative distribution at one uniform number per sequence
    uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generator])
    cumulative = probabilities.cumsum(1)
    below = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, below, right=True)[:, 0]
    # rounding may put `below` at the very end; the last token that has a probability is meant
    last = probabilities.shape[1] - 1 - probabilities.flip(1).gt(0).int().argmax(1)
    return ids.minimum(last), probabilities


def top_predictions(logits: Tensor, k: int, suppress: Tensor | None = None) -> list[list[Prediction]]:
    """The k most probable tokens of each row of logits [B, V], best first (of equals the lowest id first).

    The probabilities are the model's own: at temperature 1, before top_k and top_p.
    """
    probabilities = mask_logits(logits, suppress).double().softmax(1)
    values, ids = probabilities.sort(dim=1, descending=True, stable=True)
    return [
        [Prediction(t, p) for t, p in zip(row_ids, row_values, strict=True) if p > 0]
        for row_ids, row_values in zip(ids[:, :k].tolist(), values[:, :k].tolist(), strict=True)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
