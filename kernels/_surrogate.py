"""Derivatives of the surrogates, selected at compile time by ``Surrogate.kernel_id``.

Only gradients depend on them, so the hardware's approximate functions (to about 1e-7) are precise enough.
Triton's own take twice as many instructions, to handle numbers below 2^-126 and above 2^126; here these
become 0 and infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spikedecoder.kernels._launch import INTERPRETED

PLAIN = tl.constexpr(INTERPRETED)  # the interpreter has no inline assembly


@triton.jit
def _reciprocal(x):
    if PLAIN:
        return 1 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _exp2(x):
    if PLAIN:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def shape(h, threshold, alpha, KIND: tl.constexpr):
    """g'(h - threshold) / `height` in float32. Formulas: `spikedecoder.surrogate.SURROGATES`."""
    u = h - threshold
    if KIND == 0:  # sigmoid
        steep = alpha * -1.4426950408889634
        g = _reciprocal(1 + _exp2(h * steep - threshold * steep))
        return g - g * g
    elif KIND == 1:  # atan
        w = u * (alpha * 1.5707963267948966)
        return _reciprocal(1 + w * w)
    elif KIND == 2:  # rectangular
        return tl.where(tl.abs(u) * alpha <= 0.5, 1.0, 0.0)
    elif KIND == 3:  # triangle
        w = 1 - alpha * tl.abs(u)
        return tl.where(w < 0, 0.0, w)  # keeps a NaN
    else:  # fast sigmoid
        w = 1 + alpha * tl.abs(u)
        return _reciprocal(w * w)


@triton.jit
def height(alpha, KIND: tl.constexpr):
    """The constant factor of g', which `shape` leaves out."""
    if KIND == 1:
        return alpha * 0.5
    elif KIND == 4:
        return 1.0
    else:
        return alpha
