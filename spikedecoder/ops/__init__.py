"""The operators: signatures, checks of arguments, autograd, choice of backend."""

from spikedecoder.ops._dispatch import BackendError, use_backend
from spikedecoder.ops.binarize import binarize
from spikedecoder.ops.dense_linear import dense_linear
from spikedecoder.ops.ilif import ilif, ilif_params
from spikedecoder.ops.lif import lif, lif_params
from spikedecoder.ops.linear_norm import linear_norm
from spikedecoder.ops.linear_norm_lif import linear_norm_lif
from spikedecoder.ops.norm import norm
from spikedecoder.ops.norm_ilif import norm_ilif
from spikedecoder.ops.norm_lif import norm_lif
from spikedecoder.ops.pack_spikes import pack_spikes, unpack_spikes
from spikedecoder.ops.spike_attention import spike_attention
from spikedecoder.ops.spike_attention_lif import spike_attention_lif
from spikedecoder.ops.spike_linear import spike_linear
from spikedecoder.ops.token_shift import token_shift
from spikedecoder.ops.unrolled import (
    spike_counts,
    spike_planes,
    spike_worths,
    unrolled_attention,
    unrolled_linear,
)

__all__ = [
    "BackendError",
    "binarize",
    "dense_linear",
    "ilif",
    "ilif_params",
    "lif",
    "lif_params",
    "linear_norm",
    "linear_norm_lif",
    "norm",
    "norm_ilif",
    "norm_lif",
    "pack_spikes",
    "spike_attention",
    "spike_attention_lif",
    "spike_counts",
    "spike_linear",
    "spike_planes",
    "spike_worths",
    "token_shift",
    "unpack_spikes",
    "unrolled_attention",
    "unrolled_linear",
    "use_backend",
]
