"""The one thread that works with the models: requests wait in a bounded queue, are answered in batches, and can leave.

Each model (an adapter, or the base) has its own batch; those that have something to do take turns of a few steps.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmtune.errors import LlmtuneError
from llmtune.evaluate.generation import cache_budget
from llmtune.evaluate.greedy import column_bytes_of
from llmtune.evaluate.token_batches import release_memory
from llmtune.model import compute_context, is_out_of_memory, resolve_dtype
from llmtune.serve.continuous_batch import LiveRows
from llmtune.serve.generate_fallback import write_alone
from llmtune.serve.sampling import Chooser, Wish, choose_tokens
from llmtune.serve.served_model import Served

TURN = 8
"""Steps that one model takes before another has its turn."""
MOST_WAIT = 60
"""Seconds that a client is told to wait at most before it asks again."""


class QueueFull(Exception):
    """No room for another request; `seconds` is when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Closing(Exception):
    """The server is about to stop."""


class OutOfMemory(Exception):
    """The answers that were being written together did not fit into memory."""


@dataclass(frozen=True)
class End:
    """An answer is complete: `stop` or `length` for one that was written, `answer` with what a task predicts."""

    reason: str
    prediction: Any = None


Event = list[int] | End | BaseException
"""New token ids; the end; or what went wrong."""


@dataclass(eq=False)
class Job:
    """One request: token ids to go on from (`ids`, `wish`), or a row to predict from."""

    served: Served
    deliver: Callable[[Event], None]
    """Called in the model's thread."""
    ids: Sequence[int] = ()
    wish: Wish | None = None
    row: dict[str, Any] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by whoever does not want the answer any more."""
    began: float = 0.0
    written: int = 0

    @property
    def positions(self) -> int:
        """Columns of keys and values that it may come to need."""
        return len(self.ids) + (self.wish.new_tokens if self.wish else 0)


@dataclass(eq=False)
class _Batch:
    """What one model has to do."""

    served: Served
    budget: int | None
    """Positions that its keys and values may take up; None where rows cannot be written side by side."""
    most: int
    live: LiveRows
    jobs: list[Job] = field(default_factory=list)
    """By place in `live`."""
    choosers: list[Chooser] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """What each row wrote last, which is still to be read."""
    waiting: deque[Job] = field(default_factory=deque)


class Engine:
    """Answers jobs on a thread of its own, from `start` to `stop`."""

    def __init__(self, models: Mapping[str, Served], *, most_rows: int, max_queue: int) -> None:
        self.models, self.most_rows, self.max_queue = models, most_rows, max_queue
        self.batches: dict[Served, _Batch] = {}
        self.changed = threading.Condition()
        self.waiting = self.running = 0
        self.closing: float | None = None
        """When the answers that are being written then are ended, by the monotonic clock."""
        self.seconds = 1.0
        """How long an answer took lately, the last ones counting most."""
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.thread.is_alive() and self.closing is None

    def start(self) -> None:
        """Look at what each model can do, and begin."""
        for served in self.models.values():
            budget = None
            if served.writes and served.recipe.generation.num_beams == 1:
                with torch.inference_mode(), served.at_work():
                    column_bytes = column_bytes_of(served.model, served.device)
                budget = None if column_bytes is None else cache_budget(served.device, column_bytes)
            live = LiveRows(served.model, served.device)
            self.batches[served] = _Batch(served, budget, self.most_rows, live)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: there is no room.
            Closing: no new ones are taken.
        """
        with self.changed:
            if self.closing is not None or not self.thread.is_alive():
                raise Closing
            if self.waiting >= self.max_queue:
                raise QueueFull(self._wait_seconds())
            self.batches[job.served].waiting.append(job)
            self.waiting += 1
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Let a job go: it leaves the queue, or its batch at the next step."""
        job.cancelled.set()
        with self.changed:
            queue = self.batches[job.served].waiting
            if job in queue:
                queue.remove(job)
                self.waiting -= 1

    def stop(self, grace_seconds: float) -> None:
        """Take nothing new, turn away what waits, and give what is being written so long to end."""
        with self.changed:
            if self.closing is None:
                self.closing = time.monotonic() + grace_seconds
            self.changed.notify()

    def _wait_seconds(self) -> int:
        rounds = self.waiting / max(1, self.most_rows)
        return max(1, min(MOST_WAIT, math.ceil(rounds * self.seconds)))

    # The model's thread

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting or self.running or self.closing is not None)
                    if self.closing is not None:
                        self._turn_away()
                        if not self.running:
                            return
                for batch in self.batches.values():
                    if batch.jobs or batch.waiting:
                        self._take_turn(batch)

    def _turn_away(self) -> None:
        """Fail what waits; after the time of grace, what is being written too."""
        over = self.closing is not None and time.monotonic() >= self.closing
        for batch in self.batches.values():
            for job in batch.waiting:
                job.deliver(Closing())
            self.waiting -= len(batch.waiting)
            batch.waiting.clear()
            if over:
                self._fail(batch, Closing())

    def _take_turn(self, batch: _Batch) -> None:
        """Work for one model; an error is told to those whose answers it costs, and the next ones are served."""
        jobs: list[Job] = []
        try:
            with batch.served.at_work():
                if batch.budget is not None:
                    self._write(batch)
                elif batch.served.writes:
                    jobs = self._take(batch, 1)
                    self._write_alone(jobs)
                else:
                    alone = batch.served.recipe.generation.do_sample  # draws of one row must not move another's
                    jobs = self._take(batch, 1 if alone else batch.most)
                    self._predict(batch, jobs)
        except Exception as error:  # noqa: BLE001 - told to those who wait for an answer; the thread goes on
            memory = isinstance(error, RuntimeError | MemoryError | OSError) and is_out_of_memory(error)
            if memory:
                batch.most = max(1, len(batch.jobs or jobs) // 2)
            else:
                traceback.print_exception(error)
            for job in jobs:
                self._leave(job, OutOfMemory() if memory else error)
            self._fail(batch, OutOfMemory() if memory else error)
            if memory:
                release_memory()

    def _take(self, batch: _Batch, most: int) -> list[Job]:
        """Take jobs out of a queue, as many as have room beside those that are there."""
        taken: list[Job] = []
        with self.changed:
            while batch.waiting and len(batch.jobs) + len(taken) < most:
                job = batch.waiting[0]
                there = [*batch.jobs, *taken]
                longest = max(one.positions for one in (*there, job))
                if batch.budget is not None and there and (len(there) + 1) * longest > batch.budget:
                    break
                batch.waiting.popleft()
                self.waiting -= 1
                if not job.cancelled.is_set():
                    job.began = time.monotonic()
                    taken.append(job)
            self.running += len(taken)
        return taken

    def _write(self, batch: _Batch) -> None:
        """Take a few steps with the rows of a batch; those that wait join after each."""
        for _ in range(TURN):
            self._drop_cancelled(batch)
            if batch.jobs:
                logits_BV = batch.live.step(torch.tensor(batch.tokens, device=batch.served.device))
                batch.tokens = choose_tokens(logits_BV, batch.choosers)
            if joining := self._take(batch, batch.most):
                self._join(batch, joining)
            self._deliver(batch)
            if not batch.jobs or (self.closing is not None and time.monotonic() >= self.closing):
                return

    def _join(self, batch: _Batch, joining: list[Job]) -> None:
        batch.jobs += joining
        choosers = []
        for job in joining:
            assert job.wish is not None
            choosers.append(Chooser(job.wish, job.ids, batch.served.device))
        batch.tokens += choose_tokens(batch.live.join([job.ids for job in joining]), choosers)
        batch.choosers += choosers

    def _deliver(self, batch: _Batch) -> None:
        """Hand out the tokens of this step; rows whose answer ends leave."""
        ended = []
        for place, (job, token) in enumerate(zip(batch.jobs, batch.tokens, strict=True)):
            assert job.wish is not None
            job.written += 1
            job.deliver([token])
            stopped = token in batch.served.stops
            if stopped or job.written == job.wish.new_tokens:
                ended.append(place)
                self._leave(job, End("stop" if stopped else "length"))
        self._let_go(batch, ended)

    def _drop_cancelled(self, batch: _Batch) -> None:
        gone = [place for place, job in enumerate(batch.jobs) if job.cancelled.is_set()]
        for place in gone:
            self._leave(batch.jobs[place], None)
        self._let_go(batch, gone)

    def _let_go(self, batch: _Batch, places: list[int]) -> None:
        if not places:
            return
        taken = batch.live.leave(places)
        batch.jobs = [batch.jobs[place] for place in taken]
        batch.choosers = [batch.choosers[place] for place in taken]
        batch.tokens = [batch.tokens[place] for place in taken]

    def _write_alone(self, jobs: list[Job]) -> None:
        for job in jobs:
            assert job.wish is not None
            over = lambda: job.cancelled.is_set() or self._is_over()  # noqa: B023, E731 - used up within the pass
            ids = write_alone(job.served, job.ids, job.wish, job.deliver, over)
            ended = self._is_over() and not job.cancelled.is_set() and not _is_whole(job, ids)
            stopped = bool(ids) and ids[-1] in job.served.stops
            self._leave(job, Closing() if ended else End("stop" if stopped else "length"))

    def _predict(self, batch: _Batch, jobs: list[Job]) -> None:
        """Predict from rows at once; where one of them cannot be used, from each by itself."""
        if not jobs:
            return
        served = batch.served
        dtype = resolve_dtype(served.recipe.model.dtype, served.model.device.type)
        rows = [job.row for job in jobs]
        try:
            with compute_context(dtype, served.device):
                said = served.task.predict(served.model, rows, served.processor, served.recipe, device=served.device)
        except LlmtuneError as error:
            if len(jobs) == 1:
                self._leave(jobs.pop(), error)
                return
            for job in list(jobs):
                self._predict(batch, [job])
                jobs.remove(job)
            return
        for job, one in zip(list(jobs), said, strict=True):
            self._leave(job, End("answer", one))
            jobs.remove(job)

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        """Give up all answers that a batch is writing."""
        for job in batch.jobs:
            self._leave(job, error)
        batch.jobs, batch.choosers, batch.tokens = [], [], []
        batch.live = LiveRows(batch.served.model, batch.served.device)

    def _leave(self, job: Job, event: Event | None) -> None:
        with self.changed:
            self.running -= 1
        if event is not None:
            job.deliver(event)
        if isinstance(event, End):
            self.seconds += 0.2 * (time.monotonic() - job.began - self.seconds)

    def _is_over(self) -> bool:
        return self.closing is not None and time.monotonic() >= self.closing


def _is_whole(job: Job, ids: Sequence[int]) -> bool:
    """Whether an answer ended by itself."""
    assert job.wish is not None
    return len(ids) == job.wish.new_tokens or (bool(ids) and ids[-1] in job.served.stops)
