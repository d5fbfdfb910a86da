"""Linear layer on spikes on the GPU (csrc/spike_linear.cu): sums the weight's columns of inputs that spiked.

It does no work for zeros, so it wins at low spike rates or with few rows; tensor cores win on large dense
shapes. Nothing here reads the spike rate back, which would mean waiting for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikedecoder.ext.cuda import native
from spikedecoder.ext.cuda._arguments import TYPES, address, launch, on_a_gpu
from spikedecoder.ext.cuda.pack_spikes import pack, transpose_bits
from spikedecoder.reference.pack_spikes import WORD

why_not = on_a_gpu


def forward(s: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y [..., N] in the weight's dtype, s as words of bits).

    A weight [N, K] whose transpose is contiguous is read as it is; any other is transposed in each call.
    """
    words = pack(s)
    return words_product(words, s.shape[-1], weight, bias), words


def from_words(words: Tensor, channels: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y from words of spikes, bit for bit that of `forward`; bits beyond the last channel are ignored."""
    words = words.contiguous()
    if channels % WORD and words.numel():
        # each bit selects a column of the weight, and one that does not exist must not be read
        words = torch.cat((words[..., :-1], words[..., -1:] & ((1 << channels % WORD) - 1)), -1)
    return words_product(words, channels, weight, bias)


def words_product(words: Tensor, channels: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y from contiguous words without bits beyond the last channel."""
    columns = weight.detach().t().contiguous()
    bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
    y = weight.new_empty(*words.shape[:-1], weight.shape[0])
    launch(
        *(native.gather, words, address(words), address(columns), address(bias), address(y)),
        *(TYPES[weight.dtype], words.shape[:-1].numel(), channels, weight.shape[0]),
    )
    return y


def weight_grad(words: Tensor, channels: int, grad: Tensor) -> Tensor:
    """grad_weight [N, K]: for each channel, the sum of grad [..., N] over the rows where it spiked."""
    grad = grad.detach().contiguous()
    out_channels = grad.shape[-1]
    rows = words.numel() // words.shape[-1] if words.shape[-1] else 0
    by_channel = grad.new_empty(channels, out_channels)
    bits = transpose_bits(words.contiguous(), rows, channels)
    launch(
        *(native.gather, grad, address(bits), address(grad), 0, address(by_channel)),
        *(TYPES[grad.dtype], channels, rows, out_channels),
    )
    return by_channel.t().contiguous()
