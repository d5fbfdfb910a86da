"""Generation from text to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from spikedecoder.fields import is_integer
from spikedecoder.generation.batch import GeneratedToken
from spikedecoder.generation.detokenize import TextStream, check_stop_strings
from spikedecoder.generation.generate import (
    GenerationResult,
    Request,
    check_options,
    collect,
    prepare,
    run,
    suppressed_ids,
)
from spikedecoder.generation.sampling import SamplingParams, to_python
from spikedecoder.model import check_model

if TYPE_CHECKING:
    from spikedecoder.data import Tokenizer
    from spikedecoder.model import SpikeDecoder

ERRORS = ("strict", "replace", "drop")
_WAY_OUT = "errors 'drop' leaves them out, 'replace' puts the unknown token"
_NAMED = 8  # how many unknown characters or words a message names


def named(unknown: Sequence[str]) -> str:
    """The first of these characters or words, and how many more there are."""
    more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
    return ", ".join(map(repr, unknown[:_NAMED])) + more


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    errors: str = "strict",
    name: str = "prompt",
    way_out: str = _WAY_OUT,
) -> list[int]:
    """The ids of a prompt.

    errors: what to do with characters or words outside the vocabulary: "strict" raises a ValueError that
        names them, "replace" puts the unknown token (tokenizers without one drop them), "drop" leaves them
        out.
    name: what messages call the prompt. way_out: the end of the message: what the user can do about it.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{name}: got {type(prompt).__name__}, takes a str")
    if errors not in ERRORS:
        raise ValueError(f"errors: got {errors!r}, takes one of {', '.join(ERRORS)}")
    unknown = tokenizer.unknown(prompt) if errors == "strict" else []
    if unknown:
        what = "word" if "word" in tokenizer.kind else "character"
        raise ValueError(
            f"{name}: {len(unknown)} {what}(s) outside the model's vocabulary: {named(unknown)}; {way_out}"
        )
    return [int(i) for i in tokenizer.encode(prompt, errors="replace" if errors == "strict" else errors)]


def generate_text(
    model: SpikeDecoder,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | int | Iterable[str | int] | None = None,
    errors: str = "strict",
    **options: Any,
) -> list[str]:
    """Continue each prompt; returns each, as the tokenizer reads it, followed by its continuation.

    tokenizer: None: the model's own. max_new_tokens: for each prompt. errors: see `encode_prompt`.
    stop: strings or token ids that end a text. Stop strings are looked for in the continuation only, across
    the borders of tokens, and are not part of the result (see `TextStream`). The other arguments: see
    `SamplingParams` and `spikedecoder.generation.generate` (suppress, keep, past). An empty prompt starts
    from nothing.

    Raises TypeError or ValueError naming the argument.
    """
    sampling = SamplingParams(temperature, top_k, top_p, seed, min_p, repetition_penalty)
    tokenizer = own_tokenizer(model, tokenizer)
    result = generate_result(
        model, tokenizer, prompts, max_new_tokens, sampling, errors=errors, stop=stop, **options
    )
    return [
        (tokenizer.decode(ids) if ids else "") + new
        for ids, new in zip(result.prompts, result.completions, strict=True)
    ]


def generate_result(
    model: SpikeDecoder,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingParams,
    *,
    errors: str = "strict",
    **options: Any,
) -> GenerationResult:
    """Like `generate_text`, but returns everything: ids, predictions, texts and the seed."""
    if isinstance(prompts, str):
        raise TypeError("prompts: got a str, takes a list of str")
    if not isinstance(prompts, Iterable):
        raise TypeError(f"prompts: got {type(prompts).__name__}, takes a list of str")
    tokenizer = own_tokenizer(model, tokenizer)
    ids = [encode_prompt(tokenizer, prompt, errors) for prompt in prompts]
    return collect(prepare_text(model, tokenizer, ids, max_new_tokens, sampling, **options))


def stream_text(
    model: SpikeDecoder,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    errors: str = "strict",
    **options: Any,
) -> Iterator[str]:
    """Yield the continuation of one prompt in pieces, as they are drawn; arguments as in `generate_text`.

    One piece per token, empty while the text may be the beginning of a stop string. The decoded prompt and
    the pieces, joined, are the result of `generate_text`.
    """
    sampling = SamplingParams(temperature, top_k, top_p, seed, min_p, repetition_penalty)
    tokenizer = own_tokenizer(model, tokenizer)
    ids = encode_prompt(tokenizer, prompt, errors)
    events = stream_tokens(model, tokenizer, ids, max_new_tokens, sampling, **options)
    return (new.text for new in events)


def stream_tokens(
    model: SpikeDecoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    sampling: SamplingParams,
    **options: Any,
) -> Iterator[GeneratedToken]:
    """`stream` for one prompt of ids; each token comes with its text."""
    return run(prepare_text(model, tokenizer, [prompt], max_new_tokens, sampling, **options))


def prepare_text(
    model: SpikeDecoder,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    *,
    stop: str | int | Iterable[str | int] | None = None,
    **options: Any,
) -> Request:
    """A checked request whose tokens become text; `stop`: strings or token ids."""
    check_options("generate_text", options)
    stop = to_python(stop)
    stop = [] if stop is None else [stop] if isinstance(stop, str) or is_integer(stop) else stop
    if not isinstance(stop, Iterable):
        raise TypeError(f"stop: got {type(stop).__name__}, takes strings or token ids")
    stop = list(stop)
    ids = [s for s in stop if is_integer(s)]
    others: list[Any] = [s for s in stop if not is_integer(s)]
    strings = check_stop_strings(others)
    if options.get("suppress") is None:
        options["suppress"] = suppressed_ids(model, tokenizer)
    texts = [TextStream(tokenizer, prompt, strings) for prompt in prompts]
    return prepare(model, prompts, max_new_tokens, sampling, stop=ids, texts=texts, **options)


def own_tokenizer(model: SpikeDecoder, tokenizer: Tokenizer | None) -> Tokenizer:
    model = check_model(model)
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(
            "tokenizer: got None, and the model has none of its own; takes the one of its training"
        )
    if not hasattr(tokenizer, "vocab_size"):
        raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, takes a Tokenizer")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "takes the one it was trained with"
        )
    return tokenizer
