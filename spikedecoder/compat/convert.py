"""Load checkpoints of the original SpikeDecoder as models of this package, with the same weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikedecoder.checkpoint import CheckpointError, load_state
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.model import SpikeDecoder

KINDS = ("spiking", "partial", "nonspiking")
_NORMS = {"layer": "layer", "batch": "batch", "PowerNorm": "power"}


# --- configuration -------------------------------------------------------------------------------


def _spiking(
    vocab_size: int,
    max_len: int,
    encodingType: str = "two-hot",
    position_encoding_strategy: str = "linear",
    tok_embed_dim: int = 30,
    pos_embed_dim: int = 30,
    attn_dropout: float = 0.0,
    mlp_dropout: float = 0.0,
    heads: int = 2,
    blocks: int = 1,
    spiking_residuals: int = 0,
    spiking_head: bool = True,
    timesteps: int = 2,
    attention_scale: float = 0.125,
    normalization: str = "layer",
    combine_position: bool = False,
    firstBlock_spiking_res: bool = False,
    spike_mode: str = "average",
    pos_bias: float = 0.0,
    float_reunite: bool = False,
    float_embedding: bool = False,
    learning_MSLIF: bool = False,
) -> dict[str, Any]:
    """Arguments of the original's SDconfig -> fields of our config."""
    learned = encodingType == "learned"
    # the original applied it only to learned positions beside tokens that are not learned
    floats = (
        float_embedding and encodingType in ("two-hot", "binary") and position_encoding_strategy == "learned"
    )
    return {
        "vocab_size": vocab_size,
        "max_len": max_len,
        "token_encoding": encodingType,
        "position_encoding": position_encoding_strategy,
        "token_dim": tok_embed_dim,
        "position_dim": tok_embed_dim if combine_position else pos_embed_dim,
        "combine_position": combine_position and learned,
        "position_bias": pos_bias,
        "float_embedding": floats,
        "attention_dropout": attn_dropout,
        "mlp_dropout": mlp_dropout,
        "heads": heads,
        "blocks": blocks,
        "spiking_residuals": spiking_residuals,
        "spiking_head": spiking_head,
        "timesteps": timesteps,
        "attention_scale": attention_scale,
        "norm": _NORMS.get(normalization, normalization),
        "first_block_residual_lif": firstBlock_spiking_res,
        "reunite": spike_mode,
        "float_reunite": float_reunite,
        "learn_threshold": learning_MSLIF,
    }


def _partial(
    vocab_size: int,
    max_len: int,
    spike_degree: int = 0,
    spiking_head: bool = False,
    SMHA_only: bool = False,
    attention_scale: float = 0.125,
    **spiking: Any,
) -> dict[str, Any]:
    """The same for PSDconfig. `attention_scale` is ignored, because the original never passed it on."""
    fields = _spiking(vocab_size, max_len, spiking_head=spiking_head or spike_degree == 4, **spiking)
    fields.update(spike_degree=spike_degree, attention_only=SMHA_only)
    if spike_degree < 2 or SMHA_only:
        fields.update(spiking_head=None, float_reunite=False)
    if spike_degree == 0 or SMHA_only:
        width = SpikeDecoderConfig.from_dict({**fields, "spike_degree": 1, "attention_only": False}).embed_dim
        fields.update(
            token_encoding="learned",
            position_encoding="static",
            token_dim=width,
            combine_position=True,
            float_embedding=False,
        )
    return fields


def _nonspiking(
    vocab_size: int,
    max_len: int,
    embed_dim: int = 8,
    dropout: float = 0.0,
    heads: int = 2,
    blocks: int = 1,
    normalization: str = "layer",
    learned_embedding: bool = False,
) -> dict[str, Any]:
    """The same for NSDconfig."""
    return {
        "vocab_size": vocab_size,
        "max_len": max_len,
        "spike_degree": 0,
        "token_encoding": "learned",
        "position_encoding": "learned" if learned_embedding else "static",
        "token_dim": embed_dim,
        "combine_position": True,
        "attention_dropout": dropout,
        "heads": heads,
        "blocks": blocks,
        "norm": _NORMS.get(normalization, normalization),
    }


_CONFIGS: dict[str, Callable[..., dict[str, Any]]] = {
    "spiking": _spiking,
    "partial": _partial,
    "nonspiking": _nonspiking,
}
_IRRELEVANT = ("device", "track_frequency")


def original_config(kind: str, options: Mapping[str, Any], dim_hid: int | None = None) -> SpikeDecoderConfig:
    """Our config for the original's keyword arguments.

    kind: "spiking" (SDconfig), "partial" (PSDconfig) or "nonspiking" (NSDconfig).
    options: by the original's names. `dictionary` (a list of words) sets the vocabulary's size; `device` and
        `track_frequency` are ignored.
    dim_hid: the MLP's hidden width in multiples of E, as passed to the original's model; None is 4.

    Raises ValueError: an unknown kind or option, vocab_size or max_len missing, a value out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, takes one of {', '.join(KINDS)}")
    options = {k: v for k, v in options.items() if k not in _IRRELEVANT}
    dictionary = options.pop("dictionary", None)
    if dictionary is not None:
        if not isinstance(dictionary, (Sequence, Mapping)):
            raise ValueError(f"dictionary: got {dictionary!r}, takes a list of words")
        options["vocab_size"] = len(dictionary)
    for name, value in options.items():
        if not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{name}: got {value!r}, takes one value")
    if dim_hid is None:
        dim_hid = 4
    if not isinstance(dim_hid, int) or isinstance(dim_hid, bool) or dim_hid < 1:
        raise ValueError(f"dim_hid: got {dim_hid!r}, takes an integer of 1 or more")
    known = _option_names(kind)
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r} of a {kind} model; known: {', '.join(known)}")
    for name in ("vocab_size", "max_len"):
        if name not in options:
            raise ValueError(f"{name}: missing among the options, and the original has no default for it")
    fields = _CONFIGS[kind](**options)
    original = {
        "binary_code": "left-aligned",
        "learn_positions": kind == "nonspiking",
        "mlp_ratio": dim_hid,
    }
    return SpikeDecoderConfig.from_dict({**fields, **original})


def _option_names(kind: str) -> tuple[str, ...]:
    names = list(inspect.signature(_CONFIGS[kind]).parameters)
    if kind == "partial":
        names = names[:-1] + [n for n in inspect.signature(_spiking).parameters if n not in names]
    return tuple(names)


# --- weights -------------------------------------------------------------------------------------

_PREFIXES = (
    ("embedder.tok_embed.", "embedding.token."),
    ("embedder.token_embedding_table.", "embedding.token."),
    ("embedder.pos_table.", "embedding.position."),
    ("embedder.positional_encoding.", "embedding.position."),
    ("Head.gen_FC.", "head.linear."),
    ("Head.gen_LIF.", "head.lif."),
)
_BLOCK = {"SMHA_LIF": "input_lif", "resLIF": "residual_lif", "resLif": "residual_lif", "blockLIF": "sum_lif"}
_ATTENTION = {
    **{f"{long}_{part}": f"{short}.{ours}"
       for long, short in (("query", "q"), ("key", "k"), ("value", "v"))
       for part, ours in (("L", "linear"), ("Norm", "norm"), ("LIF", "lif"))},
    "input_LIF": "input_lif",
    "output_LIF": "output_lif",
    "att_LIF": "attention_lif.lif",
    "proj_L": "proj.linear",
    "proj_Norm": "proj.norm",
    "proj_N": "proj.norm",  # older checkpoints
}  # fmt: skip
# by index in the original's nn.Sequential; with spiking residuals it lacks the first, and indices are 1 less
_SPIKING_MLP = {0: "input_lif", 2: "fc1.linear", 3: "fc1.norm", 5: "fc1.lif", 7: "fc2.linear", 8: "fc2.norm"}
_MLP = {0: "fc1", 2: "fc2"}
# masks are constants; proj_LIF is never called
_UNUSED = re.compile(r"(^|\.)(mask|proj_LIF\.v_threshold)$")


def rename(name: str, config: SpikeDecoderConfig) -> str | None:
    """Our name of the original's parameter or buffer `name`; None if no forward pass uses it.

    Raises CheckpointError if `name` is not one of the original's.
    """
    if _UNUSED.search(name) or (
        name.startswith("embedder.pos_table.") and config.token_encoding == "one-hot"
    ):
        return None
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name)
    if match is None:
        raise CheckpointError(f"{name}: not a name of the original's")
    block, part, rest = f"blocks.{match[1]}.", match[2], match[3]
    if part in _BLOCK:
        return f"{block}{_BLOCK[part]}.{rest}"
    if part in ("SMHA", "NSMHA"):
        layer, _, leaf = rest.partition(".")
        if layer in _ATTENTION:
            return f"{block}attention.{_ATTENTION[layer]}.{leaf.removeprefix('1.')}"
    match = re.fullmatch(r"net\.(\d+)\.(?:1\.)?(\w+)", rest)
    if part in ("MLP", "NSMLP") and match is not None:
        place, leaf = int(match[1]), match[2]
        if not config.spiking_mlp:
            return f"{block}mlp.{_MLP[place]}.{leaf}" if place in _MLP else None
        residual_spikes = config.spiking_residuals > 0
        ours = _SPIKING_MLP.get(place + residual_spikes, "output_lif" if residual_spikes else None)
        if ours is not None:
            return f"{block}mlp.{ours}.{leaf}"
    raise CheckpointError(f"{name}: not a name of the original's")


def rename_tensors(tensors: Mapping[str, Tensor], config: SpikeDecoderConfig) -> dict[str, Tensor]:
    """The original's tensors, weights or gradients, under our names and in our shapes.

    Tensors that no forward pass uses are left out. PowerNorm's [1, C, 1, 1] becomes [C]. A position table
    longer than the context (the original sized one by its vocabulary) loses the rows that are never read.
    """
    renamed = {}
    for name, tensor in tensors.items():
        ours = rename(name, config)
        if ours is None:
            continue
        leaf = ours.rpartition(".")[2]
        if tensor.layout != torch.strided:
            pass  # left for `load_state` to refuse
        elif leaf in ("running_phi", "ema_gz"):
            tensor = tensor.reshape(-1)
        elif leaf == "iters" and tensor.numel() == 1:
            tensor = tensor.reshape(())
        elif ours == "embedding.position.weight" and tensor.dim() == 2:
            tensor = tensor[: config.max_len]
        renamed[ours] = tensor
    return renamed


def convert_original(
    source: str | Path | Mapping[str, Tensor],
    options: Mapping[str, Any] | None = None,
    *,
    kind: str | None = None,
    dim_hid: int | None = None,
) -> SpikeDecoder:
    """The model in a checkpoint of the original, in evaluation mode.

    Args:
        source: a ``.pt`` file, which is read with ``weights_only=True``, or its state dict.
        options: the original's keyword arguments (of SDconfig, PSDconfig or NSDconfig). None: from the
            ``*_log.txt`` that the original writes beside its checkpoint.
        kind: "spiking", "partial" or "nonspiking"; None: from the log, else guessed from the names of the
            options and tensors.
        dim_hid: hidden width of the MLP in multiples of E; None: from the tensors' shapes.

    Raises CheckpointError if the source is not a checkpoint of the original or the tensors contradict the
    options, ValueError if options are missing or unknown.
    """
    where = "source" if isinstance(source, Mapping) else source
    tensors = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    if not tensors or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()):
        raise CheckpointError(f"{where}: got no state dict of tensors")
    if options is None:
        if isinstance(source, Mapping):
            raise ValueError("options: missing; takes the original's keyword arguments")
        log_kind, options = _read_log(Path(source))
        kind = kind or log_kind
    kind = kind or _guess_kind(tensors, options)
    config = original_config(kind, options, _ratio(tensors) if dim_hid is None else dim_hid)
    model = SpikeDecoder(config)
    try:
        renamed = rename_tensors(tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    load_state(model, renamed, where)
    return model.eval()


def _read(path: Path) -> dict[Any, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch's reader may fail anywhere in a file of another kind
        # an empty file gives no message; torch's second sentence tells how to run foreign code
        reason = (str(error) or "nothing in it").splitlines()[0].partition(". ")[0]
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint of tensors alone, or truncated ({reason})"
        ) from None
    return state if isinstance(state, dict) else {}


def _ratio(tensors: Mapping[str, Tensor]) -> int | None:
    for name, tensor in tensors.items():
        is_layer = re.fullmatch(r"blocks\.0\.(NS)?MLP\.net\.\d+\.weight", name)
        if is_layer and tensor.dim() == 2 and tensor.numel():
            return tensor.shape[0] // tensor.shape[1] or None
    return None


def _guess_kind(tensors: Iterable[str], options: Mapping[str, Any]) -> str:
    if "spike_degree" in options or "SMHA_only" in options:
        return "partial"
    if "embed_dim" in options or any("token_embedding_table" in name for name in tensors):
        return "nonspiking"
    return "spiking"


_LOG = {
    "vocab_size": r"vocab size (\d+)",
    "max_len": r"max length (\d+)",
    "blocks": r"number of blocks (\d+)",
    "heads": r"number of heads (\d+)",
    "spike_degree": r"spike degree (\d+)",
    "encodingType": r"token embedding of type ([\w-]+)",
    "position_encoding_strategy": r"position encoding strategy (\w+)",
    "spiking_residuals": r"spiking residuals set to (\d+)",
    "spiking_head": r"spiking head set to (\w+)",
    "tok_embed_dim": r"token embedding dimension set to (\d+)",
    "pos_embed_dim": r"position embedding dimension \(if applicable\) set to (\d+)",
    "embed_dim": r"^\s*embedding dimension (\d+)",
    "timesteps": r"number of timesteps (\d+)",
    "attention_scale": r"self attention scaling with ([\d.e+-]+)",
    "SMHA_only": r"SMHA only set to (\w+)",
    "normalization": r"normalization of type (\w+)",
    "combine_position": r"[Cc]ombine [Pp]osition set to (\w+)",
    "firstBlock_spiking_res": r"first Block spiking residual is set to (\w+)",
    "spike_mode": r"spike mode set to (\w+)",
    "pos_bias": r"static position encoding bias set to ([\d.e+-]+)",
    "float_reunite": r"float reunion set to (\w+)",
    "float_embedding": r"float embedding set to (\w+)",
    "learning_MSLIF": r"learning MSLIF set to (\w+)",
    "learned_embedding": r"learned embedding set to (\w+)",
}
_LOG_KINDS = {"SD": "spiking", "PSD": "partial", "NSD": "nonspiking"}


def _read_log(checkpoint: Path) -> tuple[str, dict[str, Any]]:
    """Kind and options from the log that the original writes beside a checkpoint."""
    path = checkpoint.with_name(re.sub(r"(_?state_dict)?\.pt$", "_log.txt", checkpoint.name))
    if path == checkpoint:
        raise CheckpointError(f"{path}: does not end in .pt, as a checkpoint of the original's does")
    if not path.is_file():
        raise ValueError(
            f"options: missing, and there is no {path.name} beside the checkpoint to read them from; give "
            "the original's keyword arguments, on the command line with --options FILE or --set KEY=VALUE"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    kind = re.match(r"\s*(\w+) config", text)
    if kind is None or kind[1] not in _LOG_KINDS:
        raise CheckpointError(f"{path}: not a log of the original's")
    options = {}
    for name, pattern in _LOG.items():
        match = re.search(pattern, text, re.MULTILINE)
        if match is not None:
            options[name] = _value(match[1].rstrip("."))
    return _LOG_KINDS[kind[1]], options


def _value(word: str) -> Any:
    if word in ("True", "False"):
        return word == "True"
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return word
