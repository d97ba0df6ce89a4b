"""The bounded queue of requests; when it is full, clients get 429 with Retry-After."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from transformers import GenerationConfig

from llmtune.records import Row
from llmtune.serve.schemas import ApiError
from llmtune.serve.served_model import Predicted, ServedModel

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


@dataclass(frozen=True)
class End:
    """The end of an answer: `stop` or `length` for generated text, `answer` once all rows of a job are predicted."""

    reason: str


Event = list[int] | End | BaseException
"""New token ids, the end, or an error."""


@dataclass(eq=False)
class AnswerJob:
    """One request: a prompt to continue (`ids`, `settings`, `seed`), or rows to predict from."""

    served: ServedModel
    ids: Sequence[int] = ()
    settings: GenerationConfig | None = None
    seed: int = 0
    """Random seed."""
    parts: Sequence[Sequence[Row]] = ()
    """Rows to predict from, a part at a time: other jobs get their turn in between."""
    predicted: list[Predicted] = field(default_factory=list)
    """Of the rows so far."""
    ended: int = 0
    """Number of parts that are predicted."""
    deliver: Callable[[Event], None] = lambda event: None
    """Called in the model's thread."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when the client no longer wants the answer."""
    started: float = 0.0
    generated: int = 0

    @property
    def new_tokens(self) -> int:
        """The longest answer."""
        return int(self.settings.max_new_tokens) if self.settings else 0

    @property
    def positions(self) -> int:
        """Columns of the KV cache that it may use."""
        return len(self.ids) + self.new_tokens


class RequestQueue:
    """Waiting jobs by model, and the number of running ones."""

    def __init__(self, models: Mapping[str, ServedModel], *, max_batch: int, max_queue: int) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.waiting: dict[ServedModel, deque[AnswerJob]] = {served: deque() for served in models.values()}
        self.changed = threading.Condition()
        self.running = 0
        self.swapped = False
        """Whether there are replaced models to free once their requests are answered."""
        self.deadline: float | None = None
        """Time of the monotonic clock at which running answers are cut off; None until the server stops."""
        self.answer_seconds = 1.0
        """Moving average of the time per answer."""

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    @property
    def expired(self) -> bool:
        """Whether the grace period is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def submit(self, job: AnswerJob) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: it already has `max_queue` jobs.
            Stopping: the server is shutting down.
        """
        with self.changed:
            if self.deadline is not None:
                raise Stopping
            if len(self) >= self.max_queue:
                rounds = len(self) / max(1, self.max_batch)
                raise QueueFull(max(1, min(MAX_RETRY_SECONDS, ceil(rounds * self.answer_seconds))))
            if job.served not in self.waiting:  # replaced while the request was read
                self.waiting, self.swapped = {**self.waiting, job.served: deque()}, True
            self.waiting[job.served].append(job)
            self.changed.notify()

    def expect(self, models: Iterable[ServedModel]) -> None:
        """Accept jobs of further models."""
        with self.changed:
            self.waiting = {**{served: deque() for served in models}, **self.waiting}
            self.swapped = True
            self.changed.notify()

    def forget(self, replaced: Collection[ServedModel], busy: Collection[ServedModel]) -> None:
        """Drop replaced models that are not `busy` and have no waiting jobs."""
        with self.changed:
            kept = {served for served in replaced if served in busy or self.waiting[served]}
            dropped = {*replaced} - kept
            self.waiting = {served: jobs for served, jobs in self.waiting.items() if served not in dropped}
            self.swapped = bool(kept)

    def cancel(self, job: AnswerJob) -> None:
        """Cancel a job: remove it from the queue now, or from its batch at the next step."""
        job.cancelled.set()
        with self.changed:
            if job in (waiting := self.waiting.get(job.served, deque())):
                waiting.remove(job)

    def stop(self, grace_seconds: float) -> None:
        """Refuse new and waiting jobs; running ones have `grace_seconds` to finish."""
        with self.changed:
            if self.deadline is None:
                self.deadline = time.monotonic() + grace_seconds
            self.changed.notify()

    def wait(self) -> bool:
        """Block until there is work; return False once stopped and drained. A stop fails waiting jobs."""
        with self.changed:
            self.changed.wait_for(lambda: len(self) or self.running or self.swapped or self.deadline is not None)
            if self.deadline is None:
                return True
            for jobs in self.waiting.values():
                while jobs:
                    jobs.popleft().deliver(Stopping())
            return self.running > 0

    def take(
        self, served: ServedModel, running: Sequence[AnswerJob], limit: int, budget: int | None
    ) -> list[AnswerJob]:
        """Take jobs of a model: with the `running` ones at most `limit` jobs and `budget` positions."""
        taken: list[AnswerJob] = []
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

    def leave(self, job: AnswerJob, event: Event | None) -> None:
        """Deliver the last event of a running job."""
        with self.changed:
            self.running -= 1
        if event is not None:
            job.deliver(event)
        if isinstance(event, End):
            self.answer_seconds += 0.2 * (time.monotonic() - job.started - self.answer_seconds)
