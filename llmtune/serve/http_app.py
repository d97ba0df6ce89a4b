"""The HTTP application: checks of each request, endpoints and their documentation, errors in OpenAI's format, pages."""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from hashlib import sha256
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import llmtune
from llmtune.recipe.retired import RETIRED
from llmtune.serve.engine import Engine
from llmtune.serve.generation_endpoints import ClientDisconnected, mount_generation, served_by_name
from llmtune.serve.schemas import ERROR_RESPONSES, NEUTRAL, ApiError, Health, ModelCard, ModelList
from llmtune.serve.search_endpoints import OWN_ENDPOINTS
from llmtune.serve.task_endpoints import mount_task

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
PUBLIC_PATHS = ("/", "/docs", "/openapi.json", "/health/live", "/health/ready")
"""Paths that need no key: they return nothing secret."""
HOST = re.compile(r"(?:[\w.-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)
BODY_SECONDS = 30
"""How long a body may take to arrive."""
DRAIN_FACTOR, DRAIN_SECONDS = 8, 5
"""The rest of a refused body is discarded up to this many times the limit, and for so long, before the connection is
closed: many clients send all before they read, and a connection that is closed with unread bytes is reset."""
NEAR = 0.65
"""Likeness of two paths from which one may be meant for the other: /v1/moderations is not /v1/completions."""
ABOUT = """Models tuned with llmtune. `/v1/models` lists them; `model` in a request chooses one.

Undocumented parameters are refused by name, never ignored. If the server was started with an API key, every path
under `/v1` needs it: `Authorization: Bearer KEY`."""


def build_app(engine: Engine, *, body_bytes: int, key: str | None = None) -> ASGIApp:
    """Build the application: the gateway, and the endpoints for the task of the models."""
    task = served_by_name(engine, None).task
    app = FastAPI(
        title="llmtune",
        version=llmtune.__version__,
        description=ABOUT,
        responses=ERROR_RESPONSES,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    page_kind = None
    if task.free_prompt:
        page_kind = "chat" if task.is_conversational else "completion"
        mount_generation(app, engine, chat=task.is_conversational)
    elif task.endpoint is not None and task.endpoint.path in OWN_ENDPOINTS:
        OWN_ENDPOINTS[task.endpoint.path](app, engine)
    else:
        mount_task(app, task, engine)
    _mount_models(app, engine)
    _mount_state(app, engine)
    _mount_pages(app, page_kind, needs_key=key is not None, takes_images=task.model_kind.takes_images)
    _mount_error_handlers(app)
    return Gateway(app, body_bytes=body_bytes, key=key)


def _mount_models(app: FastAPI, engine: Engine) -> None:
    def card(name: str) -> ModelCard:
        served = served_by_name(engine, name)
        return ModelCard(
            id=name,
            object="model",
            created=served.created,
            owned_by="llmtune",
            task=served.task.name,
            max_model_len=served.context,
            release=served.release,
        )

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[card(name) for name in engine.models])

    @app.get("/v1/models/{model:path}")
    async def show_a_model(model: str) -> ModelCard:
        return card(model)


def _mount_state(app: FastAPI, engine: Engine) -> None:
    @app.get("/health/live")
    async def live() -> Health:
        """Whether the process responds."""
        return Health(status="ok")

    @app.get("/health/ready", response_model=Health, responses={503: {"model": Health, "description": "Stopping."}})
    async def ready() -> Response:
        """Whether the server accepts requests."""
        release = served_by_name(engine, None).release
        state = Health(status="ok" if engine.ready else "stopping", release=release)
        return JSONResponse(state.model_dump(), 200 if engine.ready else 503)


def _mount_pages(app: FastAPI, kind: str | None, *, needs_key: bool, takes_images: bool) -> None:
    """Mount the web pages; they are self-contained and may not load external content."""
    folder = files("llmtune.serve")
    docs = folder.joinpath("docs.html").read_text("utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs_page() -> Response:
        return page_response(docs)

    key, images = ("yes" if one else "no" for one in (needs_key, takes_images))
    marks = f'data-kind="{kind}" data-key="{key}" data-images="{images}"'
    plain = 'data-kind="chat" data-key="no" data-images="no"'
    chat = folder.joinpath("chat.html").read_text("utf-8").replace(plain, marks)

    @app.get("/", include_in_schema=False)
    async def home_page() -> Response:
        return page_response(chat) if kind else RedirectResponse("/docs")


def page_response(text: str) -> Response:
    """Return a page with a content security policy that allows only its own script and style."""
    policy = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'"}
    policy |= {"frame-ancestors": "'none'", "img-src": "data:"}
    for tag in ("script", "style"):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        hashes = [base64.b64encode(sha256(part.encode()).digest()).decode() for part in parts]
        policy[f"{tag}-src"] = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _mount_error_handlers(app: FastAPI) -> None:
    """Return every error in OpenAI's format."""

    @app.exception_handler(ClientDisconnected)
    async def disconnected(request: Request, error: ClientDisconnected) -> Response:
        return Response(status_code=499)  # never sent: the client disconnected

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        return error_response(describe_errors(error.errors()))

    @app.exception_handler(ValidationError)
    async def invalid_fields(request: Request, error: ValidationError) -> Response:
        return error_response(describe_errors(error.errors(include_url=False)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            paths = [path for path in app.openapi()["paths"] if path.startswith("/v1")]
            ends = {path.removeprefix("/v1/"): path for path in paths}  # what all paths share makes none of them near
            near = get_close_matches(request.url.path.removeprefix("/v1").strip("/"), ends, 1, NEAR)
            message = f"{request.url.path!r} not found.{f' Did you mean {ends[near[0]]!r}?' if near else ''} "
            message += f"Known paths: {', '.join(paths)}."
            message = RETIRED.get(f"{request.method} {request.url.path}", message)
        return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(ApiError)
    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> Response:
        return error_response(ApiError.of(error))


def describe_errors(errors: Iterable[Mapping[str, object]]) -> ApiError:
    """Return the error of an invalid body: each parameter by name, with its allowed values."""
    messages: dict[str, str] = {}
    code, culprit = None, None
    for error in errors:
        location = error["loc"] if isinstance(error["loc"], tuple) else ()
        keys = [str(part) for part in location if part != "body" and _is_key(part)]
        name, message, kind = ".".join(keys), str(error["msg"]).removeprefix("Value error, "), str(error["type"])
        if kind == "extra_forbidden":
            message = "is not supported" if keys[-1] in NEUTRAL else "unknown parameter"
            code, culprit = "unsupported_parameter" if keys[-1] in NEUTRAL else "unknown_parameter", name
        elif kind.startswith("json"):
            context = error.get("ctx")
            reason = context.get("error", message) if isinstance(context, Mapping) else message
            name, message = "", f"The body is not JSON: {reason}"
        if message not in messages.setdefault(name, message):  # the value fits none of several types
            messages[name] += f"; or: {message}"
    text = "; ".join(f"{name}: {message}" if name else message for name, message in messages.items())
    text = text.encode("utf-8", "replace").decode()  # JSON allows lone surrogates, UTF-8 does not
    return ApiError(400, text, param=culprit or next(iter(messages), None) or None, code=code)


def _is_key(part: object) -> bool:
    """Whether a part of a location is a key or an index, not pydantic's name for a member of a union."""
    return isinstance(part, int) or not re.search(r"[\[\(]|^(str|list|int|float|bool|constrained.*)$", str(part))


class Gateway:
    """ASGI middleware that checks host, origin, API key and body size of every request.

    Without a key it only answers to loopback host names. This prevents DNS rebinding: a web page could point its own
    host name at this machine, and would then have the same origin.
    """

    def __init__(self, app: ASGIApp, *, body_bytes: int, key: str | None) -> None:
        self.app, self.body_bytes = app, body_bytes
        self.key_hash = sha256(key.encode()).digest() if key else None
        """Keys are compared by their hashes, which all have the same length."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return

        async def unsniffed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        unread = True

        async def noted() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        try:
            self._check(scope)
            body = await self._read(noted)
        except ApiError as error:
            response = error_response(error)
            response.headers["Connection"] = "close"
            await response(scope, receive, lambda message: unsniffed({**message, "more_body": True}))
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    left = DRAIN_FACTOR * self.body_bytes
                    while unread and left > 0:
                        left -= len((await noted()).get("body", b""))
            await send({"type": "http.response.body"})
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), unsniffed)

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
        """Read the body; returns None if the client disconnected before its request was complete."""
        limit, parts, size = self.body_bytes, [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise ApiError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} s.", code="timeout") from None


def error_response(error: ApiError) -> JSONResponse:
    """Return an error in OpenAI's format."""
    return JSONResponse(error.content(), error.status, headers=error.headers)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that replays the body, then passes further messages on."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
