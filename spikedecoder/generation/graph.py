"""Logits for the next token on a GPU: the model's step, captured once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikedecoder.generation.recurrent import Recurrent
from spikedecoder.nn.evaluating import evaluating
from spikedecoder.nn.neuron import followed
from spikedecoder.nn.state import DecoderState

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder

# Steps that a batch size takes through the modules before it is captured: they compile and warm up kernels,
# and a batch whose size soon changes again is not worth capturing.
BEFORE = 4


def why_not(model: SpikeDecoder) -> str | None:
    """The reason why steps of this model cannot be captured; None if they can."""
    if model.device.type != "cuda":
        return f"it runs on a GPU, the model is on {model.device}"
    if not model.config.spiking_attention:
        return "softmax attention's cache of keys and values grows, which asks the host for its length"
    if followed(model):
        return "somebody watches its modules with forward hooks, which a graph would not call"
    return None


class StaticStep:
    """`SpikeDecoder.step` for one batch size, on a fixed set of tensors for token and state.

    On a GPU the step is captured as a graph, so that a token costs one launch and nothing waits for the host.
    Elsewhere it runs as usual. Weights are read from the model's own tensors: in-place changes take effect.

    state: sets the batch size and dtypes; it has read at least one token. It is copied.

    Raises:
        ValueError: a state without sums of attention; when called, a state that does not `fit` or a token of
            another shape.
    """

    def __init__(self, model: SpikeDecoder, state: DecoderState) -> None:
        if not all("attention.state" in layer for layer in state.layers):
            raise ValueError(
                "state: got one without sums of attention, takes that of a prompt and a model that has them"
            )
        self.model = model
        self.token = torch.zeros_like(state.position)
        self.state = state.clone()
        self._logits = torch.empty(0)
        self._replay: Callable[[], object] = self._run
        if model.device.type == "cuda":
            self._replay = self._capture()

    def __call__(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one more token [B]; returns logits [B, V] and the new state, always the same object."""
        if not self.fits(state):
            raise ValueError(
                f"state: got one of {state.batch_size} sequences behind {state.longest} tokens, takes this "
                f"model's of {len(self.token)}, in the dtypes of the first, while float32 holds their sums"
            )
        if token.shape != self.token.shape:
            raise ValueError(f"token: got shape {tuple(token.shape)}, takes {tuple(self.token.shape)}")
        if state is not self.state:
            for mine, other in zip(_tensors(self.state), _tensors(state), strict=True):
                mine.copy_(other)
            self.state.longest = state.longest
        self.token.copy_(token)
        self._replay()
        self.state.longest += 1
        return self._logits.clone(), self.state

    def fits(self, state: DecoderState) -> bool:
        """Whether a state has this step's config, shapes and dtypes, also after one more token."""
        if not _exact(state):
            return False
        if state is self.state:
            return True
        mine, other = _tensors(self.state), _tensors(state)
        same = len(mine) == len(other) and all(
            a.shape == b.shape and a.dtype == b.dtype for a, b in zip(mine, other, strict=True)
        )
        return same and state.config == self.state.config

    def _run(self) -> None:
        # the model replaces tensors in the state it is given, so give it copies of the dictionaries
        layers = [dict(layer) for layer in self.state.layers]
        before = DecoderState(self.state.config, self.state.position, layers, self.state.longest)
        self._logits, after = self.model.step(self.token, before)
        for mine, new in zip(_tensors(self.state), _tensors(after), strict=True):
            mine.copy_(new)

    def _capture(self) -> Callable[[], object]:
        # the model's device may not be the current one, whose stream would capture nothing
        current, stream = (of(self.token.device) for of in (torch.cuda.current_stream, torch.cuda.Stream))
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._run()
        return graph.replay


class Graph(Recurrent):
    """`Recurrent` with its steps replayed as CUDA graphs, one for each batch size that lasts.

    Prompts, and windows that are read again, go through the model.

    Raises:
        ValueError: `why_not` has a reason.
    """

    def __init__(self, model: SpikeDecoder, keep: int | None = None, past: str = "slide") -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        super().__init__(model, keep, past)
        self._steps: dict[int, StaticStep] = {}
        self._count: dict[int, int] = {}

    def _advance(self, tokens: Sequence[int], state: DecoderState) -> tuple[Tensor, DecoderState]:
        size = state.batch_size
        self._count[size] = self._count.get(size, 0) + 1
        step = self._steps.get(size)
        if self._count[size] <= BEFORE or not (_exact(state) if step is None else step.fits(state)):
            return super()._advance(tokens, state)
        with evaluating(self.modules), torch.no_grad():
            if step is None:
                step = self._steps[size] = StaticStep(self.model, state)
            return step(torch.tensor(tokens, device=self.model.device), state)


def _exact(state: DecoderState) -> bool:
    """Whether the state's dtype still holds the sums of attention exactly after one more token."""
    sums = state.layers[0].get("attention.state")
    wide = sums is not None and sums.dtype == torch.float64
    return wide or state.longest + 1 <= state.config.exact_tokens


def _tensors(state: DecoderState) -> list[Tensor]:
    return [state.position, *(layer[name] for layer in state.layers for name in sorted(layer))]
