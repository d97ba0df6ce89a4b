"""Connections of clients: those that ask nothing make room for others, and a request's head may not take for ever."""

from __future__ import annotations

import asyncio
import resource
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 1000
HEAD_SECONDS = 15
"""How long the head of a request may take to arrive, from the connection or from its first byte on."""
OPEN_FILES = 4096
OTHER_FILES = 128
"""Open files that are no connections."""


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which closes connections that take too long to ask."""

    waiting: asyncio.TimerHandle | None = None
    since = 0.0
    """When it began to wait for a request."""
    limit = MAX_CONNECTIONS

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; where there is no room, close the one that has been idle for longest, or else this one."""
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
        """Take bytes in; a head that has begun must be there in time."""
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
    """Raise the limit on open files as far as is allowed and needed, and keep connections below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY:
        TimedProtocol.limit = max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))
