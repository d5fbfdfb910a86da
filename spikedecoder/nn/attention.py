"""Self-attention: spiking without softmax, and the baseline's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.linear import LinearNorm, LinearNormLIF
from spikedecoder.nn.neuron import LIF
from spikedecoder.nn.shift import token_shift


class SpikingAttention(nn.Module):
    """x [T, B, S, E] -> [T, B, S, E]:

        s = LIF(x), token-shifted;  q, k, v = LIF(Norm(Linear(s)));
        a = LIF((q k^T, causal) v * scale);  out = Norm(Linear(a)).

    With `residual_spikes` x already spikes: no LIF before, one more LIF behind.
    """

    def __init__(self, c: SpikeDecoderConfig, residual_spikes: bool) -> None:
        super().__init__()
        e = c.embed_dim
        self.shift = c.token_shift
        self.input_lif = None if residual_spikes else LIF(c.lif, c.learn_threshold)
        self.q = LinearNormLIF(e, e, c.norm, c.lif, c.learn_threshold)
        self.k = LinearNormLIF(e, e, c.norm, c.lif, c.learn_threshold)
        self.v = LinearNormLIF(e, e, c.norm, c.lif, c.learn_threshold)
        self.attention_lif = AttentionLIF(c)
        self.proj = LinearNorm(e, e, c.norm, spikes=True)
        self.output_lif = LIF(c.lif, c.learn_threshold) if residual_spikes else None

    def forward(self, x: Tensor) -> Tensor:
        s = x if self.input_lif is None else self.input_lif(x)
        s = token_shift(s, self.shift)
        a = self.attention_lif(self.q(s), self.k(s), self.v(s))
        out = self.proj(a)
        return out if self.output_lif is None else self.output_lif(out)


class AttentionLIF(nn.Module):
    """Spikes [T, B, S, E] of the attention of q, k, v [T, B, S, E]."""

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        self.heads, self.scale, self.dropout = c.heads, c.attention_scale, c.attention_dropout
        self.lif = LIF(c.lif, c.learn_threshold)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # [T, B, S, E] -> [T, B, H, S, d]
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(2, 3) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        a = ops.spike_attention_lif(
            q, k, v, self.lif.params, self.scale, threshold=self.lif.v_threshold, dropout=dropout
        )
        return a.transpose(2, 3).flatten(-2)


class SoftmaxAttention(nn.Module):
    """The baseline's, x [B, S, E] -> [B, S, E]:

    q, k, v = Norm(Linear(x));  out = Norm(Linear(softmax(q k^T / sqrt(d), causal) v)).
    """

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        e = c.embed_dim
        self.heads, self.shift, self.dropout = c.heads, c.token_shift, c.attention_dropout
        self.q = LinearNorm(e, e, c.norm, spikes=False)
        self.k = LinearNorm(e, e, c.norm, spikes=False)
        self.v = LinearNorm(e, e, c.norm, spikes=False)
        self.proj = LinearNorm(e, e, c.norm, spikes=False)

    def forward(self, x: Tensor) -> Tensor:
        x = token_shift(x, self.shift)
        # [B, S, E] -> [B, H, S, d]
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.proj(a.transpose(1, 2).flatten(-2))
