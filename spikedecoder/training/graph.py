"""The loss and gradients of a training step, replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spikedecoder.training.config import TrainConfig

# Steps that run as usual before the capture, so that kernels are compiled, tuned and loaded. They are
# ordinary training steps, and the capture itself computes nothing, so there is nothing to undo.
BEFORE = 3


def why_not(settings: TrainConfig, accelerator: Any) -> str | None:
    """The reason why the steps of a run are not replayed as a graph; None if they are."""
    if not settings.cuda_graph:
        return "cuda_graph is off"
    if accelerator.device.type != "cuda":
        return f"it runs on a GPU, the model is on {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return "processes exchange gradients during backward"
    if settings.compile:
        return "torch.compile has its own graphs (mode reduce-overhead)"
    if settings.grad_accum > 1:
        return "a replay writes gradients anew, accumulation adds to them"
    if settings.mixed_precision == "fp16":
        return "fp16 scales its losses"
    return None


def backward_of(
    loss_of: nn.Module, settings: TrainConfig, accelerator: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (inputs, targets) -> detached loss that leaves the gradients in the parameters' ``.grad``.

    It is a `GraphedStep` unless `why_not` has a reason.
    """

    def backward(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(inputs, targets)
        accelerator.backward(loss)
        return loss.detach()

    return backward if why_not(settings, accelerator) else GraphedStep(backward, loss_of.parameters())


class GraphedStep:
    """Forward and backward pass, run as usual for `BEFORE` calls, then captured and replayed.

    ``step(inputs, targets) -> loss`` returns a new tensor and leaves the gradients of this call alone in the
    parameters' ``.grad``. After the capture, gradients use the same memory at every call, so copy what must
    outlive the next one. Weights, running statistics and the CUDA generator are used in place, so in-place
    updates, loaded checkpoints and `torch.manual_seed` take effect as usual.

    A single graph covers both passes. `torch.cuda.make_graphed_callables` would make two, pass every
    parameter through an autograd function at each call, and warm up with passes that change the running
    statistics.

    Args:
        backward: (inputs, targets) -> detached loss, after `loss.backward()`. It must not wait for the GPU,
            and its Python code runs once more at the capture and then never again.
        parameters: those whose gradients it computes, all on one device. On a CPU every call runs `backward`.

    Raises:
        ValueError: the shape of a batch differs from the captured one.
        RuntimeError: `backward` cannot be captured.
    """

    def __init__(
        self, backward: Callable[[Tensor, Tensor], Tensor], parameters: Iterable[nn.Parameter]
    ) -> None:
        self.backward, self.parameters = backward, list(parameters)
        self.device = self.parameters[0].device
        # The steps before run on the capture's stream: autograd nodes remember the stream they were made on.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs = self._targets = self._loss = torch.empty(0)
        self._gradients: list[Tensor | None] = []

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= BEFORE:
            self._clear()
            return self._beside(inputs, targets)
        if self.calls == BEFORE + 1:
            self._inputs, self._targets = inputs.clone(), targets.clone()
            self._graph = None if self.stream is None else self._capture(self.stream)
        for ours, given in ((self._inputs, inputs), (self._targets, targets)):
            if ours.shape != given.shape:  # a copy would broadcast
                raise ValueError(f"batch: got shape {tuple(given.shape)}, captured is {tuple(ours.shape)}")
            ours.copy_(given)
        if self._graph is None:
            self._record()
        else:
            self._graph.replay()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _beside(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Run on the capture's stream, after the current stream's work; the current stream then waits."""
        if self.stream is None:
            return self.backward(inputs, targets)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self.backward(inputs, targets)
        current.wait_stream(self.stream)
        return loss

    def _record(self) -> None:
        self._clear()  # otherwise every replay would add to the gradients
        self._loss = self.backward(self._inputs, self._targets)
        self._gradients = [p.grad for p in self.parameters]

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._record()
        except RuntimeError as error:
            raise RuntimeError(
                f"the training step cannot be captured as a CUDA graph; train with cuda_graph=false ({error})"
            ) from error
        return graph
