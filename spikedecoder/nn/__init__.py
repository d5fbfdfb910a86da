"""What a model is made of. No choice of backend in here: everything goes through `spikedecoder.ops`."""
