"""The non-spiking baseline: the operations of an ordinary transformer with the same shapes."""

from __future__ import annotations

import math
from typing import Any

from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.energy import rows as build
from spikedecoder.energy.ledger import Ledger
from spikedecoder.energy.rows import Row


def twin_config(c: SpikeDecoderConfig) -> SpikeDecoderConfig:
    """Config of the non-spiking model with the same width, depth, heads, MLP, vocabulary and norm."""
    return c.replace(
        spike_degree=0,
        attention_only=False,
        token_encoding="learned",
        token_dim=c.embed_dim,
        position_encoding="static",
        combine_position=True,
        float_embedding=False,
        embedding_gain=1.0,
        spiking_head=None,
        float_reunite=False,
        timesteps=1,
    )


def ann_ledger(ledger: Ledger) -> Ledger:
    """The ledger of `twin_config` on the same tokens: one dense pass instead of T, with softmax attention.

    Its operation counts do not depend on the values of the tokens, so no model is run. Raises ValueError if
    `ledger` has no config, because it is not of a SpikeDecoder.
    """
    if ledger.config is None:
        raise ValueError("ledger: got one of a model without a config, which has no non-spiking twin")
    c, tokens, sequences = ledger.config, ledger.tokens, ledger.sequences
    e, hidden = c.embed_dim, c.hidden_dim
    token_mode = ledger.mode == "token"
    reads = tokens if token_mode else sequences

    def linear(layer: str, n_in: int, n_out: int) -> list[Row]:
        return build.linear(
            layer,
            n_in=n_in,
            n_out=n_out,
            rows=tokens,
            events=tokens * n_in,
            spikes=False,
            bias=True,
            weight_words=reads * n_in * n_out,
            reads=reads,
            output_kept=False,
        )

    def linear_norm(layer: str) -> list[Row]:
        return linear(layer, e, e) + build.norm(layer, c.norm, rows=tokens, channels=e, reads=reads)

    work: dict[str, Any] = {"words": 2 * e, "add": e, "compare": 0, "mul": 0, "channels": e, "spikes": False}
    rows = build.embedding("embedding", tokens=tokens, **work)
    for i in range(c.blocks):
        attention, mlp = f"blocks.{i}.attention", f"blocks.{i}.mlp"
        for part in "qkv":
            rows += linear_norm(f"{attention}.{part}")
        rows += linear_norm(f"{attention}.proj")
        rows += build.softmax_attention(
            attention,
            tokens=tokens,
            width=e,
            heads=c.heads,
            pairs=ledger.pairs,
            longest=-(-tokens // sequences),
            recurrent=token_mode,
        )
        rows += linear(f"{mlp}.fc1", e, hidden) + linear(f"{mlp}.fc2", hidden, e)
        rows += build.gelu(mlp, values=tokens * hidden)
        rows += build.residual(f"blocks.{i}", values=tokens * e)
    rows += linear("head", e, c.vocab_size)
    norms = 4 * 2 * e
    block = 4 * (e * e + e) + norms + 2 * e * hidden + hidden + e
    parameters = c.vocab_size * e + c.blocks * block + e * c.vocab_size + c.vocab_size
    name = f"{ledger.name} as ANN" if ledger.name else "ANN"
    return Ledger(rows, ledger.mode, sequences, tokens, ledger.pairs, parameters, twin_config(c), name)


def equal_bits(timesteps: int) -> int:
    """Bits of an activation as precise as a spike count over T timesteps: log2(T + 1), rounded up."""
    return math.ceil(math.log2(timesteps + 1))
