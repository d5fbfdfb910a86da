"""Serving a model over HTTP; `app` and `server` need the extra: pip install 'spikedecoder[serve]'."""

from spikedecoder.serve.engine import Engine, EngineError, QueueFull, Stopping

__all__ = ["Engine", "EngineError", "QueueFull", "Stopping"]
