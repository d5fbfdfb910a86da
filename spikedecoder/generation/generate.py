"""Autoregressive generation of token ids: batches of prompts, streaming, predictions as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikedecoder.fields import is_integer
from spikedecoder.generation.batch import Batch, Continuation, Finish, GeneratedToken
from spikedecoder.generation.detokenize import TextStream
from spikedecoder.generation.native import open_source
from spikedecoder.generation.sampling import Prediction, SamplingParams, check_ids, fresh_seed, to_python
from spikedecoder.generation.window import LogitSource
from spikedecoder.model import check_model

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder


@dataclass
class GenerationResult:
    """What `generate` returns; each list has one entry per prompt.

    prompts: ids of the prompts. tokens: the new ids, including a stop token.
    predictions: for each new token the `top` most probable candidates, best first (empty lists if top=0).
    finish: "length" (max_new_tokens reached) or "stop". seed: pass it to get the same result again.
    completions: the text of each continuation, up to a stop string; an empty list from `generate` itself.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    predictions: list[list[list[Prediction]]]
    finish: list[Finish]
    seed: int
    completions: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> list[list[int]]:
        """The ids of each prompt and its continuation."""
        return [p + t for p, t in zip(self.prompts, self.tokens, strict=True)]


@dataclass
class Request:
    """The checked arguments of a generation."""

    sequences: list[Continuation]
    max_new_tokens: int
    suppress: list[int]
    source: LogitSource
    prompts: list[list[int]]
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
    past: str = "slide",
) -> GenerationResult:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
        model: used in evaluation mode, left in the mode it was in.
        prompts: lists of ids, which may differ in length, or a tensor [B, S] (or [S]). Each prompt gives the
            result that it gives alone. An empty one starts from `start_token(model)`.
        max_new_tokens: 0 or more.
        sampling: see `SamplingParams`; None: its defaults.
        stop: ids that end a sequence; None: none.
        top: how many predictions to keep for each new token.
        suppress: ids that are never generated; None: `suppressed_ids(model)`, ``()``: none.
        past: what to do with a sequence, prompt included, that gets longer than the context of max_len
            tokens. "slide": cut it to its last `keep` tokens, whose positions start from 0 again, and go on;
            this happens once every max_len - keep + 1 tokens. "continue": positions and state simply go on,
            nothing is cut, and no token costs more than the first. It needs spiking attention, static
            positions and no one-hot tokens, and a model that copes with longer contexts than it was trained
            on, because the sums of attention grow with the context.
        keep: for "slide" only; None: max_len // 2, at least 1.

    Raises ValueError or TypeError naming the argument.
    """
    request = prepare(
        model, prompts, max_new_tokens, sampling, stop=stop, top=top, suppress=suppress, keep=keep, past=past
    )
    return collect(request)


def stream(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    **options: Any,
) -> Iterator[GeneratedToken]:
    """Yield the tokens of `generate`, same arguments, as they are drawn: one per unfinished sequence a step.

    The arguments are checked at the call, not at the first token.
    """
    check_options("stream", options)
    return run(prepare(model, prompts, max_new_tokens, sampling, **options))


def generate_tensor(
    model: SpikeDecoder,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: SamplingParams,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    **options: Any,
) -> Tensor:
    """`generate` for a tensor: tokens [B, S] to [B, S + N] int64 on their device, N the longest continuation.

    A stop token is followed by pad tokens, or by itself if the model has no pad token.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or _is_real(tokens) or not len(tokens):
        got = (
            f"{tokens.dtype}, shape {tuple(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__
        )
        raise TypeError(f"tokens: got {got}, takes an int64 tensor [B, S] with B >= 1")
    sampling = replace(sampling, min_p=min_p, repetition_penalty=repetition_penalty)
    result = generate(model, tokens, max_new_tokens, sampling, **options)
    longest = max(map(len, result.tokens))
    pad = model.config.pad_id
    rows = [t + [t[-1] if pad is None else pad] * (longest - len(t)) if t else t for t in result.tokens]
    new = torch.tensor(rows, dtype=torch.int64, device=tokens.device).reshape(len(rows), longest)
    return torch.cat([tokens.to(torch.int64), new], dim=1)


def run(request: Request) -> Iterator[GeneratedToken]:
    if request.max_new_tokens == 0:
        return
    batch = Batch(request.source, request.suppress)
    batch.add(request.sequences)
    while batch:
        yield from batch.step()


def collect(request: Request) -> GenerationResult:
    n = len(request.prompts)
    result = GenerationResult(
        request.prompts, [[] for _ in range(n)], [[] for _ in range(n)], ["length"] * n, request.seed
    )
    texts = [""] * n
    for new in run(request):
        result.tokens[new.sequence].append(new.token)
        result.predictions[new.sequence].append(new.predictions)
        texts[new.sequence] += new.text
        if new.finish is not None:
            result.finish[new.sequence] = new.finish
    if any(c.text is not None for c in request.sequences):
        result.completions = texts
    return result


def start_token(model: SpikeDecoder) -> int:
    """The token that an empty prompt starts from: the model's or its tokenizer's pad token, else token 0."""
    pad = model.config.pad_id
    if pad is None and model.tokenizer is not None:
        pad = model.tokenizer.pad_id
    return 0 if pad is None else int(pad)


def suppressed_ids(model: SpikeDecoder, tokenizer: Any = None) -> list[int]:
    """Ids that stand for no text: padding, unknown, and any beyond the vocabulary of the tokenizer.

    tokenizer: None is the model's own.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    ids = {model.config.pad_id}
    if tokenizer is not None:
        ids |= {tokenizer.pad_id, tokenizer.unk_id, *range(tokenizer.vocab_size, model.config.vocab_size)}
    return sorted(i for i in ids if i is not None and i < model.config.vocab_size)


def check_options(function: str, options: dict[str, Any]) -> None:
    """TypeError for an option that `generate` does not have."""
    names = ("stop", "top", "suppress", "keep", "past")
    for name in options:
        if name not in names:
            raise TypeError(f"{function}: got an unknown argument {name!r}, takes {', '.join(names)}")


def prepare(
    model: SpikeDecoder,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    *,
    stop: Iterable[int] | int | None = None,
    top: int = 0,
    suppress: Iterable[int] | None = None,
    keep: int | None = None,
    past: str = "slide",
    texts: Sequence[TextStream] | None = None,
) -> Request:
    """Check `generate`'s arguments. `texts`: turn each sequence's tokens into text; None: no text."""
    model = check_model(model)
    vocabulary = model.config.vocab_size
    for name, value in (("max_new_tokens", max_new_tokens), ("top", top)):
        if not is_integer(value) or value < 0:
            raise ValueError(f"{name}: got {value!r}, takes an integer >= 0")
    sampling = SamplingParams() if sampling is None else sampling
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling: got {type(sampling).__name__}, takes SamplingParams")
    stop = to_python(stop)
    stop = () if stop is None else (stop,) if is_integer(stop) else stop
    ends = frozenset(check_ids("stop", stop, vocabulary))
    suppressed = suppressed_ids(model) if suppress is None else check_ids("suppress", suppress, vocabulary)
    if len(set(suppressed)) == vocabulary:
        raise ValueError(f"suppress: got all {vocabulary} tokens, takes fewer: none would be left")
    lists = _prompts(prompts, vocabulary)
    seed = fresh_seed() if sampling.seed is None else sampling.seed
    start = [start_token(model)]
    sequences = [
        Continuation(
            number=i,
            prompt=prompt or start,
            max_new_tokens=int(max_new_tokens),
            sampling=sampling,
            seed=seed + i,
            stop=ends,
            text=None if texts is None else texts[i],
            top=int(top),
        )
        for i, prompt in enumerate(lists)
    ]
    source = open_source(model, keep, past)
    return Request(sequences, max_new_tokens, suppressed, source, lists, seed)


def _prompts(prompts: Sequence[Sequence[int]] | Tensor, vocabulary: int) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2) or _is_real(prompts):
            raise TypeError(
                f"prompts: got a tensor of {prompts.dtype}, shape {tuple(prompts.shape)}, "
                "takes integers [B, S] or [S]"
            )
        prompts = torch.atleast_2d(prompts).tolist()
    untyped: Any = prompts
    several = isinstance(untyped, Iterable) and not isinstance(untyped, (str, bytes))
    found = list(untyped) if several else [untyped]
    for p in found:
        if isinstance(p, (str, bytes)) or not isinstance(p, Iterable):
            raise TypeError(
                f"prompts: got {type(p).__name__}, takes lists of token ids, one list per prompt; "
                "for text use generate_text"
            )
    if not found:
        raise ValueError("prompts: got none, takes at least one (an empty list of ids starts from nothing)")
    return [check_ids(f"prompts[{i}]", ids, vocabulary) for i, ids in enumerate(found)]


def _is_real(x: Tensor) -> bool:
    """Whether `x` holds floats or booleans instead of integers."""
    return x.is_floating_point() or x.dtype == torch.bool
