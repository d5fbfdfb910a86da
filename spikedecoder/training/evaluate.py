"""Loss, accuracy and spike rates of a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.data import held_out_batches
from spikedecoder.diagnosis import dead_layers, saturated_layers
from spikedecoder.model import IGNORE, SpikeDecoder, check_model
from spikedecoder.nn.evaluating import evaluating
from spikedecoder.spike_stats import SpikeCounter, spiking_layers


@dataclass(frozen=True)
class Evaluation:
    """Means over `tokens` predicted tokens, of `of_tokens` in the held-out part; padding does not count.

    loss: nats per token. bits: loss / ln 2, per token. accuracy: share of targets that were the most probable
    token. spike_rates: by layer, spikes per neuron and timestep. full: by layer, the share of neuron outputs
    that were the largest possible, 1 or an I-LIF neuron's levels.
    """

    loss: float
    bits: float
    accuracy: float
    tokens: int
    of_tokens: int
    spike_rates: dict[str, float] = field(default_factory=dict)
    full: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict."""
        return asdict(self)

    @property
    def covers(self) -> str:
        """In words, which part of the held-out text was predicted."""
        if self.tokens == self.of_tokens:
            return f"all {self.tokens:,} held-out tokens"
        return f"the first {self.tokens:,} of {self.of_tokens:,} held-out tokens"


@torch.no_grad()
def evaluate(
    model: SpikeDecoder,
    tokens: np.ndarray,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    accelerator: Any = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Loss, accuracy and spike rates of `model` on held-out tokens, window by window.

    tokens: 1-D array of integers, read in windows of max_len tokens; each window starts without context.
    batch_size: windows per batch.
    max_tokens: how many tokens to predict; None: all. Padding does not count as a target.
    accelerator: its processes share the batches, and all of them return the same result.
    stop: called before each batch; if it returns True, the result is None. Processes must agree on it.

    The model runs in evaluation mode and is left in the mode it was in.

    Raises TypeError or ValueError naming the argument.
    """
    check_model(model)
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        got = (
            f"{tokens.dtype}, shape {tokens.shape}"
            if isinstance(tokens, np.ndarray)
            else type(tokens).__name__
        )
        raise TypeError(f"tokens: got {got}, takes an array [N] of integers")
    config = model.config
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    pad = config.pad_id
    loss, correct, count = 0.0, 0, 0
    with evaluating(model), SpikeCounter(model) as counter:
        batches = held_out_batches(tokens, config.max_len, batch_size, max_tokens, pad_id=pad or 0)
        for i, (inputs, targets) in enumerate(batches):
            if stop():
                return None
            if i % world != rank:
                continue
            inputs, targets = inputs.to(model.device), targets.to(model.device)
            if pad is not None:
                targets = targets.masked_fill(targets == pad, IGNORE)
            counter.mask = targets != IGNORE
            if accelerator is None:
                logits = model(inputs)
            else:
                with accelerator.autocast():
                    logits = model(inputs)
            chosen, wanted = logits[counter.mask].float(), targets[counter.mask]
            loss += float(F.cross_entropy(chosen, wanted, reduction="sum"))
            correct += int((chosen.argmax(-1) == wanted).sum())
            count += wanted.numel()
    counts = counter.counts()
    if world > 1:
        loss, correct, count, counts = _sum_over_processes(accelerator, model, loss, correct, count, counts)
    mean = loss / count if count else math.nan
    return Evaluation(
        loss=mean,
        bits=mean / math.log(2),
        accuracy=correct / count if count else math.nan,
        tokens=count,
        of_tokens=len(tokens) - 1 - (0 if pad is None else int((tokens[1:] == pad).sum())),
        spike_rates={name: spikes / slots if slots else 0.0 for name, (spikes, _, slots) in counts.items()},
        full={name: full / slots if slots else 0.0 for name, (_, full, slots) in counts.items()},
    )


def _sum_over_processes(
    accelerator: Any,
    model: SpikeDecoder,
    loss: float,
    correct: int,
    count: int,
    counts: dict[str, tuple[int, int, int]],
) -> tuple[float, int, int, dict[str, tuple[int, int, int]]]:
    names = [name for name, _ in spiking_layers(model)]  # not from `counts`: empty without a batch
    flat = [n for name in names for n in counts.get(name, (0, 0, 0))]
    sums = accelerator.reduce(torch.tensor([correct, count, *flat], device=model.device), "sum").tolist()
    total = float(accelerator.reduce(torch.tensor(loss, device=model.device, dtype=torch.float32), "sum"))
    triples = {name: tuple(sums[2 + 3 * i : 5 + 3 * i]) for i, name in enumerate(names)}
    return total, sums[0], sums[1], triples


def health(evaluation: Evaluation, config: SpikeDecoderConfig) -> list[str]:
    """Warnings, with what to try, about layers that never fire or are always at their largest output."""
    silent = [name for name, rate in evaluation.spike_rates.items() if rate == 0]
    full = [name for name, share in evaluation.full.items() if share == 1]
    return [dead_layers(silent, config)] * bool(silent) + [saturated_layers(full, config)] * bool(full)
