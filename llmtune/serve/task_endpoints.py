"""One endpoint for each task whose answer is no conversation: its inputs, and its prediction."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter
from pydantic import BaseModel, Field, create_model
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.serve.request_queue import End
from llmtune.serve.schemas import ERROR_RESPONSES, ApiError, RequestModel, Text
from llmtune.serve.sse import until_disconnect

if TYPE_CHECKING:
    from llmtune.serve.middleware import Metrics
    from llmtune.serve.request_handler import PendingAnswer, RequestHandler
    from llmtune.serve.served_model import ServedModel
    from llmtune.tasks.base import AnyTask


FIELDS = {
    "text": "The text; where the model fills masks, with its mask tokens in it.",
    "pair": "The second text, where the model was trained on pairs.",
    "question": "The question.",
    "context": "The text that holds the answer.",
    "audio": "The recording (wav, flac, mp3, ogg), as base64.",
    "prompt": "The question.",
    "answer": "The answer to score.",
}
MODEL = "A name of `/v1/models`; default: the first one."

Inputs = dict[str, str | None]


class TaskAnswer(BaseModel):
    """The answer of a task."""

    model: str
    task: str
    text: str = Field(description="As a person reads it.")
    prediction: object
    labels: list[str] | None = Field(default=None, description="Names of the classes, in the order of the scores.")
    words: list[str] | None = Field(default=None, description="The words that the tags are of.")


def mount_task(router: APIRouter, task: AnyTask, handler: RequestHandler, metrics: Metrics) -> None:
    """Put the endpoint of a task into `router`."""
    endpoint = task.endpoint
    assert endpoint is not None, "a task without OpenAI's endpoints has its own"
    names = {endpoint.prompt_field if name == "prompt" else name: name for name in task.inputs}
    schema = _request_schema(task, names)

    async def answer(request: Request) -> Response:
        recording, fields = b"", Inputs()
        if not task.takes_audio:
            fields = await _read_json(request, schema)
        elif _content_type(request) == "multipart/form-data":
            recording, fields = await _read_form(request)
        else:
            fields = await _read_json(request, schema)
            recording = _decode_base64(str(fields.pop("audio")))
        model = fields.pop("model", None)
        inputs = {names[field]: value for field, value in fields.items()}
        with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
            if recording:  # it lies in a file for as long as it is worked on
                path = Path(folder) / "recording"
                path.write_bytes(recording)
                inputs["audio"] = str(path)
            try:
                return await _answer(handler, metrics, request, model, inputs)
            except ApiError as error:
                error.message = error.message.replace(f"{folder}/", "")  # where it lay is nobody's business
                raise

    content: dict[str, object] = {"application/json": {"schema": schema.model_json_schema()}}
    if task.takes_audio:
        fields = {"file": {"type": "string", "format": "binary"}, "model": {"type": "string"}}
        form = {"type": "object", "properties": fields, "required": ["file"]}
        content["multipart/form-data"] = {"schema": form}
    router.add_api_route(
        endpoint.path,
        answer,
        methods=["POST"],
        summary=TASK_FACTS[task.name].summary.capitalize(),
        description=f"`prediction` is {endpoint.prediction}.",
        response_model=TaskAnswer,
        responses=ERROR_RESPONSES,
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )


def _request_schema(task: AnyTask, names: Mapping[str, str]) -> type[RequestModel]:
    required = {
        field: (Text, Field(min_length=1, description=FIELDS[field]))
        for field, name in names.items()
        if task.inputs[name]
    }
    optional = {
        field: (Text | None, Field(default=None, description=FIELDS[field]))
        for field, name in names.items()
        if not task.inputs[name]
    }
    model = (Text | None, Field(default=None, description=MODEL))
    name = f"{task.name.title().replace('-', '')}Request"
    return create_model(name, __base__=RequestModel, model=model, **required, **optional)  # type: ignore[call-overload, no-any-return]


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_json(request: Request, schema: type[RequestModel]) -> Inputs:
    """Read a JSON body; raises ApiError, or ValidationError for what does not fit `schema`."""
    if (kind := _content_type(request)) != "application/json":
        raise ApiError(400, f"The body is of type {kind or 'none'}; send application/json.")
    return schema.model_validate_json(await request.body()).model_dump(exclude_none=True)


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"audio is not base64: {error}", param="audio") from error


async def _read_form(request: Request) -> tuple[bytes, Inputs]:
    """Read a recording as a file in a form, and the model's name."""
    async with request.form() as form:
        unknown = sorted(set(form) - {"file", "model"})
        if unknown:
            raise ApiError(400, f"unknown: {', '.join(unknown)}; a form takes file and model.", param=unknown[0])
        file, model = form.get("file"), form.get("model")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "Send the recording as the file of the form.", param="file")
        return await file.read(), {"model": model} if isinstance(model, str) else {}


async def _answer(
    handler: RequestHandler, metrics: Metrics, request: Request, model: str | None, inputs: Inputs
) -> JSONResponse:
    pending, row = await handler.predict(model, inputs)
    served, task = pending.job.served, pending.job.served.task
    try:
        async with until_disconnect(pending, request, metrics):
            prediction = await _prediction(pending, served, metrics)
    finally:
        pending.cancel()
    section = served.recipe.classify
    answer = TaskAnswer(
        model=served.name,
        task=task.name,
        text=task.format_answer(prediction, row),
        prediction=prediction,
        labels=list(section.labels or ()) or None if section else None,
        words=row.get("tokens"),
    )
    return JSONResponse(answer.model_dump(exclude_none=True))


async def _prediction(pending: PendingAnswer, served: ServedModel, metrics: Metrics) -> object:
    """Return what is predicted, or the text that is generated."""
    ids: list[int] = []
    async for event in pending.stream():
        if not isinstance(event, End):
            ids += event
        elif event.reason == "answer":
            return event.prediction
    metrics.prompt_tokens.labels(served.name).inc(len(pending.job.ids))
    metrics.answer_tokens.labels(served.name).inc(len(ids))
    return served.read(ids)
