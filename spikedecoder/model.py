"""The whole model, for every degree of spiking."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder.checkpoint import FolderMixin
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.fields import number
from spikedecoder.nn.attention import AttentionLIF, SoftmaxAttention, SpikingAttention
from spikedecoder.nn.embedding import Embedding, FloatEmbedding
from spikedecoder.nn.head import Head
from spikedecoder.nn.linear import LinearNorm, LinearNormLIF, SpikeLinear
from spikedecoder.nn.mlp import MLP, SpikingMLP
from spikedecoder.nn.neuron import LIF, neurons
from spikedecoder.nn.state import DecoderState, LayerState, shapes

IGNORE = -100  # targets of this value do not count in the loss


def check_model(model: object) -> SpikeDecoder:
    """The SpikeDecoder, unwrapped if torch.compile wrapped it; TypeError for any other object."""
    found = getattr(model, "_orig_mod", model)
    if not isinstance(found, SpikeDecoder):
        wraps = isinstance(getattr(model, "module", None), SpikeDecoder)
        raise TypeError(
            f"model: got {type(model).__name__}, takes a SpikeDecoder" + " (its .module is one)" * wraps
        )
    return found


class Block(nn.Module):
    """One decoder block, x [T, B, S, E] (or [B, S, E] if attention does not spike).

        spiking_residuals 0:  x = x + Attn(x);                 x = x + MLP(x)
        spiking_residuals 1:  x = LIF(x + Attn(x));            x = x + MLP(x)
        spiking_residuals 2:  x = LIF(x); x = LIF(x + Attn(x)); x = x + MLP(x)

    LIF(x) is left out below spike_degree 2 and with attention_only; LIF(x + Attn(x)) also where the MLP does
    not spike. In the `first` block, with first_block_residual_lif, Attn(x) passes through a LIF before it is
    added.
    """

    def __init__(self, c: SpikeDecoderConfig, first: bool) -> None:
        super().__init__()
        # the residual stream can spike only where the parts around it do
        residuals = 0 if c.attention_only or c.spike_degree < 2 else c.spiking_residuals
        neuron = lambda wanted: neurons(c) if wanted else None  # noqa: E731

        self.input_lif = neuron(residuals == 2)
        self.attention = SpikingAttention(c, residuals == 2) if c.spiking_attention else SoftmaxAttention(c)
        self.residual_lif = neuron(
            first and c.first_block_residual_lif and c.spike_degree >= 2 and not c.attention_only
        )
        self.sum_lif = neuron(residuals > 0 and c.spiking_mlp)
        self.mlp = SpikingMLP(c, residuals > 0) if c.spiking_mlp else MLP(c)

    def forward(self, x: Tensor, layer: LayerState | None = None, position: Tensor | None = None) -> Tensor:
        """With `layer`, continue from that past and update it; softmax attention needs `position` [B] too."""
        if self.input_lif is not None:
            x = self.input_lif(x)
        past = (layer,) if isinstance(self.attention, SpikingAttention) else (layer, position)
        attended = self.attention(x, *past)
        if self.residual_lif is not None:
            attended = self.residual_lif(attended)
        x = x + attended
        if self.sum_lif is not None:
            x = self.sum_lif(x)
        return x + self.mlp(x, layer)


class SpikeDecoder(nn.Module, FolderMixin):
    """A GPT-style decoder-only language model made of spiking neurons.

    ``model(tokens [B, S] int64) -> logits [B, S, V]``. Every call starts with all neurons at rest; the model
    keeps no state between calls. ``config.spike_degree`` says how much of it spikes.

    Source: SpikeDecoder, Beger, Walter and Knoll, arXiv 2606.12287.
    """

    def __init__(self, config: SpikeDecoderConfig) -> None:
        super().__init__()
        if not isinstance(config, SpikeDecoderConfig):
            raise TypeError(f"config: got {type(config).__name__}, takes a SpikeDecoderConfig")
        self.config = config
        self.tokenizer: Any = None  # saved with the checkpoint if set
        self.embedding = FloatEmbedding(config) if config.ann_embedding else Embedding(config)
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(config.blocks))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head's weights."""
        return self._some_weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return self._some_weight.device

    @property
    def _some_weight(self) -> Tensor:
        # the head's Linear may have been replaced by an adapter, or by a module without parameters
        return next(chain(getattr(self.head, "linear", self.head).parameters(), self.parameters()))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] for tokens [B, S], int64 or int32; position i sees tokens 0 to i.

        Raises TypeError for another type, and ValueError for another shape, for more than `max_len` tokens
        (static positions take any number, unless tokens are one-hot) or, on the CPU, for unknown ids.
        """
        self._check(tokens)
        x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens.long(), positions, self.dtype)
        # the same input at every timestep
        return x.expand(self.config.timesteps, *x.shape) if self.config.spiking_attention else x

    @torch.no_grad()
    def prefill(self, tokens: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Read tokens [B, S], from the beginning or after `state`: (logits [B, S, V], the new state).

        The logits are those of a parallel forward pass over all tokens read so far. With spiking attention,
        memory does not grow with their number. Consumes `state`: see `DecoderState`. `forward` is not
        called, so hooks on the model itself do not run; those on its modules do.

        Raises ValueError in training mode and for a state of another config or batch size, and rejects
        tokens as `forward` does.
        """
        if self.training:
            raise ValueError("prefill: the model is in training mode; call model.eval() first")
        if state is None:
            self._check(tokens)
            state = DecoderState.empty(self.config, tokens.shape[0], tokens.device)
        elif not isinstance(state, DecoderState) or state.config != self.config:
            raise ValueError("state: got one of another model, takes a DecoderState of this one's")
        else:
            self._check(tokens, state.longest)
            if state.batch_size != tokens.shape[0]:
                raise ValueError(
                    f"state: got {state.batch_size} sequences, takes {tokens.shape[0]} as tokens have"
                )
        s = tokens.shape[1]
        self._keep_exact(state, s)
        x = self._embed(tokens, state.position[:, None] + torch.arange(s, device=tokens.device))
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block(x, layer, state.position)
        state.position = state.position + s
        state.longest += s
        return self.head(x), state

    def step(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one more token of each sequence, token [B]: (logits [B, V], the new state); see `prefill`.

        Raises TypeError if token is no tensor, ValueError for another shape, and the errors of `prefill`.
        """
        if not isinstance(token, Tensor):
            raise TypeError(f"token: got {type(token).__name__}, takes an int64 or int32 tensor [B]")
        if token.dim() != 1:
            raise ValueError(f"token: got shape {tuple(token.shape)}, takes [B], one token of each sequence")
        logits, state = self.prefill(token[:, None], state)
        return logits[:, 0], state

    def _keep_exact(self, state: DecoderState, more: int) -> None:
        """Continue the state in float64 if float32 would no longer hold the sums of spikes exactly."""
        c = self.config
        if not c.spiking_attention or state.longest + more <= c.exact_tokens:
            return
        shape = shapes(c, state.batch_size)["attention.state"]
        for layer in state.layers:
            if "attention.state" not in layer:  # nothing read yet
                layer["attention.state"] = torch.zeros(shape, device=state.position.device)
            layer["attention.state"] = layer["attention.state"].double()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over targets [B, S]; targets of -100 and `pad_id` do not count.

        targets: for each token the one that follows it, int64 or int32. NaN if none of them counts. Raises
        TypeError for other types, ValueError if the shape differs from that of tokens or, on the CPU, for
        ids outside the vocabulary.
        """
        if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
            got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"targets: got {got}, takes an int64 or int32 tensor [B, S]")
        if not isinstance(tokens, Tensor) or targets.shape != tokens.shape:
            self._check(tokens)  # bad tokens are reported first; otherwise `forward` checks them
            raise ValueError(
                f"targets: got shape {tuple(targets.shape)}, takes that of tokens, {tuple(tokens.shape)}"
            )
        if self.config.pad_id is not None:
            targets = targets.masked_fill(targets == self.config.pad_id, IGNORE)
        logits = self(tokens).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        try:
            return F.cross_entropy(logits, targets.flatten().long(), ignore_index=IGNORE)
        except IndexError:  # on the CPU only: a GPU has its own assertion, and reading values would stall it
            low, high = map(int, targets.aminmax())
            takes = f"0 to {self.config.vocab_size - 1}, and {IGNORE} for none"
            raise ValueError(f"targets: got ids from {low} to {high}, takes {takes}") from None

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
        """Tokens [B, S] followed by their continuations: int64 [B, S + N], N <= max_new_tokens.

        temperature: 0 is greedy. top_k, top_p: limits on the candidates; None: no limit. seed: None draws a
        new one. `options`: min_p, repetition_penalty, stop, suppress, keep, past. They are described in
        `spikedecoder.generation.generate`, which also takes prompts of unequal lengths and returns the
        predictions; `spikedecoder.generation.stream` yields tokens as they are generated.
        """
        from spikedecoder.generation.generate import generate_tensor
        from spikedecoder.generation.sampling import SamplingParams

        sampling = SamplingParams(temperature, top_k, top_p, seed)
        return generate_tensor(self, tokens, max_new_tokens, sampling, **options)

    def _check(self, tokens: Tensor, start: int = 0) -> None:
        c = self.config
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens: got {got}, takes an int64 or int32 tensor [B, S]")
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, takes [B, S] with B, S >= 1")
        bounded = c.position_encoding != "static" or (c.token_encoding == "one-hot" and not c.ann_embedding)
        length = start + tokens.shape[1]
        if bounded and length > c.max_len:
            what = "one-hot tokens" if c.token_encoding == "one-hot" else f"{c.position_encoding} positions"
            raise ValueError(
                f"tokens: got {length} positions, takes at most max_len = {c.max_len} with {what}"
            )
        # reading values would stall a GPU, where the embedding's device assertion catches bad ids
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= c.vocab_size:
                raise ValueError(f"tokens: got ids from {low} to {high}, takes 0 to {c.vocab_size - 1}")

    def recompute_activations(self, on: bool = True) -> None:
        """Save memory in training: keep only spikes, as bits, and norm statistics; redo Linears in backward.

        Results are the same. A training step keeps several times less, for one more matrix product per
        Linear. The setting belongs to this object and is stored in no config or checkpoint. Raises
        ValueError with neuron="ilif", whose integers are not bits.
        """
        if on and self.config.neuron == "ilif":
            raise ValueError("recompute: got True, takes False with neuron='ilif': it keeps spikes as bits")
        for module in self.modules():
            if isinstance(module, (LinearNorm, LinearNormLIF)):
                module.recompute = on

    def unroll(self, on: bool = True) -> None:
        """Run I-LIF neurons as binary timesteps, one for each binary digit of `levels`.

        Every matrix product is then computed from the spikes, 0 and 1, that its integer operand stands for
        (see `spikedecoder.params.ILIFParams`), one timestep at a time; the results are summed, each timestep
        weighted twice as much as the next. Values and gradients stay the same, except for the order of
        summation. Without I-LIF neurons nothing changes. An unrolled model with attention_dropout > 0 cannot
        be trained. The setting belongs to this object and is stored in no config or checkpoint.
        """
        for module in self.modules():
            if isinstance(module, (SpikeLinear, AttentionLIF)):
                module.unrolled = on and self.config.spike_levels > 1

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimiser: decay for Linear weights and learned thresholds, none for the rest.

        The rest are biases, norms and embeddings. weight_decay: >= 0, else TypeError or ValueError.
        """
        number("weight_decay", weight_decay, "a finite number >= 0", 0)
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
