"""The result of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikedecoder.model import SpikeDecoder
from spikedecoder.training.evaluate import Evaluation


class TrainingError(RuntimeError):
    """The run cannot go on: its loss, a gradient or a weight became NaN or infinite."""


class SavingError(OSError):
    """The run cannot go on: a checkpoint or its metrics cannot be written."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a run after `step` of `steps` steps.

    train_loss: mean of the last 20 steps, nats per token.
    tokens_per_second: of the training steps alone, all processes together, since this run was (re)started.
    evaluation: the last held-out evaluation, made after `evaluated_step` steps (= step unless the run was
        interrupted); both None if there was none.
    best: step, val_loss and val_bits_per_token of OUT/best; empty if there was no evaluation.
    baselines: bits per token of n-gram models on the same held-out tokens.
    warnings: those of `health` at the last evaluation.
    peak_rss_mib: largest resident memory of this process, in MiB.
    checkpoint: OUT/last.
    model: after the last step, in evaluation mode.
    interrupted: name of the signal that ended the run early, or "reporter"; None if it ran to its end.
    unknown: share of the held-out tokens that are the unknown token. If it is not 0, figures compare only
        with those of models with the same vocabulary.
    """

    steps: int
    step: int
    train_loss: float
    tokens_per_second: float
    evaluation: Evaluation | None
    evaluated_step: int | None
    best: dict[str, float]
    baselines: dict[str, float]
    warnings: list[str]
    peak_rss_mib: float
    checkpoint: Path
    out: Path
    model: SpikeDecoder
    interrupted: str | None = None
    unknown: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values, ready for JSON: "steps" were done, of "max_steps"."""
        e = self.evaluation
        return {
            "steps": self.step,
            "max_steps": self.steps,
            "interrupted": self.interrupted,
            "tokens_per_second": self.tokens_per_second,
            "train_loss": self.train_loss if self.train_loss == self.train_loss else None,  # JSON has no NaN
            "val_loss": e.loss if e else None,
            "val_bits_per_token": e.bits if e else None,
            "val_accuracy": e.accuracy if e else None,
            "val_tokens": e.tokens if e else None,
            "val_of_tokens": e.of_tokens if e else None,
            "val_step": self.evaluated_step,
            "val_unknown": self.unknown,
            "baselines": self.baselines,
            "spike_rates": e.spike_rates if e else {},
            "best": self.best,
            "warnings": self.warnings,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "peak_rss_mib": self.peak_rss_mib,
            "checkpoint": str(self.checkpoint),
            "out": str(self.out),
        }
