"""Autoregressive generation of token ids: batches of prompts, streaming, the predictions as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spikedecoder.generation.recurrent import Recurrent
from spikedecoder.generation.sampling import (
    Prediction,
    SamplingParams,
    fresh_seed,
    generators,
    sample,
    top_predictions,
)
from spikedecoder.generation.window import LogitSource

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder

Finish = Literal["length", "stop"]


@dataclass(frozen=True)
class GeneratedToken:
    """One token as it comes: which sequence it continues, its id, what else was probable.

    `finish` is None while the sequence goes on, "length" or "stop" on its last token.
    """

    sequence: int
    token: int
    predictions: list[Prediction]
    finish: Finish | None = None


@dataclass
class GenerationResult:
    """What `generate` returns; one entry per prompt everywhere.

    prompts: the prompts as read. tokens: the new ids, a stop token included.
    predictions: for each new token the `top` most probable candidates, best first (empty lists if top=0).
    finish: "length" (max_new_tokens reached) or "stop". seed: what to pass to get the same again.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    predictions: list[list[list[Prediction]]]
    finish: list[Finish]
    seed: int

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and continuation."""
        return [p + t for p, t in zip(self.prompts, self.tokens, strict=True)]


@dataclass
class _Request:
    """The checked arguments of a generation."""

    model: SpikeDecoder
    prompts: list[list[int]]
    max_new_tokens: int
    sampling: SamplingParams
    stop: frozenset[int]
    top: int
    suppress: Tensor
    source: LogitSource
    seed: int


def generate(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    *,
    stop: Iterable[int] | int | None = None,
    top: int = 0,
    suppress: Iterable[int] | None = None,
    keep: int | None = None,
) -> GenerationResult:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
        model: used in evaluation mode, left in the mode it was in.
        prompts: lists of ids, of unequal lengths if need be, or a tensor [B, S] (or [S]). Each gives the
            result it gives alone. An empty one starts from `start_token(model)`.
        sampling: see `SamplingParams`; None is its default.
        stop: ids that end a sequence.
        top: how many predictions to keep for each new token.
        suppress: ids that are never generated; None: `suppressed_ids(model)`, ``()``: none.
        keep: a sequence longer than the context (max_len tokens), prompt or not, is cut to its last `keep`
            tokens, whose positions start from 0, and grows from there; default max_len // 2. So any length
            can be generated, and the cut comes once in max_len - keep tokens.

    Raises ValueError or TypeError naming the argument.
    """
    request = _request(model, prompts, max_new_tokens, sampling, stop, top, suppress, keep)
    n = len(request.prompts)
    result = GenerationResult(
        request.prompts, [[] for _ in range(n)], [[] for _ in range(n)], ["length"] * n, request.seed
    )
    for new in _run(request):
        result.tokens[new.sequence].append(new.token)
        result.predictions[new.sequence].append(new.predictions)
        if new.finish is not None:
            result.finish[new.sequence] = new.finish
    return result


def stream(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    **options: Any,
) -> Iterator[GeneratedToken]:
    """The tokens of `generate`, same arguments, as they come: one per unfinished sequence at each step."""
    defaults: dict[str, Any] = {"stop": None, "top": 0, "suppress": None, "keep": None}
    for name in options:
        if name not in defaults:
            raise TypeError(f"stream: got an unknown argument {name!r}, takes {', '.join(defaults)}")
    # checked here, at the call, not at the first token
    return _run(_request(model, prompts, max_new_tokens, sampling, **{**defaults, **options}))


def generate_tensor(
    model: SpikeDecoder, tokens: Tensor, max_new_tokens: int, sampling: SamplingParams, **options: Any
) -> Tensor:
    """`generate` for tokens [B, S]: [B, S + N] int64 on their device, N the longest continuation.

    Behind a stop token stand pad tokens (where the model has none: the stop token again).
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens: got {got}, takes an int64 tensor [B, S]")
    result = generate(model, tokens, max_new_tokens, sampling, **options)
    longest = max(map(len, result.tokens))
    pad = model.config.pad_id
    rows = [t + [t[-1] if pad is None else pad] * (longest - len(t)) if t else t for t in result.tokens]
    new = torch.tensor(rows, dtype=torch.int64, device=tokens.device).reshape(len(rows), longest)
    return torch.cat([tokens.to(torch.int64), new], dim=1)


def _run(r: _Request) -> Iterator[GeneratedToken]:
    if r.max_new_tokens == 0:
        return
    start = [start_token(r.model)]
    logits = r.source.start([prompt or start for prompt in r.prompts])
    rows = list(range(len(r.prompts)))
    rngs = generators(r.seed, len(rows))
    for step in range(1, r.max_new_tokens + 1):
        ids = sample(logits, r.sampling, [rngs[i] for i in rows], r.suppress)[0].tolist()
        best = top_predictions(logits, r.top, r.suppress) if r.top else [[] for _ in rows]
        going = [i for i, token in enumerate(ids) if token not in r.stop]
        for row, token, predictions in zip(rows, ids, best, strict=True):
            finish: Finish | None = "length" if step == r.max_new_tokens else None
            yield GeneratedToken(row, token, predictions, "stop" if token in r.stop else finish)
        if not going or step == r.max_new_tokens:
            return
        if len(going) < len(rows):
            r.source.select(going)
            rows = [rows[i] for i in going]
        logits = r.source.step([ids[i] for i in going])


def start_token(model: SpikeDecoder) -> int:
    """What an empty prompt starts from: the pad token, or token 0 where there is none."""
    pad = model.config.pad_id
    if pad is None and model.tokenizer is not None:
        pad = model.tokenizer.pad_id
    return 0 if pad is None else int(pad)


def suppressed_ids(model: SpikeDecoder, tokenizer: Any = None) -> list[int]:
    """Ids that stand for no text: padding, unknown, and what lies beyond the tokenizer's vocabulary."""
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    ids = {model.config.pad_id}
    if tokenizer is not None:
        ids |= {tokenizer.pad_id, tokenizer.unk_id, *range(tokenizer.vocab_size, model.config.vocab_size)}
    return sorted(i for i in ids if i is not None and i < model.config.vocab_size)


def _request(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: SamplingParams | None,
    stop: Iterable[int] | int | None,
    top: int,
    suppress: Iterable[int] | None,
    keep: int | None,
) -> _Request:
    vocabulary = model.config.vocab_size
    for name, value in (("max_new_tokens", max_new_tokens), ("top", top)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}: got {value!r}, takes an integer >= 0")
    sampling = SamplingParams() if sampling is None else sampling
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling: got {type(sampling).__name__}, takes SamplingParams")
    stop = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    suppressed = suppressed_ids(model) if suppress is None else list(suppress)
    _check_ids("stop", stop, vocabulary)
    _check_ids("suppress", suppressed, vocabulary)
    if len(set(suppressed)) == vocabulary:
        raise ValueError(f"suppress: got all {vocabulary} tokens, takes fewer: none would be left")
    return _Request(
        model=model,
        prompts=_prompts(prompts, vocabulary),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=frozenset(stop),
        top=top,
        suppress=torch.tensor(suppressed, dtype=torch.int64, device=model.device),
        source=Recurrent(model, keep),
        seed=fresh_seed() if sampling.seed is None else sampling.seed,
    )


def _prompts(prompts: Sequence[Sequence[int]] | Tensor, vocabulary: int) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2) or prompts.is_floating_point() or prompts.dtype == torch.bool:
            raise TypeError(
                f"prompts: got a tensor of {prompts.dtype}, shape {tuple(prompts.shape)}, "
                "takes integers [B, S] or [S]"
            )
        prompts = torch.atleast_2d(prompts).tolist()
    untyped: Any = prompts
    if isinstance(untyped, (str, bytes)) or any(isinstance(p, (str, bytes, int)) for p in untyped):
        raise TypeError("prompts: takes lists of token ids, one list per prompt; for text use generate_text")
    lists = [p.tolist() if hasattr(p, "tolist") else list(p) for p in prompts]
    if not lists:
        raise ValueError("prompts: got none, takes at least one (an empty list of ids starts from nothing)")
    for i, ids in enumerate(lists):
        _check_ids(f"prompts[{i}]", ids, vocabulary)
    return lists


def _check_ids(name: str, ids: Sequence[int], vocabulary: int) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"{name}: got {token!r}, takes integers")
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name}: got token {token}, takes 0 to {vocabulary - 1}")
