"""Parameters of operators, travelling together."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikedecoder.fields import LEAST, number, switch
from spikedecoder.surrogate import get_surrogate

RUNNING = {  # what each kind of norm keeps from pass to pass
    "layer": (),
    "batch": ("running_mean", "running_var"),
    "power": ("running_phi", "ema_gz", "iters"),
}
NORMS = tuple(RUNNING)


def check_levels(levels: object) -> None:
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"levels: got {levels!r}, takes an integer from 1 to {MAX_LEVELS}")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels: got {levels}, takes 1 to {MAX_LEVELS}")


@dataclass(frozen=True)
class LIFParams:
    """What defines a leaky integrate-and-fire neuron besides its input.

    With input x and membrane potential v, at each timestep t:

        h[t] = v[t-1] + (x[t] - (v[t-1] - r)) / tau       decay_input=True
        h[t] = v[t-1] + x[t] - (v[t-1] - r) / tau         decay_input=False
        s[t] = 1 if h[t] >= v_threshold else 0
        v[t] = v_reset where s[t] = 1, else h[t]          hard reset (v_reset a number)
        v[t] = h[t] - s[t] * v_threshold                  soft reset (v_reset=None)

    where r = v_reset (0 if None). ``detach_reset=True`` lets no gradient through s in the reset.
    ``v_threshold`` here is the fixed one; operators also take a threshold tensor that overrides it.
    """

    tau: float = 2.0
    v_threshold: float = 1.0
    v_reset: float | None = 0.0
    decay_input: bool = True
    surrogate: str = "sigmoid"
    alpha: float = 4.0
    detach_reset: bool = True

    def __post_init__(self) -> None:
        number("tau", self.tau, "a finite number >= 1 (in timesteps)", 1)
        number("v_threshold", self.v_threshold, "a finite number")
        if self.v_reset is not None:
            number("v_reset", self.v_reset, "a finite number, or None for a soft reset")
        number("alpha", self.alpha, "a finite number > 0", LEAST)
        switch("decay_input", self.decay_input)
        switch("detach_reset", self.detach_reset)
        get_surrogate(self.surrogate)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(*flat: Any) -> LIFParams:
        """``LIFParams(*flat)``, checked the first time: at every call of an operator that would be felt."""
        return LIFParams(*flat)

    def flat(self) -> tuple[float, float, float | None, bool, str, float, bool]:
        """The fields in order, for an operator's schema; ``LIFParams.of(*p.flat())`` is p again."""
        return (
            self.tau,
            self.v_threshold,
            self.v_reset,
            self.decay_input,
            self.surrogate,
            self.alpha,
            self.detach_reset,
        )


MAX_LEVELS = 15


def binary_timesteps(levels: int) -> int:
    """B, the binary digits of integers up to `levels`: 2^B > levels; 1 for spikes."""
    return levels.bit_length()


@dataclass(frozen=True)
class ILIFParams:
    """What defines an integer leaky integrate-and-fire neuron (I-LIF) besides its input.

    Trained in one timestep, with D = `levels`:

        s = clip(floor(x / v_threshold + 1/2), 0, D)
        ds/dx = 1 / v_threshold where -WINDOW <= x / v_threshold <= D + WINDOW, else 0

    At inference s is B binary timesteps, its binary digits, 2^B > D: an integrate-and-fire neuron without
    leak whose potential starts at x + v_threshold / 2 (at most (D + 1/2) v_threshold), whose threshold is
    2^(B-1) v_threshold at the first timestep and half as large at each later one, and from which each spike
    subtracts the threshold that it crossed (soft reset). A spike counts as much as its threshold: see
    `spikedecoder.ops.spike_planes`.

    Sources: I-LIF, Luo et al., 2024 (SpikeYOLO, arXiv 2407.20708), there with D timesteps of equal worth;
    spikes weighted by powers of 2: Kim et al., 2018 (Neurocomputing 311).
    """

    levels: int
    v_threshold: float = 1.0

    WINDOW: ClassVar[float] = 0.5  # levels below 0 and above D as far as which the gradient passes

    def __post_init__(self) -> None:
        check_levels(self.levels)
        number("v_threshold", self.v_threshold, "a finite number > 0 with I-LIF", LEAST)

    def flat(self) -> tuple[int, float]:
        """The fields in order, for an operator's schema."""
        return self.levels, self.v_threshold

    @property
    def window(self) -> tuple[float, float]:
        """Of x / v_threshold, where the gradient passes."""
        return -self.WINDOW, self.levels + self.WINDOW


def repeats_a_pass() -> bool:
    """Whether a backward pass runs here: a forward pass inside it is one that activation checkpointing
    repeats. (torch has no public name for it.)"""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class NormParams:
    """One normalisation over the last dimension (channels), with the tensors it reads and updates.

    kind="layer": statistics per row; mean 0, variance 1, then weight and bias.
    kind="batch": statistics per channel over all rows (T, B and S together); `running` is
        (running_mean, running_var), updated in training with `momentum`, used in evaluation.
    kind="power": PowerNorm (Shen et al., 2020), no mean: `running` is (running_phi, ema_gz, iters);
        `momentum` is alpha, `warmup` the number of passes that use the batch's own second moment.

    `group`: the name of a process group (`spikedecoder.sync.name_of`) whose processes share the statistics of
    kinds "batch" and "power" in training, as torch.nn.SyncBatchNorm does: those of all processes' rows, each
    row counted once. The gradients of weight and bias stay each process's own, for data parallelism to
    average. None: every process by itself.
    """

    kind: str
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    training: bool = True
    running: tuple[Tensor, ...] = ()
    momentum: float = 0.1
    warmup: int = 10_000
    group: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in NORMS:
            raise ValueError(f"norm: got {self.kind!r}, takes one of {', '.join(NORMS)}")
        number("eps", self.eps, "a finite number >= 0", 0)
        number("momentum", self.momentum, "a number in [0, 1]", 0, 1)

    @property
    def synced(self) -> str | None:
        """The group that shares this pass's statistics, None where each process has its own."""
        return self.group if self.training and self.kind != "layer" else None
