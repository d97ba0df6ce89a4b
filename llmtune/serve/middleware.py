"""The gateway, which checks host, origin, API key and body size of every request; and the metrics."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Collection
from hashlib import sha256

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmtune.serve.engine import Engine
from llmtune.serve.schemas import ApiError

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Prometheus metrics of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("llmtune_requests", "Requests answered.", ["endpoint", "status"], registry=registry)
        self.latency = Histogram(
            "llmtune_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "llmtune_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("llmtune_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self.answer_tokens = Counter("llmtune_generated_tokens", "Tokens of answers.", ["model"], registry=registry)
        self.disconnects = Counter(
            "llmtune_disconnects", "Answers cancelled because the client disconnected.", registry=registry
        )
        waiting = Gauge("llmtune_queue_length", "Requests waiting in the queue.", registry=registry)
        waiting.set_function(lambda: len(engine.queue))
        running = Gauge("llmtune_running", "Requests being answered.", registry=registry)
        running.set_function(lambda: engine.queue.running)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
PUBLIC_PATHS = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready")
"""Paths that need no key: they return nothing secret."""
HOST = re.compile(r"(?:[\w.-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)
BODY_SECONDS = 30
"""How long a body may take to arrive."""
DRAIN_FACTOR = 8
"""A refused body is read and discarded up to this many times the limit, as many clients send all before they read."""


class Gateway:
    """ASGI middleware around the application; requests to `paths` are counted by name, others together.

    Without a key it only answers to loopback host names. This prevents DNS rebinding: a web page could point its own
    host name at this machine, and would then have the same origin.
    """

    def __init__(
        self, app: ASGIApp, *, body_bytes: int, key: str | None, metrics: Metrics, paths: Collection[str]
    ) -> None:
        self.app, self.body_bytes, self.metrics, self.paths = app, body_bytes, metrics, paths
        self.key_hash = sha256(key.encode()).digest() if key else None
        """Keys are compared by their hashes, which all have the same length."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        started, status = time.monotonic(), 499  # the status if the client disconnects before an answer starts
        endpoint = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            self._check(scope)
            body = await self._read(receive)
            if body is not None:
                await self.app(scope, _replay(body, receive), counted)
        except ApiError as error:
            await error_response(error)(scope, receive, counted)
        finally:
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.latency.labels(endpoint).observe(time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not HOST.fullmatch(host):
            raise ApiError(400, "The Host header is invalid.", code="invalid_host")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.key_hash is None and name.lower() not in LOOPBACK:
            raise ApiError(403, f"This server does not answer to the name {host!r}.", code="foreign_host")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "Pages of other origins may not use this server.", code="foreign_origin")
        if self.key_hash is None or scope["path"] in PUBLIC_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode()).digest() if scheme.lower() == "bearer" else b""
        if not hmac.compare_digest(given, self.key_hash):
            message = "The API key is wrong." if given else "API key missing. Send Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, receive: Receive) -> bytes | None:
        """Read the body; above the limit, discard it but keep reading for a while.

        Returns None if the client disconnected before its request was complete.
        """
        limit, parts, size = self.body_bytes, [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size <= limit:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False) or size > DRAIN_FACTOR * limit:
                        break
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} s.", code="timeout") from None
        if size > limit:
            raise ApiError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
        return b"".join(parts)


def error_response(error: ApiError) -> JSONResponse:
    """Return an error in OpenAI's format."""
    return JSONResponse(error.content(), error.status, headers=error.headers)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that replays the body, then passes further messages on."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
