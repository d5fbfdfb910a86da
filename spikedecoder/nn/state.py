"""What a model remembers of the tokens it has read, as an explicit object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikedecoder.config import SpikeDecoderConfig

# One block's tensors by name; modules read and replace their own entries.
LayerState = dict[str, Tensor]


def shapes(c: SpikeDecoderConfig, batch: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's tensors once it has read something; key and value caches can be longer."""
    d = c.embed_dim // c.heads
    steps = (c.timesteps,) if c.spiking_attention else ()
    cache = (batch, c.heads, c.max_len, d)
    made: dict[str, tuple[int, ...]] = (
        {"attention.state": (*steps, batch, c.heads, d, d)}
        if c.spiking_attention
        else {"attention.k": cache, "attention.v": cache}
    )
    for name, shift in (("attention.shift", c.token_shift), ("mlp.shift", c.mlp_token_shift)):
        if shift > 1:
            made[name] = (*steps, batch, shift - 1, c.embed_dim)
    return made


@dataclass
class DecoderState:
    """The past of B sequences.

    Per block: ``attention.state``, the running sum of k^T v [T, B, H, d, d] of spiking attention, or
    ``attention.k`` and ``attention.v`` [B, H, capacity, d] of softmax attention; ``attention.shift`` and
    ``mlp.shift``, the last tokens' inputs of a token shift. Neurons start at rest at each token, so this is
    all. `position` [B]: how many tokens each sequence has read.

    `SpikeDecoder.prefill` and `step` consume the state passed to them: continue with the one that they
    return, and `clone` first to keep a point to fork from. A state is refused by models of another config;
    that the weights are the same is up to the caller.
    """

    config: SpikeDecoderConfig
    position: Tensor
    layers: list[LayerState]
    longest: int = 0  # the largest position, known without reading the device

    @classmethod
    def empty(cls, config: SpikeDecoderConfig, batch: int, device: torch.device) -> DecoderState:
        """The state of `batch` sequences of which nothing has been read."""
        position = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(config, position, [{} for _ in range(config.blocks)])

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes held, all sequences together."""
        tensors = [self.position, *(t for layer in self.layers for t in layer.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @staticmethod
    def bytes_of(config: SpikeDecoderConfig, itemsize: int = 4) -> int:
        """Bytes of one sequence's state, in a dtype of `itemsize` bytes.

        With spiking attention it never grows, except when its sums need float64 instead of float32 (past
        `config.exact_tokens` tokens). With softmax attention this is the size for up to max_len tokens.
        Before the first token a state holds only its position.
        """
        return 8 + config.blocks * sum(map(math.prod, shapes(config, 1).values())) * itemsize

    @property
    def _batch_dim(self) -> int:
        return 1 if self.config.spiking_attention else 0

    def clone(self) -> DecoderState:
        """A copy that shares no memory."""
        return self._map(torch.clone)

    def to(self, device: torch.device | str) -> DecoderState:
        """The state on `device`."""
        return self._map(lambda t: t.to(device))

    def select(self, rows: Sequence[int] | Tensor) -> DecoderState:
        """The sequences `rows`, in that order; a row may be repeated, to be continued in several ways.

        Raises TypeError for truth values and ValueError for rows that there are not.
        """
        rows = rows.tolist() if isinstance(rows, Tensor) else rows
        for row in rows:
            if isinstance(row, bool):
                raise TypeError("rows: got truth values, takes the numbers of rows")
            if not 0 <= row < self.batch_size:
                raise ValueError(f"rows: got {row}, takes 0 to {self.batch_size - 1}")
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.position.device)
        chosen = self._map(lambda t: t.index_select(0 if t is self.position else self._batch_dim, index))
        chosen.longest = int(chosen.position.max()) if len(index) else 0
        return chosen

    @classmethod
    def stack(cls, states: Sequence[DecoderState]) -> DecoderState:
        """The sequences of several states as one batch; they may have read different numbers of tokens."""
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
        """The state that these are the `tensors` of.

        Raises:
            ValueError: names the first tensor that is missing, unknown, or does not fit this config.
        """
        position = tensors.get("position")
        if position is None or position.dtype != torch.int64 or position.dim() != 1 or not position.numel():
            got = "none" if position is None else f"{tuple(position.shape)} {position.dtype}"
            raise ValueError(f"position: got {got}, takes those of a saved state, [B] torch.int64")
        lowest, longest = map(int, position.aminmax())
        if lowest < 0:
            raise ValueError(f"position: got {lowest}, takes numbers of tokens, 0 or more")
        entries = shapes(config, len(position))
        rest = tensors.keys() - {"position"}
        layers: list[LayerState] = []
        for block in range(config.blocks):
            own = {entry: f"{block}.{entry}" for entry in entries if f"{block}.{entry}" in rest}
            if longest and len(own) < len(entries):
                missing = next(f"{block}.{entry}" for entry in entries if entry not in own)
                raise ValueError(f"tensors: got no {missing!r}, takes those of a saved state of this config")
            for entry, name in own.items():
                _check_saved(name, tensors[name], entry, entries[entry], longest, position.device)
            rest -= set(own.values())
            layers.append({entry: tensors[name] for entry, name in own.items()})
        if rest:
            raise ValueError(f"tensors: got {min(rest)!r}, takes those of a saved state of this config")
        return cls(config, position, layers, longest)


def _check_saved(
    name: str, t: Tensor, entry: str, shape: tuple[int, ...], longest: int, device: torch.device
) -> None:
    got = tuple(t.shape)
    if entry in ("attention.k", "attention.v") and t.dim() == 4:
        shape = (*shape[:2], max(longest, got[2]), shape[3])
    exact = entry != "attention.state" or t.dtype in (torch.float32, torch.float64)
    if got != shape or not t.is_floating_point() or not exact or t.device != device:
        takes = (
            f"{shape} {'float32 or float64' if entry == 'attention.state' else 'floating point'} on {device}"
        )
        raise ValueError(f"{name}: got {got} {t.dtype} on {t.device}, takes {takes}")


def _join(name: str, layers: Sequence[LayerState], sizes: Sequence[int], dim: int) -> Tensor:
    """The tensors called `name`, of `sizes` sequences each, as one; zeros for those that read nothing yet."""
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
    """[..., n, d] -> [..., capacity, d], padded with zeros."""
    more = capacity - cache.shape[-2]
    if more <= 0:
        return cache
    return torch.cat([cache, cache.new_zeros(*cache.shape[:-2], more, cache.shape[-1])], dim=-2)
