"""OpenAI's completions: the fields of a request, and the form of answers and errors."""

from __future__ import annotations

import json
import math
from reprlib import Repr
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema

from spikedecoder.generation.batch import GeneratedToken
from spikedecoder.generation.detokenize import TextStream
from spikedecoder.generation.sampling import SamplingParams

STOPS = 16  # stop strings in one request
STOP_LENGTH = 256  # characters of one
LOGPROBS = 5  # OpenAI's maximum

Token = Annotated[int, Field(ge=0)]
Prompt = str | list[str] | list[Token] | list[list[Token]]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """POST /v1/completions. top_k, min_p and repetition_penalty are additions to OpenAI's API."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # a Prompt, as `parse` checks: pydantic would try every entry of a long list as each of the four types
    prompt: Annotated[Any, WithJsonSchema(TypeAdapter(Prompt).json_schema())]
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=LOGPROBS)
    user: str | None = None  # accepted, without effect
    # OpenAI's fields that are not supported: only values that ask for nothing are accepted
    best_of: int | None = None
    suffix: str | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt."""
        p = self.prompt
        return [p] if isinstance(p, str) or (p and isinstance(p[0], int)) else p

    @property
    def stop_strings(self) -> list[str]:
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self) -> SamplingParams:
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


class ApiError(Exception):
    """An error for the client: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, type: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = type or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(error: Exception | str, param: str | None = None) -> ApiError:
    """An error with status 400. `param` is by default the field that the message begins with, as ours do."""
    message = str(error)
    name = message.partition(":")[0]
    if param is None and name in CompletionRequest.model_fields:
        param = name
    return ApiError(400, message, param)


def parse(body: bytes, most: int) -> CompletionRequest:
    """The request in a body; raises an ApiError that says what is wrong. most: prompts that it may have."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({error})") from None
    if isinstance(values, dict):
        _check_entries(values, most)
    try:
        request = CompletionRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        got = "" if first["type"] == "missing" else f", got {_short(first['input'])}"
        raise ApiError(400, f"{name or 'the body'}: {first['msg']}{got}", name) from None
    for name, nothing in _NOT_DONE.items():
        if getattr(request, name) not in (None, *nothing):
            raise bad_request(f"{name}: not supported by this server, leave it out")
    if request.logprobs is not None and request.echo:
        raise bad_request("logprobs: not supported together with echo, leave one out")
    strings = request.stop_strings
    if len(strings) > STOPS or any(not 1 <= len(s) <= STOP_LENGTH for s in strings):
        raise bad_request(f"stop: takes at most {STOPS} strings of 1 to {STOP_LENGTH} characters")
    if not request.prompts:
        raise bad_request("prompt: got an empty list, takes a string, or a list of at least one")
    return request


def _check_entries(values: dict[str, Any], most: int) -> None:
    """Raise at the first wrong entry; pydantic would make an error for each of them."""
    for name, value in values.items():
        if name not in CompletionRequest.model_fields:
            known = name[:64].encode(errors="replace").decode()  # JSON may hold lone surrogates
            raise bad_request(f"{_short(name)}: no such field", known)
        if name == "prompt":
            if isinstance(value, list) and len(value) > most and not isinstance(value[0], int):
                raise bad_request(f"prompt: got {len(value)} entries, takes at most {most} texts together")
            if not _is_prompt(value):
                raise bad_request(f"prompt: {_PROMPT}, got {_short(value)}")
        elif isinstance(value, list | dict) and len(value) > STOPS:
            raise bad_request(f"{name}: got {len(value)} entries, takes at most {STOPS}")


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    return all(isinstance(p, str) for p in value) or _are_tokens(value) or all(map(_are_tokens, value))


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


_PROMPT = "takes a string, a list of strings, a list of token ids, or a list of such lists"
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


def choice(
    index: int, text: str, finish: str | None, logprobs: dict[str, list[Any]] | None = None
) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}


class LogProbs:
    """OpenAI's "logprobs" of one choice: each token, and the `top` most probable ones in its place.

    They are natural logarithms of the model's own probabilities, at temperature 1, before any penalty or
    filter. A token's text is what it adds to the text before it; its offset is where that begins, in
    characters from the end of the prompt.
    """

    def __init__(self, text: TextStream, top: int) -> None:
        self.text, self.top, self.offset = text, top, 0

    def of(self, tokens: list[GeneratedToken]) -> dict[str, list[Any]]:
        """The "logprobs" object for the next tokens."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        told: dict[str, list[Any]] = {name: [] for name in names}
        for new in tokens:
            # the drawn token comes last, so that it replaces one with an equal text
            known = {self.text.piece(p.token): math.log(p.probability) for p in new.predictions}
            piece = self.text.take(new.token)
            told["tokens"].append(piece)
            told["token_logprobs"].append(new.logprob)
            told["top_logprobs"].append({**known, piece: new.logprob} if self.top else {})
            told["text_offset"].append(self.offset)
            self.offset += len(piece)
        return told


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


_REPR = Repr()
_REPR.maxstring = _REPR.maxlong = 60


def _short(value: Any) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
