"""The four kinds of decoder that are compared with each other: what each changes in a configuration."""

from __future__ import annotations

from typing import Any

from spikedecoder.config import SpikeDecoderConfig

KINDS: dict[str, dict[str, Any]] = {
    # every matrix product takes spikes, the head's too; the norm is a constant scale and shift at inference
    "fully spiking": {"spike_degree": 4, "reunite": "concatenate", "norm": "batch"},
    # the head reads spike counts, so its products are multiply-accumulates; thresholds are learned
    "SpikeDecoder": {"spike_degree": 4, "reunite": "accumulate", "learn_threshold": True, "norm": "layer"},
    # the "performance" one: attention spikes, MLP and head do not
    "partly spiking": {"spike_degree": 2, "norm": "layer"},
    "non-spiking": {"spike_degree": 0, "embedding_gain": 1.0, "norm": "layer"},
}


def kind_of(config: SpikeDecoderConfig) -> str:
    """Which of KINDS a model is most like.

    A model whose head is fed spikes alone is "fully spiking" (integers of I-LIF neurons too: they are sums of
    spikes, see `SpikeDecoder.unroll`); one that spikes everywhere else is a "SpikeDecoder"; one in which only
    some parts spike is "partly spiking".
    """
    if config.spike_degree == 0 and not config.attention_only:
        return "non-spiking"
    if config.attention_only or config.spike_degree < 3 or not config.spiking_mlp:
        return "partly spiking"
    spikes_reach_head = config.head_spikes and (
        config.reunite in ("concatenate", "final") or config.timesteps == 1 or config.float_reunite
    )
    return "fully spiking" if spikes_reach_head else "SpikeDecoder"
