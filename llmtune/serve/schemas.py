"""Requests and responses over HTTP, by OpenAI's names; and errors in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated, Literal

from openai.types import Model
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llmtune.data.chat_rows import MAX_MESSAGES

NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "suffix": ("",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
"""Parameters of OpenAI's that are not supported, and the values by which they ask for nothing."""
MIN_TEMPERATURE = 0.01
"""Temperatures below it are as good as 0, and numbers overflow."""


def _no_surrogates(text: str) -> str:
    """Refuse halves of characters, which JSON can hold (`\\ud800`) and no tokenizer reads."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("half of a character (a lone surrogate)")
    return text


Text = Annotated[str, AfterValidator(_no_surrogates)]
FilledText = Annotated[Text, Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]


class RequestModel(BaseModel):
    """What a client may send; anything else is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: one for key, one in value.items() if key in cls.model_fields or not _is_neutral(key, one)}


def _is_neutral(key: str, value: object) -> bool:
    """Whether a parameter that is not supported asks for nothing."""
    return value is None or any(type(value) is type(off) and value == off for off in NEUTRAL.get(key, ()))


class StreamOptions(RequestModel):
    """`stream_options`."""

    include_usage: bool | None = None
    """Send the usage counts in a last chunk."""


class GenerationRequest(RequestModel):
    """Parameters of every answer that is generated token by token."""

    model: Text | None = None
    """A name of `/v1/models`; default: the first one."""
    max_tokens: PositiveInt | None = None
    """Longest answer in tokens; default: the recipe's `generation.max_new_tokens`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token each time; else at least 0.01. Default: the recipe's."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among tokens that make up this probability."""
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Draw among this many of the likeliest tokens; 0: all. (Not in OpenAI's API.)"""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw among tokens at least this likely, relative to the likeliest. (Not in OpenAI's API.)"""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """Above 1 makes repeated tokens less likely. (Not in OpenAI's API.)"""
    stop: FilledText | Annotated[list[FilledText], Field(max_length=4)] | None = None
    """A text, or up to four, before which the answer ends."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Where random draws start from; default: the recipe's seed, so the same each time."""
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    """Answers: one."""
    stream: bool | None = None
    """Send the answer in pieces as it is generated."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    return_token_ids: bool | None = None
    """Also return the token ids of prompt and answer. (Not in OpenAI's API.)"""
    user: Text | None = None
    """Whom the request is for: accepted, and kept nowhere."""

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        if self.temperature is not None and 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature is 0, or at least {MIN_TEMPERATURE}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed with stream: true alone")
        return self


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class FunctionCall(RequestModel):
    """Which function an earlier answer called."""

    name: Text
    arguments: Text
    """As JSON text."""


class ToolCall(RequestModel):
    """A call that an earlier answer made."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(RequestModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_MESSAGES)] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    """The thoughts of an earlier answer, which the chat template may leave out. (Not in OpenAI's API.)"""


class FunctionDefinition(RequestModel):
    """What a tool does, and what it takes."""

    name: FilledText
    description: Text | None = None
    parameters: dict[str, object] | None = None
    """As JSON Schema."""
    strict: bool | None = None
    """Accepted; what a model writes is not held to the schema."""


class ToolDefinition(RequestModel):
    """A tool that may be called."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(RequestModel):
    """The name of a function."""

    name: FilledText


class NamedToolChoice(RequestModel):
    """The tool to call."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: PositiveInt | None = None
    """OpenAI's newer name of `max_tokens`."""
    tools: list[ToolDefinition] | None = None
    """Tools that the answer may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    """`none` shows the model no tool, `auto` (default) leaves it the choice; `required`, or a tool, begins the answer
    with a call."""
    chat_template_kwargs: dict[str, object] | None = None
    """Values for variables of the chat template, in place of those that the model was trained with. (Not in OpenAI's
    API.)"""

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same setting, and here they differ")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    )
    """One text, or one list of token ids, to continue."""


class ModelCard(Model):
    """One model that can be asked."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    task: str
    """What it was tuned for."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together; null where the model does not say."""


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every response that is not a 200."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether the server lives, or takes requests."""

    status: Literal["ok", "stopping"]


class ApiError(Exception):
    """A request that is refused or failed: status and message, sent in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def content(self) -> dict[str, object]:
        """Return the body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=detail).model_dump()


ERROR_RESPONSES: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "A parameter is wrong, unknown or not supported: the message names it.",
        401: "The API key is missing or wrong.",
        403: "Asked by a page of another origin, or under a foreign host name.",
        404: "No such model.",
        408: "The body did not arrive in time.",
        413: "The body is larger than this server takes.",
        429: "The queue is full; `Retry-After` says when to ask again.",
        503: "The server is about to stop, or out of memory.",
    }.items()
}
"""What any endpoint may respond instead; for the OpenAPI document."""
