"""What generating a text cost: spikes, operations and energy per token, found by reading it once more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from spikedecoder.energy.ledger import Ledger
from spikedecoder.energy.record import Recorder
from spikedecoder.generation.window import Context
from spikedecoder.model import SpikeDecoder
from spikedecoder.nn.evaluating import evaluating
from spikedecoder.nn.state import DecoderState
from spikedecoder.spike_stats import SpikeCounter


@dataclass(frozen=True)
class TextCost:
    """The cost of texts, prompts included.

    spike_rates: by layer, spikes per neuron and timestep, 0 to 1. ledger: all operations, token by token.
    again: how many of the `tokens` read had been read before, because a text outgrew the context.
    """

    spike_rates: dict[str, float]
    ledger: Ledger
    again: int

    @property
    def tokens(self) -> int:
        return self.ledger.tokens

    @property
    def spike_rate(self) -> float | None:
        """The mean over the layers; None if no layer spikes."""
        rates = list(self.spike_rates.values())
        return sum(rates) / len(rates) if rates else None

    @property
    def accumulates(self) -> float:
        """Additions caused by spikes, per token read: in Linears on spikes and in spiking attention."""
        return float(self.ledger.totals()["ac"] / self.tokens)

    @property
    def multiply_accumulates(self) -> float:
        """Multiply-accumulates per token read: products of real numbers with weights or each other."""
        return float(self.ledger.totals()["mac"] / self.tokens)


@torch.no_grad()
def text_cost(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    keep: int | None = None,
    past: str = "slide",
) -> TextCost:
    """The cost of texts generated with these arguments; no prompt may be empty.

    The recurrent and the parallel form spike alike, so this counts what the generation did, however it was
    computed, without slowing it down. That includes reading the last `keep` tokens again where a text outgrew
    the context. The last token of a text was never read.
    """
    context = Context.of(model, keep, past)
    spikes, recorder, again = SpikeCounter(model), Recorder(model, "token"), 0
    with evaluating(model), spikes, recorder:
        for prompt, new in zip(prompts, tokens, strict=True):
            state: DecoderState | None = None
            for window, known in windows(prompt, new, context):
                before = state if past == "continue" else None
                _, state = model.prefill(torch.tensor([window], device=model.device), before)
                again += known
    return TextCost(spikes.rates(), recorder.ledger(), again)


def windows(
    prompt: Sequence[int], tokens: Sequence[int], context: Context
) -> Iterator[tuple[list[int], int]]:
    """The windows that were read while `tokens` were written after a prompt.

    Each comes with the number of tokens at its beginning that had been read before. The last of `tokens` was
    never read.
    """
    prompt, new = list(prompt), list(tokens)[:-1]
    if context.past == "continue":
        text = prompt + new
        for i in range(0, len(text), context.longest):
            yield text[i : i + context.longest], 0
        return
    window, known = context.cut(prompt), 0
    while window:
        room = context.longest - len(window)
        window, new = window + new[:room], new[room:]
        yield window, known
        if not new:
            return
        window, new = context.cut([*window, new[0]]), new[1:]
        known = len(window) - 1
