"""Count a model's operations from the spikes that pass through it: a forward hook for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spikedecoder import ops
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.energy import rows as build
from spikedecoder.energy.ledger import Ledger
from spikedecoder.energy.rows import Row
from spikedecoder.model import Block, SpikeDecoder
from spikedecoder.nn.attention import AttentionLIF, SoftmaxAttention
from spikedecoder.nn.embedding import Embedding, FloatEmbedding
from spikedecoder.nn.finite import check_finite
from spikedecoder.nn.head import Head
from spikedecoder.nn.linear import LinearNormLIF, SpikeLinear
from spikedecoder.nn.mlp import MLP
from spikedecoder.nn.neuron import ILIF, LIF, foreign
from spikedecoder.nn.norm import Norm
from spikedecoder.nn.watching import watching
from spikedecoder.params import binary_timesteps

Mode = Literal["prompt", "token"]
_PARTS = ("linear", "norm", "lif")  # sub-modules whose rows are listed under their parent's name


class Recorder:
    """Context manager that counts the operations of every layer of `model`.

        with Recorder(model, "token") as recorder:
            model.generate(prompt, 100)
        ledger = recorder.ledger()

    mode "prompt" bills whole sequences at once: attention in its causal quadratic form, weights fetched once
    per sequence. "token" bills one token after another: attention in its recurrent form (softmax attention
    with a cache of keys and values), weights fetched once per token. The spikes are the same in both, so
    either mode can count a parallel forward pass; only "token" can count `prefill`, `step` and generation.

    Raises ValueError if a parameter or a layer's values are NaN or infinite, if an input that must be spikes
    is not, or if the model has a layer whose operations are not known here. Counting takes about as long as
    one more pass.

    Tokens are counted by this package's embedding. In a model without one, they are those of the input of the
    first layer that runs, [T, B, S, E], [B, S, E] or [S, E], in each call of the model itself.
    """

    def __init__(self, model: nn.Module, mode: Mode = "prompt") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, takes a torch module")
        if mode not in get_args(Mode):
            raise ValueError(f"mode: got {mode!r}, takes prompt or token")
        self.model, self.mode = model, mode
        self._rows: dict[tuple[str, str], Row] = {}
        self._tokens = self._sequences = self._pairs = 0
        self._has_embedding = False
        self._begins = True  # no layer has run yet in this pass
        self._open = ExitStack()
        self._spike_fed, self._unkept = _linears(model)
        self._hooks = [(m, hook) for name, m in model.named_modules() if (hook := self._hook(name, m))]
        if not self._hooks:
            raise ValueError(f"model: {type(model).__name__} has no layer whose operations are known here")

    def __enter__(self) -> Recorder:
        check_finite(self.model)
        if not self._has_embedding:
            self._open.callback(self.model.register_forward_pre_hook(self._begin).remove)
        self._open.enter_context(watching(self.model, self._hooks))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def ledger(self, name: str = "") -> Ledger:
        """The ledger of what was counted so far. Raises ValueError if the model has seen no input."""
        config = self.model.config if isinstance(self.model, SpikeDecoder) else None
        return Ledger(
            rows=list(self._rows.values()),
            mode=self.mode,
            sequences=self._sequences,
            tokens=self._tokens,
            pairs=self._pairs,
            parameters=sum(p.numel() for p in self.model.parameters()),
            config=config,
            name=name,
        )

    def _begin(self, *_: Any) -> None:
        self._begins = True

    def _add(self, rows: list[Row]) -> None:
        for row in rows:
            key = (row.layer, row.operation)
            if key in self._rows:
                self._rows[key].merge(row)
            else:
                self._rows[key] = row

    def _reads(self, x: Tensor) -> int:
        """How often weights are fetched for x [T, B, S, E], [B, S, E] or [S, E]."""
        sequences, length = _sequences(x)
        return sequences * length if self.mode == "token" else sequences

    def _hook(self, name: str, module: nn.Module) -> Callable[..., None] | None:
        parent, _, last = name.rpartition(".")
        layer = (parent if last in _PARTS and parent else name) or type(module).__name__
        parts: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Any]] = [
            (nn.Linear, self._linear),
            (LinearNormLIF, self._norm_lif),
            (AttentionLIF, self._attention_lif),
            (SoftmaxAttention, self._softmax_attention),
            (LIF, self._lif),
            (Norm, self._norm),
            (MLP, self._mlp),
            (Block, self._block),
            (Head, self._head),
            ((Embedding, FloatEmbedding), self._embedding),
        ]
        method = next((m for kind, m in parts if isinstance(module, kind)), None)
        if method is None:
            known = isinstance(module, nn.Embedding)  # counted by the Embedding around it
            computes = next(module.parameters(recurse=False), None) is not None
            if isinstance(self.model, SpikeDecoder):  # all modules of its own are known
                leaf = next(module.children(), None) is None and not isinstance(module, nn.Identity)
                computes = computes or (leaf and foreign(module))
            if not known and computes:
                raise ValueError(
                    f"model: {name or 'itself'}: the operations of {type(module).__name__} are not known here"
                )
            return None
        if isinstance(module, (Embedding, FloatEmbedding)):
            self._has_embedding = True
        if method in (self._lif, self._norm):
            above = self.model.get_submodule(parent) if name else None
            if isinstance(above, (LinearNormLIF, AttentionLIF)):
                return None  # counted there
        if method == self._lif:
            layer = name or "LIF"

        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            with torch.no_grad():
                if self._begins and not self._has_embedding:
                    sequences, length = _sequences(inputs[0])
                    self._sequences += sequences
                    self._tokens += sequences * length
                    self._pairs += sequences * (length * (length + 1) // 2)
                self._begins = False
                method(layer, name, module, inputs, output)

        return hook

    def _linear(
        self, layer: str, name: str, module: nn.Linear, inputs: tuple[Tensor, ...], y: Tensor
    ) -> None:
        x = inputs[0]
        spikes = name in self._spike_fed
        _check_finite(layer, "input", x)
        _check_finite(layer, "output", y)
        fired = x != 0
        events, levels = int(fired.sum()), 1
        if isinstance(module, SpikeLinear):
            levels = module.levels
            _check_spikes(layer, "input", x, levels)
            events = _total(x, levels)
        elif spikes:
            _check_constant(layer, "input", x)
        reads = self._reads(x)
        words = reads * module.weight.numel()
        if spikes and self.mode == "token":
            # the T timesteps of a token run together: one fetch of a column for all of them
            columns = fired.any(0) if x.dim() == 4 else fired
            words = int(columns.sum()) * module.out_features
        self._add(
            build.linear(
                layer,
                n_in=module.in_features,
                n_out=module.out_features,
                rows=x.numel() // module.in_features,
                events=events,
                spikes=spikes,
                bias=module.bias is not None,
                weight_words=words,
                reads=reads,
                output_kept=name in self._unkept,
                levels=levels,
            )
        )

    def _norm_lif(
        self, layer: str, _name: str, module: LinearNormLIF, inputs: tuple[Tensor, ...], s: Tensor
    ) -> None:
        _check_spikes(layer, "output", s, module.lif.levels)
        channels = s.shape[-1]
        self._add(
            build.norm(
                layer,
                module.norm.kind,
                rows=s.numel() // channels,
                channels=channels,
                reads=self._reads(inputs[0]),
            )
        )
        self._add_lif(layer, module.lif, s, input_words=0)

    def _lif(self, layer: str, _name: str, module: LIF, inputs: tuple[Tensor, ...], s: Tensor) -> None:
        _check_finite(layer, "input", inputs[0])
        _check_spikes(layer, "output", s, module.levels)
        self._add_lif(layer, module, s, input_words=s.numel())

    def _add_lif(self, layer: str, module: LIF, s: Tensor, input_words: int) -> None:
        count = {"updates": s.numel(), "spikes": _total(s, module.levels), "channels": s.shape[-1]}
        if isinstance(module, ILIF):
            self._add(build.ilif(layer, module.params, input_words=input_words, **count))
        else:
            self._add(build.lif(layer, module.params, input_words=input_words, **count))

    def _norm(self, layer: str, _name: str, module: Norm, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        _check_finite(layer, "output of the norm", y)
        rows, channels = y.numel() // y.shape[-1], y.shape[-1]
        reads = self._reads(inputs[0])
        self._add(build.norm(layer, module.kind, rows=rows, channels=channels, reads=reads))

    def _attention_lif(
        self, layer: str, _name: str, module: AttentionLIF, inputs: tuple[Any, ...], s: Tensor
    ) -> None:
        q, k, v = inputs[:3]
        past = inputs[3] if len(inputs) > 3 else None
        if past is not None and self.mode == "prompt":
            raise ValueError("mode: got 'prompt' for a pass that goes on from a state, takes 'token'")
        for what, x in (("q", q), ("k", k), ("v", v), ("output", s)):
            _check_spikes(layer, what, x, module.lif.levels)
        heads, t = module.heads, q.shape[0]
        d = q.shape[-1] // heads
        levels = module.lif.levels
        # the number of spikes in each value, [T, B, S, H, d]
        q, k, v = (ops.spike_counts(x, levels).unflatten(-1, (heads, d)) for x in (q, k, v))
        common: dict[str, Any] = {"values": s.numel(), "spikes": _total(q), "levels": levels}
        if self.mode == "token":
            written = (k.sum(-1, dtype=torch.float64) * v.sum(-1, dtype=torch.float64)).sum()
            common |= {"written": int(written), "read": common["spikes"] * d, "state": t * heads * d * d}
            decayed = q.shape[1] * q.shape[2] * common["state"]
        else:
            common |= _quadratic(q, k, v)
            common["tests"] *= binary_timesteps(levels)  # a q spike is tested with each timestep of a key
            decayed = common["scored"]
        common["decayed"] = 0 if module.decay is None else decayed
        self._add(build.spiking_attention(layer, recurrent=self.mode == "token", **common))
        if module.norm is not None:
            rows, reads = s.numel() // s.shape[-1], self._reads(inputs[0])
            self._add(build.norm(layer, module.norm.kind, rows=rows, channels=s.shape[-1], reads=reads))
        self._add_lif(layer, module.lif, s, input_words=0)

    def _softmax_attention(
        self, layer: str, _name: str, module: SoftmaxAttention, inputs: tuple[Any, ...], y: Tensor
    ) -> None:
        b, s, width = y.shape
        pairs, longest = b * (s * (s + 1) // 2), s
        if len(inputs) > 2 and inputs[2] is not None:  # [B], how many tokens came before
            if self.mode == "prompt":
                raise ValueError("mode: got 'prompt' for a pass that goes on from a state, takes 'token'")
            pairs += int(inputs[2].sum()) * s
            longest += int(inputs[2].max())
        self._add(
            build.softmax_attention(
                layer,
                tokens=b * s,
                width=width,
                heads=module.heads,
                pairs=pairs,
                longest=longest,
                recurrent=self.mode == "token",
            )
        )

    def _mlp(self, layer: str, _name: str, module: MLP, inputs: tuple[Any, ...], y: Tensor) -> None:
        values = y.numel() // module.fc2.out_features * module.fc1.out_features
        self._add(build.gelu(layer, values=values))

    def _block(self, layer: str, _name: str, _module: Block, _inputs: tuple[Any, ...], y: Tensor) -> None:
        self._add(build.residual(layer, values=y.numel()))

    def _head(self, layer: str, _name: str, module: Head, inputs: tuple[Tensor, ...], _y: Tensor) -> None:
        x = inputs[0]
        if x.dim() == 4:
            spikes = module.lif is not None and not module.float_reunite
            outputs = x.numel() // x.shape[0]
            self._add(
                build.join(layer, how=module.reunite, timesteps=x.shape[0], outputs=outputs, spikes=spikes)
            )

    def _embedding(
        self, layer: str, _name: str, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
    ) -> None:
        b, s = inputs[0].shape
        places = inputs[1].expand(b, s)
        self._sequences += int((places[:, 0] == 0).sum())
        self._tokens += b * s
        self._pairs += int((places + 1).sum())
        _check_finite(layer, "output", y)
        config = module.config
        assert isinstance(config, SpikeDecoderConfig)
        self._add(build.embedding(layer, tokens=b * s, channels=y.shape[-1], **embedding_work(config)))


def embedding_work(c: SpikeDecoderConfig) -> dict[str, Any]:
    """Per token: numbers ("words") fetched from tables, additions, comparisons, products; and whether the
    result is spikes."""
    gain = c.embedding_gain != 1
    if c.ann_embedding:
        e = c.embed_dim
        return {"words": 2 * e, "add": e, "compare": 0, "mul": e * gain, "spikes": False}
    learned = c.token_dim if c.token_encoding == "learned" else 0
    placed = 0
    if c.token_encoding != "one-hot" and c.position_encoding in ("static", "learned"):
        placed = c.token_dim if c.combine_position else c.position_dim
    real = c.float_embedding and learned + placed > 0
    summed = c.token_dim if c.combine_position else 0
    return {
        "words": learned + placed,
        "add": summed,
        "compare": 0 if c.float_embedding else (summed or learned + placed),
        "mul": c.embed_dim if gain and real else 0,  # spikes times the gain are still binary
        "spikes": not real,
    }


def _sequences(x: Tensor) -> tuple[int, int]:
    """(B, S) of x [T, B, S, E], [B, S, E] or [S, E]."""
    return (x.shape[-3] if x.dim() > 2 else 1), x.shape[-2]


def _linears(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the Linears whose input is spikes, and of those whose output goes directly into neurons."""
    spikes, unkept = set(), set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, SpikeLinear):
            spikes.add(name)
        elif isinstance(module, LinearNormLIF):
            unkept.add(f"{prefix}linear")
        elif isinstance(module, SpikeDecoder):
            c = module.config
            if c.head_spikes and c.timesteps == 1:
                spikes.add(f"{prefix}head.linear")  # the mean of one spike is that spike
            if c.spike_degree == 1 and not c.ann_embedding and embedding_work(c)["spikes"]:
                spikes |= {f"{prefix}blocks.0.attention.{part}.linear" for part in "qkv"}
    return spikes, unkept


def _quadratic(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Counts of causal attention for spikes [T, B, S, H, d], computed one timestep and sequence at a time."""
    s = q.shape[2]
    counts = torch.zeros(3, dtype=torch.float64, device=q.device)
    for t in range(q.shape[0]):
        for b in range(q.shape[1]):
            q_, k_, v_ = (x[t, b].transpose(0, 1).float() for x in (q, k, v))  # [H, S, d]
            scores = (q_ @ k_.transpose(-1, -2)).tril()
            found = scores != 0
            fan_out = v_.sum(-1, dtype=torch.float64)  # [H, S]: a score is added once per v spike
            totals = (scores.sum(dtype=torch.float64), found.sum(), (found.sum(1) * fan_out).sum())
            counts += torch.stack([x.to(torch.float64) for x in totals])
    keys = torch.arange(1, s + 1, device=q.device, dtype=torch.float64)  # seen by token 1, 2, ...
    tests = (q.sum((0, 1, 3, 4), dtype=torch.float64) * keys).sum()
    pairs = q.shape[0] * q.shape[1] * q.shape[3] * (s * (s + 1) // 2)
    coincidences, scored, weighted = (int(n) for n in counts)
    return {
        "coincidences": coincidences,
        "tests": int(tests),
        "scored": scored,
        "pairs": pairs,
        "weighted": weighted,
    }


def _check_finite(layer: str, what: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(f"energy: {what} of {layer} holds NaN or infinite values, so nothing can be counted")


def _total(s: Tensor, levels: int = 1) -> int:
    """The number of spikes; in integers up to `levels`, the number of ones among their binary digits."""
    return int(ops.spike_counts(s, levels).sum(dtype=torch.float64))


def _check_spikes(layer: str, what: str, x: Tensor, levels: int = 1) -> None:
    """Raises ValueError unless x holds only 0 and 1, or integers from 0 to `levels`."""
    _check_finite(layer, what, x)
    if not bool(((x >= 0) & (x <= levels) & (x == x.round())).all()):
        takes = "0 and 1" if levels == 1 else f"integers from 0 to {levels}"
        raise ValueError(f"energy: {what} of {layer} is not spikes: it holds other values than {takes}")


def _check_constant(layer: str, what: str, x: Tensor) -> None:
    """Raises ValueError unless x holds only 0 and one constant, which the weights can absorb."""
    _check_finite(layer, what, x)
    if not bool(((x == 0) | (x == x.max())).all()):
        raise ValueError(f"energy: {what} of {layer} is not spikes: it holds other values than 0 and 1")
