"""The specification of every operator in plain PyTorch: short, obvious, differentiable.

Each module carries one operator. ``forward`` is what the operator means; where a ``backward`` stands
beside it, it is the closed form of what autograd would give, kept so that the operator need not save
intermediate tensors; tests hold the two together.
"""
