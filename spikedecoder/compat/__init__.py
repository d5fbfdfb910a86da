"""Bridges to other code: the original SpikeDecoder's checkpoints and names."""
