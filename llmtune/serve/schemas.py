"""What is asked and answered over HTTP, by OpenAI's names; and what is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
"""Parameters of OpenAI's that are not supported, and the values by which they ask for nothing."""
COLDEST = 0.01
"""Temperatures below it are as good as 0, and numbers overflow."""


def _whole(text: str) -> str:
    """Refuse halves of characters, which JSON can hold (`\\ud800`) and no tokenizer reads."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("half of a character (a lone surrogate)")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Asked(BaseModel):
    """What a client may say; anything else is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_neutral_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        own = cls.model_fields
        return {key: one for key, one in value.items() if key in own or not _is_neutral(key, one)}


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a parameter that is not supported asks for nothing."""
    return value is None or any(type(value) is type(off) and value == off for off in NEUTRAL.get(key, ()))


class StreamOptions(Asked):
    """`stream_options`."""

    include_usage: bool | None = Field(default=None, description="Send the usage counts in a last chunk.")


class Written(Asked):
    """What can be asked of every answer that is written token by token."""

    model: Text | None = Field(default=None, description="A name of `/v1/models`; the first one if left out.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Longest answer in tokens; the recipe's `generation.max_new_tokens` if left out."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 takes the likeliest token each time; else at least 0.01. Default: the recipe's."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Draw among tokens that make up this probability."
    )
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None, description="Draw among so many of the likeliest tokens; 0: all. (Not in OpenAI's API.)"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Draw among tokens at least so likely, relative to the likeliest. (Not in OpenAI's.)"
    )
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = Field(
        default=None, description="Above 1 makes repeated tokens less likely. (Not in OpenAI's API.)"
    )
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = Field(default=None, description="A text, or up to four, before which the answer ends.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        default=None, description="Where random draws start from; the recipe's seed if left out: the same each time."
    )
    n: Annotated[int, Field(ge=1, le=1)] | None = Field(default=None, description="Answers: one.")
    stream: bool | None = Field(default=None, description="Send the answer in pieces as it is written.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    return_token_ids: bool | None = Field(
        default=None, description="Also give the token ids of prompt and answer. (Not in OpenAI's API.)"
    )
    user: Text | None = Field(default=None, description="Whom the request is for: taken, and kept nowhere.")

    @model_validator(mode="after")
    def _check(self) -> Written:
        if self.temperature is not None and 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature is 0, or at least {COLDEST}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed with stream: true alone")
        return self


class TextPart(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class FunctionCall(Asked):
    """Which function an earlier answer called."""

    name: Text
    arguments: Text = Field(description="As JSON text.")


class ToolCall(Asked):
    """A call that an earlier answer made."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Asked):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None


class ChatAsked(Written):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="OpenAI's newer name of `max_tokens`."
    )

    @model_validator(mode="after")
    def _one_length(self) -> ChatAsked:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same setting, and here they differ")
        return self


class CompletionAsked(Written):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    ) = Field(description="One text, or one list of token ids, to go on from.")


class Usage(BaseModel):
    """Counts of tokens; the one that ended the answer is among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Said(BaseModel):
    """The answer's message."""

    role: Literal["assistant"] = "assistant"
    content: str


Finish = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """The answer: there is one."""

    index: int = 0
    message: Said
    logprobs: None = None
    finish_reason: Finish
    token_ids: list[int] | None = None


class ChatAnswer(BaseModel):
    """`chat.completion`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class TextChoice(BaseModel):
    """What follows the prompt: there is one."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Finish
    token_ids: list[int] | None = None


class TextAnswer(BaseModel):
    """`text_completion`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ModelCard(BaseModel):
    """One model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llmtune"
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


class ErrorAnswer(BaseModel):
    """Every answer that is not a 200."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether the server lives, or takes requests."""

    status: Literal["ok", "stopping"]


class Refusal(Exception):
    """A request that is not answered: status, and what is said about it in OpenAI's shape."""

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

    def content(self) -> dict[str, Any]:
        """Return the body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorAnswer(error=detail).model_dump()


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "A parameter is wrong, unknown or not supported: the message names it."},
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong."},
    403: {"model": ErrorAnswer, "description": "Asked by a page of another origin, or under a foreign host name."},
    404: {"model": ErrorAnswer, "description": "No such model."},
    408: {"model": ErrorAnswer, "description": "The body did not arrive in time."},
    413: {"model": ErrorAnswer, "description": "The body is larger than this server takes."},
    429: {"model": ErrorAnswer, "description": "The queue is full; `Retry-After` says when to ask again."},
    503: {"model": ErrorAnswer, "description": "The server is about to stop, or out of memory."},
}
"""What any endpoint may answer instead; for the OpenAPI page."""
