"""The four kinds of decoder that are compared, and what each changes in a configuration."""

from __future__ import annotations

from typing import Any

from spikedecoder.config import SpikeDecoderConfig

KINDS: dict[str, dict[str, Any]] = {
    # every matrix product takes spikes, the head's too; the norm is a constant scale and shift at inference
    "fully spiking": {"spike_degree": 4, "reunite": "concatenate", "norm": "batch"},
    # the head reads spike counts, so its products are multiply-accumulates; thresholds are learned
    "SpikeDecoder": {"spike_degree": 4, "reunite": "accumulate", "learn_threshold": True, "norm": "layer"},
    # the original's "performance" kind: attention spikes, MLP and head do not
    "partly spiking": {"spike_degree": 2, "norm": "layer"},
    "non-spiking": {"spike_degree": 0, "embedding_gain": 1.0, "norm": "layer"},
}


def kind_of(config: SpikeDecoderConfig) -> str:
    """The entry of KINDS that a model is closest to.

    "fully spiking": its head, too, receives only spikes (or integers of I-LIF neurons, which are sums of
    spikes: see `SpikeDecoder.unroll`). "SpikeDecoder": it spikes everywhere but there. "partly spiking": only
    some parts spike. "non-spiking": none does.
    """
    if config.spike_degree == 0 and not config.attention_only:
        return "non-spiking"
    if config.attention_only or config.spike_degree < 3 or not config.spiking_mlp:
        return "partly spiking"
    spikes_reach_head = config.head_spikes and (
        config.reunite in ("concatenate", "final") or config.timesteps == 1 or config.float_reunite
    )
    return "fully spiking" if spikes_reach_head else "SpikeDecoder"
