"""HTTP requests and responses with OpenAI's names, and errors in OpenAI's format."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from openai.types import ErrorObject, Model
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmtune.data.chat_rows import MAX_MESSAGES
from llmtune.errors import DataError, LlmtuneError, RecipeError

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
"""Unsupported parameters of OpenAI's API, with the values that have no effect and are accepted."""
MIN_TEMPERATURE = 0.01
"""Lower temperatures are practically 0, and logits overflow."""


FilledText = Annotated[str, Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]


class RequestModel(BaseModel):
    """Parameters that a client may send; other parameters are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, value: object) -> object:
        """Drop parameters without effect; refuse lone surrogates, which JSON allows (`\\ud800`)."""
        if not isinstance(value, dict):
            return value
        for key, one in value.items():
            try:
                json.dumps(one, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{key}: contains a lone surrogate (half of a character)") from None
            except RecursionError:
                raise ValueError(f"{key}: nested too deeply") from None
        return {key: one for key, one in value.items() if key in cls.model_fields or not _is_neutral(key, one)}


def _is_neutral(key: str, value: object) -> bool:
    """Whether an unsupported parameter has a value without effect."""
    return value is None or any(type(value) is type(off) and value == off for off in NEUTRAL.get(key, ()))


class StreamOptions(RequestModel):
    """`stream_options`."""

    include_usage: bool | None = None
    """Send the usage counts in a last chunk."""


class GenerationRequest(RequestModel):
    """Parameters of all endpoints that generate token by token."""

    model: str | None = None
    """A name of `/v1/models`; default: the first one."""
    max_tokens: PositiveInt | None = None
    """Longest answer in tokens; default: the recipe's `generation.max_new_tokens`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 always takes the most likely token; else at least 0.01. Default: the recipe's."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the most likely tokens whose probabilities add up to this."""
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Sample from this many of the most likely tokens; 0: all. (Not in OpenAI's API.)"""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample from tokens at least this likely, relative to the most likely one. (Not in OpenAI's API.)"""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """Above 1 makes repeated tokens less likely. (Not in OpenAI's API.)"""
    stop: FilledText | Annotated[list[FilledText], Field(max_length=4)] | None = None
    """Up to four stop texts; the answer ends before the first one."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Random seed; default: the recipe's, so repeated requests get the same answer."""
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    """Number of answers: 1."""
    stream: bool | None = None
    """Send the answer in pieces as it is generated."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    return_token_ids: bool | None = None
    """Also return the token ids of prompt and answer. (Not in OpenAI's API.)"""
    user: str | None = None
    """The end user: accepted, but not stored."""

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        if self.temperature is not None and 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {MIN_TEMPERATURE}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class FunctionDefinition(RequestModel):
    """A tool's description and parameters."""

    name: FilledText
    description: str | None = None
    parameters: dict[str, object] | None = None
    """As JSON Schema."""
    strict: bool | None = None
    """Accepted, but arguments are not forced to match the schema."""


class ToolDefinition(RequestModel):
    """A tool that the model may call; in `tool_choice` its name is enough."""

    type: Literal["function"]
    function: FunctionDefinition

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.name


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, object]], Field(min_length=1, max_length=MAX_MESSAGES)]
    """Each has `role` and `content`: text, or a list of text parts. An answer may have `tool_calls`, and
    `reasoning_content` (not in OpenAI's API)."""
    max_completion_tokens: PositiveInt | None = None
    """OpenAI's newer name for `max_tokens`."""
    tools: list[ToolDefinition] | None = None
    """Tools that the answer may call."""
    tool_choice: Literal["none", "auto", "required"] | ToolDefinition | None = None
    """`none` hides the tools from the model, `auto` (default) lets it choose; `required`, or a tool, forces the answer
    to begin with a call."""
    chat_template_kwargs: dict[str, object] | None = None
    """Values for variables of the chat template; they override those of training. (Not in OpenAI's API.)"""

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same setting, but have different values")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    )
    """One text, or one list of token ids, to continue."""


class ModelCard(Model):
    """One served model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    task: str
    """The task it was tuned for."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together; null if the model does not say."""
    release: str | None = None
    """The release that it is of, `NAME@HASH`; null for a run or a base."""


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorResponse(BaseModel):
    """The body of every response other than 200."""

    error: ErrorObject


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "stopping"]
    release: str | None = None
    """The release that answers requests now, `NAME@HASH`; null if no release is served."""


class ApiError(Exception):
    """A refused or failed request: status and message, sent in OpenAI's format."""

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

    @classmethod
    def of(cls, error: BaseException, param: str | None = None) -> ApiError:
        """Convert an error to the one that a client sees."""
        if isinstance(error, cls):
            return error
        if isinstance(error, LlmtuneError):
            message = "; ".join(problem.what for problem in error.problems)
            if isinstance(error, DataError | RecipeError):
                return cls(400, message, param=param)
            return cls(503, message, code="environment")
        return cls(500, "Internal error; see the server's log.", code="internal_error")

    def content(self) -> dict[str, object]:
        """Return the body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


ERROR_RESPONSES: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "A parameter is invalid, unknown or not supported; the message names it.",
        401: "The API key is missing or wrong.",
        403: "The request came from a page of another origin, or used another host name.",
        404: "No such model.",
        408: "The body did not arrive in time.",
        413: "The body is larger than this server accepts.",
        429: "The queue is full; `Retry-After` says when to retry.",
        503: "The server is shutting down, or out of memory.",
    }.items()
}
"""Other responses of any endpoint, for the OpenAPI document."""
