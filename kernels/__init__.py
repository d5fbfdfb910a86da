"""Triton kernels, one file per operator; imported only when the triton backend is used."""
