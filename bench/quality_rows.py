"""The rows of the study: what each changes, in the order in which they are listed."""

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
QUICK: dict[str, Any] = {**BATCH, "decay_slowest": 0.96}
LIF: dict[str, Any] = {**QUICK, "token_dim": 95, "position_dim": 1}
SPREAD: dict[str, Any] = {**LIF, "embedding_std": 1.0}
BEST_LIF: dict[str, Any] = {**SPREAD, "residual_init": 0.3}


def integers(levels: int, unit: float, **changes: Any) -> dict[str, Any]:
    """The last step of the ladder: I-LIF neurons with integers 0 to `levels`, in units of `unit`, and T = 1.

    changes: other fields of the config.
    """
    # the scale that LIF's attention has, for spikes worth `unit`
    own = {
        "neuron": "ilif",
        "levels": levels,
        "v_threshold": unit,
        "attention_scale": round(0.125 * unit**3, 6),
    }
    return {**BEST_LIF, "timesteps": 1, **own, **changes}


STILL: dict[str, Any] = {"decay_fastest": 1.0, "decay_slowest": 1.0}
HELPS: dict[str, Any] = {"shift": 4, "mlp_shift": 4}
SLOW: dict[str, Any] = {"lr": 4e-3}
FAST: dict[str, Any] = {"lr": 8e-3}


def slug(name: str) -> str:
    """A row's name as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Row:
    """One model of the study.

    kind: says what `model` holds: for "spike", fields of a `SpikeDecoderConfig`; for "preset", its name and
    changes to it; for "gpt", arguments of `GPT`. train: fields of a `TrainConfig`. tried: the name of a
    change in `quality_tried.TRIED`.
    """

    name: str
    kind: Literal["spike", "preset", "gpt"]
    model: dict[str, Any]
    train: dict[str, Any] = field(default_factory=lambda: dict(SLOW))
    tried: str | None = None
    steps: int | None = None  # binary timesteps, of the rows that differ only in these

    @property
    def ann(self) -> bool:
        return self.kind == "gpt" or self.model.get("spike_degree") == 0

    def reads_past(self, times: int) -> bool:
        """Whether the model has positions for contexts of `times` the training length."""
        return times == 1 or self.model.get("position") != "learned"


SMALL: list[Row] = [
    # the ladder: each row adds to the one before
    Row("original recipe", "spike", ORIGINAL),
    Row("+ embedding gain 2", "spike", GAIN),
    Row("+ token shift 4", "spike", SHIFT),
    Row("+ soft reset", "spike", SOFT),
    Row("+ decay per head", "spike", DECAY),
    Row("+ learning rate 8e-3", "spike", DECAY, FAST),
    Row("+ BatchNorm", "spike", BATCH, FAST),
    Row("+ decay of 0.75 to 0.96", "spike", QUICK, FAST),
    Row("+ one position channel", "spike", LIF, FAST),
    Row("+ embedding spread 1", "spike", SPREAD, FAST),
    Row("+ residual init 0.3", "spike", BEST_LIF, FAST, steps=4),
    Row("+ I-LIF, 15 levels", "spike", integers(15, 0.2), FAST, steps=4),
    Row("default", "preset", {"name": "default"}, FAST),  # + MLP shift of 2 in place of 4
    # levels and timesteps
    Row("I-LIF, 1 level", "spike", integers(1, 1.0), FAST, steps=1),
    Row("I-LIF, 3 levels", "spike", integers(3, 0.75), FAST, steps=2),
    Row("I-LIF, 4 levels", "spike", integers(4, 0.5), FAST),
    Row("I-LIF, 7 levels", "spike", integers(7, 0.4), FAST, steps=3),
    Row("LIF, T = 1", "spike", {**BEST_LIF, "timesteps": 1}, FAST, steps=1),
    Row("LIF, T = 2", "spike", {**BEST_LIF, "timesteps": 2}, FAST, steps=2),
    Row("LIF, T = 8", "spike", {**BEST_LIF, "timesteps": 8}, FAST, steps=8),
    # single changes
    Row("original recipe, BatchNorm", "spike", {**ORIGINAL, "norm": "batch"}),
    Row("I-LIF 15, no decay", "spike", integers(15, 0.2, **STILL), FAST),
    Row("I-LIF 15, LayerNorm", "spike", integers(15, 0.2, norm="layer"), FAST),
    Row("I-LIF 15, PowerNorm", "spike", integers(15, 0.2, norm="power"), FAST),
    Row("I-LIF 15, attention norm", "spike", integers(15, 0.2, attention_norm=True), FAST),
    Row("I-LIF 15, attention norm, no decay", "spike", integers(15, 0.2, attention_norm=True, **STILL), FAST),
    Row("I-LIF 15, shifts 8", "spike", integers(15, 0.2, token_shift=8, mlp_token_shift=8), FAST),
    Row("I-LIF 15, learning rate 4e-3", "spike", integers(15, 0.2), SLOW),
    Row("I-LIF 15, embedding spread 1e-5", "spike", integers(15, 0.2, embedding_std=1e-5), FAST),
    Row("I-LIF 15, residual init 1", "spike", integers(15, 0.2, residual_init=1.0), FAST),
    Row("I-LIF 15, unit 0.3", "spike", integers(15, 0.3), FAST),
    Row("I-LIF 15, eight heads", "spike", integers(15, 0.2, heads=8), FAST),
    Row("I-LIF 15, real-valued embedding", "spike", integers(15, 0.2, float_embedding=True), FAST),
    Row("LIF, threshold 0.5", "spike", {**BEST_LIF, "v_threshold": 0.5}, FAST),
    Row("LIF, no leak", "spike", {**BEST_LIF, "tau": 1e3, "decay_input": False}, FAST),
    Row("LIF, atan surrogate", "spike", {**BEST_LIF, "surrogate": "atan", "surrogate_alpha": 2.0}, FAST),
    Row("LIF, attention scale 0.25", "spike", {**BEST_LIF, "attention_scale": 0.25}, FAST),
    Row("LIF, timesteps summed", "spike", {**BEST_LIF, "reunite": "accumulate"}, FAST),
    Row("LIF, only the attention spikes", "spike", {**BEST_LIF, "attention_only": True}, FAST),
    Row("LIF, timesteps concatenated", "spike", {**BEST_LIF, "reunite": "concatenate"}, FAST),
    Row("LIF, learned thresholds", "spike", {**BEST_LIF, "learn_threshold": True}, FAST),
    Row("LIF, surrogate alpha 2", "spike", {**BEST_LIF, "surrogate_alpha": 2.0}, FAST),
    Row("LIF, surrogate alpha 8", "spike", {**BEST_LIF, "surrogate_alpha": 8.0}, FAST),
    Row("LIF, real-valued MLP and head", "spike", {**BEST_LIF, "spike_degree": 2}, FAST),
    # tried, and left out of the package
    Row("LIF, learned tau (PLIF)", "spike", BEST_LIF, FAST, tried="learned tau"),
    Row("LIF, thresholds per channel", "spike", BEST_LIF, FAST, tried="channel thresholds"),
    Row("I-LIF, ternary spikes, -7 to 7", "spike", integers(7, 0.4), FAST, tried="ternary"),
    Row("I-LIF 15, gradient one level beyond", "spike", integers(15, 0.2), FAST, tried="wide window"),
    # twins that do not spike
    Row("GPT, learned positions", "gpt", {"position": "learned"}),
    Row("GPT, ALiBi", "gpt", {"position": "alibi"}),
    Row("GPT, ALiBi, convolution 4", "gpt", {"position": "alibi", "convolution": 4}),
    Row("GPT, ALiBi, shifts", "gpt", {"position": "alibi", **HELPS}),
    Row("GPT, ALiBi, shifts, lr 8e-3", "gpt", {"position": "alibi", **HELPS}, FAST),
    Row(
        "GPT, ALiBi, shift 4, MLP shift 2, lr 8e-3",
        "gpt",
        {"position": "alibi", "shift": 4, "mlp_shift": 2},
        FAST,
    ),
    Row("GPT, ALiBi, shifts, lr 1.6e-2", "gpt", {"position": "alibi", **HELPS}, {"lr": 1.6e-2}),
    Row(
        "GPT, ALiBi, shifts, convolution 4, lr 8e-3",
        "gpt",
        {"position": "alibi", "convolution": 4, **HELPS},
        FAST,
    ),
    Row(
        "the original's baseline, shifts",
        "spike",
        {**SHIFT, "spike_degree": 0, "embedding_gain": 1.0},
    ),
    Row(
        "the original's baseline, shifts, lr 8e-3",
        "spike",
        {**SHIFT, "spike_degree": 0, "embedding_gain": 1.0},
        FAST,
    ),
]

_LARGE: dict[str, Any] = {"lr": 3e-3, "batch_size": 32, "warmup": 500}
_SHAPE: dict[str, Any] = {"channels": 384, "heads": 8, "blocks": 8, "position": "alibi"}
# the best presets with LIF neurons in place of I-LIF, and with the original's recipe
_LIF: dict[str, Any] = {
    **{"neuron": "lif", "levels": None, "v_threshold": 1.0, "timesteps": 4, "attention_scale": 0.125},
    "mlp_token_shift": 4,
}
_AS_ORIGINAL: dict[str, Any] = {
    **_LIF,
    **{"norm": "layer", "embedding_gain": 1.0, "embedding_std": 1e-5, "residual_init": 1.0},
    **{"token_shift": 1, "mlp_token_shift": 1, "v_reset": 0.0, "decay_fastest": 1.0, "decay_slowest": 1.0},
}

MEDIUM: list[Row] = [
    Row("original recipe", "preset", {"name": "best-medium", **_AS_ORIGINAL}, {**_LARGE, "lr": 1e-3}),
    Row("best-medium", "preset", {"name": "best-medium"}, _LARGE),
    Row("best-medium, LIF", "preset", {"name": "best-medium", **_LIF}, _LARGE),
    Row("GPT, ALiBi", "gpt", _SHAPE, {**_LARGE, "lr": 1e-3}),
    Row("GPT, ALiBi, shifts", "gpt", {**_SHAPE, **HELPS}, {**_LARGE, "lr": 1e-3}),
    Row("GPT, ALiBi, shifts, lr 3e-3", "gpt", {**_SHAPE, **HELPS}, _LARGE),
]

ROWS: dict[str, list[Row]] = {"small": SMALL, "medium": MEDIUM}
