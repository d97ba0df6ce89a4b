"""Between HTTP and the engine: a request becomes a job, and what the model's thread says reaches the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from llmtune.data.chat_rows import canonical_messages
from llmtune.data.completion_encoding import prompt_ids
from llmtune.data.rejected_rows import RowError
from llmtune.errors import DataError, LlmtuneError, RecipeError, nearest
from llmtune.serve.engine import Closing, End, Engine, Event, Job, OutOfMemory, QueueFull
from llmtune.serve.sampling import SETTINGS, wish_for
from llmtune.serve.schemas import ChatAsked, CompletionAsked, Refusal, Written
from llmtune.serve.served_model import Served

LONGEST = 1 << 15
"""Tokens of prompt and answer where a model does not say how far its positions reach."""


class Ticket:
    """One request in the engine, as the event loop sees it."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.engine, self.job = engine, job
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        job.deliver = self._put

    def _put(self, event: Event) -> None:
        """Hand an event over from the model's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    def submit(self) -> None:
        """Queue up.

        Raises Refusal where there is no room, or the server is about to stop.
        """
        try:
            self.engine.submit(self.job)
        except (QueueFull, Closing) as error:
            raise as_refusal(error) from error

    async def events(self) -> AsyncIterator[list[int] | End]:
        """Yield new token ids, all that are there at a time, and the end; raises Refusal for what went wrong."""
        while True:
            ids: list[int] = []
            event = await self.queue.get()
            while isinstance(event, list):
                ids += event
                if self.queue.empty():
                    break
                event = self.queue.get_nowait()
            if ids:
                yield ids
            if isinstance(event, BaseException):
                raise as_refusal(event) from event
            if isinstance(event, End):
                yield event
                return

    def cancel(self) -> None:
        """Give the answer up; does nothing where it is complete."""
        self.engine.cancel(self.job)


def as_refusal(error: BaseException) -> Refusal:
    """Say to a client what went wrong in the engine."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFull):
        message = f"The queue is full: ask again in {error.seconds} s."
        return Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(error.seconds)})
    if isinstance(error, Closing):
        return Refusal(503, "The server is about to stop.", code="stopping", headers={"Retry-After": "5"})
    if isinstance(error, OutOfMemory):
        message = "Out of memory: the answer was given up. Ask for a shorter one, or again."
        return Refusal(503, message, code="out_of_memory", headers={"Retry-After": "1"})
    if isinstance(error, DataError | RecipeError):
        return Refusal(400, "; ".join(problem.what for problem in error.problems))
    if isinstance(error, LlmtuneError):
        return Refusal(503, "; ".join(problem.what for problem in error.problems), code="environment")
    return Refusal(500, "Something went wrong in the server; its log says what.", code="internal_error")


class Desk:
    """Takes requests for the models of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.models: Mapping[str, Served] = engine.models

    @property
    def first(self) -> Served:
        """The model that is asked where a request names none."""
        return next(iter(self.models.values()))

    def find(self, name: str | None) -> Served:
        """Return the model of a name; raises Refusal where there is none."""
        if name is None:
            return self.first
        if name not in self.models:
            known = ", ".join(self.models)
            message = f"There is no model {name!r}.{nearest(name, tuple(self.models))} Models: {known}."
            raise Refusal(404, message, param="model", code="model_not_found")
        return self.models[name]

    def chat(self, asked: ChatAsked) -> Ticket:
        """Queue a conversation up for its next answer."""
        served = self.find(asked.model)
        row, turn = read_messages(asked)
        try:
            ids = served.task.prompt_ids(row, served.processor, served.recipe)
        except LlmtuneError as error:
            raise Refusal(400, "; ".join(problem.what for problem in error.problems), param="messages") from error
        return self._queue(served, ids, asked, asked.max_completion_tokens or asked.max_tokens, turn)

    def complete(self, asked: CompletionAsked) -> Ticket:
        """Queue a text up to be gone on from."""
        served = self.find(asked.model)
        first = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
        if isinstance(first, str):
            ids = text_ids(first, served)
        else:
            ids = [token for token in asked.prompt if isinstance(token, int)]
            wrong = [token for token in ids if token >= served.vocabulary]
            if wrong:
                message = f"Token {wrong[0]} is outside of the vocabulary, which has {served.vocabulary}."
                raise Refusal(400, message, param="prompt")
        return self._queue(served, ids, asked, asked.max_tokens, 0)

    def ask(self, name: str | None, given: Mapping[str, str | None]) -> tuple[Ticket, Served, dict[str, Any]]:
        """Queue up what a task asks for; returns the row beside the ticket."""
        served = self.find(name)
        task = served.task
        row = task.make_row(given)
        if task.predicts:
            job = Job(served, lambda event: None, row=row)
        else:
            try:
                ids = task.prompt_ids(row, served.processor, served.recipe)
            except LlmtuneError as error:
                raise as_refusal(error) from error
            job = self._written(served, ids, {}, None, served.recipe.seed)
        return self._submit(job), served, row

    def _queue(self, served: Served, ids: list[int], asked: Written, wanted: int | None, turn: int) -> Ticket:
        stated = {name: getattr(asked, name) for name in SETTINGS}
        seed = served.recipe.seed + turn if asked.seed is None else asked.seed
        return self._submit(self._written(served, ids, stated, wanted, seed))

    def _written(
        self, served: Served, ids: Sequence[int], stated: dict[str, Any], wanted: int | None, seed: int
    ) -> Job:
        room = (served.context or LONGEST) - len(ids)
        if room < (wanted or 1):
            asked = f" and the answer may have {wanted}" if wanted else ""
            message = f"The prompt has {len(ids)} tokens{asked}, but the model's context holds {room + len(ids)}."
            raise Refusal(400, message, param="max_tokens" if room > 0 else None, code="context_length_exceeded")
        new = wanted or min(room, served.recipe.generation.max_new_tokens)
        return Job(served, lambda event: None, ids=ids, wish=wish_for(served.recipe, stated, new, seed))

    def _submit(self, job: Job) -> Ticket:
        ticket = Ticket(self.engine, job)
        ticket.submit()
        return ticket


def read_messages(asked: ChatAsked) -> tuple[dict[str, Any], int]:
    """Return the row of a conversation that wants an answer, and how many messages it has without the system's.

    They are checked as rows are; so is their order, behind which an answer is put for that alone.
    """
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    if messages[-1]["role"] == "assistant":
        raise Refusal(400, "The last message is the assistant's: there is nothing to answer.", param="messages")
    try:
        row = canonical_messages([*messages, {"role": "assistant", "content": "-"}])
    except RowError as error:
        raise Refusal(400, f"messages: {error}", param="messages") from error
    row["messages"] = row["messages"][:-1]
    if all(message["role"] == "system" for message in row["messages"]):
        raise Refusal(400, "messages: there is no question, only a system message.", param="messages")
    return dict(row), sum(message["role"] != "system" for message in row["messages"])


def text_ids(text: str, served: Served) -> list[int]:
    """Return the ids of a text to go on from, as task completion makes them.

    A text that begins with the start token, such as a rendered chat template, is not given a second one.
    """
    start = served.processor.bos_token
    if start and text.startswith(str(start)):
        ids: list[int] = served.processor(text, add_special_tokens=False)["input_ids"]
        return ids
    return prompt_ids(text, served.processor)
