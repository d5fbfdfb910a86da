"""Derivatives of the surrogates, chosen at compile time by ``Surrogate.kernel_id``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def derivative(u, alpha, KIND: tl.constexpr):
    """g'(u) in float32; the formulas of `spikedecoder.surrogate.SURROGATES`."""
    if KIND == 0:  # sigmoid
        g = tl.sigmoid(alpha * u)
        return alpha * g * (1 - g)
    elif KIND == 1:  # atan
        w = 1.5707963267948966 * alpha * u
        return alpha / 2 / (1 + w * w)
    elif KIND == 2:  # rectangular
        return tl.where(tl.abs(u) * alpha <= 0.5, alpha, 0.0)
    elif KIND == 3:  # triangle
        w = 1 - alpha * tl.abs(u)
        return alpha * tl.where(w < 0, 0.0, w)  # a NaN stays one
    else:  # fast sigmoid
        w = 1 + alpha * tl.abs(u)
        return 1 / (w * w)
