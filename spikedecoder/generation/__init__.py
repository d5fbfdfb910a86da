"""Generation: sampling, batches, streaming, text."""

from spikedecoder.generation.generate import (
    GeneratedToken,
    GenerationResult,
    generate,
    start_token,
    stream,
    suppressed_ids,
)
from spikedecoder.generation.sampling import Prediction, SamplingParams, sample, top_predictions
from spikedecoder.generation.text import encode_prompt, generate_result, generate_text, stream_text
from spikedecoder.generation.window import LogitSource, Window

__all__ = [
    "GeneratedToken",
    "GenerationResult",
    "LogitSource",
    "Prediction",
    "SamplingParams",
    "Window",
    "encode_prompt",
    "generate",
    "generate_result",
    "generate_text",
    "sample",
    "start_token",
    "stream",
    "stream_text",
    "suppressed_ids",
    "top_predictions",
]
