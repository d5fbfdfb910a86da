"""The settings of a training run: validated, serialisable, with one preset for each model preset."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spikedecoder.fields import LEAST, at_least, check_field, coerce, number
from spikedecoder.presets import TRAIN_PRESETS


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run except the model and the text.

    steps: optimiser steps; each one sees batch_size * grad_accum windows of max_len tokens per process.
    batch_size, grad_accum: windows of a pass, in each process; passes whose gradients make one step.
    lr, min_lr, warmup: the learning rate rises linearly to `lr` over `warmup` steps (at most a tenth of
        `steps`), then falls along a cosine to `min_lr` at the last step. min_lr None: lr / 10.
    weight_decay, beta1, beta2: of AdamW; only Linear weights and learned thresholds decay.
    clip: the gradient norm is clipped to this value; 0 turns clipping off.
    eval_every: steps between held-out evaluations; 0: only at the end.
    eval_tokens: how many tokens each evaluation predicts, from the start of the held-out part; None: all.
    save_every: steps between checkpoints; 0: only at the end.
    log_every: steps between lines of metrics.jsonl.
    seed: of the initial weights, the batches and the dropout.
    mixed_precision: "no", "bf16" or "fp16" for the matrix products; "fp16" not on a CPU, nor with PowerNorm.
    device: "auto", "cpu", "cuda", "cuda:N" or "mps".
    threads: CPU threads of torch; None leaves torch's setting.
    compile: whether to run the training step through torch.compile.
    cuda_graph: whether to replay the forward and backward pass of a step as one CUDA graph, so that the host
        does not launch kernels one by one (`spikedecoder.training.graph`). Same results. Takes effect on a
        single CUDA device, without `compile`, with grad_accum = 1 and mixed_precision "no" or "bf16";
        otherwise it is ignored.
    recompute: whether to keep only bits of the Linears' inputs and recompute the Linears in the backward
        pass: less memory, same results (`SpikeDecoder.recompute_activations`). Not for neuron "ilif".
    sync_norm: with several processes, whether BatchNorm and PowerNorm take their statistics over all of them
        (`spikedecoder.nn.norm.sync_norms`). False: each process uses its own batch, as in torch.
    tensorboard: whether to write OUT/tensorboard as well; needs the extra "tensorboard".
    tokenizer, min_count, val_fraction: how the text is encoded and split, see
        `spikedecoder.data.prepare_corpus`.

    Raises ValueError naming the field that has an invalid value.
    """

    steps: int = 1000
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 4e-3
    min_lr: float | None = None
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    eval_every: int = 200
    eval_tokens: int | None = 100_000
    save_every: int = 100
    log_every: int = 10
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: str = "auto"
    threads: int | None = None
    compile: bool = False
    cuda_graph: bool = True
    recompute: bool = False
    sync_norm: bool = False
    tensorboard: bool = False
    tokenizer: Literal["char", "original-char", "word", "original-word"] = "char"
    min_count: int = 1
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, coerce(field.name, getattr(self, field.name), _HINTS[field.name])
            )
        for name in ("steps", "batch_size", "grad_accum", "min_count", "log_every"):
            at_least(name, getattr(self, name), 1)
        for name in ("warmup", "eval_every", "save_every"):
            at_least(name, getattr(self, name), 0)
        if self.eval_tokens is not None:
            at_least("eval_tokens", self.eval_tokens, 1)
        if self.threads is not None:
            number("threads", self.threads, "1 to 4096", 1, 4096)
        number("lr", self.lr, "a finite number > 0", LEAST)
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr: got {self.min_lr}, takes 0 to lr = {self.lr}, or None for lr / 10")
        for name in ("weight_decay", "clip"):
            number(name, getattr(self, name), "a finite number >= 0", 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a number in [0, 1)")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction: got {self.val_fraction}, takes a number between 0 and 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, takes 0 to 2**63 - 1")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise ValueError(f"device: got {self.device!r}, takes auto, cpu, cuda, cuda:N or mps")

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed; unknown names raise ValueError."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, strings, booleans and None, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; missing fields take their defaults, unknown ones raise ValueError."""
        for name in values:
            check_field(name, tuple(_HINTS), "training config")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainConfig:
        """The training settings for the model preset `name`, with some fields changed.

        Raises ValueError for an unknown preset or field.
        """
        if name not in tuple(TRAIN_PRESETS):
            raise ValueError(f"preset: got {name!r}, takes one of {', '.join(TRAIN_PRESETS)}")
        return cls.from_dict({**TRAIN_PRESETS[name], **changes})

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1: linear warm-up, then half a cosine."""
        floor = self.lr / 10 if self.min_lr is None else self.min_lr
        warmup = min(self.warmup, self.steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = min((step - warmup) / max(self.steps - 1 - warmup, 1), 1.0)
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


_HINTS: dict[str, Any] = typing.get_type_hints(TrainConfig)
