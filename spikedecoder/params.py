"""Parameters of operators, grouped into objects."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spikedecoder.fields import LEAST, at_least, number, switch
from spikedecoder.surrogate import get_surrogate

RUNNING = {  # the tensors that each kind of norm keeps from pass to pass
    "layer": (),
    "batch": ("running_mean", "running_var"),
    "power": ("running_phi", "ema_gz", "iters"),
}
NORMS = tuple(RUNNING)


def check_levels(levels: object) -> None:
    """Raise TypeError or ValueError unless `levels` is an integer from 1 to MAX_LEVELS."""
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"levels: got {levels!r}, takes an integer from 1 to {MAX_LEVELS}")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels: got {levels}, takes 1 to {MAX_LEVELS}")


@dataclass(frozen=True)
class LIFParams:
    """Parameters of a leaky integrate-and-fire neuron.

    With input x and membrane potential v, at each timestep t:

        h[t] = v[t-1] + (x[t] - (v[t-1] - r)) / tau       decay_input=True
        h[t] = v[t-1] + x[t] - (v[t-1] - r) / tau         decay_input=False
        s[t] = 1 if h[t] >= v_threshold else 0
        v[t] = v_reset where s[t] = 1, else h[t]          hard reset (v_reset a number)
        v[t] = h[t] - s[t] * v_threshold                  soft reset (v_reset=None)

    where r = v_reset (0 if None) and tau >= 1 is in timesteps. In backward, ds/dh is the `surrogate` with
    sharpness `alpha` (`spikedecoder.surrogate.SURROGATES`); ``detach_reset=True`` blocks the gradient through
    s in the reset. ``v_threshold`` is a fixed number; operators also take a threshold tensor that overrides
    it. A bad value raises TypeError or ValueError naming the field.
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
        """``LIFParams(*flat)``, cached: checking values at every operator call would take noticeable time."""
        return LIFParams(*flat)

    def flat(self) -> tuple[float, float, float | None, bool, str, float, bool]:
        """The fields in order, for an operator's schema; ``LIFParams.of(*p.flat())`` equals p."""
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
    """B, the number of binary digits of integers up to `levels`, 2^B > levels; 1 for plain spikes."""
    return levels.bit_length()


@dataclass(frozen=True)
class ILIFParams:
    """Parameters of an integer leaky integrate-and-fire neuron (I-LIF).

    It is trained in one timestep, with input x and D = `levels`, 1 to 15:

        s = clip(floor(x / v_threshold + 1/2), 0, D)
        ds/dx = 1 / v_threshold where -WINDOW <= x / v_threshold <= D + WINDOW, else 0

    At inference s unrolls into B binary timesteps, 2^B > D, which emit its binary digits, most significant
    first. The neuron then integrates and fires without leak: its potential starts at x + v_threshold / 2,
    capped at (D + 1/2) v_threshold; its threshold is 2^(B-1) v_threshold at the first timestep and halves at
    each later one; each spike subtracts the threshold that it crossed (soft reset). A spike counts as much
    as its threshold: see `spikedecoder.ops.spike_planes`.

    Sources: I-LIF, Luo et al., 2024 (SpikeYOLO, arXiv 2407.20708), there with D equally weighted timesteps;
    spikes weighted by powers of 2: Kim et al., 2018 (Neurocomputing 311).
    """

    levels: int
    v_threshold: float = 1.0

    WINDOW: ClassVar[float] = 0.5  # the gradient passes this many levels below 0 and above D

    def __post_init__(self) -> None:
        check_levels(self.levels)
        number("v_threshold", self.v_threshold, "a finite number > 0 with I-LIF", LEAST)

    def flat(self) -> tuple[int, float]:
        """The fields in order, for an operator's schema."""
        return self.levels, self.v_threshold

    @property
    def window(self) -> tuple[float, float]:
        """(low, high): the gradient passes where x / v_threshold lies within them."""
        return -self.WINDOW, self.levels + self.WINDOW


def repeats_a_pass() -> bool:
    """Whether this runs inside a backward pass: a forward pass there is a repetition by activation
    checkpointing. (torch has no public function for this.)"""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class NormParams:
    """One normalisation over the last dimension (channels), with the tensors it reads and updates.

        y = (x - mean) / sqrt(var + eps) * weight + bias        "layer", "batch"
        y = x / sqrt(mean of squares + eps) * weight + bias     "power"

    kind="layer": statistics per row.
    kind="batch": statistics per channel over all rows (T, B and S together); `running` is
        (running_mean, running_var), updated in training with `momentum`, used in evaluation.
    kind="power": PowerNorm (Shen et al., 2020): `running` is (running_phi, ema_gz, iters);
        `momentum` is 1 - alpha; the first `warmup` training passes use the batch's own second moment.

    `group`: the name of a process group (`spikedecoder.sync.name_of`) whose processes share the statistics of
    kinds "batch" and "power" in training, as with torch.nn.SyncBatchNorm: they are taken over the rows of all
    processes, and every row counts once. Gradients of weight and bias stay local, to be averaged by data
    parallelism. None: each process uses the statistics of its own rows.

    A bad kind, eps, momentum or warmup raises TypeError or ValueError.
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
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int):
            got = f"{self.warmup!r} ({type(self.warmup).__name__})"
            raise TypeError(f"warmup: got {got}, takes an integer >= 0")
        at_least("warmup", self.warmup, 0)

    @property
    def synced(self) -> str | None:
        """The group that shares this pass's statistics, None if each process uses its own."""
        return self.group if self.training and self.kind != "layer" else None
