"""Serves the application on a socket until a signal stops it."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from spikedecoder._hosts import LOCAL
from spikedecoder.serve.app import UPLOAD, Limits, create_app
from spikedecoder.serve.engine import Engine

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Protocol(H11Protocol):
    """Closes a connection on which the first request's head, or another once begun, is not whole in UPLOAD
    seconds."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(UPLOAD, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._in_time()
        elif self._late is None:
            self._late = self.loop.call_later(UPLOAD, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Stops in order: no new connections, `grace` seconds to finish running texts, then the rest is ended."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self.engine, self.grace, self.hurried = engine, grace, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends running texts at once, and their clients are told; the third does not wait
        for that."""
        if self.should_exit and not self.hurried:
            self.hurried = True
            self.engine.close()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.close(self.grace)
        await super().shutdown(sockets)


def build(
    engine: Engine, name: str, limits: Limits, grace: float = 10.0, hosts: Collection[str] = ()
) -> Server:
    """The server of an engine. hosts: names that a request's Host header may have; empty: any."""
    config = uvicorn.Config(
        create_app(engine, name, limits, hosts),
        http=Protocol,
        log_level="warning",
        access_log=False,
        lifespan="off",
        # longer than `grace`, so that the engine gives up first and tells its clients
        timeout_graceful_shutdown=int(grace) + 5,
    )
    return Server(config, engine, grace)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at `host` and `port`; an OSError names them, ValueError for a port out of range."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port: got {port}, takes 0 to 65535, 0 being any free one")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port} ({error.strerror or error})") from None


def known_hosts(where: socket.socket, host: str, more: Collection[str] = ()) -> tuple[str, ...]:
    """The `hosts` for a socket that listens at `host`: this machine's names if only it can reach the socket,
    and `more`; empty if any other machine can and no name is given."""
    local = ipaddress.ip_address(where.getsockname()[0]).is_loopback
    return (*LOCAL, host, *more) if local or more else ()


def run(server: Server, where: socket.socket, ready: Callable[[], Any] = lambda: None) -> None:
    """Serve until SIGINT or SIGTERM; both stop it in order, a second one without waiting for texts."""
    # uvicorn raises the signal again when it is done: these handlers ignore it
    before = {s: signal.signal(s, lambda *_: None) for s in _SIGNALS}
    server.engine.start()
    try:
        ready()
        server.run(sockets=[where])
    finally:
        server.engine.close()
        server.engine.join(5)
        for s, handler in before.items():
            signal.signal(s, handler)
