"""What a text cost: spikes, operations and energy per token, from reading it once more."""

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
    """Of texts, prompts included.

    spike_rates: by layer, spikes per neuron and timestep, 0 to 1. ledger: all operations, token by token.
    `tokens` were read, of which `again` had been read before, when a text outgrew the context.
    """

    spike_rates: dict[str, float]
    ledger: Ledger
    again: int

    @property
    def tokens(self) -> int:
        return self.ledger.tokens

    @property
    def spike_rate(self) -> float | None:
        """The mean over the layers; None where none spikes."""
        rates = list(self.spike_rates.values())
        return sum(rates) / len(rates) if rates else None

    @property
    def accumulates(self) -> float:
        """Additions per token read that a spike caused: in Linears on spikes and in spiking attention."""
        return float(self.ledger.totals()["ac"] / self.tokens)

    @property
    def multiply_accumulates(self) -> float:
        """Per token read, where real numbers meet weights or each other: what does not spike."""
        return float(self.ledger.totals()["mac"] / self.tokens)


@torch.no_grad()
def text_cost(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    keep: int | None = None,
    past: str = "slide",
) -> TextCost:
    """The cost of texts generated with these arguments; prompts not empty.

    The recurrent and the parallel form spike alike, so this counts what the generation did, however it was
    computed, without slowing it down; also reading the last `keep` tokens anew, where the text outgrew the
    context. The last token was never read.
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
    """What was read in one piece while `tokens` were written behind a prompt, and how many tokens of its
    beginning were read before. The last of `tokens` was not."""
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
