"""The configuration of a model: validated, serialisable, with presets."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spikedecoder.fields import LEAST, at_least, check_field, coerce, number
from spikedecoder.params import MAX_LEVELS, NORMS, ILIFParams, LIFParams, binary_timesteps
from spikedecoder.presets import PRESETS
from spikedecoder.surrogate import SURROGATES

TokenEncoding = Literal["learned", "one-hot", "two-hot", "binary"]
PositionEncoding = Literal["static", "learned", "linear", "binary"]
Reunite = Literal["average", "accumulate", "concatenate", "final"]
BinaryCode = Literal["fixed-width", "left-aligned"]


@dataclass(frozen=True)
class SpikeDecoderConfig:
    """Everything that defines a `SpikeDecoder` except its weights.

    A value that does not fit raises ValueError naming the field. T: timesteps, E: channels (`embed_dim`),
    B: sequences of a batch, S: tokens of a sequence.

    vocab_size: number of tokens.
    max_len: context length in tokens.
    spike_degree: 0 the non-spiking baseline (softmax attention, GELU); 1 spiking embedding; 2 also
        attention; 3 also MLP; 4 also head, the full SpikeDecoder.
    attention_only: only the attention spikes; embedding, MLP and head are the baseline's. Overrides
        spike_degree.
    token_encoding: "learned" (an embedding of `token_dim`, binarised), "one-hot" (one channel per pair of
        token and position), "two-hot" (one channel per token), "binary" (the token's number in binary).
    token_dim, position_dim: channels of a learned token, and of a static or learned position.
    position_encoding: "static" (sinusoid of `position_dim`, minus `position_bias`, binarised), "learned" (an
        embedding of `position_dim`, binarised), "linear" (one channel per position), "binary". Its channels
        follow those of the token; one-hot tokens need none.
    position_bias: subtracted from the sinusoid before it is binarised.
    combine_position: add learned tokens and static or learned positions, then binarise (E = token_dim).
    float_embedding: do not binarise learned tokens and static or learned positions.
    learn_positions: learned positions get a gradient (in the original they did not).
    binary_code: "fixed-width" (unique), or the original's "left-aligned" (1, 2, 4, 8 share a code).
    embedding_gain: factor on the embedding. At tau = 2, a constant input of 1 raises the membrane potential
        only to 1 - 2^-T, so a neuron with threshold 1 never fires; with a gain of 2 it does.
    embedding_std: initial standard deviation of a spiking embedding's learned tokens and positions. With the
        default, the original's 1e-5, all values start so close to the binarisation threshold that any
        training step can flip them.
    heads: of attention, a divisor of E.
    blocks: how many, each of an attention and an MLP.
    mlp_ratio: hidden width of the MLP / E.
    timesteps: T, for which the neurons run on every token.
    residual_init: initial weight of the norms after the last Linear of spiking attention and MLP. It sets how
        much a block adds to the residual stream, which neurons read only up to their saturation.
    norm: "layer", "batch" or "power". In training the last two take statistics over T, B and S together, so
        the training loss sees later positions through them.
    spiking_residuals: 0 real-valued residual stream; 1 LIF after adding the attention (if the MLP spikes); 2
        also before the attention. Without effect below spike_degree 2 and with attention_only.
    first_block_residual_lif: in the first block, the attention's output passes through a LIF before it is
        added.
    attention_scale: factor on the result of spiking attention.
    attention_dropout, mlp_dropout: probabilities of dropping an attention score and an output of the MLP.
    decay_fastest, decay_slowest: make spiking attention forget: n tokens later, a token's contribution is
        multiplied by decay^n. Heads get decays from the fastest to the slowest, with 1 - decay in equal
        ratios; a single head gets the slowest. 1 and 1: no decay, and sums are exact integers.
    attention_norm: normalise the attention's result before its LIF, so that its size does not grow with the
        context.
    token_shift, mlp_token_shift: n channel groups, of which group i comes from the token i places back, at
        the input of the first Linear of attention and MLP; 1 is off.
    reunite: how the head joins timesteps: "average" (mean over T), "accumulate" (sum), "concatenate" (T E
        channels) or "final" (the last one alone).
    float_reunite: join them first, then apply one LIF step.
    spiking_head: LIF before the head's Linear; None: if spike_degree is 4. Never below spike_degree 2 or
        with attention_only.
    neuron: "lif" or "ilif". "ilif" trains in a single timestep (T = 1) with integers from 0 to `levels` in
        units of v_threshold, and can run as binary timesteps, one for each of their binary digits
        (`SpikeDecoder.unroll`); see `spikedecoder.params.ILIFParams`. LIF's other parameters do not apply.
    levels: largest integer of "ilif", 1 to 15; None with "lif".
    tau: the neurons' time constant in timesteps, >= 1; for all of the neuron's equations see
        `spikedecoder.params.LIFParams`.
    v_threshold: membrane potential at which a neuron fires; with "ilif" the unit of its integers.
    v_reset: membrane potential after a spike; None: a spike takes v_threshold off (soft reset).
    decay_input: whether the input is divided by tau.
    learn_threshold: whether each layer of neurons learns its threshold, which starts at v_threshold.
    surrogate, surrogate_alpha: name of the function whose derivative stands in for that of a spike, and its
        sharpness.
    detach_reset: whether the reset is a constant to gradients.
    pad_id: token that the loss ignores; None if there is none.
    """

    vocab_size: int = 30
    max_len: int = 256
    spike_degree: int = 4
    attention_only: bool = False

    token_encoding: TokenEncoding = "learned"
    position_encoding: PositionEncoding = "static"
    token_dim: int = 66
    position_dim: int = 30
    combine_position: bool = False
    position_bias: float = 0.0
    float_embedding: bool = False
    learn_positions: bool = True
    binary_code: BinaryCode = "fixed-width"
    embedding_gain: float = 1.0
    embedding_std: float = 1e-5

    heads: int = 4
    blocks: int = 3
    mlp_ratio: int = 4
    timesteps: int = 4
    norm: Literal["layer", "batch", "power"] = "layer"
    residual_init: float = 1.0
    spiking_residuals: int = 0
    first_block_residual_lif: bool = False
    attention_scale: float = 0.125
    decay_fastest: float = 1.0
    decay_slowest: float = 1.0
    attention_norm: bool = False
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    token_shift: int = 1
    mlp_token_shift: int = 1

    reunite: Reunite = "average"
    float_reunite: bool = False
    spiking_head: bool | None = None

    neuron: Literal["lif", "ilif"] = "lif"
    levels: int | None = None
    tau: float = 2.0
    v_threshold: float = 1.0
    v_reset: float | None = 0.0
    decay_input: bool = True
    learn_threshold: bool = False
    surrogate: str = "sigmoid"
    surrogate_alpha: float = 4.0
    detach_reset: bool = True

    pad_id: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = coerce(field.name, getattr(self, field.name), _HINTS[field.name])
            object.__setattr__(self, field.name, value)
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes 1 to {most}")
        for name, top in (("spike_degree", 4), ("spiking_residuals", 2)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes 0 to {top}")
        for name in ("attention_dropout", "mlp_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes a probability in [0, 1)")
        number("position_bias", self.position_bias, "a finite number")
        for name in _POSITIVE:
            number(name, getattr(self, name), "a finite number > 0", LEAST)
        for name in ("decay_fastest", "decay_slowest"):
            takes = f"a number in (0, 1], {_LEAST_DECAY:g} or more: float32 makes 0 of less"
            number(name, getattr(self, name), takes, _LEAST_DECAY, 1)
        if self.decay_fastest > self.decay_slowest or (self.decay_fastest < 1) != (self.decay_slowest < 1):
            raise ValueError(
                f"decay_fastest: got {self.decay_fastest}, takes at most decay_slowest = "
                f"{self.decay_slowest}, and both below 1 or both 1"
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm: got {self.norm!r}, takes one of {', '.join(NORMS)}")
        if self.surrogate not in SURROGATES:
            raise ValueError(f"surrogate: got {self.surrogate!r}, takes one of {', '.join(SURROGATES)}")
        self._check_neuron()
        if self.pad_id is not None and not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(
                f"pad_id: got {self.pad_id}, takes None or a token in 0 to {self.vocab_size - 1}"
            )
        self._check_embedding()
        for name in ("token_shift", "mlp_token_shift"):
            at_least(name, getattr(self, name), 1)
            limit = min(self.max_len, self.embed_dim)
            if getattr(self, name) > limit:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, takes 1 to {limit} "
                    f"(max_len {self.max_len}, {self.embed_dim} channels)"
                )
        if self.embed_dim > _MOST_CHANNELS:
            raise ValueError(
                f"token_encoding: got {self.token_encoding!r} with {self.embed_dim} channels, takes at most "
                f"{_MOST_CHANNELS}"
            )
        if self.embed_dim % self.heads:
            raise ValueError(f"heads: got {self.heads}, takes a divisor of the {self.embed_dim} channels")
        if self.float_reunite and not self.head_spikes:
            raise ValueError(
                "float_reunite: got True without a spiking head, takes False, or spiking_head=True"
            )

    def _check_neuron(self) -> None:
        if self.neuron == "lif":
            if self.levels is not None:
                raise ValueError(
                    f"levels: got {self.levels}, takes None with neuron='lif', as the preset default-lif has"
                )
            _ = self.lif  # checks its values
            rest = self.v_reset or 0.0
            if self.v_threshold <= rest:
                raise ValueError(
                    f"v_threshold: got {self.v_threshold}, takes a number above {rest} (v_reset), "
                    "or neurons fire whatever they get"
                )
            return
        if self.levels is None:
            raise ValueError(f"levels: got None, takes 1 to {MAX_LEVELS} with neuron='ilif'")
        if self.timesteps != 1:
            raise ValueError(
                f"timesteps: got {self.timesteps}, takes 1 with neuron='ilif': its integers, up to levels = "
                f"{self.levels}, stand for {binary_timesteps(self.levels)} binary timesteps; the preset "
                "default-lif has neurons of several"
            )
        for name in _LIF_ONLY:
            got, default = getattr(self, name), _DEFAULTS[name]
            if got != default:
                raise ValueError(f"{name}: got {got!r}, takes {default!r} with neuron='ilif', which has none")
        if self.v_reset not in (None, _DEFAULTS["v_reset"]):
            raise ValueError(f"v_reset: got {self.v_reset}, takes None with neuron='ilif': its reset is soft")
        _ = self.neurons  # checks its values

    def _check_embedding(self) -> None:
        if self.ann_embedding and self.position_encoding not in ("static", "learned"):
            raise ValueError(
                f"position_encoding: got {self.position_encoding!r}, takes static or learned where the "
                "embedding does not spike (spike_degree=0 or attention_only)"
            )
        if self.combine_position and (
            self.token_encoding != "learned" or self.position_encoding not in ("static", "learned")
        ):
            raise ValueError(
                f"combine_position: got True with {self.token_encoding} tokens and {self.position_encoding} "
                "positions, takes learned tokens and static or learned positions"
            )

    @property
    def ann_embedding(self) -> bool:
        """Whether the embedding is the baseline's: real-valued tokens plus positions."""
        return self.spike_degree == 0 or self.attention_only

    @property
    def spiking_attention(self) -> bool:
        """Whether attention computes with spikes."""
        return self.spike_degree >= 2 or self.attention_only

    @property
    def spiking_mlp(self) -> bool:
        """Whether the MLPs compute with spikes."""
        return self.spike_degree >= 3 and not self.attention_only

    @property
    def head_spikes(self) -> bool:
        """Whether the head gets spikes."""
        if self.spike_degree < 2 or self.attention_only:
            return False
        return self.spike_degree == 4 if self.spiking_head is None else self.spiking_head

    @property
    def token_width(self) -> int:
        """Channels of the token part."""
        widths = {
            "learned": self.token_dim,
            "one-hot": self.vocab_size * self.max_len,
            "two-hot": self.vocab_size,
            "binary": bits(self.vocab_size),
        }
        return widths[self.token_encoding]

    @property
    def position_width(self) -> int:
        """Channels of the position part; 0 if positions are added to the token part or contained in it."""
        if self.token_encoding == "one-hot" or self.combine_position:
            return 0
        widths = {"linear": self.max_len, "binary": bits(self.max_len)}
        return widths.get(self.position_encoding, self.position_dim)

    @property
    def embed_dim(self) -> int:
        """E, the channels of the residual stream."""
        return self.token_width + self.position_width

    @property
    def hidden_dim(self) -> int:
        """Channels inside the MLP."""
        return self.embed_dim * self.mlp_ratio

    @property
    def decays(self) -> list[float] | None:
        """The decay of each head, fastest first; None without decay."""
        if self.decay_fastest == 1:
            return None
        fastest, slowest = self.decay_fastest, self.decay_slowest
        if self.heads == 1:
            return [slowest]
        ratio = (1 - slowest) / (1 - fastest)
        between = (1 - (1 - fastest) * ratio ** (h / (self.heads - 1)) for h in range(1, self.heads - 1))
        # clamped: rounding of 1 - decay can lose a decay near 0
        return [fastest, *(min(max(decay, fastest), slowest) for decay in between), slowest]

    @property
    def lif(self) -> LIFParams:
        """The parameters of the model's LIF neurons."""
        return LIFParams(
            tau=self.tau,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            decay_input=self.decay_input,
            surrogate=self.surrogate,
            alpha=self.surrogate_alpha,
            detach_reset=self.detach_reset,
        )

    @property
    def neurons(self) -> LIFParams | ILIFParams:
        """Parameters of the model's neurons."""
        if self.neuron == "lif":
            return self.lif
        assert self.levels is not None
        return ILIFParams(self.levels, self.v_threshold)

    @property
    def spike_levels(self) -> int:
        """The largest output of a neuron: 1, or `levels` with I-LIF neurons."""
        return self.levels or 1

    @property
    def binary_timesteps(self) -> int:
        """Binary timesteps of a neuron: T, or the number of binary digits of `levels` with I-LIF neurons."""
        return self.timesteps * binary_timesteps(self.spike_levels)

    @property
    def exact_tokens(self) -> float:
        """Number of tokens for which the attention's sums stay below 2^24, and so exact in float32.

        A token adds up to d D^3, where d = E / heads and D is 1, or the levels of I-LIF neurons. Sums with a
        decay are real numbers and bounded; inf if that bound is below 2^24.
        """
        tokens = 2**24 / (self.embed_dim // self.heads * self.spike_levels**3)
        return math.inf if self.decay_slowest < 1 and 1 / (1 - self.decay_slowest) <= tokens else tokens

    @property
    def spike_worth(self) -> float:
        """Value of a spike at the head's input: 1, or `v_threshold` with I-LIF neurons."""
        return 1.0 if self.levels is None else self.v_threshold

    def replace(self, **changes: Any) -> SpikeDecoderConfig:
        """A copy with some fields changed; unknown names raise ValueError."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, strings, booleans and None, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpikeDecoderConfig:
        """The inverse of `to_dict`; missing fields take their defaults, unknown ones raise ValueError."""
        for name in values:
            check_field(name, tuple(_HINTS), "config")
        return cls(**values)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """The names that `preset` takes."""
        return tuple(PRESETS)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SpikeDecoderConfig:
        """A named configuration, with some fields changed: ``preset("original-char", blocks=2)``.

        If vocab_size changes, the preset's pad_id is dropped: it belongs to the preset's own vocabulary.
        Raises ValueError for an unknown preset or field.
        """
        if name not in cls.presets():  # may have any type: a file can hold a list here
            raise ValueError(f"preset: got {name!r}, takes one of {', '.join(PRESETS)}")
        fields = dict(PRESETS[name])
        own = fields.get("vocab_size", _DEFAULTS["vocab_size"])
        if changes.get("vocab_size", own) != own:
            fields.pop("pad_id", None)
        return cls.from_dict({**fields, **changes})


def bits(n: int) -> int:
    """Number of binary digits needed to number n things."""
    return math.ceil(math.log2(n)) if n > 1 else 1


_HINTS: dict[str, Any] = typing.get_type_hints(SpikeDecoderConfig)
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(SpikeDecoderConfig)}
_MOST_CHANNELS = 2**21
_MOST = {  # beyond what memory holds, and below what overflows
    "vocab_size": 2**24,
    "max_len": 2**24,
    "token_dim": 2**20,
    "position_dim": 2**20,
    "heads": 2**20,
    "blocks": 1024,
    "mlp_ratio": 2**16,
    "timesteps": 2**16,
}
_LEAST_DECAY = 1e-45
_POSITIVE = ("embedding_gain", "embedding_std", "residual_init", "attention_scale", "surrogate_alpha")
_LIF_ONLY = ("tau", "decay_input", "learn_threshold", "surrogate", "surrogate_alpha", "detach_reset")
