"""The original's configs and models under their old names, as thin shims around `SpikeDecoder`.

A shim takes strings (or lists of words) and returns (predictions, attention, loss) as the original did. Its
weights are those of ``shim.decoder``, a plain `SpikeDecoder`, so `state_dict` has this package's names.
`spikedecoder.compat.utils.load_model_from_checkpoint` and `spikedecoder.compat.convert.convert_original` read
checkpoints of the original.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikedecoder.compat.convert import original_config
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.data import ORIGINAL_ALPHABET, CharTokenizer, WordTokenizer, clean_words
from spikedecoder.generation import SamplingParams, generate
from spikedecoder.model import IGNORE, SpikeDecoder
from spikedecoder.nn.watching import watching

# the original's alphabet if the vocabulary's size is not 30
LONG_ALPHABET = "abcdefghijklmnopqrstuvwxyz.'SEP "


class _Config:
    """Takes the original's arguments, by position or name, and keeps them as attributes of the same names.

    Further attributes: `num_heads`, `num_blocks`, `embed_dim`. Raises ValueError for an unknown name or a
    value out of range, TypeError for too many arguments or one given twice.
    """

    kind: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        names = ("vocab_size", "max_len", *self.defaults)
        label = type(self).__name__
        if len(args) > len(names):
            raise TypeError(f"{label}: got {len(args)} arguments by position, takes at most {len(names)}")
        for name in options:
            if name in names[: len(args)]:
                raise TypeError(f"{label}: got {name} twice, by position and by name")
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"takes {', '.join(names)}"
                raise ValueError(f"{label}: unknown option {name!r}; {hint}")
        self.options = {**self.defaults, **dict(zip(names, args, strict=False)), **options}
        ours = self.decoder_config()
        if self.options["dictionary"] is not None:
            self.options["dictionary"] = list(self.options["dictionary"])
        for name, value in self.options.items():
            setattr(self, name, value)
        self.vocab_size, self.max_len = ours.vocab_size, ours.max_len
        self.num_heads, self.num_blocks, self.embed_dim = ours.heads, ours.blocks, ours.embed_dim

    def decoder_config(self, dim_hid: int | None = None) -> SpikeDecoderConfig:
        """The same as a config of this package. dim_hid: the MLP's width in multiples of `embed_dim`; None is
        4."""
        return original_config(self.kind, self.options, dim_hid)

    def __str__(self) -> str:
        shown = {**self.options, "embed_dim": self.embed_dim}
        if shown["dictionary"] is not None:
            shown["dictionary"] = f"{len(shown['dictionary'])} words"
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"

    def __getattr__(self, name: str) -> Any:  # for type checkers: the attributes are set from the options
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class SDconfig(_Config):
    """Options of the fully spiking model, `SpikingDecoderModel`."""

    kind = "spiking"
    defaults: ClassVar[Mapping[str, Any]] = {
        "encodingType": "two-hot",
        "position_encoding_strategy": "linear",
        "tok_embed_dim": 30,
        "pos_embed_dim": 30,
        "attn_dropout": 0.0,
        "mlp_dropout": 0.0,
        "heads": 2,
        "blocks": 1,
        "spiking_residuals": 0,
        "spiking_head": True,
        "timesteps": 2,
        "device": torch.device("cpu"),
        "attention_scale": 0.125,
        "normalization": "layer",
        "combine_position": False,
        "firstBlock_spiking_res": False,
        "spike_mode": "average",
        "pos_bias": 0.0,
        "float_reunite": False,
        "float_embedding": False,
        "learning_MSLIF": False,
        "dictionary": None,
        "track_frequency": False,
    }


class PSDconfig(_Config):
    """Options of the partly spiking model, `PartiallySpikingDecoderModel`."""

    kind = "partial"
    defaults: ClassVar[Mapping[str, Any]] = {
        "spike_degree": 0,
        "tok_embed_dim": 30,
        "pos_embed_dim": 30,
        "attn_dropout": 0.0,
        "mlp_dropout": 0.0,
        "heads": 2,
        "blocks": 1,
        "device": torch.device("cpu"),
        "encodingType": "two-hot",
        "position_encoding_strategy": "linear",
        "spiking_residuals": 0,
        "spiking_head": False,
        "timesteps": 2,
        "attention_scale": 0.125,
        "SMHA_only": False,
        "normalization": "layer",
        "float_embedding": False,
        "combine_position": False,
        "firstBlock_spiking_res": False,
        "spike_mode": "average",
        "pos_bias": 0.0,
        "float_reunite": False,
        "learning_MSLIF": False,
        "dictionary": None,
        "track_frequency": True,
    }


class NSDconfig(_Config):
    """Options of the non-spiking model, `NonSpikingDecoderModel`."""

    kind = "nonspiking"
    defaults: ClassVar[Mapping[str, Any]] = {
        "embed_dim": 8,
        "dropout": 0.0,
        "heads": 2,
        "blocks": 1,
        "device": torch.device("cpu"),
        "normalization": "layer",
        "learned_embedding": False,
        "dictionary": None,
    }


class Vocabulary:
    """Tokens of a config and their ids: the dictionary, or the original's alphabet of 30 or 32 characters."""

    def __init__(self, config: _Config) -> None:
        self.words = config.options["dictionary"] is not None
        if self.words:
            self.alphabet: Sequence[str] = list(config.options["dictionary"])
        else:
            self.alphabet = ORIGINAL_ALPHABET if config.vocab_size == 30 else LONG_ALPHABET
            if config.vocab_size < len(self.alphabet):
                raise ValueError(
                    f"vocab_size: got {config.vocab_size}, takes 30, >= {len(LONG_ALPHABET)}, or a dictionary"
                )
        self.tok_to_int = {token: i for i, token in enumerate(self.alphabet)}
        self.int_to_tok = dict(enumerate(self.alphabet))
        if "P" not in self.tok_to_int:
            raise ValueError(
                "dictionary: got one without the padding token 'P'; takes Reader.createDictionary's"
            )
        self.pad = self.tok_to_int["P"]
        self._table = np.full(129, -1, dtype=np.int64)  # the last entry: anything not ASCII
        if not self.words:
            self._table[[ord(c) for c in self.alphabet]] = np.arange(len(self.alphabet))

    def encode(self, sequence: Any) -> np.ndarray:
        """Ids [S] of a string or, with a dictionary, of a list of words. The text is not cleaned.

        Raises ValueError naming characters or words outside the alphabet, TypeError for another type.
        """
        if self.words:
            if isinstance(sequence, str) or not all(isinstance(w, str) for w in sequence):
                raise TypeError(
                    f"x: got {type(sequence).__name__}, takes lists of words (there is a dictionary)"
                )
            ids = np.fromiter((self.tok_to_int.get(w, -1) for w in sequence), np.int64, len(sequence))
        else:
            if not isinstance(sequence, str):
                raise TypeError(f"x: got {type(sequence).__name__}, takes a string or a list of strings")
            codes = np.frombuffer(sequence.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            ids = self._table[np.minimum(codes, 128)]
        if (ids < 0).any():
            outside = list(dict.fromkeys(sequence[i] for i in np.flatnonzero(ids < 0)))
            what = "words" if self.words else "characters"
            raise ValueError(f"x: {what} outside the alphabet: {', '.join(map(repr, outside[:8]))}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return (" " if self.words else "").join(self.alphabet[i] for i in ids)

    def tokenizer(self) -> CharTokenizer | WordTokenizer | None:
        """The same as a tokenizer of this package; None if it is the alphabet of 32, or a dictionary that
        lacks a full stop."""
        if self.words:
            return WordTokenizer.original(self.alphabet) if "." in self.tok_to_int else None
        return CharTokenizer.original() if self.alphabet == ORIGINAL_ALPHABET else None


class _Shim(nn.Module):
    """What the three models share; `decoder` is the `SpikeDecoder`, `config` the original's config."""

    config_class: ClassVar[type[_Config]]

    def __init__(
        self,
        config: _Config | None = None,
        *,
        dim_hid: int | None = None,
        mlp_dropout: float | None = None,
        **options: Any,
    ) -> None:
        """config: the original's config. None: it is made of `options`, its arguments by name, of which
        vocab_size and max_len are required.

        dim_hid: the MLP's width in multiples of embed_dim; None is 4. mlp_dropout: overrides the config's.
        """
        super().__init__()
        if config is None:
            config = self.config_class(**options)
        elif options:
            raise TypeError(
                f"{type(self).__name__}: got a config and {', '.join(options)}, takes one of them"
            )
        if not isinstance(config, self.config_class):
            raise TypeError(f"config: got {type(config).__name__}, takes {self.config_class.__name__}")
        self.config = config
        self.embedder = Vocabulary(config)
        ours = config.decoder_config(dim_hid)
        self.decoder = SpikeDecoder(ours if mlp_dropout is None else ours.replace(mlp_dropout=mlp_dropout))
        self.decoder.tokenizer = self.embedder.tokenizer()

    def forward(self, x: Any, targets: Any = None, raw: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predictions, attention and loss.

        Args:
            x: a string or a list of strings; with a dictionary, a list of words or a list of such lists.
                Each has at most max_len tokens and is padded to max_len.
            targets: the same, one token ahead. None: no loss.
            raw: if False, x and targets are token ids [B, S] instead (-100 in targets is not counted).

        Returns:
            preds: logits [B, max_len, V] ([B, S, V] for ids).
            attention: the values v of the last block's attention: spikes [T, B, H, S, d], or real numbers
                [B, H, S, d] if the attention does not spike.
            loss: mean cross-entropy in nats over the targets (padding is not counted), or None.

        Raises TypeError, ValueError naming the argument.
        """
        if raw:
            x = self._ids(x, self.embedder.pad)
            if targets is not None:
                targets = self._ids(targets, IGNORE)
        elif not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, takes a tensor of ids [B, S] where raw=False")
        if targets is not None and targets.shape != x.shape:
            raise ValueError(f"targets: got shape {tuple(targets.shape)}, takes that of x, {tuple(x.shape)}")
        values: list[Tensor] = []
        last: Any = self.decoder.blocks[-1]
        with watching(self.decoder, [(last.attention.v, lambda _module, _args, out: values.append(out))]):
            preds = self.decoder(x.to(self.decoder.device))
        # [..., S, E] -> [..., H, S, d]
        attention = values[0].unflatten(-1, (self.decoder.config.heads, -1)).transpose(-3, -2)
        if targets is None:
            return preds, attention, None
        targets = targets.to(preds.device)
        logits = preds.flatten(0, 1).to(torch.promote_types(preds.dtype, torch.float32))
        return preds, attention, F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def generate(self, x: str, iterations: int = 1) -> str:
        """The greedy continuation of a prompt.

        A prompt of n < max_len tokens is returned with its continuation; the first iteration adds
        max_len + 1 - n tokens, at most max_len. With n >= max_len only the prompt's last max_len tokens are
        read, and the continuation is returned without it; the first iteration gives max_len tokens. Each
        further iteration adds max_len tokens. With the alphabet of 32, an "E" ends the text.
        """
        if not isinstance(x, str):
            raise TypeError(f"x: got {type(x).__name__}, takes a string")
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations: got {iterations!r}, takes an integer >= 1")
        prompt = self.embedder.encode(clean_words(x) if self.embedder.words else x).tolist()
        longest = self.decoder.config.max_len
        shorter = len(prompt) < longest
        first = min(longest + 1 - len(prompt), longest) if shorter else longest
        new = generate(
            self.decoder,
            [prompt[-longest:]],
            first + (iterations - 1) * longest,
            SamplingParams(temperature=0),
            stop=self.embedder.tok_to_int.get("E"),  # only in the alphabet of 32
            suppress=(),
            keep=longest,
        ).tokens[0]
        return self.embedder.decode([*prompt, *new] if shorter else new)

    def configure_optimizer(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float]
    ) -> torch.optim.AdamW:
        """AdamW, with weight decay on Linear weights and thresholds, none on biases, norms and embeddings."""
        return torch.optim.AdamW(self.decoder.parameter_groups(weight_decay), lr=learning_rate, betas=betas)

    def _ids(self, x: Any, fill: int) -> Tensor:
        """Token ids [B, max_len], padded with `fill`."""
        one = isinstance(x, str) or (self.embedder.words and len(x) > 0 and isinstance(x[0], str))
        rows = [self.embedder.encode(row) for row in ([x] if one else x)]
        if not rows:
            raise ValueError("x: got an empty list, takes at least one sequence")
        longest, limit = max(map(len, rows)), self.decoder.config.max_len
        if longest > limit or min(map(len, rows)) == 0:
            raise ValueError(f"x: got a sequence of {longest or 0} tokens, takes 1 to max_len = {limit}")
        ids = np.full((len(rows), limit), fill, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return torch.from_numpy(ids).to(self.decoder.device)


class SpikingDecoderModel(_Shim):
    """The fully spiking decoder: ``SpikingDecoderModel(config, dim_hid=16)``."""

    config_class = SDconfig


class PartiallySpikingDecoderModel(_Shim):
    """The partly spiking decoder: what spikes is set by `config.spike_degree`."""

    config_class = PSDconfig


class NonSpikingDecoderModel(_Shim):
    """The non-spiking baseline. `dropout` acts on its MLPs, the config's own on the attention; without a
    config, `dropout` is both."""

    config_class = NSDconfig

    def __init__(
        self,
        config: NSDconfig | None = None,
        *,
        dim_hid: int | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        if config is None:
            options["dropout"] = dropout
        super().__init__(config, dim_hid=dim_hid, mlp_dropout=dropout, **options)
