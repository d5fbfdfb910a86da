"""Train and run GPT-style language models whose every activation is a spike."""

import os

from spikedecoder._waiting import spins

# read when torch loads
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = spins()

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
