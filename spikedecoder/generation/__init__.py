"""Generation: sampling, batches, streaming, text."""

from spikedecoder.generation.batch import Batch, Continuation, GeneratedToken
from spikedecoder.generation.detokenize import TextStream
from spikedecoder.generation.generate import GenerationResult, generate, start_token, stream, suppressed_ids
from spikedecoder.generation.graph import Graph, StaticStep
from spikedecoder.generation.native import Native, open_source
from spikedecoder.generation.recurrent import Recurrent
from spikedecoder.generation.sampling import Prediction, SamplingParams, sample, top_predictions
from spikedecoder.generation.text import (
    encode_prompt,
    generate_result,
    generate_text,
    stream_text,
    stream_tokens,
)
from spikedecoder.generation.window import LogitSource, Window

__all__ = [
    "Batch",
    "Continuation",
    "GeneratedToken",
    "GenerationResult",
    "Graph",
    "LogitSource",
    "Native",
    "Prediction",
    "Recurrent",
    "SamplingParams",
    "StaticStep",
    "TextStream",
    "Window",
    "encode_prompt",
    "generate",
    "generate_result",
    "generate_text",
    "open_source",
    "sample",
    "start_token",
    "stream",
    "stream_text",
    "stream_tokens",
    "suppressed_ids",
    "top_predictions",
]
