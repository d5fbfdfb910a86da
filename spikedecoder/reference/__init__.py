"""The specification of every operator in plain PyTorch: short, obvious, differentiable.

Each module holds one operator. ``forward`` defines what the operator means. A ``backward`` beside it is the
closed form of what autograd would give, so that the operator need not save intermediate tensors; tests
compare the two.
"""
