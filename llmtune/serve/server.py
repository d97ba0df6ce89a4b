"""The server process: a socket bound early, uvicorn around the application, and a graceful stop."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from types import FrameType
from typing import cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.serve.engine import Engine

MAX_CONNECTIONS = 1000
HEAD_SECONDS = 15
"""How long a connection may take to send the complete head of a request."""
OPEN_FILES = 4096
OTHER_FILES = 128
"""Open files other than connections."""


class TimedProtocol(H11Protocol):
    """uvicorn's protocol; it closes connections that take too long to send a request."""

    waiting: asyncio.TimerHandle | None = None
    since = 0.0
    """When the connection began to wait for a request."""
    limit = MAX_CONNECTIONS

    @property
    def idle(self) -> bool:
        """Whether no request is in progress."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; above the limit, close the one idle for longest, or this one if none is idle."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.limit:
            others = [cast(TimedProtocol, one) for one in self.connections if one is not self]
            idle = [one for one in others if one.idle]
            doomed = min(idle, key=lambda one: one.since) if idle else self
            self.connections.discard(doomed)
            doomed.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Receive data; a request head must be complete in time."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if not self.idle:
            self._stop_watching()
        elif self.waiting is None:
            self.since = self.loop.time()
            self.waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


def allow_connections() -> None:
    """Raise the limit on open files as far as allowed and needed, and limit connections to it.

    Raises EnvironmentProblem if the limit is too low: every refused connection would be logged, without end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY:
        if soft <= OTHER_FILES:
            what = f"only {soft} files may be open at once, but the server needs more than {OTHER_FILES}"
            raise EnvironmentProblem.of(what, "ulimit -n", "Raise the limit: ulimit -n 4096.")
        TimedProtocol.limit = min(MAX_CONNECTIONS, soft - OTHER_FILES)


SPARE_SECONDS = 5
"""How long the server waits, after the grace period, for connections to close."""
IDLE_SECONDS = 75
"""When an idle connection is closed: later than clients close it, so no request arrives on a closed connection."""


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind an address before anything heavy is loaded; no connection is accepted yet.

    Raises:
        RecipeError: unknown host.
        EnvironmentProblem: the port is taken or not permitted, or too few files may be open.
    """
    allow_connections()
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RecipeError.of(f"unknown host {host!r}", "--host", "Name an address of this machine.") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        what = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        fix = "Choose another port; 0 takes a free one."
        raise EnvironmentProblem.of(what, "--port", fix) from error
    return bound


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether to keep a log record: drops cancelled requests, which uvicorn logs as bugs of the application."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Server(uvicorn.Server):
    """uvicorn, which stops the engine first."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None], on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_stop, self.on_ready = on_stop, on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests, and let running answers finish."""
        self.on_stop()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and report it."""
        await super().startup(sockets)
        self.on_ready()


def run_server(
    app: ASGIApp, engine: Engine, bound: socket.socket, grace_seconds: float, on_ready: Callable[[], None]
) -> None:
    """Answer requests until SIGINT or SIGTERM; the previous signal handlers run at the end."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        http=TimedProtocol,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(grace_seconds) + SPARE_SECONDS,
        ws="none",
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    server = _Server(config, lambda: engine.queue.stop(grace_seconds), on_ready)
    try:
        server.run(sockets=[bound])
    finally:
        engine.queue.stop(0)
        engine.thread.join(SPARE_SECONDS)
        bound.close()
