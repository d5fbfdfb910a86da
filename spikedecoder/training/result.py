"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikedecoder.model import SpikeDecoder
from spikedecoder.training.evaluate import Evaluation


class TrainingError(RuntimeError):
    """A run that cannot go on: its loss or gradient is no finite number any more."""


class SavingError(OSError):
    """A run that cannot go on: what it has learned cannot be written."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to after `step` of `steps` steps.

    train_loss: mean of the last 20 steps, nats per token. evaluation: the last held-out one, made after
    `evaluated_step` steps (= step, unless the run was interrupted; None if it had none). best: step and
    held-out loss of OUT/best. baselines: bits per token of n-gram models on the same held-out tokens.
    unknown: the share of unknown words among all held-out tokens, where figures compare only with others of
    the same vocabulary. tokens_per_second: of the training steps alone, in this process. checkpoint:
    OUT/last. interrupted: name of the signal that ended the run early, or "reporter". model: after the last
    step, in evaluation mode.
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
        """Fit for JSON."""
        e = self.evaluation
        return {
            "steps": self.step,
            "max_steps": self.steps,
            "interrupted": self.interrupted,
            "tokens_per_second": self.tokens_per_second,
            "train_loss": self.train_loss if self.train_loss == self.train_loss else None,  # NaN is no JSON
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
