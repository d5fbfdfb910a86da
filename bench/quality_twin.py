"""The non-spiking twin of the study: an ordinary pre-norm GPT, optionally with the spiking model's shifts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder.nn.shift import token_shift

_STD = 0.02


class GPT(nn.Module):
    """tokens [B, S] -> logits [B, S, V]: x = x + Attn(LN(x)), x = x + MLP(LN(x)), softmax attention, GELU.

    position: "learned" embeddings up to `max_len`, or "alibi" (a slope per head on the distance, Press et
    al., 2022). shift, mlp_shift: the spiking model's token shifts, on real values. convolution: a causal
    depthwise convolution over so many tokens before q, k, v; 0 is none.
    """

    def __init__(
        self,
        vocab_size: int,
        channels: int = 96,
        heads: int = 4,
        blocks: int = 3,
        mlp_ratio: int = 4,
        max_len: int = 128,
        position: str = "alibi",
        shift: int = 1,
        mlp_shift: int = 1,
        convolution: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.max_len, self.shift, self.mlp_shift = heads, max_len, shift, mlp_shift
        self.token = nn.Embedding(vocab_size, channels)
        self.position = nn.Embedding(max_len, channels) if position == "learned" else None
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)])
        self.register_buffer(
            "slopes", slopes if position == "alibi" else torch.zeros(heads), persistent=False
        )
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(channels),
                    "qkv": nn.Linear(channels, 3 * channels),
                    "proj": nn.Linear(channels, channels),
                    "norm2": nn.LayerNorm(channels),
                    "fc1": nn.Linear(channels, mlp_ratio * channels),
                    "fc2": nn.Linear(mlp_ratio * channels, channels),
                }
                | (
                    {"conv": nn.Conv1d(channels, channels, convolution, groups=channels)}
                    if convolution
                    else {}
                )
            )
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, vocab_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=_STD / (math.sqrt(2 * blocks) if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 3:  # a convolution starts as "this token as it is"
                nn.init.zeros_(parameter)
                parameter.data[:, 0, -1] = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        x, s = self.token(tokens), tokens.shape[1]
        places = torch.arange(s, device=tokens.device)
        if self.position is not None:
            x = x + self.position(places % self.max_len)
        distance = (places[:, None] - places).to(x.dtype)
        mask = (-distance * self.slopes[:, None, None]).masked_fill(distance < 0, -math.inf)
        for block in self.blocks:
            h = token_shift(block["norm1"](x), self.shift)
            if "conv" in block:
                conv = block["conv"]
                h = conv(F.pad(h.transpose(1, 2), (conv.kernel_size[0] - 1, 0))).transpose(1, 2)
            q, k, v = (
                y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in block["qkv"](h).chunk(3, -1)
            )
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block["proj"](a.transpose(1, 2).flatten(-2))
            h = token_shift(block["norm2"](x), self.mlp_shift)
            x = x + block["fc2"](F.gelu(block["fc1"](h), approximate="tanh"))
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over targets [B, S]; those of -100 are not counted."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Decay on Linear weights, none on biases, norms and embeddings, as for the spiking model."""
        linear = {id(m.weight) for m in self.modules() if isinstance(m, nn.Linear)}
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in self.parameters():
            groups[id(parameter) in linear].append(parameter)
        return [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ]
