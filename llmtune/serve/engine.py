"""Continuous batching on one thread: prompts join a model's batch at any step and leave when their answer ends.

Each model (an adapter, or the base) has its own batch. Batches with work take turns of a few steps.

Shapes: B rows, N joining rows, T columns, V vocabulary. All rows end in the same column, whenever they joined.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from llmtune.errors import LlmtuneError
from llmtune.evaluate.generation import cache_budget
from llmtune.evaluate.greedy_decoding import KVCache, column_bytes_of, next_logits
from llmtune.evaluate.token_batches import TOKEN_BUDGET, batch_size, budget_for
from llmtune.model.causal_lm_loss import unwrap, virtual_tokens
from llmtune.model.device import is_out_of_memory, release_memory
from llmtune.records import Row
from llmtune.serve.request_queue import AnswerJob, End, Event, RequestQueue, Stopping
from llmtune.serve.schemas import ApiError
from llmtune.serve.served_model import ServedModel

HEADROOM = 128
"""Number of spare columns: once they are full, all keys and values are copied into a wider cache."""


class LiveRows:
    """The keys and values of answers in progress; a row is identified by its slot, 0 to B - 1."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.model, self.device = model, device
        self.lengths: list[int] = []
        """Tokens of each row in the cache, virtual ones included."""
        self.columns = KVCache(0, 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def join(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read prompts into the next slots; return the logits [N, V] that follow them."""
        first, virtual = len(self), virtual_tokens(self.model)
        self.lengths += [virtual + len(prompt) for prompt in prompts]
        self._make_room(first)
        size = 1 if virtual else batch_size(max(map(len, prompts)), budget_for(self.device, TOKEN_BUDGET))
        return torch.cat([self._read(prompts[i : i + size], first + i) for i in range(0, len(prompts), size)])

    def _read(self, prompts: Sequence[Sequence[int]], first: int) -> torch.Tensor:
        """Read some of the prompts, padded on the left; their rows begin at slot `first`."""
        columns, end, width = self.columns, self.columns.end, max(map(len, prompts))
        rows, virtual = slice(first, first + len(prompts)), virtual_tokens(self.model)
        columns.active, columns.first, columns.end = rows, end - width - virtual, end - width
        if virtual:
            prefix = KVCache(1, virtual)
            prefix.read_virtual_tokens(self.model)
            columns.copy_prefix(prefix, rows, columns.first, virtual)
        ids_NT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        positions_NT = torch.stack([torch.arange(width) - (width - len(prompt)) for prompt in prompts])
        seen_NT = torch.nn.functional.pad((positions_NT >= 0).long(), (virtual, 0), value=1)
        inputs = (ids_NT, positions_NT.clamp(0) + virtual, seen_NT)
        logits_NV = next_logits(self.model, columns, *(part.to(self.device) for part in inputs))
        columns.end = end
        return logits_NV

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append a token to each row; return the logits [B, V] of the next one."""
        columns = self.columns
        if columns.end == columns.width:
            self._lay(len(self), columns.rows)
        columns = self.columns
        columns.active, columns.first = slice(0, len(self)), columns.end - max(self.lengths)
        lengths_B = torch.tensor(self.lengths, device=self.device)
        seen_T = torch.arange(columns.first, columns.end + 1, device=self.device)
        mask_BT = (seen_T[None] >= columns.end - lengths_B[:, None]).long()
        logits_BV = next_logits(self.model, columns, tokens_B[:, None], lengths_B[:, None], mask_BT)
        columns.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV

    def leave(self, ended: Sequence[int]) -> list[int]:
        """Remove rows by their slots; return the old slots of the remaining rows, in their new order."""
        stays, leaving = len(self) - len(ended), set(ended)
        holes = [slot for slot in sorted(leaving) if slot < stays]
        last = [slot for slot in range(stays, len(self)) if slot not in leaving]
        self.columns.first = self.columns.end - max(self.lengths)
        self.columns.move(holes, last)
        moved = dict(zip(holes, last, strict=True))
        taken = [moved.get(slot, slot) for slot in range(stays)]
        self.lengths = [self.lengths[slot] for slot in taken]
        if not taken:
            self.columns = KVCache(0, 0)  # free the memory
        return taken

    def _make_room(self, before: int) -> None:
        """Make room for all rows, and for the longest one; the first `before` rows are already in the cache."""
        columns = self.columns
        if len(self) > columns.rows or max(self.lengths) > columns.end or columns.end == columns.width:
            self._lay(before, 1 << (len(self) - 1).bit_length())

    def _lay(self, before: int, rows: int) -> None:
        """Copy the keys and values of the first `before` rows into new columns, as far left as possible."""
        old, end = self.columns, max(self.lengths)
        new = KVCache(rows, end + HEADROOM)
        new.end = end
        width = max(self.lengths[:before], default=0)
        for number, (keys, values) in old.states.items():
            keys, values = (part.new_zeros(rows, part.shape[1], new.width, part.shape[3]) for part in (keys, values))
            for target, part in zip((keys, values), old.states[number], strict=True):
                target[:before, :, end - width : end] = part[:before, :, old.end - width : old.end]
            new.states[number] = keys, values
        self.columns = new


class TokenSampler:
    """Choose the tokens of one answer as transformers does, with its own random generator."""

    def __init__(self, model: torch.nn.Module, settings: GenerationConfig, prompt: Sequence[int], seed: int) -> None:
        inner = cast(PreTrainedModel, unwrap(model))
        self.ids, self.do_sample = list(prompt), settings.do_sample
        self.processors = inner._get_logits_processor(settings, input_ids_seq_length=len(prompt))
        self.generator = torch.Generator(inner.device).manual_seed(seed)

    @property
    def greedy(self) -> bool:
        """Whether it always takes the most likely token."""
        return not self.do_sample and not self.processors

    def sample(self, logits_V: torch.Tensor) -> int:
        """Return the next token from its logits."""
        scores_1V = logits_V[None].float()
        if self.processors:
            ids_1T = torch.tensor([self.ids], device=logits_V.device)
            scores_1V = cast(torch.Tensor, self.processors(ids_1T, scores_1V.clone()))
        if not self.do_sample:
            return int(scores_1V.argmax())
        return int(torch.multinomial(scores_1V.softmax(-1), 1, generator=self.generator))


def sample_tokens(logits_BV: torch.Tensor, samplers: Sequence[TokenSampler]) -> None:
    """Append each row's next token to the ids of its sampler."""
    for row, (likeliest, sampler) in enumerate(zip(logits_BV.argmax(-1).tolist(), samplers, strict=True)):
        sampler.ids.append(likeliest if sampler.greedy else sampler.sample(logits_BV[row]))


TURN_STEPS = 8
"""Steps that one model takes before the next one's turn."""


class OutOfMemory(ApiError):
    """The answers of a batch did not fit into memory."""

    def __init__(self) -> None:
        message = "Out of memory: the answer was aborted. Request a shorter one, or retry."
        super().__init__(503, message, code="out_of_memory", headers={"Retry-After": "1"})


@dataclass(eq=False)
class DecodingBatch:
    """The jobs of one model, and the state of their answers."""

    served: ServedModel
    budget: int | None
    """Maximum positions of its KV cache; None if its rows cannot be batched."""
    max_rows: int
    live: LiveRows
    jobs: list[AnswerJob] = field(default_factory=list)
    """By row of `live`."""
    samplers: list[TokenSampler] = field(default_factory=list)
    """By row as well; the model has not read the last id of each yet."""


class Engine:
    """Answer jobs on a thread of its own, from `start` until the queue stops."""

    def __init__(self, models: Mapping[str, ServedModel], *, max_batch: int, max_queue: int) -> None:
        self.models = models
        self.queue = RequestQueue(models, max_batch=max_batch, max_queue=max_queue)
        self.batches: dict[ServedModel, DecodingBatch] = {}
        self.made: dict[ServedModel, DecodingBatch] = {}
        """Batches of models that the thread does not serve yet."""
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether the engine accepts requests."""
        return self.thread.is_alive() and self.queue.deadline is None

    def start(self) -> None:
        """Test whether each model's rows can be batched, and start the thread."""
        self.batches = {served: self._make_batch(served) for served in self.models.values()}
        self.thread.start()

    def replace(self, models: Mapping[str, ServedModel]) -> None:
        """Serve other models from the next request on; earlier ones answer their requests, and are then freed."""
        self.made |= {served: self._make_batch(served) for served in models.values()}
        self.models = models
        self.queue.expect(models.values())

    def _make_batch(self, served: ServedModel) -> DecodingBatch:
        budget = None
        if served.generates and served.recipe.generation.num_beams == 1:
            with torch.inference_mode(), served.activated():
                column_bytes = column_bytes_of(served.model, served.device)
            budget = None if column_bytes is None else cache_budget(served.device, column_bytes)
        return DecodingBatch(served, budget, self.queue.max_batch, LiveRows(served.model, served.device))

    def submit(self, job: AnswerJob) -> None:
        """Put a job into the queue; raises QueueFull, or Stopping."""
        if not self.thread.is_alive():
            raise Stopping
        self.queue.submit(job)

    def _work(self) -> None:
        with torch.inference_mode():
            while self.queue.wait():
                self._update_batches()
                self._take_turns()

    def _take_turns(self) -> None:
        for batch in self.batches.values():
            if self.queue.expired:
                self._fail(batch, Stopping())
            if batch.jobs or self.queue.waiting[batch.served]:
                self._take_turn(batch)

    def _update_batches(self) -> None:
        """Make a batch for each new model; free the models that were replaced and have no requests left."""
        replaced = {*self.queue.waiting} - {*self.models.values()}
        if replaced:
            self.queue.forget(replaced, {served for served, batch in self.batches.items() if batch.jobs})
            replaced.clear()
        kept = {served: batch for served, batch in self.batches.items() if served in self.queue.waiting}
        if len(kept) < len(self.batches):
            self.batches = kept
            release_memory()
        for served in self.queue.waiting.keys() - self.batches.keys():
            self.batches[served] = self.made.pop(served) if served in self.made else self._make_batch(served)

    def _take_turn(self, batch: DecodingBatch) -> None:
        """Take a turn of one model; an error fails its running jobs only, and later jobs are served."""
        try:
            with batch.served.activated():
                if batch.budget is not None:
                    self._generate_steps(batch)
                elif batch.served.generates:
                    self._generate_alone(batch)
                else:
                    self._predict(batch)
        except Exception as error:  # noqa: BLE001 - delivered to the clients that wait; the thread continues
            memory = isinstance(error, RuntimeError | MemoryError | OSError) and is_out_of_memory(error)
            if memory:
                batch.max_rows = max(1, len(batch.jobs) // 2)
            else:
                traceback.print_exception(error)
            self._fail(batch, OutOfMemory() if memory else error)
            if memory:
                release_memory()

    def _generate_steps(self, batch: DecodingBatch) -> None:
        """Take a few steps with the rows of a batch; waiting jobs may join after each."""
        for _ in range(TURN_STEPS):
            self._remove(batch, {row: None for row, job in enumerate(batch.jobs) if job.cancelled.is_set()})
            if batch.jobs:
                tokens_B = torch.tensor([sampler.ids[-1] for sampler in batch.samplers], device=batch.served.device)
                sample_tokens(batch.live.step(tokens_B), batch.samplers)
            if joining := self.queue.take(batch.served, batch.jobs, batch.max_rows, batch.budget):
                batch.jobs += joining
                model = batch.served.model
                samplers = [TokenSampler(model, job.settings, job.ids, job.seed) for job in joining if job.settings]
                sample_tokens(batch.live.join([job.ids for job in joining]), samplers)
                batch.samplers += samplers
            self._deliver(batch)
            if not batch.jobs or self.queue.expired:
                return

    def _deliver(self, batch: DecodingBatch) -> None:
        """Deliver the tokens of this step, and remove rows whose answer ended."""
        ended: dict[int, Event | None] = {}
        for row, (job, sampler) in enumerate(zip(batch.jobs, batch.samplers, strict=True)):
            token = sampler.ids[-1]
            job.generated += 1
            job.deliver([token])
            if token in batch.served.stops or job.generated == job.new_tokens:
                ended[row] = End("stop" if token in batch.served.stops else "length")
        self._remove(batch, ended)

    def _remove(self, batch: DecodingBatch, ended: Mapping[int, Event | None]) -> None:
        """Remove rows from the batch, and deliver the last event of each."""
        if not ended:
            return
        for row, event in ended.items():
            self.queue.leave(batch.jobs[row], event)
        taken = batch.live.leave(list(ended))
        batch.jobs = [batch.jobs[row] for row in taken]
        batch.samplers = [batch.samplers[row] for row in taken]

    def _generate_alone(self, batch: DecodingBatch) -> None:
        """Answer one job by transformers' loop, for beam search and models whose rows cannot be batched."""
        served = batch.served
        batch.jobs = self.queue.take(served, [], 1, None)
        if not batch.jobs:
            return
        (job,) = batch.jobs
        assert job.settings is not None, "only a job with a prompt is generated"
        ids = served.generate(
            job.ids, job.settings, job.seed, job.deliver, lambda: job.cancelled.is_set() or self.queue.expired
        )
        stopped = bool(ids) and ids[-1] in served.stops
        cut_off = self.queue.expired and not job.cancelled.is_set() and not stopped and len(ids) < job.new_tokens
        self.queue.leave(job, Stopping() if cut_off else End("stop" if stopped else "length"))
        batch.jobs = []

    def _predict(self, batch: DecodingBatch) -> None:
        """Predict from the next part of each job together; if a row is invalid, from each part separately."""
        served = batch.served
        for job in [job for job in batch.jobs if job.cancelled.is_set()]:
            self._end(batch, job, None)
        alone = served.recipe.generation.do_sample  # one row's random draws must not affect another's
        batch.jobs += self.queue.take(served, batch.jobs, 1 if alone else batch.max_rows, None)
        parts = [job.parts[job.ended] for job in batch.jobs]
        try:
            predicted = iter(served.predict([row for part in parts for row in part]))
            for job, part in zip(batch.jobs, parts, strict=True):
                job.predicted += islice(predicted, len(part))
        except LlmtuneError:
            for job, part in zip([*batch.jobs], parts, strict=True):
                self._predict_part(batch, job, part)
        for job in [*batch.jobs]:
            job.ended += 1
            if job.ended == len(job.parts):
                self._end(batch, job, End("answer"))

    def _predict_part(self, batch: DecodingBatch, job: AnswerJob, part: Sequence[Row]) -> None:
        """Predict from rows of one job; an invalid one ends the job."""
        try:
            job.predicted += batch.served.predict(part)
        except LlmtuneError as error:
            self._end(batch, job, error)

    def _end(self, batch: DecodingBatch, job: AnswerJob, event: Event | None) -> None:
        """Remove a job without generated text from its batch, and deliver its last event."""
        batch.jobs.remove(job)
        self.queue.leave(job, event)

    def _fail(self, batch: DecodingBatch, error: BaseException) -> None:
        """Abort all answers of a batch with `error`."""
        for job in batch.jobs:
            self.queue.leave(job, error)
        batch.jobs, batch.samplers = [], []
        batch.live = LiveRows(batch.served.model, batch.served.device)
