"""Run a model on tokens and return the ledger of its operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spikedecoder.energy.ledger import Ledger
from spikedecoder.energy.record import Mode, Recorder
from spikedecoder.model import SpikeDecoder
from spikedecoder.nn.evaluating import evaluating

_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def measure(
    model: SpikeDecoder, tokens: Tensor | Sequence[Tensor], *, mode: Mode = "prompt", name: str = ""
) -> Ledger:
    """Run `model` on `tokens` and return the ledger of its operations, counted from the spikes it fires.

    tokens: int64 [B, S], or several such tensors of any lengths.
    mode: "prompt" bills each sequence as a whole, "token" one token at a time, as in generation (the energy
        per token is then a mean over all positions). See `Recorder`.
    name: the ledger's, shown in comparisons.

    The model runs in evaluation mode and is left in the mode it was in.

    Raises TypeError, ValueError: naming the argument, or the layer whose values cannot be counted.
    """
    if not isinstance(model, SpikeDecoder):
        raise TypeError(f"model: got {type(model).__name__}, takes a SpikeDecoder (others: see Recorder)")
    if not isinstance(tokens, Iterable):
        raise TypeError(f"tokens: got {type(tokens).__name__}, takes an int64 tensor [B, S], or several")
    batches = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    if not batches:
        raise ValueError("tokens: got none, takes an int64 tensor [B, S], or several")
    with Recorder(model, mode) as recorder, evaluating(model):
        for batch in batches:
            if not isinstance(batch, Tensor) or batch.dim() != 2:
                got = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
                raise ValueError(f"tokens: got {got}, takes an int64 tensor [B, S]")
            for part in batch.split(max(1, _TOKENS_AT_ONCE // max(1, batch.shape[1]))):
                model(part.to(model.device))
    return recorder.ledger(name)
