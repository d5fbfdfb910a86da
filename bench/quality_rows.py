"""The rows of the study: what each changes, and in which order they are told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

# the original's recipe in the study's shape: 66 + 30 channels, 4 heads, 3 blocks, T = 4, LayerNorm
ORIGINAL: dict[str, Any] = {"token_dim": 66, "position_dim": 30, "heads": 4, "blocks": 3, "mlp_ratio": 4}
GAIN: dict[str, Any] = {**ORIGINAL, "embedding_gain": 2.0}
SHIFT: dict[str, Any] = {**GAIN, "token_shift": 4, "mlp_token_shift": 4}
SOFT: dict[str, Any] = {**SHIFT, "v_reset": None}
DECAY: dict[str, Any] = {**SOFT, "decay_fastest": 0.75, "decay_slowest": 0.99}
BATCH: dict[str, Any] = {**DECAY, "norm": "batch"}
BEST: dict[str, Any] = {**BATCH, "decay_slowest": 0.96, "token_dim": 95, "position_dim": 1}
STILL: dict[str, Any] = {"decay_fastest": 1.0, "decay_slowest": 1.0}
HELPS: dict[str, Any] = {"shift": 4, "mlp_shift": 4}
SLOW: dict[str, Any] = {"lr": 4e-3}
FAST: dict[str, Any] = {"lr": 8e-3}


@dataclass(frozen=True)
class Row:
    """One model of the study.

    kind: what `model` holds: "spike" fields of a `SpikeDecoderConfig`, "preset" its name and changes to it,
    "gpt" arguments of `GPT`. train: fields of a `TrainConfig`. tried: a change of `quality_tried.TRIED`.
    """

    name: str
    kind: Literal["spike", "preset", "gpt"]
    model: dict[str, Any]
    train: dict[str, Any] = field(default_factory=lambda: dict(SLOW))
    tried: str | None = None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")

    @property
    def ann(self) -> bool:
        return self.kind == "gpt" or self.model.get("spike_degree") == 0

    def reads_past(self, length: int, times: int) -> bool:
        """Whether a context of `times` the training length has positions."""
        return times == 1 or self.model.get("position") != "learned"


SMALL: list[Row] = [
    # the ladder: each adds to the one before
    Row("original recipe", "spike", ORIGINAL),
    Row("+ embedding gain 2", "spike", GAIN),
    Row("+ token shift 4", "spike", SHIFT),
    Row("+ soft reset", "spike", SOFT),
    Row("+ decay per head", "spike", DECAY),
    Row("+ learning rate 8e-3", "spike", DECAY, FAST),
    Row("+ BatchNorm", "spike", BATCH, FAST),
    Row("default", "preset", {"name": "default"}, FAST),  # + one position channel, decay of 0.75 to 0.96
    # single changes
    Row("original recipe, BatchNorm", "spike", {**ORIGINAL, "norm": "batch"}),
    Row("default without decay", "spike", {**BEST, **STILL}, FAST),
    Row("default, LayerNorm", "spike", {**BEST, "norm": "layer"}, FAST),
    Row("default, attention norm", "spike", {**BEST, "attention_norm": True}, FAST),
    Row("default, attention norm, no decay", "spike", {**BEST, **STILL, "attention_norm": True}, FAST),
    Row("default, PowerNorm", "spike", {**BEST, "norm": "power"}, FAST),
    Row("default, timesteps concatenated", "spike", {**BEST, "reunite": "concatenate"}, FAST),
    Row("default, MLP shift 2", "spike", {**BEST, "mlp_token_shift": 2}, FAST),
    Row("default, shifts 8", "spike", {**BEST, "token_shift": 8, "mlp_token_shift": 8}, FAST),
    Row("default, learned thresholds", "spike", {**BEST, "learn_threshold": True}, FAST),
    Row("default, surrogate alpha 2", "spike", {**BEST, "surrogate_alpha": 2.0}, FAST),
    Row("default, surrogate alpha 8", "spike", {**BEST, "surrogate_alpha": 8.0}, FAST),
    Row("default, real-valued MLP and head", "spike", {**BEST, "spike_degree": 2}, FAST),
    Row("T = 1", "spike", {**BEST, "timesteps": 1}, FAST),
    Row("T = 2", "spike", {**BEST, "timesteps": 2}, FAST),
    Row("T = 8", "spike", {**BEST, "timesteps": 8}, FAST),
    # tried, and left out of the package
    Row("default, PLIF", "spike", BEST, FAST, tried="learned tau"),
    Row("default, thresholds per channel", "spike", BEST, FAST, tried="channel thresholds"),
    Row(
        "default, I-LIF, 4 levels",
        "spike",
        {**BEST, "timesteps": 1, "attention_scale": 1 / 64},
        FAST,
        tried="integer",
    ),
    # twins that do not spike
    Row("GPT, learned positions", "gpt", {"position": "learned"}),
    Row("GPT, ALiBi", "gpt", {"position": "alibi"}),
    Row("GPT, ALiBi, convolution 4", "gpt", {"position": "alibi", "convolution": 4}),
    Row("GPT, ALiBi, shifts", "gpt", {"position": "alibi", **HELPS}),
    Row("GPT, ALiBi, shifts, lr 8e-3", "gpt", {"position": "alibi", **HELPS}, FAST),
    Row(
        "the original's baseline, shifts",
        "spike",
        {**SHIFT, "spike_degree": 0, "embedding_gain": 1.0},
    ),
]

_LARGE: dict[str, Any] = {"lr": 3e-3, "batch_size": 32, "warmup": 500}
_SHAPE: dict[str, Any] = {"channels": 384, "heads": 8, "blocks": 8, "position": "alibi"}
_AS_ORIGINAL: dict[str, Any] = {
    **{"embedding_gain": 1.0, "token_shift": 1, "mlp_token_shift": 1},
    **{"v_reset": 0.0, "decay_fastest": 1.0, "decay_slowest": 1.0},
}

MEDIUM: list[Row] = [
    Row("original recipe", "preset", {"name": "best-medium", **_AS_ORIGINAL}, {**_LARGE, "lr": 1e-3}),
    Row("best-medium", "preset", {"name": "best-medium"}, _LARGE),
    Row("best-medium, T = 2", "preset", {"name": "best-medium", "timesteps": 2}, _LARGE),
    Row("GPT, ALiBi", "gpt", _SHAPE, {**_LARGE, "lr": 1e-3}),
    Row("GPT, ALiBi, shifts", "gpt", {**_SHAPE, **HELPS}, {**_LARGE, "lr": 1e-3}),
    Row("GPT, ALiBi, shifts, lr 3e-3", "gpt", {**_SHAPE, **HELPS}, _LARGE),
]

ROWS: dict[str, list[Row]] = {"small": SMALL, "medium": MEDIUM}
