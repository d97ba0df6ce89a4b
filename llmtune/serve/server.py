"""The process: a socket taken early, uvicorn around the application, and a stop that lets answers end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.serve.connections import TimedProtocol, allow_connections
from llmtune.serve.engine import Engine

SPARE_SECONDS = 5
"""How long the server waits, beyond the time of grace, for connections to close."""
IDLE_SECONDS = 75
"""When an idle connection is closed: later than clients do it, so that none asks on one just closed."""


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind an address before anything heavy is loaded; nothing is accepted yet.

    Raises:
        RecipeError: there is no such host.
        EnvironmentProblem: the port is taken, or may not be used.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RecipeError.of(f"there is no host {host!r}", "--host", "Name an address of this machine.") from error
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


class _Server(uvicorn.Server):
    """uvicorn, whose stop begins with the engine's."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None], on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_stop, self.on_ready = on_stop, on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests, and let those that are being answered end."""
        self.on_stop()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.on_ready()


def run_server(
    app: ASGIApp, engine: Engine, bound: socket.socket, grace_seconds: float, on_ready: Callable[[], None]
) -> None:
    """Answer requests until SIGINT or SIGTERM, whose own handlers run once all is ended."""
    allow_connections()
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
    server = _Server(config, lambda: engine.queue.stop(grace_seconds), on_ready)
    try:
        server.run(sockets=[bound])
    finally:
        engine.queue.stop(0)
        engine.thread.join(SPARE_SECONDS)
        bound.close()
