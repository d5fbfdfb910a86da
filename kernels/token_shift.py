"""Channel group i of n comes from the token i places back or, for the gradient, ahead; zeros beyond the ends.

x [..., S, C], seen as units of ALIGN elements that lie in one group: 128 bits where the groups are equally
wide and multiples of that, else less, down to single elements. A program takes BLOCK units, two 128-bit
accesses per thread. Bytes per element (b = bytes of x's dtype), the minimum possible: 2 b each way. Bound by
memory bandwidth or, in units of a single element, by the divisions that find a unit's group and token.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from spikedecoder.kernels._launch import alignment, cdiv, kernel, launch, why_not

__all__ = ["forward", "why_not"]


@kernel
def token_shift_units(
    x_ptr, out_ptr, n, tokens, channels, width, wider,
    BACK: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """n, channels, width and BLOCK are in units of ALIGN elements, for each of which there is one division.
    width: of a group; the first `wider` of them have one unit more, none if EVEN."""
    n = n.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first // channels
    i = (first - row * channels).to(tl.int32) + tl.arange(0, BLOCK)  # from the first channel of `row` on
    below = i // channels
    channel, place = i - below * channels, ((row % tokens).to(tl.int32) + below) % tokens
    if EVEN:
        group = channel // width
    else:
        narrow = channel - wider * (width + 1)
        group = tl.where(narrow < 0, channel // (width + 1), wider + narrow // tl.maximum(width, 1))
    at = first + tl.arange(0, BLOCK)
    if BACK:
        inside, source = place + group < tokens, at + group.to(tl.int64) * channels
    else:
        inside, source = group <= place, at - group.to(tl.int64) * channels
    element = tl.arange(0, ALIGN)
    mask = (at < n) & inside
    x = tl.load(x_ptr + (source[:, None] * ALIGN + element[None, :]), mask=mask[:, None], other=0.0)
    tl.store(out_ptr + (at[:, None] * ALIGN + element[None, :]), x, mask=(at < n)[:, None])


def forward(x: Tensor, n: int, back: bool = False) -> Tensor:
    """x [..., S, C] shifted, or a gradient shifted `back`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        tokens, channels = x.shape[-2:]
        width, wider = divmod(channels, n)
        access = 16 // x.element_size()
        align = 1 if wider else alignment(width, limit=access)
        units, block = x.numel() // align, 256 * access // align
        launch(
            token_shift_units, (cdiv(units, block),), x_ptr=x, out_ptr=out, n=units, tokens=tokens,
            channels=channels // align, width=width // align, wider=wider, BACK=back, EVEN=wider == 0,
            BLOCK=block, ALIGN=align,
        )  # fmt: skip
    return out
