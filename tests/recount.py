"""The energy ledger a second time, from the words of docs/energy.md and what a model's layers gave; and its
price. Nothing of `spikedecoder.energy` is used."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import torch

from spikedecoder import SpikeDecoder

Counts = dict[tuple[str, str], Counter[str]]  # by layer and operation: what `energy.Row` calls these


class Recount:
    """rows: what `model` does to read `ids` [B, S]."""

    def __init__(self, model: SpikeDecoder, ids: torch.Tensor, mode: str) -> None:
        self.c, self.model, self.token_mode = model.config, model, mode == "token"
        self.batch, self.length = ids.shape
        self.tokens = ids.numel()
        self.reads = self.tokens if self.token_mode else self.batch
        self.timesteps = self.c.timesteps if self.c.spiking_attention else 1
        self.levels = self.c.levels or 1
        self.digits = self.levels.bit_length()
        self.rows: Counts = {}
        self.seen: dict[str, tuple[Any, torch.Tensor]] = {}  # by module: inputs and output
        hooks = [
            module.register_forward_hook(lambda _, x, y, name=name: self.seen.update({name: (x, y)}))
            for name, module in model.named_modules()
        ]
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()
        self._embedding()
        for i in range(self.c.blocks):
            self._block(f"blocks.{i}", first=i == 0)
        self._head()

    def _put(self, layer: str, operation: str, **counts: int) -> None:
        found = self.rows.setdefault((layer, operation), Counter())
        found.update({name: int(count) for name, count in counts.items()})

    def _planes(self, integers: np.ndarray) -> np.ndarray:
        """[digits, ...] of 0 and 1, the largest first."""
        places = range(self.digits - 1, -1, -1)
        return np.stack([integers.astype(np.int64) >> place & 1 for place in places])

    def _embedding(self) -> None:
        c, n, e = self.c, self.tokens, self.c.embed_dim
        if c.ann_embedding:
            gain = n * e if c.embedding_gain != 1 else 0
            self._put("embedding", "look-up", add=n * e, mul=gain, weight_words=2 * n * e)
            self._put("embedding", "look-up", activation_words=n * e)
            return
        learned = c.token_encoding == "learned"
        placed = c.position_encoding in ("static", "learned") and c.token_encoding != "one-hot"
        if c.combine_position:
            words, sums, compared = 2 * c.token_dim, c.token_dim, c.token_dim
        else:
            words = compared = learned * c.token_dim + placed * c.position_dim
            sums = 0
        self.spiking_embedding = not (c.float_embedding and words)
        self._put("embedding", "look-up", add=n * sums, weight_words=n * words)
        if not c.float_embedding:
            self._put("embedding", "look-up", compare=n * compared)
        if self.spiking_embedding:
            self._put("embedding", "look-up", activation_bits=n * e)
        else:
            gain = n * e if c.embedding_gain != 1 else 0
            self._put("embedding", "look-up", activation_words=n * e, mul=gain)

    def _block(self, name: str, first: bool) -> None:
        values, e = self.timesteps * self.tokens * self.c.embed_dim, self.c.embed_dim
        self._put(name, "residual", add=2 * values, activation_words=6 * values)  # two reads and a write each
        for lif in ("input_lif", "residual_lif", "sum_lif"):
            self._lif_alone(f"{name}.{lif}")
        layer = f"{name}.attention"
        self._lif_alone(f"{layer}.input_lif")
        self._lif_alone(f"{layer}.output_lif")
        spiking = self.c.spiking_attention
        fed = spiking or (first and self.c.spike_degree == 1 and self.spiking_embedding)
        for part in "qkv":
            self._linear(f"{layer}.{part}", f"{layer}.{part}.linear", spikes=fed, kept=not spiking)
            self._norm(f"{layer}.{part}", values, e)
            if spiking:
                self._lif(f"{layer}.{part}", reads_input=False)
        if spiking:
            self._spiking_attention(f"{layer}.attention_lif")
        else:
            self._softmax_attention(layer)
        self._linear(f"{layer}.proj", f"{layer}.proj.linear", spikes=spiking, kept=True)
        self._norm(f"{layer}.proj", values, e)
        self._mlp(f"{name}.mlp", values)

    def _mlp(self, layer: str, values: int) -> None:
        hidden = values * self.c.mlp_ratio
        self._lif_alone(f"{layer}.input_lif")
        self._lif_alone(f"{layer}.output_lif")
        if self.c.spiking_mlp:
            self._linear(f"{layer}.fc1", f"{layer}.fc1.linear", spikes=True, kept=False)
            self._norm(f"{layer}.fc1", hidden, self.c.hidden_dim)
            self._lif(f"{layer}.fc1", reads_input=False)
            self._linear(f"{layer}.fc2", f"{layer}.fc2.linear", spikes=True, kept=True)
            self._norm(f"{layer}.fc2", values, self.c.embed_dim)
        else:
            self._linear(f"{layer}.fc1", f"{layer}.fc1", spikes=False, kept=True)
            self._linear(f"{layer}.fc2", f"{layer}.fc2", spikes=False, kept=True)
            self._put(layer, "GELU", add=2 * hidden, mul=6 * hidden, special=hidden)

    def _head(self) -> None:
        c, values = self.c, self.tokens * self.c.embed_dim
        self._lif_alone("head.lif")
        if self.timesteps > 1 and c.reunite in ("average", "accumulate"):
            self._put("head", "join", add=(self.timesteps - 1) * values)
            if c.reunite == "average":
                self._put("head", "mean", mul=values)
        one_each = c.float_reunite or self.timesteps == 1 or c.reunite in ("concatenate", "final")
        self._linear("head", "head.linear", spikes=c.head_spikes and one_each, kept=True)

    def _linear(self, layer: str, name: str, spikes: bool, kept: bool) -> None:
        """kept: whether the output leaves the layer, as numbers, to be read by another."""
        x, module = self.seen[name][0][0].numpy(), self.model.get_submodule(name)
        n_in, n_out = module.in_features, module.out_features
        inputs = x.size // n_in
        outputs = inputs * n_out
        words = outputs if kept else 0
        self._put(layer, "bias", add=outputs, weight_words=self.reads * n_out)
        if not spikes:
            self._put(layer, "linear", add=inputs * n_in * n_out, mul=inputs * n_in * n_out)
            self._put(layer, "linear", activation_words=inputs * n_in + words)
            self._put(layer, "linear", weight_words=self.reads * n_in * n_out, slots=inputs * n_in)
            return
        planes = self._planes(x if self.levels > 1 else x != 0)  # a spike may be worth a constant
        bits = inputs * n_in * self.digits
        self._put(layer, "linear", add=planes.sum() * n_out, activation_bits=bits, activation_words=words)
        self._put(layer, "linear", events=planes.sum(), slots=bits)
        if self.digits > 1:
            self._put(layer, "shift", add=(self.digits - 1) * outputs)
        fetched = self.reads * n_in
        if self.token_mode:  # the columns of inputs that spiked at any timestep
            at_once = planes.reshape(-1, self.batch, self.length, n_in)
            fetched = at_once.any(0).sum()
        self._put(layer, "linear", weight_words=fetched * n_out)

    def _norm(self, layer: str, values: int, channels: int) -> None:
        rows = values // channels
        self._put(layer, "norm", weight_words=self.reads * 2 * channels)
        if self.c.norm == "layer":
            self._put(layer, "norm", add=4 * values + rows, mul=3 * values + 2 * rows, special=rows)
        else:
            self._put(layer, "norm", add=values, mul=values)

    def _lif_alone(self, name: str) -> None:
        """Neurons without a Linear before them, where there are any."""
        if name in self.seen:
            self._lif(name, reads_input=True)

    def _lif(self, name: str, reads_input: bool) -> None:
        out = self.seen[name][1].numpy()
        neurons, updates = out.size, out.size * self.digits
        spikes, soft = self._planes(out).sum(), self.c.v_reset is None
        if self.c.neuron == "ilif":
            self._put(name, "LIF", add=neurons + spikes, compare=updates)
        else:
            self._put(name, "LIF", mul=updates, add=(3 if self.c.v_reset else 2) * updates)
            self._put(name, "LIF", add=spikes if soft else 0, compare=updates if soft else 2 * updates)
        self._put(name, "LIF", state_words=2 * updates, held=out.shape[-1], activation_bits=updates)
        self._put(name, "LIF", activation_words=neurons if reads_input else 0)
        self._put(name, "LIF", events=spikes, slots=updates)

    def _spiking_attention(self, layer: str) -> None:
        c, values = self.c, self.timesteps * self.tokens * self.c.embed_dim
        shape = (self.digits, c.timesteps, self.batch, self.length, c.heads, -1)
        q, k, v = (self._planes(x.numpy()).reshape(shape) for x in self.seen[layer][0][:3])
        bits = values * self.digits
        if self.token_mode:
            self._state(layer, q, k, v, bits)
        else:
            self._scores(layer, q, k, v, bits)
        self._put(layer, "scale", mul=values)
        if self.digits > 1:
            self._put(layer, "shift", add=(self.digits - 1) * values)
        if c.attention_norm:
            self._norm(layer, values, c.embed_dim)
        self._lif(layer, reads_input=False)

    def _scores(self, layer: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, bits: int) -> None:
        pairs = scored = 0
        self._put(layer, "q k^T", activation_bits=2 * bits)
        self._put(layer, "(q k^T) v", activation_bits=bits)
        for t, b, h, i in np.ndindex(*q.shape[1:3], q.shape[4], q.shape[3]):
            for j in range(i + 1):
                both = [
                    (q[x, t, b, i, h] & k[y, t, b, j, h]).sum()
                    for x, y in itertools.product(range(self.digits), repeat=2)
                ]
                tests = self.digits * q[:, t, b, i, h].sum()
                self._put(layer, "q k^T", add=sum(both), logic=tests)
                pairs += 1
                if any(both):
                    scored += 1
                    self._put(layer, "(q k^T) v", add=v[:, t, b, j, h].sum())
        self._put(layer, "(q k^T) v", events=scored, slots=pairs)
        if self.c.decays is not None:
            self._put(layer, "decay", mul=scored)

    def _state(self, layer: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, bits: int) -> None:
        width = q.shape[-1]
        numbers = self.c.timesteps * self.c.heads * width * width
        written = (k.sum((0, -1)) * v.sum((0, -1))).sum()
        read = q.sum() * width
        self._put(layer, "state += k^T v", add=written, held=numbers, activation_bits=2 * bits)
        self._put(layer, "q state", add=read, state_words=read, activation_bits=bits)
        if self.c.decays is None:
            self._put(layer, "state += k^T v", state_words=2 * written)
        else:
            decayed = self.tokens * numbers
            self._put(layer, "decay", mul=decayed, state_words=2 * decayed)

    def _softmax_attention(self, layer: str) -> None:
        n, e, heads = self.tokens, self.c.embed_dim, self.c.heads
        pairs = self.batch * sum(range(1, self.length + 1))
        self._put(layer, "scale", mul=n * e)
        self._put(layer, "softmax", compare=pairs * heads, add=2 * pairs * heads, mul=pairs * heads)
        self._put(layer, "softmax", special=pairs * heads + n * heads)
        for operation in ("q k^T", "softmax v"):
            self._put(layer, operation, add=pairs * e, mul=pairs * e)
            if self.token_mode:
                self._put(layer, operation, activation_words=n * e, cache_words=(pairs + n) * e)
                self._put(layer, operation, cache_held=self.length * e)
            else:
                self._put(layer, operation, activation_words=2 * n * e)


# pJ at 45 nm: a multiplication and an addition of weights and activations
PRICES = {"fp32": (3.7, 0.9), "fp16": (1.1, 0.4), "int8": (0.2, 0.1)}
BITS = {"fp32": 32, "fp16": 16, "int8": 8}
MEMORIES = {"sram_8kB": (8e3, 10), "sram_32kB": (32e3, 20), "sram_1MB": (1e6, 100), "dram": (np.inf, 1300)}
_SPIKING = ("(q k^T) v", "state += k^T v", "q state")


def price(
    counted: Recount, number_format: str, narrow: int | None, parameters: int
) -> tuple[float, float, Any]:
    """Joules of arithmetic, and of memory, and where that lies; narrow: bits of an activation beside int8."""
    c, word = counted.c, BITS[number_format]
    activation, share = narrow or word, (narrow or 8) / 8
    arithmetic, held, widest = 0.0, 0.0, 0.0
    moved = dict.fromkeys(("weights", "activations", "state"), 0.0)
    for (_, operation), r in counted.rows.items():
        mul, add = PRICES["fp32"]
        if operation in ("linear", "bias"):
            mul, add = PRICES[number_format]
            mul *= share
        elif not c.spiking_attention and operation in ("q k^T", "softmax v"):
            mul, add = PRICES[number_format]
            mul *= share**2  # both factors are activations
        elif (
            operation in ("q k^T", "shift")
            or (operation in _SPIKING and c.decays is None)
            or (operation == "join" and c.head_spikes and not c.float_reunite)
        ):
            mul, add = 0.0, 0.1  # integers
        arithmetic += r["mul"] * mul + (r["add"] + r["compare"]) * add
        arithmetic += r["logic"] * 0.03 / 8 + r["special"] * 4 * (3.7 + 0.9)
        outside = r["activation_words"] * activation + r["activation_bits"]
        moved["weights"] += r["weight_words"] * word
        moved["activations"] += outside
        moved["state"] += r["state_words"] * 32 + r["cache_words"] * activation
        widest, held = max(widest, outside), held + r["held"] * 32 + r["cache_held"] * activation
    sizes = {"weights": parameters * word, "activations": widest / counted.tokens, "state": held}
    places = {
        kind: next(name for name, (most, _) in MEMORIES.items() if bits / 8 <= most)
        for kind, bits in sizes.items()
    }
    memory = sum(bits * MEMORIES[places[kind]][1] / 64 for kind, bits in moved.items())
    return arithmetic * 1e-12, memory * 1e-12, places
