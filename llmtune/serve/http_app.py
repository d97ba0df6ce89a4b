"""The HTTP application: endpoints, their documentation, errors in OpenAI's shape, the page for a person."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp

import llmtune
from llmtune.errors import nearest
from llmtune.serve.engine import Engine
from llmtune.serve.middleware import CONTENT_TYPE, AccessRules, Gateway, Metrics, error_response
from llmtune.serve.request_handler import RequestHandler, as_api_error
from llmtune.serve.schemas import (
    ERROR_RESPONSES,
    NEUTRAL,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Health,
    ModelCard,
    ModelList,
)
from llmtune.serve.sse import ClientDisconnected, GeneratedAnswer, send_answer
from llmtune.serve.task_endpoints import mount_task

ABOUT = """Models tuned with llmtune. `/v1/models` lists them; `model` in a request chooses one.

Parameters that are not documented here are refused by name, never ignored. Where the server was started with an API
key, every path under `/v1` and `/metrics` needs it: `Authorization: Bearer KEY`."""
EVENT_STREAM = {"text/event-stream": {"example": "data: {...}\n\ndata: [DONE]\n\n"}}
GENERATED: dict[int | str, dict[str, object]] = {
    200: {"content": EVENT_STREAM, "description": "The answer; with `stream: true` as server-sent events."},
    **ERROR_RESPONSES,
}
REFUSED: dict[int | str, dict[str, object]] = {status: ERROR_RESPONSES[status] for status in (401, 403)}


def build_app(engine: Engine, rules: AccessRules) -> ASGIApp:
    """Build the application: the endpoints that fit the task of the models, behind the gateway."""
    handler, metrics = RequestHandler(engine), Metrics(engine)
    app = FastAPI(
        title="llmtune",
        version=llmtune.__version__,
        description=ABOUT,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    router, served = APIRouter(), handler.default
    page_kind = None
    if served.task.free_prompt:
        page_kind = "chat" if served.task.is_conversational else "completion"
        _mount_generation(router, handler, metrics, chat=served.task.is_conversational)
    else:
        mount_task(router, served.task, handler, metrics)
    _mount_models(router, handler)
    _mount_state(router, engine, metrics)
    app.include_router(router)
    _mount_pages(app, page_kind, needs_key=rules.key_digest is not None)
    _mount_error_handlers(app)
    return Gateway(app, rules=rules, metrics=metrics, paths={*app.openapi()["paths"], "/", "/docs"})


def _mount_generation(router: APIRouter, handler: RequestHandler, metrics: Metrics, *, chat: bool) -> None:
    if chat:

        @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATED)
        async def answer_a_conversation(body: ChatRequest, request: Request) -> Response:
            """The messages become token ids by the function that made those of training."""
            return await send_answer(GeneratedAnswer(await handler.chat(body), body, metrics, chat=True), request)

    @router.post("/v1/completions", response_model=Completion, responses=GENERATED)
    async def continue_a_text(body: CompletionRequest, request: Request) -> Response:
        """No chat template is used. The tokenizer's start token is put first, unless the text begins with it."""
        return await send_answer(GeneratedAnswer(await handler.complete(body), body, metrics, chat=False), request)


def _mount_models(router: APIRouter, handler: RequestHandler) -> None:
    def card(name: str) -> ModelCard:
        served = handler.find(name)
        return ModelCard(
            id=name,
            object="model",
            created=served.created,
            owned_by="llmtune",
            task=served.task.name,
            max_model_len=served.context,
        )

    @router.get("/v1/models", response_model=ModelList, responses=REFUSED)
    async def list_models() -> ModelList:
        return ModelList(data=[card(name) for name in handler.engine.models])

    @router.get("/v1/models/{model:path}", response_model=ModelCard, responses={**REFUSED, 404: ERROR_RESPONSES[404]})
    async def show_a_model(model: str) -> ModelCard:
        return card(model)


def _mount_state(router: APIRouter, engine: Engine, metrics: Metrics) -> None:
    @router.get("/health/live", response_model=Health)
    async def live() -> Health:
        """Whether the process answers at all."""
        return Health(status="ok")

    stopping: dict[int | str, dict[str, object]] = {503: {"model": Health, "description": "It is about to stop."}}

    @router.get("/health/ready", response_model=Health, responses=stopping)
    async def ready() -> Response:
        """Whether requests are taken."""
        state = Health(status="ok" if engine.ready else "stopping")
        return JSONResponse(state.model_dump(), 200 if engine.ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse, responses=REFUSED)
    async def show_metrics() -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _mount_pages(app: FastAPI, kind: str | None, *, needs_key: bool) -> None:
    """Mount what a person looks at: pages that hold all they need, and may ask for nothing but this server."""
    folder = files("llmtune.serve")
    docs = folder.joinpath("docs.html").read_text("utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs_page() -> Response:
        return _page(docs)

    marks = f'data-kind="{kind}" data-key="{"yes" if needs_key else "no"}"'
    chat = folder.joinpath("chat.html").read_text("utf-8").replace('data-kind="chat" data-key="no"', marks)

    @app.get("/", include_in_schema=False)
    async def home_page() -> Response:
        return _page(chat) if kind else RedirectResponse("/docs")


def _page(text: str) -> Response:
    """Return a page with a policy under which its own script and style run, and nothing else."""
    policy = {"default-src": "'none'", "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'"}
    policy |= {"frame-ancestors": "'none'", "img-src": "data:"}
    for tag in ("script", "style"):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        policy[f"{tag}-src"] = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def _mount_error_handlers(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""

    @app.exception_handler(ClientDisconnected)
    async def disconnected(request: Request, error: ClientDisconnected) -> Response:
        return Response(status_code=499)  # nobody reads it

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
            known = [path for path in app.openapi()["paths"] if path.startswith("/v1")]
            message = f"There is no {request.url.path!r} here.{nearest(request.url.path, known)} There are: "
            message += f"{', '.join(known)}."
        return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(ApiError)
    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error))


def describe_errors(errors: Iterable[Mapping[str, object]]) -> ApiError:
    """Return what is wrong with a body: each parameter by name, and what it may be."""
    messages: dict[str, str] = {}
    code = None
    for error in errors:
        location = error["loc"] if isinstance(error["loc"], tuple) else ()
        keys = [str(part) for part in location if part != "body" and _is_key(part)]
        name, message, kind = ".".join(keys), str(error["msg"]).removeprefix("Value error, "), str(error["type"])
        if kind == "extra_forbidden":
            message = "is not supported" if keys[-1] in NEUTRAL else "is no parameter here"
            code = "unsupported_parameter" if keys[-1] in NEUTRAL else "unknown_parameter"
        elif kind.startswith("json"):
            context = error.get("ctx")
            reason = context.get("error", message) if isinstance(context, Mapping) else message
            name, message = "", f"The body is not JSON: {reason}"
        messages.setdefault(name, message)
    text = "; ".join(f"{name}: {message}" if name else message for name, message in messages.items())
    text = text.encode("utf-8", "replace").decode()  # JSON may hold halves of characters, and UTF-8 may not
    return ApiError(400, text, param=next(iter(messages), None) or None, code=code)


def _is_key(part: object) -> bool:
    """Whether a part of a location is a key or a number, and not pydantic's name for a member of a union."""
    return isinstance(part, int) or not re.search(r"[\[\(]|^(str|list|int|float|bool|constrained.*)$", str(part))
