"""The original program's energy formulas, reproduced with their errors; for comparison only.

Source: the graphical app of SpikeDecoder (Beger, Walter and Knoll, arXiv 2606.12287). The errors are listed
in docs/energy.md.
"""

from __future__ import annotations

from collections.abc import Callable

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.energy.ledger import Estimate, Ledger

_MAC, _AC = 4.6, 0.9  # pJ
_LABEL = (
    "the original program's formulas, known errors included (see docs/energy.md): not comparable with the "
    "ledger; an estimate",
    "sequence length is max_len whatever was read; spikes are measured per sequence and timestep, averaged "
    "over blocks; Horowitz 2014: 4.6 pJ a MAC, 0.9 pJ an addition",
)


def original_estimate(ledger: Ledger) -> Estimate:
    """The energy that the original's app would show for this model and its measured spikes.

    The app knows three kinds of model: fully spiking (spike_degree 4), spiking in embedding and attention
    (2), and non-spiking (0). Raises ValueError for any other, and for a ledger of mode "token".
    """
    c = ledger.config
    if c is None or c.attention_only or c.spike_degree not in (0, 2, 4):
        kind = "none" if c is None else f"spike_degree={c.spike_degree}, attention_only={c.attention_only}"
        raise ValueError(f"compat: got a model of {kind}; the original has formulas for degrees 0, 2 and 4")
    if ledger.mode != "prompt":
        raise ValueError(f"compat: got a ledger of mode {ledger.mode!r}, takes 'prompt'")
    formula = {0: _non_spiking, 2: _performance, 4: _strict}[c.spike_degree]
    picojoules = formula(c, _nonzeros(ledger, c))
    joules = picojoules * 1e-12 * ledger.sequences
    return Estimate(
        joules=joules,
        tokens=ledger.tokens,
        arithmetic=joules,
        memory=0.0,
        rows={},
        by_kind={},
        by_memory={},
        placement={},
        table="the original's",
        number_format="fp32",
        mode=ledger.mode,
        assumptions=_LABEL,
    )


Counts = Callable[[str, str], float]


def _nonzeros(ledger: Ledger, c: SpikeDecoderConfig) -> Counts:
    """Maps (part of a block, operation) to the nonzero values per sequence and timestep, mean over blocks."""

    def mean(part: str, operation: str) -> float:
        events = [ledger.row(f"blocks.{i}.{part}", operation).events for i in range(c.blocks)]
        return sum(events) / c.blocks / ledger.sequences / c.binary_timesteps

    def count(part: str, operation: str) -> float:
        if part == "head":  # once per pass, not per timestep
            return ledger.row("head", "linear").events / ledger.sequences
        return mean(part, operation)

    return count


def _attention(c: SpikeDecoderConfig, n: Counts) -> tuple[float, float, float]:
    """Operations of one of the projections q, k, v; of the two products; of the output projection."""
    e, s = c.embed_dim, c.max_len
    products = 2 * n("attention.q", "LIF") * s + 2 * n("attention.attention_lif", "(q k^T) v") * e
    into = 2 * n("attention.q", "linear") * e + s * e
    out = 2 * n("attention.proj", "linear") * e + s * e
    return into, products, out


def _strict(c: SpikeDecoderConfig, n: Counts) -> float:
    e, s, v, wide = c.embed_dim, c.max_len, c.vocab_size, c.mlp_ratio
    into, products, out = _attention(c, n)
    mlp_in = 2 * n("mlp.fc1", "linear") * wide * e + s * e * wide
    mlp_out = 2 * n("mlp.fc2", "linear") * e + e * s
    head = 2 * n("head", "linear") * v + v * s
    return c.binary_timesteps * c.blocks * (3 * into + products + out + mlp_in + mlp_out) * _AC + head * _AC


def _performance(c: SpikeDecoderConfig, n: Counts) -> float:
    e, s, v, wide = c.embed_dim, c.max_len, c.vocab_size, c.mlp_ratio
    into, products, out = _attention(c, n)
    mlp = 2 * ((2 * e - 1) * s * e * wide + e * s * wide)  # once, though it runs T times
    block = (into + products + out) * _AC * c.binary_timesteps + mlp * _MAC  # q, k and v counted once
    head = (e - 1) * s * v + s * v
    return c.blocks * block + head * _AC  # the head on averages, billed as additions


def _non_spiking(c: SpikeDecoderConfig, _: Counts) -> float:
    e, s, v, wide = c.embed_dim, c.max_len, c.vocab_size, c.mlp_ratio
    attention = (2 * e - 1) * s**2 + (2 * s - 1) * s * e  # not causal
    projections = 4 * ((2 * e - 1) * s * e + s * e)
    # the second Linear has s * wide for the hidden width e * wide
    mlp = (2 * e - 1) * s * (e * wide) + e * s * wide + (2 * s * wide) * s * e + s * e
    head = 0.2 * s * v + s * v  # "2E-1", a number to Python, where 2 * E - 1 was meant
    return c.blocks * (attention + projections + mlp) * _MAC + head * _MAC
