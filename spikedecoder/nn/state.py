"""What a model remembers of the tokens it has read: explicit, movable, forkable, of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikedecoder.config import SpikeDecoderConfig

# One block's tensors by name; modules read and replace their own entries.
LayerState = dict[str, Tensor]


@dataclass
class DecoderState:
    """The past of B sequences.

    Per block: ``attention.state``, the running sum of k^T v [T, B, H, d, d] of spiking attention, or
    ``attention.k`` and ``attention.v`` [B, H, capacity, d] of softmax attention; ``attention.shift`` and
    ``mlp.shift``, the last tokens' spikes of a token shift. Neurons start fresh at each token, so this is
    all. `position` [B] is how many tokens each sequence has read.

    A call of `SpikeDecoder.prefill` or `step` consumes the state that it gets: go on with the one that it
    returns, and `clone` first to keep a point to fork from.
    """

    config: SpikeDecoderConfig
    position: Tensor
    layers: list[LayerState]
    longest: int = 0  # the largest position, known without asking the device

    @classmethod
    def empty(cls, config: SpikeDecoderConfig, batch: int, device: torch.device) -> DecoderState:
        position = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(config, position, [{} for _ in range(config.blocks)])

    @property
    def batch_size(self) -> int:
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes held, all sequences together."""
        tensors = [self.position, *(t for layer in self.layers for t in layer.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @staticmethod
    def bytes_of(config: SpikeDecoderConfig, itemsize: int = 4) -> int:
        """Bytes that one sequence's state takes, in a dtype of `itemsize` bytes.

        With spiking attention for ever, but for the step from float32 to float64 where sums need it (past
        2^24 / d tokens); with softmax attention for up to max_len tokens. Before the first token a state
        holds its position only.
        """
        c, d = config, config.embed_dim // config.heads
        rows = c.timesteps if c.spiking_attention else 1
        attention = rows * c.heads * d * d if c.spiking_attention else 2 * c.max_len * c.embed_dim
        shifts = rows * (c.token_shift - 1 + c.mlp_token_shift - 1) * c.embed_dim
        return 8 + c.blocks * (attention + shifts) * itemsize

    @property
    def _batch_dim(self) -> int:
        return 1 if self.config.spiking_attention else 0

    def clone(self) -> DecoderState:
        """A copy that shares nothing."""
        return self._map(torch.clone)

    def to(self, device: torch.device | str) -> DecoderState:
        return self._map(lambda t: t.to(device))

    def select(self, rows: Sequence[int] | Tensor) -> DecoderState:
        """The sequences `rows`, in that order; a row may come more than once: n ways to go on."""
        rows = rows.tolist() if isinstance(rows, Tensor) else rows
        for row in rows:
            if isinstance(row, bool):
                raise TypeError("rows: got truth values, takes the numbers of rows")
            if not -self.batch_size <= row < self.batch_size:
                raise ValueError(f"rows: got {row}, takes 0 to {self.batch_size - 1}")
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.position.device)
        chosen = self._map(lambda t: t.index_select(0 if t is self.position else self._batch_dim, index))
        chosen.longest = int(chosen.position.max()) if len(index) else 0
        return chosen

    @classmethod
    def stack(cls, states: Sequence[DecoderState]) -> DecoderState:
        """The sequences of several states as one batch; they may have read unequal numbers of tokens."""
        if not states:
            raise ValueError("states: got none, takes at least one")
        first = states[0]
        for state in states:
            if state.config != first.config:
                raise ValueError("states: got states of different configs, takes those of one model")
        sizes = [state.batch_size for state in states]
        layers: list[LayerState] = []
        for parts in zip(*(state.layers for state in states), strict=True):
            names = dict.fromkeys(name for part in parts for name in part)
            layers.append({name: _join(name, parts, sizes, first._batch_dim) for name in names})
        position = torch.cat([state.position for state in states])
        return cls(first.config, position, layers, max(state.longest for state in states))

    def _map(self, f) -> DecoderState:  # type: ignore[no-untyped-def]
        layers = [{name: f(t) for name, t in layer.items()} for layer in self.layers]
        return DecoderState(self.config, f(self.position), layers, self.longest)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, fit for safetensors; `from_tensors` is the inverse."""
        named = {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.items()}
        return {"position": self.position, **named}

    @classmethod
    def from_tensors(cls, config: SpikeDecoderConfig, tensors: dict[str, Tensor]) -> DecoderState:
        layers: list[LayerState] = [{} for _ in range(config.blocks)]
        try:
            position = tensors["position"]
            for name, t in tensors.items():
                if name != "position":
                    block, _, entry = name.partition(".")
                    layers[int(block)][entry] = t
        except (KeyError, IndexError, ValueError):
            raise ValueError(
                f"tensors: got {', '.join(tensors) or 'none'}, takes those of a saved state"
            ) from None
        return cls(config, position, layers, int(position.max()))


def _join(name: str, layers: Sequence[LayerState], sizes: Sequence[int], dim: int) -> Tensor:
    """The tensors of that name of so many sequences each as one; zeros for those that have read nothing."""
    known = next(layer[name] for layer in layers if name in layer)
    shapes = [(*known.shape[:dim], size, *known.shape[dim + 1 :]) for size in sizes]
    parts = [
        layer[name] if name in layer else known.new_zeros(s) for layer, s in zip(layers, shapes, strict=True)
    ]
    if name in ("attention.k", "attention.v"):
        capacity = max(p.shape[-2] for p in parts)
        parts = [grow(p, capacity) for p in parts]
    return torch.cat(parts, dim)


def grow(cache: Tensor, capacity: int) -> Tensor:
    """[..., n, d] -> [..., capacity, d] with zeros behind."""
    more = capacity - cache.shape[-2]
    if more <= 0:
        return cache
    return torch.cat([cache, cache.new_zeros(*cache.shape[:-2], more, cache.shape[-1])], dim=-2)
