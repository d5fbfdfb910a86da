"""Generation from text to text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from spikedecoder.generation.generate import GenerationResult, generate, stream, suppressed_ids
from spikedecoder.generation.sampling import SamplingParams

if TYPE_CHECKING:
    from spikedecoder.data import Tokenizer
    from spikedecoder.model import SpikeDecoder

ERRORS = ("strict", "replace", "drop")
_NAMED = 8  # how many unknown characters or words a message names


def encode_prompt(tokenizer: Tokenizer, prompt: str, errors: str = "strict") -> list[int]:
    """The ids of a prompt.

    errors: what to do with characters (or words) that are outside the vocabulary: "strict" raises a
        ValueError that names them, "replace" puts the unknown token (tokenizers without one drop them),
        "drop" leaves them out.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: got {type(prompt).__name__}, takes a str")
    if errors not in ERRORS:
        raise ValueError(f"errors: got {errors!r}, takes one of {', '.join(ERRORS)}")
    unknown = tokenizer.unknown(prompt) if errors == "strict" else []
    if unknown:
        what = "word" if "word" in tokenizer.kind else "character"
        named = ", ".join(map(repr, unknown[:_NAMED]))
        if len(unknown) > _NAMED:
            named += f" and {len(unknown) - _NAMED} more"
        raise ValueError(
            f"prompt: {len(unknown)} {what}(s) outside the model's vocabulary: {named}; "
            "errors 'drop' leaves them out, 'replace' puts the unknown token"
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
    errors: str = "strict",
    **options: Any,
) -> list[str]:
    """Each prompt, as the tokenizer reads it, and its continuation.

    tokenizer: None is the model's own. errors: see `encode_prompt`. The rest: see `SamplingParams` and
    `spikedecoder.generation.generate` (stop, suppress, keep). An empty prompt starts from nothing.
    """
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    tokenizer = _tokenizer(model, tokenizer)
    result = generate_result(model, tokenizer, prompts, max_new_tokens, sampling, errors=errors, **options)
    return [tokenizer.decode(ids) if ids else "" for ids in result.sequences]


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
    """`generate_text` with everything that was found out: ids, predictions, the seed."""
    tokenizer = _tokenizer(model, tokenizer)
    if isinstance(prompts, str):
        raise TypeError("prompts: got a str, takes a list of str")
    ids = [encode_prompt(tokenizer, prompt, errors) for prompt in prompts]
    options = _with_suppressed(model, tokenizer, options)
    return generate(model, ids, max_new_tokens, sampling, **options)


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
    errors: str = "strict",
    **options: Any,
) -> Iterator[str]:
    """The continuation of one prompt in pieces, as they come; the arguments are `generate_text`'s.

    The decoded prompt and the pieces joined equal `generate_text`'s result.
    """
    sampling = SamplingParams(temperature, top_k, top_p, seed)
    tokenizer = _tokenizer(model, tokenizer)
    ids = encode_prompt(tokenizer, prompt, errors)
    options = _with_suppressed(model, tokenizer, options)
    tokens = (new.token for new in stream(model, [ids], max_new_tokens, sampling, **options))
    return pieces(tokenizer, ids, tokens)


def pieces(tokenizer: Tokenizer, before: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text that each token adds behind the ids `before`."""
    # a token's text depends on its left neighbour at most (the space between two words)
    last = [i for i in before if i != tokenizer.pad_id][-1:]
    for token in tokens:
        if token == tokenizer.pad_id:
            yield ""
            continue
        yield tokenizer.decode([*last, token])[len(tokenizer.decode(last)) if last else 0 :]
        last = [token]


def _tokenizer(model: SpikeDecoder, tokenizer: Tokenizer | None) -> Tokenizer:
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(
            "tokenizer: got None, and the model has none of its own; takes the one of its training"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "takes the one it was trained with"
        )
    return tokenizer


def _with_suppressed(model: SpikeDecoder, tokenizer: Tokenizer, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("suppress") is None:
        return {**options, "suppress": suppressed_ids(model, tokenizer)}
    return options
