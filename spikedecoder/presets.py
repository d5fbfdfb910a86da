"""The presets, by name: what each changes in the configuration of a model and of its training."""

from __future__ import annotations

from typing import Any

_ORIGINAL_CHAR: dict[str, Any] = {
    "vocab_size": 30,
    "max_len": 256,
    "token_dim": 50,
    "position_dim": 30,
    "heads": 5,
    "blocks": 12,
    "mlp_ratio": 16,
    "timesteps": 4,
    "binary_code": "left-aligned",
    "learn_positions": False,
    "pad_id": 28,
}

# the settings with which small models learn best and keep working in long contexts, by bench/quality.py; one
# position channel, a sine of period 2 pi tokens: slower ones take values at long range unseen in training
_BEST_LIF: dict[str, Any] = {
    "norm": "batch",
    "embedding_gain": 2.0,
    "embedding_std": 1.0,
    "token_shift": 4,
    "mlp_token_shift": 4,
    "residual_init": 0.3,
    "v_reset": None,
    "decay_fastest": 0.75,
    "decay_slowest": 0.96,
}
_BEST: dict[str, Any] = {
    **_BEST_LIF,
    "mlp_token_shift": 2,
    "neuron": "ilif",
    "levels": 15,
    "v_threshold": 0.2,
    "timesteps": 1,
    "attention_scale": 0.001,  # LIF's 0.125 times v_threshold^3: q, k and v count in units of v_threshold
}

PRESETS: dict[str, dict[str, Any]] = {
    # small enough to train on a laptop in minutes
    "default": {**_BEST, "max_len": 128, "token_dim": 95, "position_dim": 1},
    # the same with LIF neurons of four timesteps
    "default-lif": {**_BEST_LIF, "max_len": 128, "token_dim": 95, "position_dim": 1},
    "default-ann": {"max_len": 128, "spike_degree": 0, "token_shift": 4, "mlp_token_shift": 4},
    # the same recipe with 0.8 and 14 million parameters
    "best-small": {**_BEST, "max_len": 256, "token_dim": 127, "position_dim": 1, "blocks": 4},
    "best-medium": {
        **_BEST,
        "max_len": 512,
        "token_dim": 383,
        "position_dim": 1,
        "heads": 8,
        "blocks": 8,
    },
    # the two models of the original's README; the word model's vocabulary is its dictionary's
    "original-char": _ORIGINAL_CHAR,
    "original-word": {**_ORIGINAL_CHAR, "max_len": 128, "token_dim": 90, "blocks": 20, "pad_id": None},
    "original-char-ann": {
        "max_len": 256,
        "spike_degree": 0,
        "token_dim": 80,
        "combine_position": True,
        "heads": 5,
        "blocks": 12,
        "mlp_ratio": 16,
        "pad_id": 28,
    },
}

# as in the original: 10 epochs of 90 000 windows in batches of 32, the first of the 200 epochs over which its
# cosine schedule falls to 5e-5
_ORIGINAL_RUN: dict[str, Any] = {
    "steps": 28_125,
    "batch_size": 32,
    "lr": 1e-3,
    "warmup": 0,
    "min_lr": 9.94e-4,
    "eval_every": 1000,
}

# the training settings of each preset
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"lr": 8e-3},
    "default-lif": {"lr": 8e-3},
    "default-ann": {"lr": 8e-3},
    "best-small": {"lr": 8e-3, "steps": 5000},
    "best-medium": {"lr": 3e-3, "steps": 20_000, "batch_size": 32, "warmup": 500, "eval_every": 1000},
    "original-char": {**_ORIGINAL_RUN, "tokenizer": "original-char"},
    "original-word": {**_ORIGINAL_RUN, "tokenizer": "original-word", "min_count": 6},
    "original-char-ann": {**_ORIGINAL_RUN, "tokenizer": "original-char"},
}
