"""What every request passes first: host and origin, API key, size of its body; and what is counted of its answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmtune.serve.prometheus import Meters
from llmtune.serve.schemas import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
OPEN = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready")
"""Paths that need no key: they say nothing that the documentation does not."""
BODY_SECONDS = 30
"""How long a body may take to arrive."""
DRAINED = 8
"""So many times the limit is read, and thrown away, before a body is refused: many clients read no answer sooner."""


@dataclass(frozen=True)
class Rules:
    """Who may ask, and how much."""

    body_bytes: int
    key_digest: bytes | None = None
    """sha256 of the API key; None: no key is needed."""
    hosts: tuple[str, ...] | None = None
    """Host names under which the server may be asked; None: any. A page on the web can give a name of its own the
    address of this machine, and would then be of the same origin."""


def digest(key: str) -> bytes:
    """Return what keys are compared by: of equal length, whatever the key's."""
    return hashlib.sha256(key.encode()).digest()


class Gateway:
    """ASGI middleware around the application."""

    def __init__(self, app: ASGIApp, *, rules: Rules, meters: Meters, paths: Mapping[str, str]) -> None:
        self.app, self.rules, self.meters, self.paths = app, rules, meters, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        began, status = time.monotonic(), 0
        endpoint = self.paths.get(scope["path"], "other")

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            try:
                self._check(scope)
                body = await self._read(scope, receive)
            except Refusal as refusal:
                await respond(refusal)(scope, receive, counted)
                return
            except _HungUp:
                return
            await self.app(scope, _replay(body, receive), counted)
        finally:
            self.meters.requests.labels(endpoint, str(status or 499)).inc()
            self.meters.latency.labels(endpoint).observe(time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = urlsplit(f"//{headers.get('host', '')}")
        if self.rules.hosts is not None and _name_of(host.netloc) not in self.rules.hosts:
            raise Refusal(403, f"This server is not asked under the name {host.netloc!r}.", code="foreign_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host.netloc:
            raise Refusal(403, "Pages of other origins may not ask this server.", code="foreign_origin")
        if self.rules.key_digest is None or scope["path"] in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = digest(key.strip()) if scheme.lower() == "bearer" else b""
        if not hmac.compare_digest(given, self.rules.key_digest):
            said = "The API key is wrong." if given else "An API key is needed: Authorization: Bearer KEY."
            raise Refusal(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Read the whole body, up to the limit; what is beyond is read too, up to a point, and thrown away."""
        limit, parts, size = self.rules.body_bytes, [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUp
                    size += len(message.get("body", b""))
                    if size <= limit:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False) or size > DRAINED * limit:
                        break
        except TimeoutError:
            raise Refusal(408, f"The body did not arrive within {BODY_SECONDS} s.", code="timeout") from None
        if size > limit:
            raise Refusal(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
        return b"".join(parts)


class _HungUp(Exception):
    """The client was gone before its request was whole."""


def respond(refusal: Refusal) -> JSONResponse:
    """Return the answer that says no."""
    return JSONResponse(refusal.content(), refusal.status, headers=refusal.headers)


def _name_of(netloc: str) -> str:
    """Return the host without its port."""
    name = netloc.rpartition(":")[0] if netloc.rpartition(":")[2].isdigit() else netloc
    return name.lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the application the body that was read, and then what follows."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
