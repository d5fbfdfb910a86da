"""The web application: OpenAI's completions over an `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Collection, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from spikedecoder.generation.batch import Continuation, GeneratedToken
from spikedecoder.generation.detokenize import TextStream
from spikedecoder.generation.generate import start_token
from spikedecoder.generation.sampling import check_ids, fresh_seed
from spikedecoder.generation.text import encode_prompt, own_tokenizer
from spikedecoder.serve.engine import Engine, EngineError, QueueFull, Stopping
from spikedecoder.serve.protocol import (
    ApiError,
    CompletionRequest,
    LogProbs,
    bad_request,
    choice,
    parse,
    usage,
)

BODY = 4 * 2**20  # most bytes of a request's body
BODIES = 64 * 2**20  # most bytes of all bodies that are being received
UPLOAD = 30.0  # most seconds to receive a body
DEFAULT_TOKENS = 16  # OpenAI's
# At least so many seconds between two events of a stream. If tokens come faster than anybody reads, one event
# per token would cost more than the token. All streams send at the same moments: the loop wakes once for all.
PAUSE = 0.05
_WAY_OUT = "a server that was started with --errors drop leaves them out"

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for, in tokens per text. errors: see `encode_prompt`."""

    max_tokens: int = 4096
    prompt_tokens: int = 4096
    errors: str = "strict"


class Completion:
    """One request in progress: its sequences, and the tokens that the engine delivers."""

    def __init__(self, engine: Engine, limits: Limits, name: str, request: CompletionRequest) -> None:
        self.engine, self.name, self.request = engine, name, request
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.tokenizer = own_tokenizer(engine.model, None)
        n, asked = request.n or 1, len(request.prompts)
        if n * asked > engine.max_batch:  # before encoding the prompts, which would hold up all streams
            raise bad_request(
                f"n: got {n} for {asked} prompts, takes at most {engine.max_batch} texts together"
            )
        self.prompts = [self._encode(p, limits) for p in request.prompts]
        most = limits.max_tokens
        wanted = min(DEFAULT_TOKENS, most) if request.max_tokens is None else request.max_tokens
        if wanted > most:
            raise bad_request(f"max_tokens: got {wanted}, takes at most {most}")
        sampling = request.sampling()
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        start = [start_token(engine.model)]
        self.sequences = [
            Continuation(
                number=next(engine.numbers),
                prompt=prompt or start,
                max_new_tokens=wanted,
                sampling=sampling,
                seed=seed + index,
                text=TextStream(self.tokenizer, prompt, request.stop_strings),
                top=request.logprobs or 0,
                logprob=request.logprobs is not None,
            )
            for index, prompt in enumerate(p for p in self.prompts for _ in range(n))
        ]
        self.index = {c.number: i for i, c in enumerate(self.sequences)}
        self.logprobs = [
            None
            if request.logprobs is None
            else LogProbs(TextStream(self.tokenizer, prompt), request.logprobs)
            for prompt in self.prompts
            for _ in range(n)
        ]
        self.open = set(self.index)
        self.tokens = 0
        self._loop = asyncio.get_running_loop()
        self._heard: deque[list[GeneratedToken] | EngineError] = deque()
        self._something, self._end, self._told = asyncio.Event(), asyncio.Event(), False

    def _encode(self, prompt: str | list[int], limits: Limits) -> list[int]:
        try:
            if isinstance(prompt, str):
                ids = encode_prompt(self.tokenizer, prompt, limits.errors, way_out=_WAY_OUT)
            else:
                ids = prompt
            if len(ids) > limits.prompt_tokens:
                message = f"prompt: got {len(ids)} tokens, takes at most {limits.prompt_tokens}"
                raise ApiError(400, message, "prompt", "context_length_exceeded")
            check_ids("prompt", ids, self.tokenizer.vocab_size)
        except ValueError as error:
            raise bad_request(error) from None
        return ids

    def submit(self) -> None:
        def hear(heard: list[GeneratedToken] | EngineError) -> None:
            self._heard.append(heard)
            ends = isinstance(heard, EngineError) or any(token.finish is not None for token in heard)
            if self._told and not ends:  # `news` will look without being woken again
                return
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody listens
                self._loop.call_soon_threadsafe(self._wake, ends)

        try:
            self.engine.submit(self.sequences, hear)
        except QueueFull as error:
            raise ApiError(
                429, f"too many requests: {error}", code="queue_full", type="rate_limit_error"
            ) from None
        except Stopping as error:
            raise ApiError(503, str(error), code="stopping") from None

    def _wake(self, ends: bool) -> None:
        self._something.set()
        if ends:
            self._end.set()

    def release(self) -> None:
        """Free the places in the engine: the client has gone, or has got everything."""
        if self.open:
            self.engine.cancel(self.open)
            self.open = set()

    async def news(self) -> AsyncIterator[list[tuple[int, str, str | None, dict[str, Any] | None]]]:
        """Yield (index, text, finish, logprobs) for each choice with new tokens since the last time."""
        while self.open:
            if not self._heard:
                self._told = False  # tokens that come from here on wake this loop
                if not self._heard:
                    await self._something.wait()
            self._something.clear()
            heard = [self._heard.popleft() for _ in range(len(self._heard))]
            if not heard:
                continue
            new: dict[int, list[GeneratedToken]] = {}
            for tokens in heard:
                if isinstance(tokens, EngineError):
                    self.open = set()
                    raise tokens
                for token in tokens:
                    new.setdefault(token.sequence, []).append(token)
                    self.tokens += 1
                    if token.finish is not None:
                        self.open.discard(token.sequence)
            yield [self._new(self.index[number], tokens) for number, tokens in new.items()]
            with contextlib.suppress(asyncio.TimeoutError):
                if self.open:
                    await asyncio.wait_for(self._end.wait(), PAUSE - self._loop.time() % PAUSE)
            self._end.clear()

    def _new(
        self, index: int, tokens: list[GeneratedToken]
    ) -> tuple[int, str, str | None, dict[str, Any] | None]:
        told = self.logprobs[index]
        text = "".join(token.text for token in tokens)
        return index, text, tokens[-1].finish, None if told is None else told.of(tokens)

    def usage(self) -> dict[str, int]:
        return usage(sum(map(len, self.prompts)), self.tokens)

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }

    def echoes(self) -> list[str]:
        """What each choice's text begins with: the prompt if `echo` is set."""
        n = len(self.sequences) // len(self.prompts)
        texts = [self.tokenizer.decode(p) if p and self.request.echo else "" for p in self.prompts]
        return [text for text in texts for _ in range(n)]

    async def whole(self) -> dict[str, Any]:
        texts = self.echoes()
        finishes: list[str | None] = [None] * len(texts)
        told: list[dict[str, Any] | None] = [None] * len(texts)
        async for new in self.news():
            for index, text, finish, more in new:
                texts[index] += text
                finishes[index] = finish
                before = told[index]
                told[index] = (
                    more if before is None or more is None else {k: before[k] + more[k] for k in more}
                )
        choices = [choice(i, *each) for i, each in enumerate(zip(texts, finishes, told, strict=True))]
        return {**self.body(choices), "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last one is [DONE], or an error."""
        options = self.request.stream_options
        tells_usage = options is not None and options.include_usage

        def events(choices: list[dict[str, Any]]) -> bytes:
            """One event per choice: clients look at the first choice of an event only."""
            rest = {"usage": None} if tells_usage else {}
            return b"".join(_event({**self.body([each]), **rest}) for each in choices)

        echoes = [choice(i, text, None) for i, text in enumerate(self.echoes()) if text]
        if echoes:
            yield events(echoes)
        try:
            async for new in self.news():
                choices = [choice(*each) for each in new if each[1] or each[2] or each[3]]
                if choices:
                    yield events(choices)
        except EngineError as error:
            yield _event(ApiError(503 if isinstance(error, Stopping) else 500, str(error)).body)
            return
        if tells_usage:
            yield _event({**self.body([]), "usage": self.usage()})
        yield b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends a completion's events as they come; frees its places as soon as the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, completion: Completion) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.completion = completion

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.completion.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_disconnected(receive, pump())
        except OSError:  # the client went while something was being sent
            pass
        finally:
            self.completion.release()


async def unless_disconnected(receive: Any, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None as soon as the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def create_app(
    engine: Engine, name: str, limits: Limits | None = None, hosts: Collection[str] = ()
) -> FastAPI:
    """The web application for an engine.

    name: what clients call the model. limits: None: the defaults. hosts: names that a request's Host header
    may have, anything else getting status 400; empty: any.
    """
    limits = Limits() if limits is None else limits
    created, bodies = int(time.time()), Bodies()
    app = FastAPI(title="spikedecoder", docs_url=None, redoc_url=None)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    card = {"id": name, "object": "model", "created": created, "owned_by": "spikedecoder"}

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        detail = str(error.detail)
        if error.status_code == 404:
            detail = "no such path; takes POST /v1/completions, GET /v1/models or GET /health"
        return JSONResponse(ApiError(error.status_code, detail).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"internal error: {type(error).__name__}").body, 500)

    @app.get("/health")
    async def health() -> JSONResponse:
        status = {
            "status": "ok" if engine.alive else "stopping",
            "model": name,
            "running": engine.running,
            "waiting": engine.waiting,
            "max_batch": engine.max_batch,
            "max_queue": engine.max_queue,
        }
        return JSONResponse(status, 200 if engine.alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> dict[str, Any]:
        _check_name(model)
        return card

    # as load balancers ask whether a server is well
    app.head("/health", include_in_schema=False)(health)

    body = {
        "required": True,
        "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}},
    }

    @app.post("/v1/completions", response_model=None, openapi_extra={"requestBody": body})
    async def completions(request: Request) -> Response:
        asked = parse(await bodies.read(request), engine.max_batch)
        if asked.model is not None:
            _check_name(asked.model)
        try:
            completion = Completion(engine, limits, name, asked)
        except ValueError as error:
            raise bad_request(error) from None
        completion.submit()
        if asked.stream:
            return EventStream(completion)
        try:
            answer = await unless_disconnected(request.receive, completion.whole())
        except EngineError as error:
            raise ApiError(503 if isinstance(error, Stopping) else 500, str(error)) from None
        finally:
            completion.release()
        return JSONResponse(answer)

    def _check_name(model: str) -> None:
        if model != name:
            raise ApiError(404, f"model: got {model!r}, takes {name!r}", "model", "model_not_found")

    return app


class Bodies:
    """Reads the bodies of requests, bounding the bytes of all that are being received."""

    def __init__(self) -> None:
        self.held = 0

    async def read(self, request: Request) -> bytes:
        # a web page in the user's browser cannot send this type to another origin without a preflight request
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content-type: got {kind or 'none'!r}, takes 'application/json'")
        body = bytearray()
        try:
            await asyncio.wait_for(self._take(request, body), UPLOAD)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body has taken longer than {UPLOAD:g} s") from None
        except ClientDisconnect:  # nobody is left to read the answer
            raise ApiError(400, "the client has gone") from None
        finally:
            self.held -= len(body)
        return bytes(body)

    async def _take(self, request: Request, body: bytearray) -> None:
        async for part in request.stream():
            body += part
            self.held += len(part)
            if len(body) > BODY:
                raise ApiError(413, f"the body is longer than {BODY} bytes")
            if self.held > BODIES:
                raise ApiError(429, "too many requests: their bodies are too long", type="rate_limit_error")


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()
