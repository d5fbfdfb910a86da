"""A batch of sequences that are generated together; each can join or leave at any step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from spikedecoder.generation.detokenize import TextStream
from spikedecoder.generation.sampling import (
    Floats,
    Prediction,
    SamplingParams,
    distribution,
    draw,
    generators,
    log_normalizers,
    predictions,
    to_scores,
)
from spikedecoder.generation.window import LogitSource

Finish = Literal["length", "stop"]

_AT_ONCE = 64  # random numbers drawn per call


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token.

    sequence: number of the sequence that it continues. token: its id.
    predictions: the most probable candidates for its place, best first (see `top_predictions`).
    finish: None while the sequence goes on, "length" or "stop" on its last token.
    text: what the sequence's `TextStream` returns for it; empty without one.
    logprob: natural logarithm of the probability that the model gives it; None unless asked for.
    """

    sequence: int
    token: int
    predictions: list[Prediction]
    finish: Finish | None = None
    text: str = ""
    logprob: float | None = None


@dataclass(eq=False)
class Continuation:
    """A sequence to generate: one prompt (not empty) and at most `max_new_tokens` >= 1 tokens after it.

    number: returned as `GeneratedToken.sequence`. seed: of its draws, in place of the one in `sampling`.
    stop: ids that end it. text: turns its tokens into text; its stop strings end the sequence too.
    top: how many predictions to keep with each token. logprob: whether to keep the drawn token's logprob.
    """

    number: int
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int
    stop: frozenset[int] = frozenset()
    text: TextStream | None = None
    top: int = 0
    logprob: bool = False

    count: int = field(default=0, init=False)
    last: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        # sequences that differ only in the seed are drawn together
        self.rule = dataclasses.replace(self.sampling, seed=None)
        self.rng = generators(self.seed, 1)[0]
        self._numbers: list[float] = []  # the generator's next numbers, in reverse order
        self.seen: Any = None  # booleans [V] if there is a repetition penalty

    def uniform(self) -> float:
        """The sequence's next random number."""
        if not self._numbers:  # one call per number would cost more than all the rest of drawing a token
            numbers = torch.rand(_AT_ONCE, generator=self.rng, dtype=torch.float64, device="cpu")
            self._numbers = numbers.tolist()[::-1]
        return self._numbers.pop()

    def take(self, token: int) -> tuple[Finish | None, str]:
        """Append a token; returns why that ends the sequence (None: it goes on) and the text it adds."""
        self.last = token
        self.count += 1
        if self.seen is not None:
            self.seen[token] = True
        text = "" if self.text is None else self.text.push(token)
        finish: Finish | None = None
        if token in self.stop or (self.text is not None and self.text.stopped):
            finish = "stop"
        elif self.count >= self.max_new_tokens:
            finish = "length"
        if finish is not None and self.text is not None:
            text += self.text.flush()
        return finish, text


class Batch:
    """Draws one token for each of its sequences at each `step`; finished sequences leave by themselves.

    A sequence's tokens depend only on its own prompt, parameters and seed, not on its neighbours, up to the
    rounding of matrix products, which varies with the batch size. Not thread-safe.

    source: gives the logits. suppress: ids that are never drawn.
    """

    def __init__(self, source: LogitSource, suppress: Iterable[int] = ()) -> None:
        self.source, self.suppress = source, list(suppress)
        self.running: list[Continuation] = []
        self._new: list[Continuation] = []

    def __len__(self) -> int:
        return len(self.running) + len(self._new)

    def add(self, sequences: Iterable[Continuation]) -> None:
        """Add sequences; the next `step` reads their prompts and draws their first tokens."""
        self._new += sequences

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove the sequences with these numbers, unfinished."""
        numbers = set(numbers)
        self._new = [c for c in self._new if c.number not in numbers]
        self._keep([i for i, c in enumerate(self.running) if c.number not in numbers])

    def step(self) -> list[GeneratedToken]:
        """Draw one token for each sequence, in the order in which they were added."""
        if not len(self):
            return []
        logits = []
        if self.running:
            logits.append(self.source.step([c.last for c in self.running]))
        new, self._new = self._new, []
        if new:
            logits.append(self.source.add([c.prompt for c in new]))
            self.running = self.running + new
        all_logits = logits[0] if len(logits) == 1 else torch.cat(logits)
        scores = to_scores(all_logits, self.suppress)
        for c in new:
            if c.sampling.repetition_penalty != 1:
                c.seen = np.zeros(scores.shape[1], dtype=bool)
                c.seen[list(c.prompt)] = True
        tokens = self._draw(scores)
        own = None  # the model's own probabilities include the tokens that are never drawn
        if any(c.top or c.logprob for c in self.running):
            own = log_normalizers(to_scores(all_logits) if self.suppress else scores)
        drawn = []
        for row, (c, token) in enumerate(zip(self.running, tokens, strict=True)):
            best, logprob = [], None
            if own is not None and c.top:
                best = predictions(scores[row : row + 1], own[row : row + 1], c.top)[0]
            if own is not None and c.logprob:
                logprob = float(scores[row, token] - own[row])
            finish, text = c.take(token)
            drawn.append(GeneratedToken(c.number, token, best, finish, text, logprob))
        self._keep([i for i, new_token in enumerate(drawn) if new_token.finish is None])
        return drawn

    def _draw(self, scores: Floats) -> list[int]:
        rows: dict[SamplingParams, list[int]] = {}
        for i, c in enumerate(self.running):
            rows.setdefault(c.rule, []).append(i)
        tokens = [0] * len(self.running)
        for rule, chosen in rows.items():
            group = [self.running[i] for i in chosen]
            own = scores if len(rows) == 1 else scores[chosen]
            seen = None if rule.repetition_penalty == 1 else np.stack([c.seen for c in group])
            probabilities = distribution(own, rule, seen)
            if rule.temperature == 0:
                ids = probabilities.argmax(axis=1).tolist()
            else:
                ids = draw(probabilities, [c.uniform() for c in group])
            for i, token in zip(chosen, ids, strict=True):
                tokens[i] = token
        return tokens

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self.running):
            self.source.select(rows)
            self.running = [self.running[i] for i in rows]
