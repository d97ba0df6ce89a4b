"""The HTTP application: endpoints, their documentation, errors in OpenAI's shape, the page for a person."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp

import llmtune
from llmtune.errors import nearest
from llmtune.serve.api_reference import describe_api
from llmtune.serve.engine import Engine
from llmtune.serve.middleware import Gateway, Rules, respond
from llmtune.serve.prometheus import CONTENT_TYPE, Meters
from llmtune.serve.request_handler import Desk
from llmtune.serve.schemas import (
    NEUTRAL,
    REFUSALS,
    ChatAnswer,
    ChatAsked,
    CompletionAsked,
    Health,
    ModelCard,
    ModelList,
    Refusal,
    TextAnswer,
)
from llmtune.serve.sse import Answer, ClientGone, send_answer
from llmtune.serve.task_endpoints import mount

ABOUT = """Models tuned with llmtune. `/v1/models` lists them; `model` in a request chooses one.

Parameters that are not documented here are refused by name, never ignored. Where the server was started with an API
key, every path under `/v1` and `/metrics` wants it: `Authorization: Bearer KEY`."""
STREAM = {"text/event-stream": {"example": "data: {...}\n\ndata: [DONE]\n\n"}}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": STREAM, "description": "The answer; with `stream: true` as server-sent events."}
}


def build_app(engine: Engine, rules: Rules) -> ASGIApp:
    """Put the application together: the endpoints that fit the task of the models, behind the gateway."""
    desk, meters = Desk(engine), Meters(engine)
    app = FastAPI(
        title="llmtune",
        version=llmtune.__version__,
        description=ABOUT,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    task = desk.first.task
    router = APIRouter()
    kind = "ask"
    if task.free_prompt and task.is_conversational:
        kind = "chat"
        _mount_chat(router, desk, meters)
        _mount_completions(router, desk, meters)
    elif task.free_prompt:
        kind = "completion"
        _mount_completions(router, desk, meters)
    else:
        mount(router, task, desk, meters)
    _mount_models(router, desk)
    _mount_state(router, engine, meters)
    app.include_router(router)
    _mount_pages(app, kind, rules.key_digest is not None)
    _answer_errors(app)
    paths = {route: route for route in app.openapi()["paths"]} | {"/": "/", "/docs": "/docs"}
    return Gateway(app, rules=rules, meters=meters, paths=paths)


def _mount_chat(router: APIRouter, desk: Desk, meters: Meters) -> None:
    @router.post(
        "/v1/chat/completions",
        response_model=ChatAnswer,
        responses={**STREAMED, **REFUSALS},
        tags=["chat"],
        summary="Answer a conversation",
    )
    async def chat(asked: ChatAsked, request: Request) -> Response:
        """The messages become token ids by the function that made those of training."""
        return await send_answer(Answer(desk.chat(asked), asked, meters, chat=True), request)


def _mount_completions(router: APIRouter, desk: Desk, meters: Meters) -> None:
    @router.post(
        "/v1/completions",
        response_model=TextAnswer,
        responses={**STREAMED, **REFUSALS},
        tags=["completions"],
        summary="Go on from a text",
    )
    async def complete(asked: CompletionAsked, request: Request) -> Response:
        """No chat template is used. The tokenizer's start token is put first, unless the text begins with it."""
        return await send_answer(Answer(desk.complete(asked), asked, meters, chat=False), request)


def _mount_models(router: APIRouter, desk: Desk) -> None:
    @router.get(
        "/v1/models", response_model=ModelList, responses=_some(401, 403), tags=["models"], summary="All models"
    )
    async def models() -> ModelList:
        return ModelList(data=[_card(name, desk) for name in desk.models])

    @router.get(
        "/v1/models/{model:path}",
        response_model=ModelCard,
        responses=_some(401, 403, 404),
        tags=["models"],
        summary="One model",
    )
    async def model(model: str) -> ModelCard:
        return _card(desk.find(model).name, desk)


def _card(name: str, desk: Desk) -> ModelCard:
    served = desk.models[name]
    return ModelCard(id=name, created=served.created, task=served.task.name, max_model_len=served.context)


def _mount_state(router: APIRouter, engine: Engine, meters: Meters) -> None:
    @router.get("/health/live", response_model=Health, tags=["state"], summary="Whether the process answers at all")
    async def live() -> Health:
        return Health(status="ok")

    @router.get(
        "/health/ready",
        response_model=Health,
        responses={503: {"model": Health, "description": "It is about to stop."}},
        tags=["state"],
        summary="Whether requests are taken",
    )
    async def ready() -> Response:
        state = Health(status="ok" if engine.ready else "stopping")
        return JSONResponse(state.model_dump(), 200 if engine.ready else 503)

    @router.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=_some(401, 403),
        tags=["state"],
        summary="Counts and times, as Prometheus reads them",
    )
    async def metrics() -> Response:
        return Response(meters.text(), headers={"Content-Type": CONTENT_TYPE})


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: REFUSALS[status] for status in statuses}


def _mount_pages(app: FastAPI, kind: str, needs_key: bool) -> None:
    """Mount what a person looks at: pages that hold all they need, and may ask for nothing but this server."""
    reference = describe_api(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page(reference)

    if kind == "ask":

        @app.get("/", include_in_schema=False)
        async def home() -> Response:
            return RedirectResponse("/docs")

        return
    text = files("llmtune.serve").joinpath("chat.html").read_text("utf-8")
    text = text.replace(
        'data-kind="chat" data-key="no"', f'data-kind="{kind}" data-key="{"yes" if needs_key else "no"}"'
    )

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return _page(text)


def _page(text: str) -> Response:
    """Return a page with a policy under which its own script and style run, and nothing else."""
    policy = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'"}
    policy |= {"frame-ancestors": "'none'", "img-src": "data:"}
    for tag in ("script", "style"):
        hashes = [_hash(part) for part in re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)]
        policy[f"{tag}-src"] = " ".join(hashes) or "'none'"
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _answer_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> Response:
        return respond(error)

    @app.exception_handler(ClientGone)
    async def forget(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return respond(describe_errors(error.errors()))

    @app.exception_handler(ValidationError)
    async def unfit(request: Request, error: ValidationError) -> Response:
        return respond(describe_errors(error.errors(include_url=False)))

    @app.exception_handler(HTTPException)
    async def fail(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            known = [path for path in app.openapi()["paths"] if path.startswith("/v1")]
            message = f"There is no {request.url.path!r} here.{nearest(request.url.path, known)} There are: "
            message += f"{', '.join(known)}."
        return respond(Refusal(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def crash(request: Request, error: Exception) -> Response:
        return respond(Refusal(500, "Something went wrong in the server; its log says what.", code="internal_error"))


def describe_errors(errors: Any) -> Refusal:
    """Say what is wrong with a body: each parameter by name, and what it may be."""
    found: dict[str, str] = {}
    code = None
    for one in errors:
        where = [str(part) for part in one["loc"] if part != "body" and _is_place(part)]
        name, message = ".".join(where), str(one["msg"]).removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            message = "is not supported" if where[-1] in NEUTRAL else "is no parameter here"
            code = "unsupported_parameter" if where[-1] in NEUTRAL else "unknown_parameter"
        elif one["type"].startswith("json"):
            name, message = "", f"The body is not JSON: {(one.get('ctx') or {}).get('error', message)}"
        found.setdefault(name, message)
    text = "; ".join(f"{name}: {message}" if name else message for name, message in found.items())
    return Refusal(400, _printable(text), param=next(iter(found), None) or None, code=code)


def _is_place(part: Any) -> bool:
    """Whether a part of a place is a key or a number, and not pydantic's name for a member of a union."""
    return isinstance(part, int) or not re.search(r"[\[\(]|^(str|list|int|float|bool|constrained.*)$", str(part))


def _printable(text: str) -> str:
    """Return text without halves of characters, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()
