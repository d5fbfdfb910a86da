"""Train and run GPT-style language models whose every activation is a spike."""

import os

# Threads that wait sleep instead of spinning: on a machine whose cores are busy, training is several times
# faster so. OpenMP reads it when torch loads it, so it helps only where torch is not imported yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from spikedecoder import ops
from spikedecoder.checkpoint import CheckpointError
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.model import SpikeDecoder
from spikedecoder.ops import BackendError, use_backend

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "SpikeDecoder",
    "SpikeDecoderConfig",
    "__version__",
    "ops",
    "use_backend",
]
