"""Logits for the next token in one call of the compiled extension; choice of the source of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikedecoder.generation import graph
from spikedecoder.generation.recurrent import Recurrent
from spikedecoder.generation.window import LogitSource, Window
from spikedecoder.model import SpikeDecoder
from spikedecoder.nn.made import changed
from spikedecoder.nn.neuron import foreign
from spikedecoder.nn.state import DecoderState
from spikedecoder.ops._dispatch import requested_backend


def open_source(model: SpikeDecoder, keep: int | None = None, past: str = "slide") -> LogitSource:
    """The source of logits that generation and the server use.

    `Native` or `Graph` if possible, else `Recurrent`. `Window` if the model's forward is not this package's
    or has hooks: only `Window` calls it. keep, past: see `generate`.
    """
    if foreign(model) or model._forward_hooks or model._forward_pre_hooks:
        return Window(model, keep, past)
    if why_not(model) is None:
        return Native(model, keep, past)
    if graph.why_not(model) is None:
        return graph.Graph(model, keep, past)
    return Recurrent(model, keep, past)


def why_not(model: SpikeDecoder) -> str | None:
    """The reason why `Native` cannot be used for this model with the current backend; None if it can."""
    if requested_backend() not in ("auto", "cpu"):
        return f"backend {requested_backend()!r} was asked for"
    if model.device.type != "cpu":
        return f"it runs on the CPU, the model is on {model.device}"
    # imported only when it can be used, because importing the extension changes malloc's settings
    from spikedecoder.ext.cpu import decode

    reason = decode.why_not(model)
    if reason is None and (other := changed(model, SpikeDecoder)) is not None:
        reason = f"it knows what the config makes alone: {other}"
    return reason


class Native(Recurrent):
    """`Recurrent`, computed by `spikedecoder.ext.cpu.decode.Decoder`: prompts, windows and steps.

    Where float32 would not hold the sums of attention exactly, the model itself takes over. The weights are
    copied: after changing the model, make a new source. Only for models for which `why_not` is None.
    """

    def __init__(self, model: SpikeDecoder, keep: int | None = None, past: str = "slide") -> None:
        from spikedecoder.ext.cpu.decode import Decoder

        super().__init__(model, keep, past)
        self.decoder = Decoder(model)

    def _advance(self, tokens: Sequence[int], state: DecoderState) -> tuple[Tensor, DecoderState]:
        if not (self.decoder.takes(state) or self._narrowed(state)):
            return super()._advance(tokens, state)
        return self.decoder.step(torch.tensor(tokens, device="cpu"), state)

    def _narrowed(self, state: DecoderState) -> bool:
        """Whether float32 holds the sums again, now that the text too long for it has left; converts them."""
        if state.longest + 1 > self.model.config.exact_tokens:
            return False
        for layer in state.layers:
            layer["attention.state"] = layer["attention.state"].float()
        return True

    def _read_part(self, part: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        if state is None:
            state = DecoderState.empty(self.model.config, len(part), part.device)
        if not self.decoder.takes(state, part.shape[1]):
            return super()._read_part(part, state)
        return self.decoder.prefill(part, state, last_only=True)
