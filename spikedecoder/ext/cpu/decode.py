"""Run tokens through a whole fully spiking model in one call (csrc/decode.cpp)."""

from __future__ import annotations

import copy
import dataclasses
import mmap
import threading
from collections.abc import Iterator
from contextlib import suppress
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder.ext.cpu import missing, native
from spikedecoder.ext.cpu._arguments import address, neuron
from spikedecoder.nn.embedding import Embedding
from spikedecoder.nn.neuron import LIF, followed, foreign
from spikedecoder.nn.norm import Norm
from spikedecoder.nn.state import DecoderState, shapes
from spikedecoder.params import LIFParams, NormParams

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder

_REUNITE = ("average", "accumulate", "concatenate", "final")  # as numbered in csrc/decode.h
_LANES = 16  # outputs are padded to a multiple of this
_HUGE_PAGE = 2 << 20  # bytes
_MOST_CHANNELS = 65536
# Options that csrc/decode.cpp handles, or that do not affect a step. Others must have their defaults.
_OPTIONS = {
    "vocab_size", "max_len", "spike_degree", "attention_only", "token_encoding", "position_encoding",
    "token_dim", "position_dim", "combine_position", "position_bias", "float_embedding", "learn_positions",
    "binary_code", "embedding_gain", "embedding_std", "heads", "blocks", "mlp_ratio", "timesteps", "norm",
    "residual_init", "spiking_residuals", "first_block_residual_lif", "attention_scale", "decay_fastest",
    "decay_slowest", "attention_norm", "attention_dropout", "mlp_dropout", "token_shift", "mlp_token_shift",
    "reunite", "float_reunite", "spiking_head", "neuron", "levels", "tau", "v_threshold", "v_reset",
    "decay_input", "learn_threshold", "surrogate", "surrogate_alpha", "detach_reset", "pad_id",
}  # fmt: skip
_STATE = ("attention.state", "attention.shift", "mlp.shift")
_POSITIONS = 1024  # rows of positions held beyond max_len


def why_not(model: SpikeDecoder) -> str | None:
    """Why `Decoder` cannot run this model as it is; None if it can."""
    c = model.config
    if missing() is not None:
        return missing()
    if model.device.type != "cpu":
        return f"it runs on the CPU, the model is on {model.device}"
    if model.dtype != torch.float32:
        return f"it takes float32, the model is in {model.dtype}"
    if not (c.spiking_attention and c.spiking_mlp):
        return f"it takes spiking attention and MLP (spike_degree 3 or 4), got spike_degree {c.spike_degree}"
    for field in dataclasses.fields(c):
        if field.name not in _OPTIONS and getattr(c, field.name) != field.default:
            return f"it does not know the option {field.name}={getattr(c, field.name)!r}"
    if any(lif.v_threshold is not None and lif.v_threshold.numel() != 1 for lif in _lifs(model)):
        return "it takes one threshold a layer"
    if any(getattr(m, "unrolled", False) for m in model.modules()):
        return "its binary timesteps are run one by one (SpikeDecoder.unroll)"
    if followed(model):
        return "somebody watches its modules with forward hooks, which one call for all of them would pass by"
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) and foreign(module):
            return f"{name or 'the model'} has a forward of its own, which one call for all would pass by"
    widest = max(c.embed_dim, c.hidden_dim)
    if widest > _MOST_CHANNELS:
        return f"it takes at most {_MOST_CHANNELS} channels, the model has {widest}"
    return None


class Decoder:
    """`step` and `prefill` of a fully spiking SpikeDecoder on the CPU, all blocks and the head in one call.

    Copies the weights at construction; make a new Decoder after they have changed. Always computes what the
    model does in evaluation mode. Calls from several threads wait for each other.

    Raises:
        ValueError: `why_not` has a reason.
    """

    def __init__(self, model: SpikeDecoder) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        c = self.config = model.config
        self._lock = threading.Lock()
        with torch.no_grad():
            self._weights = _in_huge_pages([part.reshape(-1) for part in _weights(model)])
            self._thresholds, self._present = _neurons(model)
        self._decay = None if c.decays is None else _floats(c.decays)
        assert isinstance(model.embedding, Embedding)
        self._embedding = _Embedding(model.embedding)
        self._native = native.DecodeModel(
            # decoding has no gradient, so the surrogate does not matter: the default's code is the fast one
            neuron(LIFParams(c.tau, c.v_threshold, c.v_reset, c.decay_input)),
            levels=c.levels or 0,
            per_unit=1 / c.v_threshold if c.levels else 1.0,
            norm=0 if c.norm == "layer" else 1,
            reunite=_REUNITE.index(c.reunite),
            attention_norm=c.attention_norm,
            float_reunite=c.float_reunite,
            head_neuron=c.head_spikes,
            eps=NormParams.eps,
            scale=c.attention_scale,
            **{"blocks": c.blocks, "T": c.timesteps, "E": c.embed_dim, "hidden": c.hidden_dim, "H": c.heads},
            **{"V": c.vocab_size, "token_shift": c.token_shift, "mlp_token_shift": c.mlp_token_shift},
            token_width=c.token_width,
            weights=address(self._weights),
            weight_count=self._weights.numel(),
            thresholds=address(self._thresholds),
            present=address(self._present),
            decay=address(self._decay),
        )
        self._scratch = _empty(0)
        self._room = 0  # how many threads it suffices for
        # the state's tensors of the last call, and their batch size and addresses: `_addresses` is theirs
        self._known: list[Tensor] = []
        self._known_at: list[int] = []
        self._addresses = _empty(0)
        self._exact_tokens = c.exact_tokens
        self._bounded = c.position_encoding != "static" or c.token_encoding == "one-hot"

    def takes(self, state: DecoderState, more: int = 1) -> bool:
        """Whether `more` tokens can follow `state` here: sums of spikes are still exact in float32."""
        exact = state.longest + more <= self._exact_tokens
        sums = state.layers[0].get("attention.state")
        return exact and (sums is None or sums.dtype == torch.float32)

    def step(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """One more token for each sequence: token [B] int64 -> (logits [B, V], the state after it).

        Equals `SpikeDecoder.step` up to the rounding of sums. Consumes `state`: its tensors change in place.

        Raises:
            TypeError, ValueError: token or state of another shape, dtype, device or model; ids or positions
                out of range; a state for which `takes` is false.
        """
        self._check("token", token, 1, state)
        logits = _empty(len(token), self.config.vocab_size)
        with self._lock:
            table = self._embedding.position_rows(state)
            if table is None:
                self._read(token[:, None], state, logits, True)
            else:
                token, token_rows, (rows, first) = token.contiguous(), self._embedding.token_rows, table
                self._native.step_tokens(
                    *(address(token_rows), self.config.vocab_size, address(rows), len(rows), first),
                    *(address(token), address(state.position), self._point_to(state), address(logits)),
                    *(self._room_for_threads(), len(token), torch.get_num_threads()),
                )
        state.position = state.position + 1
        state.longest += 1
        return logits, state

    def prefill(
        self, tokens: Tensor, state: DecoderState | None = None, last_only: bool = False
    ) -> tuple[Tensor, DecoderState]:
        """Read tokens [B, S] int64 from the beginning or after `state`: (logits [B, S, V], the state after).

        last_only: return only the last token's logits [B, V]. Consumes `state` and raises as `step` does.
        """
        if state is None:
            batch = len(tokens) if isinstance(tokens, Tensor) and tokens.dim() else 0
            state = DecoderState.empty(self.config, batch, torch.device("cpu"))
        self._check("tokens", tokens, 2, state)
        b, s = tokens.shape
        logits = _empty(*((b,) if last_only else (b, s)), self.config.vocab_size)
        with self._lock:
            self._read(tokens, state, logits, last_only)
        state.position = state.position + s
        state.longest += s
        return logits, state

    def _check(self, name: str, tokens: Tensor, dims: int, state: DecoderState) -> None:
        c = self.config
        shape = "[B]" if dims == 1 else "[B, S]"
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.device.type != "cpu":
            raise TypeError(f"{name}: takes an int64 tensor {shape} on the CPU")
        if not isinstance(state, DecoderState) or (state.config is not c and state.config != c):
            raise ValueError("state: got one of another model, takes a DecoderState of this one's")
        if tokens.dim() != dims or len(tokens) != state.batch_size or not tokens.numel():
            takes = f"[{state.batch_size}]" if dims == 1 else f"[{state.batch_size}, S]"
            raise ValueError(f"{name}: got shape {tuple(tokens.shape)}, takes {takes} as the state has")
        at = state.position
        if at.dtype != torch.int64 or at.device.type != "cpu" or at.dim() != 1 or not at.is_contiguous():
            raise ValueError(
                f"state: position: got {tuple(at.shape)} {at.dtype} on {at.device}, takes contiguous [B] "
                "torch.int64 on the CPU"
            )
        more = 1 if dims == 1 else tokens.shape[1]
        if self._bounded and state.longest + more > c.max_len:
            raise ValueError(
                f"state: got one of {state.longest} tokens, takes one of at most {c.max_len - more}"
                f" where {more} more come"
            )
        if not self.takes(state, more):
            raise ValueError(
                f"{name}: got {more} more behind {state.longest}, takes as many as leave sums exact in "
                f"float32; go on with SpikeDecoder.{'step' if dims == 1 else 'prefill'}"
            )

    def _read(self, tokens: Tensor, state: DecoderState, logits: Tensor, last_only: bool) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"tokens: got ids from {low} to {high}, takes 0 to {self.config.vocab_size - 1}")
        embedded = self._embedding(tokens, state.position[:, None] + _numbers(tokens.shape[1]))
        self._native.read_embedded(
            *(address(embedded), self._point_to(state), address(logits), last_only),
            *(self._room_for_threads(), *tokens.shape, torch.get_num_threads()),
        )

    def _room_for_threads(self) -> int:
        """The address of scratch memory for the current number of threads."""
        threads = torch.get_num_threads()
        if threads > self._room:
            self._scratch = _empty(self._native.scratch_bytes(threads) // 4)
            self._room = threads
        return address(self._scratch)

    def _point_to(self, state: DecoderState) -> int:
        """The address of a table of the addresses of the state's tensors; kept while they stay the same."""
        tensors = [tensor for layer in state.layers for tensor in layer.values()]
        at = [state.batch_size, *map(Tensor.data_ptr, tensors)]
        if self._known and at == self._known_at and all(map(is_, tensors, self._known)):
            return address(self._addresses)
        self._known = []
        wanted = shapes(self.config, state.batch_size).items()
        for layer in state.layers:
            for name, shape in wanted:
                tensor = layer.get(name)
                if tensor is None:
                    tensor = _empty(*shape).zero_()
                if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                    got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                    raise ValueError(f"state: {name}: got {got}, takes {shape} torch.float32 on the CPU")
                layer[name] = tensor.contiguous()
        addresses = [[address(layer.get(name)) for name in _STATE] for layer in state.layers]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        self._known = [tensor for layer in state.layers for tensor in layer.values()]
        self._known_at = [state.batch_size, *map(Tensor.data_ptr, self._known)]
        return address(self._addresses)


class _Embedding:
    """A copy of a model's embedding; as tables of rows, if token and position are concatenated parts."""

    def __init__(self, embedding: Embedding) -> None:
        self._module = copy.deepcopy(embedding).requires_grad_(False)
        c = self.config = embedding.config
        self.token_rows = _empty(0)
        self._near: Tensor | None = None
        self._far, self._first = _empty(0), 0
        if c.position_width:  # else the two are summed, or there is only one
            tokens = _numbers(c.vocab_size)[None]
            self.token_rows = self(tokens, torch.zeros_like(tokens))[0, :, : c.token_width].contiguous()
            self._near = self._rows(0, c.max_len)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[B, S, E] for tokens [B, S] at positions [B, S]."""
        with torch.no_grad():
            return self._module(tokens, positions, torch.float32).contiguous()

    def _rows(self, first: int, count: int) -> Tensor:
        positions = first + _numbers(count)[None]
        return self(torch.zeros_like(positions), positions)[0, :, self.config.token_width :].contiguous()

    def position_rows(self, state: DecoderState) -> tuple[Tensor, int] | None:
        """(rows that hold all positions of a state, the first row's position); None if there is no table.

        Beyond max_len one stretch of _POSITIONS positions is held; a batch that spans more gets None.
        """
        if self._near is None or state.longest < self.config.max_len:
            return None if self._near is None else (self._near, 0)
        lowest = int(state.position.min())
        if state.longest - lowest >= _POSITIONS:
            return None
        if not self._first <= lowest <= state.longest < self._first + len(self._far):
            self._far, self._first = self._rows(lowest, _POSITIONS), lowest
        return self._far, self._first


# The kernel reads and writes float32 on the CPU, whatever torch's default dtype and device are.


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _floats(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _numbers(n: int) -> Tensor:
    return torch.arange(n, device="cpu")


def _lifs(model: SpikeDecoder) -> list[LIF]:
    return [m for m in model.modules() if isinstance(m, LIF)]


def _neurons(model: SpikeDecoder) -> tuple[Tensor, Tensor]:
    """Thresholds [blocks * 12 + 1] of the neurons in the order of csrc/decode.h, and which of them exist."""
    neurons: list[LIF | None] = []
    block: Any
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        neurons += [block.input_lif, attention.input_lif, attention.q.lif, attention.k.lif, attention.v.lif]
        neurons += [attention.attention_lif.lif, attention.output_lif, block.residual_lif, block.sum_lif]
        neurons += [mlp.input_lif, mlp.fc1.lif, mlp.output_lif]
    neurons.append(model.head.lif)
    thresholds = [
        0.0 if lif is None else lif.params.v_threshold if lif.v_threshold is None else lif.v_threshold.item()
        for lif in neurons
    ]
    present = [lif is not None for lif in neurons]
    return _floats(thresholds), torch.tensor(present, dtype=torch.uint8, device="cpu")


def _weights(model: SpikeDecoder) -> Iterator[Tensor]:
    """All weights in the order of csrc/decode.h."""
    block: Any
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        qkv = [_linear(part.linear, part.norm) for part in (attention.q, attention.k, attention.v)]
        weights, *rest = zip(*qkv, strict=True)
        yield from _panels(torch.cat(weights, dim=1))
        for side in rest:
            yield from side
        if attention.attention_lif.norm is not None:
            yield from _norm(attention.attention_lif.norm)
        for layer in (attention.proj, mlp.fc1, mlp.fc2):
            weight, *parts = _linear(layer.linear, layer.norm)
            yield from _panels(weight)
            yield from parts
    worth = getattr(model.head.linear, "unit", 1.0)  # of a spike in the head
    yield _padded(model.head.linear.weight.t()) * worth
    yield _padded(model.head.linear.bias)


def _in_huge_pages(parts: list[Tensor]) -> Tensor:
    """The concatenated parts, in huge pages if the system has them.

    Each token reads all of the weights, and looking up so many small pages takes long.
    """
    count = sum(map(len, parts))
    if 4 * count < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.cat(parts)
    memory = mmap.mmap(-1, 4 * count + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the system's kernel has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.float32)
    return torch.cat(parts, out=whole[-whole.data_ptr() % _HUGE_PAGE // 4 :][:count])


def _padded(x: Tensor) -> Tensor:
    return F.pad(x.detach(), (0, -x.shape[-1] % _LANES))


def _panels(weight: Tensor) -> tuple[Tensor, ...]:
    """A weight [inputs, outputs] as the panels that csrc/decode.h expects."""
    assert native is not None
    return weight.split(native.decode_panel(len(weight)), dim=1)


def _linear(linear: nn.Linear, norm: Norm) -> list[Tensor]:
    """Weight [inputs, outputs] and bias, then what `_norm` returns. A LayerNorm's subtraction of the mean is
    folded into weight and bias."""
    weight, bias = linear.weight.detach().t().double(), linear.bias.detach().double()
    if norm.kind == "layer":
        weight, bias = weight - weight.mean(1, keepdim=True), bias - bias.mean()
    return [_padded(weight.float()), _padded(bias.float()), *_norm(norm)]


def _norm(norm: Norm) -> list[Tensor]:
    """Weight and bias; of channel norms also the mean and 1 / sqrt(variance + eps) of evaluation mode."""
    parts: list[Tensor] = [norm.weight, norm.bias]
    if norm.kind == "batch":
        variance = norm.get_buffer("running_var")
        parts += [norm.get_buffer("running_mean"), (variance + NormParams.eps).rsqrt()]
    elif norm.kind == "power":
        second_moment = norm.get_buffer("running_phi")
        parts += [torch.zeros_like(norm.weight), (second_moment + NormParams.eps).rsqrt()]
    return [_padded(part) for part in parts]
