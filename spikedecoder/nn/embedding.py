"""Tokens and positions as channels: as spikes, and as the baseline's real numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.config import SpikeDecoderConfig, bits
from spikedecoder.surrogate import heaviside


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """[..., dim] float32: entry i of position p is sin (even i) or cos (odd i) of p / 10000^(i / dim).

    In float32 whatever the model's dtype, on which a binarised sinusoid must not depend.
    """
    i = torch.arange(dim, device=positions.device)
    phase = positions.to(torch.float32).unsqueeze(-1) / 1e4 ** (i.to(torch.float32) / dim)
    return torch.where(i % 2 == 0, phase.sin(), phase.cos())


def binary_code(numbers: Tensor, width: int, code: str) -> Tensor:
    """[..., width] of 0 and 1: the numbers' binary digits, most significant first.

    "fixed-width": leading zeros, so every number has its own code. "left-aligned" (the original's):
    trailing zeros instead, so 1, 2, 4, ... share one code.
    """
    if code == "left-aligned":
        digits = 1 + (numbers.clamp(min=1).unsqueeze(-1) >> torch.arange(1, 63, device=numbers.device)).gt(
            0
        ).sum(-1)
        numbers = numbers << (width - digits)
    shifts = torch.arange(width - 1, -1, -1, device=numbers.device)
    return (numbers.unsqueeze(-1) >> shifts) & 1


class Table(nn.Embedding):
    """torch's embedding, whose gradient is summed in float32 on CPUs: torch's is summed in the weight's dtype
    there, and a sum of ones in bfloat16 ends at 256."""

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weight
        if not weight.requires_grad or weight.is_cuda or weight.dtype.itemsize > 2:
            return super().forward(ids)
        return F.embedding(ids, weight.float()).to(weight.dtype)


class Embedding(nn.Module):
    """tokens [B, S] -> [B, S, E]: token channels, then position channels, as spikes times the gain."""

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        self.config = c
        self.token = Table(c.vocab_size, c.token_dim) if c.token_encoding == "learned" else None
        learned = c.position_encoding == "learned" and c.token_encoding != "one-hot"
        width = c.token_dim if c.combine_position else c.position_dim
        self.position = Table(c.max_len, width) if learned else None
        for table in (self.token, self.position):
            if table is not None:
                nn.init.normal_(table.weight, std=c.embedding_std)

    def forward(self, tokens: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """`positions` [S], or [B, S] if the sequences are at different positions."""
        c = self.config
        if c.token_encoding == "one-hot":
            out = F.one_hot(positions * c.vocab_size + tokens, c.token_width).to(dtype)
        elif c.combine_position:
            assert self.token is not None
            out = self._spikes(self.token(tokens) + self._positions(positions, dtype))
        else:
            place = self._positions(positions, dtype)
            if c.position_encoding in ("static", "learned"):
                place = self._spikes(place)
            out = torch.cat([self._tokens(tokens, dtype), place.expand(*tokens.shape, -1)], dim=-1)
        return out if c.embedding_gain == 1 else out * c.embedding_gain

    def _spikes(self, x: Tensor) -> Tensor:
        if self.config.float_embedding:
            return x
        return ops.binarize(x) if x.requires_grad else heaviside(x)

    def _tokens(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        c = self.config
        if self.token is not None:
            return self._spikes(self.token(tokens))
        if c.token_encoding == "two-hot":
            return F.one_hot(tokens, c.vocab_size).to(dtype)
        return binary_code(tokens, bits(c.vocab_size), c.binary_code).to(dtype)

    def _positions(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., width], not yet binarised."""
        c = self.config
        if c.position_encoding == "linear":
            return F.one_hot(positions, c.max_len).to(dtype)
        if c.position_encoding == "binary":
            return binary_code(positions, bits(c.max_len), c.binary_code).to(dtype)
        if self.position is not None:
            table = self.position(positions)
            return table if c.learn_positions else table.detach()
        if c.combine_position:
            return sinusoid(positions, c.token_dim).to(dtype)
        return (sinusoid(positions, c.position_dim) - c.position_bias).to(dtype)


class FloatEmbedding(nn.Module):
    """The baseline's embedding, tokens [B, S] -> [B, S, E]: token plus sinusoid or learned position."""

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        self.config = c
        self.token = Table(c.vocab_size, c.embed_dim)
        self.position = Table(c.max_len, c.embed_dim) if c.position_encoding == "learned" else None

    def forward(self, tokens: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        c = self.config
        if self.position is None:
            place = sinusoid(positions, c.embed_dim).to(dtype)
        else:
            place = self.position(positions)
        out = self.token(tokens) + place
        return out if c.embedding_gain == 1 else out * c.embedding_gain
