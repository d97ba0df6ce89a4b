"""Between HTTP and the engine: a request becomes a job, and its events reach the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import ParamSpec, TypeVar

from llmtune.data.chat_rows import canonical_messages
from llmtune.data.chat_template import Tools
from llmtune.data.completion_encoding import prompt_ids
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, LlmtuneError, RecipeError, nearest
from llmtune.records import Row
from llmtune.serve.engine import Engine
from llmtune.serve.request_queue import End, Event, Job
from llmtune.serve.schemas import ApiError, ChatRequest, CompletionRequest, GenerationRequest, NamedToolChoice
from llmtune.serve.served_model import DRAWS, ServedModel

_TEXT_THREAD = ThreadPoolExecutor(1, "text")
"""One: tokenizers are not made to be used by several threads at a time."""
P = ParamSpec("P")
T = TypeVar("T")
MAX_POSITIONS = 1 << 15
"""Tokens of prompt and answer where a model does not say how far its positions reach."""
ARGUMENTS: Sequence[dict[str, object]] = ({}, {"a": 1}, {"b": ""})
"""What calls are written with, to see where their arguments begin."""
ANY_LENGTH = 1 << 30


class PendingAnswer:
    """One job in the engine, as the event loop sees it.

    `begun` are the last ids of its prompt, where those are the beginning of the answer.

    Raises ApiError where there is no room in the queue, or the server is about to stop.
    """

    def __init__(self, engine: Engine, job: Job, tools: Tools = None, begun: Sequence[int] = ()) -> None:
        self.engine, self.job, self.tools, self.begun = engine, job, tools, begun
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        job.deliver = deliver
        engine.submit(job)

    async def stream(self) -> AsyncIterator[list[int] | End]:
        """Yield new token ids, all that are there at a time, and the end; raises ApiError for what went wrong."""
        while True:
            ids: list[int] = []
            event = await self.events.get()
            while isinstance(event, list):
                ids += event
                if self.events.empty():
                    break
                event = self.events.get_nowait()
            if ids:
                yield ids
            if isinstance(event, BaseException):
                raise as_api_error(event) from event
            if isinstance(event, End):
                yield event
                return

    def cancel(self) -> None:
        """Give the answer up; does nothing where it is complete."""
        self.engine.queue.cancel(self.job)


def as_api_error(error: BaseException) -> ApiError:
    """Return what a client is told of an error in the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LlmtuneError):
        message = "; ".join(problem.what for problem in error.problems)
        if isinstance(error, DataError | RecipeError):
            return ApiError(400, message)
        return ApiError(503, message, code="environment")
    return ApiError(500, "Something went wrong in the server; see its log.", code="internal_error")


async def beside_the_loop(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do work on text in the thread for it, so that a large request holds up no other answer."""
    return await asyncio.get_running_loop().run_in_executor(_TEXT_THREAD, partial(work, *args, **kwargs))


class RequestHandler:
    """Takes requests for the models of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.default = next(iter(engine.models.values()))
        """The model that is asked where a request names none."""

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a name; raises ApiError where there is none."""
        models = self.engine.models
        if name is not None and name not in models:
            message = f"There is no model {name!r}.{nearest(name, tuple(models))} Models: {', '.join(models)}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.default if name is None else models[name]

    async def chat(self, request: ChatRequest) -> PendingAnswer:
        """Queue a conversation for its next answer."""
        served = self.find(request.model)
        row, turn = await beside_the_loop(read_messages, request)
        asked = await beside_the_loop(with_values, served, request.chat_template_kwargs or {})
        try:
            ids = await beside_the_loop(asked.task.prompt_ids, row, asked.processor, asked.recipe)
            await beside_the_loop(check_shown, row, ids, asked)
            begun = await beside_the_loop(begin_call, row, request, asked)
        except LlmtuneError as error:
            raise ApiError(400, as_api_error(error).message, param="messages") from error
        longest = request.max_completion_tokens or request.max_tokens
        job = self._job(served, [*ids, *begun], request, longest, turn)
        return PendingAnswer(self.engine, job, row.get("tools"), begun)

    async def complete(self, request: CompletionRequest) -> PendingAnswer:
        """Queue a text to be continued."""
        served = self.find(request.model)
        first = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
        if isinstance(first, str):
            ids = await beside_the_loop(text_ids, first, served)
        else:
            ids = [token for token in request.prompt if isinstance(token, int)]
            outside = [token for token in ids if token >= served.vocabulary]
            if outside:
                message = f"Token {outside[0]} is outside of the vocabulary, which has {served.vocabulary}."
                raise ApiError(400, message, param="prompt")
        return PendingAnswer(self.engine, self._job(served, ids, request, request.max_tokens, 0))

    async def predict(self, name: str | None, inputs: Mapping[str, str | None]) -> tuple[PendingAnswer, Row]:
        """Queue the inputs of a task; returns the row beside the answer."""
        served = self.find(name)
        task = served.task
        row = task.make_row(inputs)
        if task.predicts:
            return PendingAnswer(self.engine, Job(served, row=row)), row
        try:
            ids = await beside_the_loop(task.prompt_ids, row, served.processor, served.recipe)
        except LlmtuneError as error:
            raise as_api_error(error) from error
        return PendingAnswer(self.engine, _make_job(served, ids, {}, None, served.recipe.seed)), row

    def _job(
        self, served: ServedModel, ids: list[int], request: GenerationRequest, max_tokens: int | None, turn: int
    ) -> Job:
        stated = request.model_dump(include={*DRAWS, "repetition_penalty"}, exclude_none=True)
        seed = served.recipe.seed + turn if request.seed is None else request.seed
        return _make_job(served, ids, stated, max_tokens, seed)


def _make_job(
    served: ServedModel, ids: list[int], stated: Mapping[str, float], max_tokens: int | None, seed: int
) -> Job:
    room = (served.context or MAX_POSITIONS) - len(ids)
    if room < (max_tokens or 1):
        answer = f" and the answer may have {max_tokens}" if max_tokens else ""
        message = f"The prompt has {len(ids)} tokens{answer}, but the model's context holds {room + len(ids)}."
        raise ApiError(400, message, param="max_tokens" if room > 0 else None, code="context_length_exceeded")
    new_tokens = max_tokens or min(room, served.recipe.generation.max_new_tokens)
    return Job(served, ids=ids, settings=served.request_settings(stated, new_tokens), seed=seed)


def read_messages(request: ChatRequest) -> tuple[Row, int]:
    """Return the row of a conversation that wants an answer, and how many messages it has without the system's.

    They are checked as rows are, and so is their order: for that alone an answer is put behind them.
    """
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    if messages[-1]["role"] == "assistant":
        raise ApiError(400, "The last message is the assistant's: there is nothing to answer.", param="messages")
    tools = shown_tools(request)
    try:
        row = canonical_messages([*messages, {"role": "assistant", "content": "-"}], tools)
    except RowError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error
    row["messages"] = row["messages"][:-1]
    turn = sum(message["role"] != "system" for message in row["messages"])
    if not turn:
        raise ApiError(400, "messages: there is no question, only a system message.", param="messages")
    return dict(row), turn


def with_values(served: ServedModel, values: Mapping[str, object]) -> ServedModel:
    """Return the model with a client's values for its chat template; raises ApiError for one that it never reads."""
    if not values:
        return served
    model = served.recipe.model
    section = model.model_copy(update={"chat_template_kwargs": {**model.chat_template_kwargs, **values}})
    try:
        return replace(served, recipe=served.recipe.model_copy(update={"model": section}))
    except LlmtuneError as error:
        raise ApiError(400, as_api_error(error).message, param="chat_template_kwargs") from error


def text_ids(text: str, served: ServedModel) -> list[int]:
    """Return the ids of a text to continue, as task completion makes them.

    A text that begins with the start token, such as a rendered chat template, gets no second one.
    """
    start = served.processor.bos_token
    if start and text.startswith(str(start)):
        ids: list[int] = served.processor(text, add_special_tokens=False)["input_ids"]
        return ids
    return prompt_ids(text, served.processor)


# Tools


def shown_tools(request: ChatRequest) -> list[dict[str, object]]:
    """Return the tools that the model sees; raises ApiError for a choice among none, or of another."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    choice = request.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools.", param="tool_choice")
    named = choice.function.name if isinstance(choice, NamedToolChoice) else None
    if named is not None and named not in (tool["function"]["name"] for tool in tools):
        raise ApiError(400, f"tool_choice names {named!r}, which is none of the tools.", param="tool_choice")
    return [] if choice == "none" else tools


def check_shown(row: Row, ids: Sequence[int], served: ServedModel) -> None:
    """Raise ApiError where the prompt is the same without the tools."""
    without = {key: value for key, value in row.items() if key != "tools"}
    if row.get("tools") and served.task.prompt_ids(without, served.processor, served.recipe) == ids:
        raise ApiError(400, "The chat template of this model shows it no tools.", param="tools")


def begin_call(row: Row, request: ChatRequest, served: ServedModel) -> list[int]:
    """Return the token ids that the answer begins with, so that it calls a tool; none where the model may choose.

    They are what all calls that are asked for have in common: up to the arguments of the tool that is named, or up to
    the name of one of several. Raises ApiError where the chat template writes no calls.
    """
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return []
    names = [tool.function.name for tool in request.tools or ()]
    names = [choice.function.name] if isinstance(choice, NamedToolChoice) else names
    calls = [{"name": name, "arguments": arguments} for name in names for arguments in ARGUMENTS]
    answers = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]} for call in calls
    ]
    rows = [{**row, "messages": [*row["messages"], answer]} for answer in answers]
    data = served.recipe.data.model_copy(update={"train_on": "last", "max_length": ANY_LENGTH})
    encoded = served.task.encode(rows, served.processor, served.recipe.model_copy(update={"data": data}))
    refused = [examples for examples in encoded if isinstance(examples, str)]
    if refused:
        raise ApiError(400, f"tool_choice: {refused[0]}", param="tool_choice")
    targets = [list(one[-1].input_ids[one[-1].spans[-2] :]) for one in encoded if not isinstance(one, str)]
    begun = [token for token, *_ in takewhile(lambda same: len({*same}) == 1, zip(*targets, strict=False))]
    if not begun:
        message = "This model's calls begin in no common way: tool_choice may be none or auto."
        raise ApiError(400, message, param="tool_choice")
    return begun
