"""Self-attention: spiking without softmax, and softmax attention for the baseline."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.linear import LinearNorm, LinearNormLIF
from spikedecoder.nn.neuron import fire, neurons, watched
from spikedecoder.nn.norm import Norm
from spikedecoder.nn.shift import token_shift
from spikedecoder.nn.state import LayerState, grow


class SpikingAttention(nn.Module):
    """x [T, B, S, E] -> [T, B, S, E]:

        s = LIF(x), token-shifted;  q, k, v = LIF(Norm(Linear(s)));
        a = LIF((q k^T, causal) v * scale);  out = Norm(Linear(a)).

    With `residual_spikes` x is spikes already: there is no LIF at the input, but one at the output.
    """

    def __init__(self, c: SpikeDecoderConfig, residual_spikes: bool) -> None:
        super().__init__()
        e = c.embed_dim
        self.shift = c.token_shift
        self.input_lif = None if residual_spikes else neurons(c)
        self.q = LinearNormLIF(e, e, c)
        self.k = LinearNormLIF(e, e, c)
        self.v = LinearNormLIF(e, e, c)
        self.attention_lif = AttentionLIF(c)
        self.proj = LinearNorm(e, e, c.norm, levels=c.spike_levels, gain=c.residual_init)
        self.output_lif = neurons(c) if residual_spikes else None

    def forward(self, x: Tensor, layer: LayerState | None = None) -> Tensor:
        s = x if self.input_lif is None else self.input_lif(x)
        s = token_shift(s, self.shift, layer, "attention.shift")
        a = self.attention_lif(self.q(s), self.k(s), self.v(s), layer)
        out = self.proj(a)
        return out if self.output_lif is None else self.output_lif(out)


class AttentionLIF(nn.Module):
    """Spiking attention of q, k, v [T, B, S, E] and its neurons: spikes [T, B, S, E]."""

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        self.heads, self.scale, self.dropout = c.heads, c.attention_scale, c.attention_dropout
        self.levels, self.unrolled = c.spike_levels, False  # see SpikeDecoder.unroll
        self.lif = neurons(c)
        self.norm = Norm(c.norm, c.embed_dim) if c.attention_norm else None
        # made from the config, so in no checkpoint
        self.decay: Tensor | None
        self._decays = c.decays
        self.register_buffer("decay", None if c.decays is None else self._made(), persistent=False)

    def _made(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(self._decays, dtype=dtype, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionLIF:
        """Called by `to`, `half` and `to_empty`: makes the decay anew, so that it is not rounded (0.999 in
        bfloat16 is 1) and gets its values if the module had none."""
        super()._apply(fn, recurse)
        if self.decay is not None and not self.decay.is_meta:
            self.decay = self._made(self.decay.device, torch.promote_types(self.decay.dtype, torch.float32))
        return self

    def decays_as_made(self) -> bool:
        """Whether the decay is what the config makes."""
        if self.decay is None or self.decay.is_meta:
            return (self.decay is None) == (self._decays is None)
        return torch.equal(self.decay, self._made(self.decay.device, self.decay.dtype))

    def _decay_for(self, x: Tensor) -> Tensor | None:
        """The decay; made here if weights were assigned to a module on the meta device."""
        if self.decay is not None and self.decay.is_meta and not x.is_meta:
            self.decay = self._made(x.device)
        return self.decay

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerState | None = None) -> Tensor:
        # [T, B, S, E] -> [T, B, H, S, d]
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(2, 3) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if layer is None and self.norm is None and not watched(self.lif) and self.lif.fused:
            p, threshold = self.lif.params, self.lif.v_threshold
            if threshold is not None and threshold.dim() == 1:  # one value per channel of E
                threshold = threshold.expand(q.shape[2] * q.shape[-1]).unflatten(0, (self.heads, 1, -1))
            a = ops.spike_attention_lif(
                q, k, v, p, self.scale, self._decay_for(q), threshold=threshold, dropout=dropout
            )
            return a.transpose(2, 3).flatten(-2)
        dtype = q.dtype
        # like the operator above (but for Triton's), round no current to 16 bits
        if self.norm is None and getattr(self.lif, "fused", False):
            q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        current = self.current(q, k, v, dropout) if layer is None else self._go_on(q, k, v, layer)
        current = current.transpose(2, 3).flatten(-2)
        spikes = self.lif(current) if self.norm is None else fire(self.lif, self.norm, current)
        return spikes.to(dtype)

    def current(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """The attention itself, before norm and neurons: [T, B, H, S, d] for q, k, v of that shape."""
        result = self._attend(q, k, v, dropout=dropout)
        assert isinstance(result, Tensor)
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        attention = ops.unrolled_attention if self.unrolled else ops.spike_attention
        return attention(q, k, v, self.scale, self._decay_for(q), levels=self.levels, **options)

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerState) -> Tensor:
        """The attention after the past's sum of k^T v, in the dtype that keeps it exact; [T, B, H, S, d]."""
        state, dtype = layer.get("attention.state"), q.dtype
        if state is not None and state.dtype == torch.float64:
            q, k, v = q.double(), k.double(), v.double()
        current, layer["attention.state"] = self._attend(q, k, v, state=state, return_state=True)
        return current.to(dtype)


class SoftmaxAttention(nn.Module):
    """The attention of the non-spiking baseline, x [B, S, E] -> [B, S, E]:

    q, k, v = Norm(Linear(x));  out = Norm(Linear(softmax(q k^T / sqrt(d), causal) v)).
    """

    def __init__(self, c: SpikeDecoderConfig) -> None:
        super().__init__()
        e = c.embed_dim
        self.heads, self.shift, self.dropout = c.heads, c.token_shift, c.attention_dropout
        self.capacity = c.max_len
        self.q = LinearNorm(e, e, c.norm, levels=None)
        self.k = LinearNorm(e, e, c.norm, levels=None)
        self.v = LinearNorm(e, e, c.norm, levels=None)
        self.proj = LinearNorm(e, e, c.norm, levels=None)

    def forward(self, x: Tensor, layer: LayerState | None = None, position: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(x, layer)
        if layer is not None and position is not None:
            a = self._go_on(q, k, v, layer, position)
        else:
            dropout = self.dropout if self.training else 0.0
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.proj(a.transpose(1, 2).flatten(-2))

    def weights(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d), causal), [B, H, S, S]."""
        q, k, _ = self._heads(x, None)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    def _heads(self, x: Tensor, layer: LayerState | None) -> tuple[Tensor, Tensor, Tensor]:
        x = token_shift(x, self.shift, layer, "attention.shift")
        # [B, S, E] -> [B, H, S, d]
        return tuple(f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerState, position: Tensor) -> Tensor:
        """The attention with cached keys and values [B, H, capacity, d]; new ones go to `position` [B] on."""
        b, s = q.shape[0], q.shape[2]
        places = position[:, None] + torch.arange(s, device=q.device)  # [B, S]
        needed = int(places.max()) + 1
        caches = []
        for name, new in (("attention.k", k), ("attention.v", v)):
            cache = layer.get(name)
            if cache is not None:
                cache = cache.to(new.dtype)  # differs if autocast has begun or ended since
            if cache is None:
                cache = new.new_zeros(*new.shape[:2], max(self.capacity, needed), new.shape[-1])
            elif needed > cache.shape[-2]:
                cache = grow(cache, max(needed, 2 * cache.shape[-2]))
            elif cache.is_inference() and not torch.is_inference_mode_enabled():  # must not change in place
                cache = cache.clone()
            cache[torch.arange(b, device=q.device)[:, None], :, places] = new.transpose(1, 2)
            layer[name] = cache
            caches.append(cache)
        seen = torch.arange(caches[0].shape[-2], device=q.device) <= places[..., None]  # [B, S, capacity]
        keys, values = caches
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None])
