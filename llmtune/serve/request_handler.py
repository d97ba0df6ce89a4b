"""Between HTTP and the engine: a request becomes a job, and its events reach the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from llmtune.data.chat_rows import canonical_messages
from llmtune.data.completion_encoding import prompt_ids
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, LlmtuneError, RecipeError, nearest
from llmtune.serve.request_queue import End, Event, Job
from llmtune.serve.sampling import SETTINGS, sampling_params
from llmtune.serve.schemas import ApiError, ChatRequest, CompletionRequest, GenerationRequest
from llmtune.serve.tool_choice import begin_call, check_shown, shown_tools

if TYPE_CHECKING:
    from llmtune.data.chat_template import Tools
    from llmtune.records import Row
    from llmtune.serve.engine import Engine
    from llmtune.serve.served_model import ServedModel

_TEXT_THREAD = ThreadPoolExecutor(1, "text")
"""One: tokenizers are not made to be used by several threads at a time."""
P = ParamSpec("P")
T = TypeVar("T")
MAX_POSITIONS = 1 << 15
"""Tokens of prompt and answer where a model does not say how far its positions reach."""


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
        try:
            ids = await beside_the_loop(served.task.prompt_ids, row, served.processor, served.recipe)
            await beside_the_loop(check_shown, row, ids, served)
            begun = await beside_the_loop(begin_call, row, request, served)
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
        stated = {name: getattr(request, name) for name in SETTINGS}
        seed = served.recipe.seed + turn if request.seed is None else request.seed
        return _make_job(served, ids, stated, max_tokens, seed)


def _make_job(
    served: ServedModel, ids: list[int], stated: Mapping[str, float | None], max_tokens: int | None, seed: int
) -> Job:
    room = (served.context or MAX_POSITIONS) - len(ids)
    if room < (max_tokens or 1):
        answer = f" and the answer may have {max_tokens}" if max_tokens else ""
        message = f"The prompt has {len(ids)} tokens{answer}, but the model's context holds {room + len(ids)}."
        raise ApiError(400, message, param="max_tokens" if room > 0 else None, code="context_length_exceeded")
    new_tokens = max_tokens or min(room, served.recipe.generation.max_new_tokens)
    return Job(served, ids=ids, sampling=sampling_params(served.recipe, stated, new_tokens, seed))


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


def text_ids(text: str, served: ServedModel) -> list[int]:
    """Return the ids of a text to continue, as task completion makes them.

    A text that begins with the start token, such as a rendered chat template, gets no second one.
    """
    start = served.processor.bos_token
    if start and text.startswith(str(start)):
        ids: list[int] = served.processor(text, add_special_tokens=False)["input_ids"]
        return ids
    return prompt_ids(text, served.processor)
