"""The bounded queue of requests: a full one answers 429 with Retry-After."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from transformers import GenerationConfig

from llmtune.records import Row
from llmtune.serve.schemas import ApiError
from llmtune.serve.served_model import ServedModel

MAX_RETRY_SECONDS = 60
"""Seconds that a client is told to wait at most before it asks again."""


class QueueFull(ApiError):
    """There is no room for another request, and when to ask again."""

    def __init__(self, seconds: int) -> None:
        message = f"The queue is full: ask again in {seconds} s."
        super().__init__(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


class Stopping(ApiError):
    """The server is about to stop."""

    def __init__(self) -> None:
        super().__init__(503, "The server is about to stop.", code="stopping", headers={"Retry-After": "5"})


@dataclass(frozen=True)
class End:
    """An answer is complete: `stop` or `length` for one that was generated, `answer` with what a task predicts."""

    reason: str
    prediction: object = None


Event = list[int] | End | BaseException
"""New token ids; the end; or what went wrong."""


@dataclass(eq=False)
class Job:
    """One request: a prompt to continue (`ids`, `settings`, `seed`), or a row to predict from."""

    served: ServedModel
    ids: Sequence[int] = ()
    settings: GenerationConfig | None = None
    seed: int = 0
    """Where random draws start from."""
    row: Row | None = None
    deliver: Callable[[Event], None] = lambda event: None
    """Called in the model's thread."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by a client that does not want the answer any more."""
    started: float = 0.0
    generated: int = 0

    @property
    def new_tokens(self) -> int:
        """The longest answer."""
        return int(self.settings.max_new_tokens) if self.settings else 0

    @property
    def positions(self) -> int:
        """Columns of keys and values that it may come to need."""
        return len(self.ids) + self.new_tokens


class RequestQueue:
    """Jobs that wait, by model, and the count of those that are being answered."""

    def __init__(self, models: Mapping[str, ServedModel], *, max_batch: int, max_queue: int) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.waiting: dict[ServedModel, deque[Job]] = {served: deque() for served in models.values()}
        self.changed = threading.Condition()
        self.running = 0
        self.deadline: float | None = None
        """When answers that are being generated are ended, by the monotonic clock; None until the server stops."""
        self.answer_seconds = 1.0
        """How long an answer took lately, the last ones counting most."""

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    @property
    def expired(self) -> bool:
        """Whether the time of grace is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: there is no room.
            Stopping: no new ones are taken.
        """
        with self.changed:
            if self.deadline is not None:
                raise Stopping
            if len(self) >= self.max_queue:
                rounds = len(self) / max(1, self.max_batch)
                raise QueueFull(max(1, min(MAX_RETRY_SECONDS, ceil(rounds * self.answer_seconds))))
            self.waiting[job.served].append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Let a job go: it leaves the queue, or its batch at the next step."""
        job.cancelled.set()
        with self.changed:
            if job in self.waiting[job.served]:
                self.waiting[job.served].remove(job)

    def stop(self, grace_seconds: float) -> None:
        """Take nothing new, turn away what waits, and give what is being generated this long to end."""
        with self.changed:
            if self.deadline is None:
                self.deadline = time.monotonic() + grace_seconds
            self.changed.notify()

    def wait(self) -> bool:
        """Wait for something to do; whether there is any, or all is ended. When stopping, waiting jobs fail."""
        with self.changed:
            self.changed.wait_for(lambda: len(self) or self.running or self.deadline is not None)
            if self.deadline is None:
                return True
            for jobs in self.waiting.values():
                while jobs:
                    jobs.popleft().deliver(Stopping())
            return self.running > 0

    def take(self, served: ServedModel, running: Sequence[Job], limit: int, budget: int | None) -> list[Job]:
        """Take jobs of a model: no more than `limit` with those that are `running`, in `budget` positions."""
        taken: list[Job] = []
        with self.changed:
            waiting = self.waiting[served]
            while waiting and len(running) + len(taken) < limit:
                present = [*running, *taken]
                longest = max(job.positions for job in (*present, waiting[0]))
                if budget is not None and present and (len(present) + 1) * longest > budget:
                    break
                job = waiting.popleft()
                if not job.cancelled.is_set():
                    job.started = time.monotonic()
                    taken.append(job)
            self.running += len(taken)
        return taken

    def leave(self, job: Job, event: Event | None) -> None:
        """Deliver the last event of a job that was running."""
        with self.changed:
            self.running -= 1
        if event is not None:
            job.deliver(event)
        if isinstance(event, End):
            self.answer_seconds += 0.2 * (time.monotonic() - job.started - self.answer_seconds)
