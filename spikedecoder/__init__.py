"""Train and run GPT-style language models whose every activation is a spike."""

import os

# Threads that wait spin a little, then sleep: where other work shares the cores, training is several times
# faster than with GNU OpenMP's long spinning. It is read when torch loads, so only before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from spikedecoder import ops
from spikedecoder._version import __version__
from spikedecoder.checkpoint import CheckpointError
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.model import SpikeDecoder
from spikedecoder.ops import BackendError, use_backend

__all__ = [
    "BackendError",
    "CheckpointError",
    "SpikeDecoder",
    "SpikeDecoderConfig",
    "__version__",
    "ops",
    "use_backend",
]
