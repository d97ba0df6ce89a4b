"""One endpoint for each task whose answer is no conversation: what it asks for, and what it says."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, create_model
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtune.serve.engine import End
from llmtune.serve.prometheus import Meters
from llmtune.serve.request_handler import Desk, Ticket
from llmtune.serve.schemas import REFUSALS, Asked, Refusal, Text
from llmtune.serve.served_model import Served
from llmtune.serve.sse import given_up
from llmtune.tasks import AnyTask


@dataclass(frozen=True)
class Endpoint:
    """Where a task is asked, and what of."""

    path: str
    summary: str
    names: Mapping[str, tuple[str, str]]
    """By what the task asks for: the field's name, and what it holds."""
    prediction: str
    """What `prediction` is."""


TEXT = ("text", "The text.")
ENDPOINTS: dict[str, Endpoint] = {
    "classify": Endpoint(
        "/v1/classify",
        "Put a text into a class, into several, or on a scale",
        {"prompt": TEXT, "pair": ("pair", "The second text, where the model was trained on pairs.")},
        "`label` (a name, a list of names or a number) and `scores`: a probability a class, in the order of `labels`",
    ),
    "qa": Endpoint(
        "/v1/qa",
        "Find the answer to a question in a text",
        {"prompt": ("question", "The question."), "context": ("context", "The text that holds the answer.")},
        "`text` (empty where there is no answer), `start` and `end` in characters of the context, and scores; of a "
        "model that writes its answers the answer as text",
    ),
    "token-classify": Endpoint(
        "/v1/token-classify",
        "Mark words in a text, such as names",
        {"prompt": TEXT},
        "a tag for each of `words`, in IOB2: `B-` begins an entity, `I-` goes on with it, `O` is outside",
    ),
    "speech": Endpoint(
        "/v1/transcribe",
        "Write down what is said in a recording",
        {"audio": ("audio", "The recording (wav, flac, mp3, ogg), as base64.")},
        "the transcript",
    ),
    "translate": Endpoint("/v1/translate", "Translate a text", {"prompt": TEXT}, "the translation"),
    "summarize": Endpoint("/v1/summarize", "Say a text in fewer words", {"prompt": TEXT}, "the summary"),
    "preference": Endpoint(
        "/v1/score",
        "Say how good an answer is",
        {"prompt": ("prompt", "The question."), "answer": ("answer", "The answer to score.")},
        "the score: of two answers to one question, the higher is the better",
    ),
    "completion": Endpoint(
        "/v1/fill",
        "Fill in what is masked",
        {"prompt": ("text", "A text with the model's mask tokens in it.")},
        "the text with its masks filled in",
    ),
}
"""By task; chat, and models that go on from a text, are asked by OpenAI's endpoints."""


class TaskAnswer(BaseModel):
    """What a task says."""

    model: str
    task: str
    text: str = Field(description="As a person reads it.")
    prediction: Any
    labels: list[str] | None = Field(default=None, description="Names of the classes, in the order of the scores.")
    words: list[str] | None = Field(default=None, description="The words that the tags are of.")


def mount(router: APIRouter, task: AnyTask, desk: Desk, meters: Meters) -> str:
    """Put the endpoint of a task into `router`; returns its path."""
    endpoint = ENDPOINTS[task.name]
    fields: dict[str, Any] = {
        endpoint.names[name][0]: _field(endpoint.names[name][1], needed) for name, needed in task.inputs.items()
    }
    model: Any = (Text | None, Field(default=None, description="A name of `/v1/models`; the first one if left out."))
    shape = create_model(f"{task.name.title().replace('-', '')}Asked", __base__=Asked, model=model, **fields)
    read = _read_recording if task.takes_audio else _read_fields
    given_names = {field: name for name, (field, _) in endpoint.names.items()}

    async def answer(request: Request) -> Response:
        given = await read(request, shape)
        name = given.pop("model", None)
        return await _answer(desk, meters, request, name, {given_names[key]: value for key, value in given.items()})

    router.add_api_route(
        endpoint.path,
        answer,
        methods=["POST"],
        summary=endpoint.summary,
        description=f"`prediction` is {endpoint.prediction}.",
        response_model=TaskAnswer,
        responses=REFUSALS,
        tags=[task.name],
        openapi_extra={"requestBody": {"required": True, "content": _content(shape, task)}},
    )
    return endpoint.path


def _field(about: str, needed: bool) -> Any:
    if needed:
        return (Text, Field(min_length=1, description=about))
    return (Text | None, Field(default=None, description=about))


def _content(shape: type[Asked], task: AnyTask) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": shape.model_json_schema()}}
    if task.takes_audio:
        properties = {"file": {"type": "string", "format": "binary"}, "model": {"type": "string"}}
        form = {"type": "object", "properties": properties, "required": ["file"]}
        content["multipart/form-data"] = {"schema": form}
    return content


async def _read_fields(request: Request, shape: type[Asked]) -> dict[str, Any]:
    """Read a JSON body; raises Refusal, or ValidationError for what does not fit `shape`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(400, f"The body is of type {kind or 'none'}; send application/json.")
    return shape.model_validate_json(await request.body()).model_dump(exclude_none=True)


async def _read_recording(request: Request, shape: type[Asked]) -> dict[str, Any]:
    """Read a recording, as base64 in JSON or as a file in a form; `audio` is then its bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        given = await _read_fields(request, shape)
        try:
            given["audio"] = base64.b64decode(given["audio"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refusal(400, f"audio is not base64: {error}", param="audio") from error
        return given
    async with request.form() as form:
        unknown = sorted(set(form) - {"file", "model"})
        if unknown:
            raise Refusal(400, f"unknown: {', '.join(unknown)}; a form has file and model.", param=unknown[0])
        file, model = form.get("file"), form.get("model")
        if not isinstance(file, UploadFile):
            raise Refusal(400, "A form has the recording as its file.", param="file")
        read: dict[str, Any] = {"audio": await file.read()}
        return read | ({"model": model} if isinstance(model, str) else {})


async def _answer(
    desk: Desk, meters: Meters, request: Request, name: str | None, given: dict[str, Any]
) -> JSONResponse:
    """Ask the task; a recording lies in a file for as long as it is worked on."""
    with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
        if isinstance(given.get("audio"), bytes):
            path = Path(folder) / "recording"
            path.write_bytes(given["audio"])
            given["audio"] = str(path)
        ticket, served, row = desk.ask(name, given)
        try:
            async with given_up(ticket, request, meters):
                said = await _wait(ticket, served, meters)
        except Refusal as refusal:
            refusal.message = refusal.message.replace(f"{folder}/", "")  # where it lay is nobody's business
            raise
        finally:
            ticket.cancel()
    return JSONResponse(_tell(served, said, row).model_dump(exclude_none=True))


async def _wait(ticket: Ticket, served: Served, meters: Meters) -> Any:
    """Return what is predicted, or the text that is written."""
    ids: list[int] = []
    async for event in ticket.events():
        if not isinstance(event, End):
            ids += event
        elif event.reason == "answer":
            return event.prediction
    meters.prompt_tokens.labels(served.name).inc(len(ticket.job.ids))
    meters.answer_tokens.labels(served.name).inc(len(ids))
    return served.decode(ids)


def _tell(served: Served, said: Any, row: dict[str, Any]) -> TaskAnswer:
    task, section = served.task, served.recipe.classify
    return TaskAnswer(
        model=served.name,
        task=task.name,
        text=task.format_answer(said, row),
        prediction=said,
        labels=list(section.labels or ()) or None if section else None,
        words=row.get("tokens"),
    )
