"""Runs PTX, the code that compilers make for NVIDIA GPUs, on a CPU: all threads at once, in NumPy.

`parse` reads the text and `machine` walks through it; `arithmetic`, `transfer`, `warps` and `tensor` hold
what instructions do, `memory` what they reach, and `traffic` counts it. It finds what an interpreter of the
source cannot: wrong inline assembly, a layout in which a thread takes another's element, a missing barrier,
a copy or a product (wgmma, tcgen05) that is used before it was waited for, an access beside a tensor, two
programs that meet in one. It says nothing about time, and what approximates (ex2, rcp, rsqrt) is as exact as
float32 can be. What it does not know, it refuses: a modifier too says which result is meant.
"""
