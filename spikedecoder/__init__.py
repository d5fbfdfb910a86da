"""Train and run GPT-style language models whose every activation is a spike."""

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
