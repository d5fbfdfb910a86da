"""The modules of a model. None of them chooses a backend: everything goes through `spikedecoder.ops`."""
