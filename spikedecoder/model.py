"""The whole model, for every degree of spiking."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder.checkpoint import FolderMixin
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.nn.attention import SoftmaxAttention, SpikingAttention
from spikedecoder.nn.embedding import Embedding, FloatEmbedding
from spikedecoder.nn.head import Head
from spikedecoder.nn.mlp import MLP, SpikingMLP
from spikedecoder.nn.neuron import LIF

IGNORE = -100  # target that the loss does not count


class Block(nn.Module):
    """One decoder block, x [T, B, S, E] (or [B, S, E] where attention does not spike).

        spiking_residuals 0:  x = x + Attn(x);                 x = x + MLP(x)
        spiking_residuals 1:  x = LIF(x + Attn(x));            x = x + MLP(x)
        spiking_residuals 2:  x = LIF(x); x = LIF(x + Attn(x)); x = x + MLP(x)

    `first` with first_block_residual_lif: Attn(x) passes a LIF before it is added.
    """

    def __init__(self, c: SpikeDecoderConfig, first: bool) -> None:
        super().__init__()
        # the residual stream can spike only where the parts around it do
        residuals = 0 if c.attention_only or c.spike_degree < 2 else c.spiking_residuals
        neuron = lambda wanted: LIF(c.lif, c.learn_threshold) if wanted else None  # noqa: E731

        self.input_lif = neuron(residuals == 2)
        self.attention = SpikingAttention(c, residuals == 2) if c.spiking_attention else SoftmaxAttention(c)
        self.residual_lif = neuron(
            first and c.first_block_residual_lif and c.spike_degree >= 2 and not c.attention_only
        )
        self.sum_lif = neuron(residuals > 0 and c.spiking_mlp)
        self.mlp = SpikingMLP(c, residuals > 0) if c.spiking_mlp else MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_lif is not None:
            x = self.input_lif(x)
        attended = self.attention(x)
        if self.residual_lif is not None:
            attended = self.residual_lif(attended)
        x = x + attended
        if self.sum_lif is not None:
            x = self.sum_lif(x)
        return x + self.mlp(x)


class SpikeDecoder(nn.Module, FolderMixin):
    """A GPT-style decoder-only language model made of spiking neurons.

    ``model(tokens [B, S] int64) -> logits [B, S, V]``. Every call starts from neurons at rest: the model
    remembers nothing between calls. How much of it spikes: ``config.spike_degree``.

    Source: SpikeDecoder, Beger, Walter and Knoll, arXiv 2606.12287.
    """

    def __init__(self, config: SpikeDecoderConfig) -> None:
        super().__init__()
        if not isinstance(config, SpikeDecoderConfig):
            raise TypeError(f"config: got {type(config).__name__}, takes a SpikeDecoderConfig")
        self.config = config
        self.tokenizer: Any = None  # travels with the checkpoint if set
        self.embedding = FloatEmbedding(config) if config.ann_embedding else Embedding(config)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.blocks))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.linear.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.linear.weight.device

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] for tokens [B, S]; position i sees tokens 0 to i."""
        self._check(tokens)
        x = self.embedding(tokens, 0, self.dtype)
        if self.config.spiking_attention:
            x = x.expand(self.config.timesteps, *x.shape)  # the same input at every timestep
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over targets [B, S], those of -100 and of `pad_id` left out."""
        if self.config.pad_id is not None:
            targets = targets.masked_fill(targets == self.config.pad_id, IGNORE)
        logits = self(tokens).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens [B, S] with their continuations, [B, S + N], N <= max_new_tokens.

        temperature 0 is greedy; `options`: stop, suppress, keep. See `spikedecoder.generation.generate`,
        which also takes prompts of unequal length and returns the predictions, and its `stream`.
        """
        from spikedecoder.generation.generate import generate_tensor
        from spikedecoder.generation.sampling import SamplingParams

        sampling = SamplingParams(temperature, top_k, top_p, seed)
        return generate_tensor(self, tokens, max_new_tokens, sampling, **options)

    def _check(self, tokens: Tensor) -> None:
        c = self.config
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens: got {got}, takes an int64 tensor [B, S]")
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, takes [B, S] with B, S >= 1")
        bounded = c.position_encoding != "static" or (c.token_encoding == "one-hot" and not c.ann_embedding)
        if bounded and tokens.shape[1] > c.max_len:
            what = "one-hot tokens" if c.token_encoding == "one-hot" else f"{c.position_encoding} positions"
            raise ValueError(
                f"tokens: got {tokens.shape[1]} positions, takes at most max_len = {c.max_len} with {what}"
            )
        # reading values would stall a GPU; there the embedding's own device assertion guards
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= c.vocab_size:
                raise ValueError(f"tokens: got ids from {low} to {high}, takes 0 to {c.vocab_size - 1}")

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the optimiser: decay on Linear weights and thresholds, none on biases, norms, embeddings."""
        decay = {id(m.weight) for m in self.modules() if isinstance(m, nn.Linear)} | {
            id(m.v_threshold) for m in self.modules() if isinstance(m, LIF) and m.v_threshold is not None
        }
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in self.parameters():
            groups[id(parameter) in decay].append(parameter)
        return [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ]
