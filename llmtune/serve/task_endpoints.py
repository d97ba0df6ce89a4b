"""One endpoint for each task without OpenAI endpoints: its inputs, and its prediction."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field, create_model
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmtune.data.long_texts import MOST_CHARACTERS
from llmtune.errors import DataError, LlmtuneError
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.serve.chat_prompt import ServedPrompt
from llmtune.serve.engine import Engine, predict_parts
from llmtune.serve.generation_endpoints import answer_ids, in_text_thread, served_by_name, unless_disconnected
from llmtune.serve.schemas import ApiError, GenerationRequest, RequestModel
from llmtune.serve.served_model import Predicted
from llmtune.tasks.base import AnyTask

FIELDS = {
    "text": "The text; for a model that fills masks, including the mask tokens.",
    "pair": "The second text, if the model was trained on pairs.",
    "question": "The question.",
    "context": "The text that holds the answer.",
    "audio": "The recording (wav, flac, mp3, ogg), as base64.",
    "prompt": "The question.",
    "answer": "The answer to score.",
    "source_language": "The language of the text; default: the recipe's.",
    "target_language": "The language of the translation; default: the recipe's.",
}
MODEL = "A name of `/v1/models`; default: the first one."


class TaskAnswer(BaseModel):
    """The answer of a task."""

    model: str
    task: str
    text: str = Field(description="The answer as text, for people.")
    prediction: object
    labels: list[str] | None = Field(default=None, description="Names of the classes, in the order of the scores.")
    words: list[str] | None = Field(default=None, description="The words that the tags belong to.")
    scores: list[dict[str, float]] | None = Field(default=None, description="The probability of each tag, by word.")
    decision: Literal["decide", "ask"] | None = Field(default=None, description="Whether the answer is decided.")
    confidence: float | None = Field(default=None, description="Its probability, before the temperature.")
    set: list[str] | None = Field(default=None, description="The prediction set: labels that may be right.")
    truncated: bool | None = Field(default=None, description="Whether only the start of the text was read.")
    out_of_scope: bool | None = Field(default=None, description="Whether the input is unlike the validation rows.")


def mount_task(app: FastAPI, task: AnyTask, engine: Engine) -> None:
    """Add the endpoint of a task to `app`."""
    endpoint = task.endpoint
    assert endpoint is not None, "a task without OpenAI's endpoints has its own"
    names = {endpoint.prompt_field if name == "prompt" else name: name for name in task.inputs}
    schema = request_schema(task, names)

    async def answer(request: Request) -> Response:
        if task.model_kind.takes_audio and content_type(request) == "multipart/form-data":
            recording, fields = await read_form(request)
        else:
            fields = await read_fields(request, schema)
            recording = decode_base64(fields.pop("audio")) if task.model_kind.takes_audio else b""
        model = fields.pop("model", None)
        inputs: dict[str, str | None] = {names[field]: value for field, value in fields.items()}
        with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
            if recording:  # a temporary file for the duration of the request
                path = Path(folder) / "recording"
                path.write_bytes(recording)
                inputs["audio"] = str(path)
            try:
                return await unless_disconnected(request, answer_row(engine, model, inputs))
            except ApiError as error:
                error.message = error.message.replace(f"{folder}/", "")  # hide local paths
                raise

    content: dict[str, object] = {"application/json": {"schema": schema.model_json_schema()}}
    if task.model_kind.takes_audio:
        form_fields = {"file": {"type": "string", "format": "binary"}, "model": {"type": "string"}}
        form = {"type": "object", "properties": form_fields, "required": ["file"]}
        content["multipart/form-data"] = {"schema": form}
    app.add_api_route(
        endpoint.path,
        answer,
        methods=["POST"],
        summary=TASK_FACTS[task.name].summary.capitalize(),
        description=f"`prediction` is {endpoint.prediction}.",
        response_model=TaskAnswer,
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )


def request_schema(task: AnyTask, names: Mapping[str, str]) -> type[RequestModel]:
    """Return the schema of a request: the task's inputs and the model's name."""
    fields: dict[str, object] = {"model": (str | None, Field(default=None, description=MODEL))}
    for field, name in names.items():
        most = None if name == "audio" else MOST_CHARACTERS
        required = (str, Field(min_length=1, max_length=most, description=FIELDS[field]))
        optional = (str | None, Field(default=None, max_length=most, description=FIELDS[field]))
        fields[field] = required if task.inputs[name] else optional
    name = f"{task.name.title().replace('-', '')}Request"
    return create_model(name, __base__=RequestModel, **fields)  # type: ignore[call-overload, no-any-return]


def content_type(request: Request) -> str:
    """Return the content type of a request, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_fields(request: Request, schema: type[RequestModel]) -> dict[str, str]:
    """Read a JSON body; raises ApiError, or ValidationError if it does not fit `schema`."""
    if (kind := content_type(request)) != "application/json":
        raise ApiError(400, f"The content type is {kind or 'missing'}. Send application/json.")
    return schema.model_validate_json(await request.body()).model_dump(exclude_none=True)


def decode_base64(text: str) -> bytes:
    """Return the recording in a JSON body."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"audio is not base64: {error}", param="audio") from error


async def read_form(request: Request) -> tuple[bytes, dict[str, str]]:
    """Read a recording as a file in a form, and the model's name."""
    async with request.form() as form:
        unknown = sorted(set(form) - {"file", "model"})
        if unknown:
            raise ApiError(400, f"unknown: {', '.join(unknown)}; a form takes file and model.", param=unknown[0])
        file, model = form.get("file"), form.get("model")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "Send the recording as the file of the form.", param="file")
        return await file.read(), {"model": model} if isinstance(model, str) else {}


async def answer_row(engine: Engine, model: str | None, inputs: Mapping[str, str | None]) -> JSONResponse:
    """Predict from a task's inputs, or generate an answer to the prompt made of them."""
    served = served_by_name(engine, model)
    task, row = served.task, served.task.make_row(inputs)
    truncated = None
    if task.predicts:
        try:
            truncated = await in_text_thread(served.check_length, row) or None
        except DataError as error:
            message = f"{error.problems[0].what}. {error.problems[0].fix}"
            field = task.endpoint.prompt_field if task.endpoint else None
            raise ApiError(400, message, param=field, code="context_length_exceeded") from error
        except LlmtuneError as error:
            raise ApiError.of(error) from error
        (predicted,) = await predict_parts(engine, served, [[row]])
    else:
        try:
            prompt = await in_text_thread(task.prompt, row, served.processor, served.recipe)
        except LlmtuneError as error:
            raise ApiError.of(error) from error
        generated = answer_ids(engine, served, ServedPrompt(prompt), GenerationRequest(), None)
        predicted = Predicted(served.read([token async for ids in generated for token in ids]), [], {})
    labels = [*served.recipe.classes] if TASK_FACTS[task.name].answer_kind == "labels" else []
    words = task.words(row)
    answer = TaskAnswer(
        model=served.name,
        task=task.name,
        text=task.format_answer(predicted.value, row),
        prediction=predicted.value,
        labels=labels or None,
        words=words,
        scores=None if words is None else predicted.probabilities,
        truncated=truncated,
        **predicted.decision,
    )
    return JSONResponse(answer.model_dump(exclude_none=True))
