"""The model's thread: it answers one request at a time, in order of arrival; a client that leaves gives up its turn."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from math import ceil
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import GenerationConfig

from llmtune.errors import LlmtuneError
from llmtune.model.device import is_out_of_memory, release_memory
from llmtune.records import Prompt, Row
from llmtune.serve.schemas import ApiError
from llmtune.serve.served_model import Predicted, ServedModel

T = TypeVar("T")
MAX_RETRY_SECONDS = 60
"""Longest `Retry-After`, in seconds."""


class QueueFull(ApiError):
    """The queue is full; a client may retry after `seconds`."""

    def __init__(self, seconds: int) -> None:
        message = f"The queue is full: retry in {seconds} s."
        super().__init__(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


class Stopping(ApiError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__(503, "The server is shutting down.", code="stopping", headers={"Retry-After": "5"})


class OutOfMemory(ApiError):
    """An answer did not fit into memory."""

    def __init__(self) -> None:
        message = "Out of memory: the answer was aborted. Request a shorter one, or retry."
        super().__init__(503, message, code="out_of_memory", headers={"Retry-After": "1"})


class ModelCall(NamedTuple):
    """Work for the model's thread."""

    work: Callable[[], Any]
    result: Future[Any]
    begun: bool
    """Whether it continues a request, which a stop lets finish."""


class Engine:
    """Run models on a thread of their own, from `start` until `close`.

    All methods are called in the thread of the event loop, except `replace` and `stop`.
    """

    def __init__(self, models: Mapping[str, ServedModel], *, max_queue: int) -> None:
        self.models, self.max_queue = models, max_queue
        self.requests = 0
        """Requests in progress; all but one of them wait."""
        self.deadline: float | None = None
        """Time of the monotonic clock at which a running answer is cut off; None until the server stops."""
        self.answer_seconds = 1.0
        """Moving average of the time per answer."""
        self.calls: SimpleQueue[ModelCall | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether the engine accepts requests."""
        return self.thread.is_alive() and self.deadline is None

    @property
    def expired(self) -> bool:
        """Whether the grace period is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def replace(self, models: Mapping[str, ServedModel]) -> None:
        """Serve other models from the next request on; the old ones answer earlier requests, and are then freed."""
        self.models = models
        self.calls.put(ModelCall(release_memory, Future(), begun=True))

    def stop(self, grace_seconds: float) -> None:
        """Refuse new and waiting requests; the running one has `grace_seconds` to finish."""
        if self.deadline is None:
            self.deadline = time.monotonic() + grace_seconds

    def close(self, seconds: float) -> None:
        """Cut off the running answer, and wait up to `seconds` for the thread to end."""
        self.deadline = time.monotonic()
        self.calls.put(None)
        self.thread.join(seconds)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it is in progress; raises QueueFull or Stopping."""
        if not self.ready:
            raise Stopping
        if self.requests > self.max_queue:
            raise QueueFull(max(1, min(MAX_RETRY_SECONDS, ceil(self.requests * self.answer_seconds))))
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def run(self, work: Callable[[], T], *, begun: bool = False) -> T:
        """Return the result of `work`, done in the model's thread after all earlier work; raises ApiError."""
        result: Future[T] = Future()
        self.calls.put(ModelCall(work, result, begun))
        return await asyncio.wrap_future(result)

    def _work(self) -> None:
        with torch.inference_mode():
            while (call := self.calls.get()) is not None:
                if call.result.set_running_or_notify_cancel():
                    self._do(call)
                del call  # it may hold the last reference to a replaced model

    def _do(self, call: ModelCall) -> None:
        """Do one call; an error fails its request only."""
        started = time.monotonic()
        try:
            if self.expired or not (call.begun or self.deadline is None):
                raise Stopping
            call.result.set_result(call.work())
        except Exception as error:  # noqa: BLE001 - delivered to the client that waits; the thread continues
            if isinstance(error, RuntimeError | MemoryError | OSError) and is_out_of_memory(error):
                call.result.set_exception(OutOfMemory())
                release_memory()
                return
            if not isinstance(error, ApiError | LlmtuneError):
                traceback.print_exception(error)
            call.result.set_exception(ApiError.of(error))
        self.answer_seconds += 0.2 * (time.monotonic() - started - self.answer_seconds)


async def predict_parts(engine: Engine, served: ServedModel, parts: Sequence[Sequence[Row]]) -> list[Predicted]:
    """Return the predictions of a request's rows, made a part at a time: other requests get their turn in between."""
    predicted: list[Predicted] = []
    with engine.admitted():
        for part in parts:
            predicted += await engine.run(partial(served.predict, part), begun=bool(predicted))
    return predicted


async def generate_ids(
    engine: Engine, served: ServedModel, prompt: Prompt, settings: GenerationConfig, seed: int
) -> AsyncGenerator[list[int]]:
    """Yield the ids of an answer, all that are ready at a time. Closing the iterator ends the generation.

    Raises ApiError if the queue is full, the server is stopping, or the model fails.
    """
    events: asyncio.Queue[list[int] | None] = asyncio.Queue()
    loop, cancelled = asyncio.get_running_loop(), threading.Event()

    def deliver(ids: list[int] | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, ids)

    def work() -> None:
        ids = served.generate(prompt, settings, seed, deliver, lambda: cancelled.is_set() or engine.expired)
        if engine.expired and ids[-1] not in served.stops and len(ids) < settings.max_new_tokens:
            raise Stopping

    def end(answering: asyncio.Task[None]) -> None:
        events.put_nowait(None)
        if not answering.cancelled():
            answering.exception()  # a client that left does not await it

    with engine.admitted():
        answering = asyncio.create_task(engine.run(work))
        answering.add_done_callback(end)
        try:
            ready: list[list[int] | None] = []
            while None not in ready:
                ready = [await events.get()]
                while not events.empty():
                    ready.append(events.get_nowait())
                if ids := [token for some in ready if some for token in some]:
                    yield ids
            await answering
        finally:
            cancelled.set()
            answering.cancel()
