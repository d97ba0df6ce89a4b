"""Before step 1: try the largest micro-batch, a validation batch, and a checkpoint that is written and read."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from llmtune.data.examples import SHOWN, ExampleReader
from llmtune.data.row_store import iterate_texts
from llmtune.display.console import spinner
from llmtune.errors import DataError, EnvironmentProblem, LlmtuneError, Problem, TrainingError
from llmtune.model.chunked_cross_entropy import takes_head_loss
from llmtune.model.device import device_memory, release_memory
from llmtune.model.prefix_packing import whole_documents
from llmtune.recipe.schema import Recipe
from llmtune.records import Examples, Rows, SelectedModel
from llmtune.store.machine import free_memory, resident_bytes, resident_peak_bytes
from llmtune.train.accumulation import MicroBatchTooLarge, make_batch, seed_micro_batch, try_memory
from llmtune.train.batch_plan import Indexes, heaviest
from llmtune.train.checkpoint import Damage, TrainState, read_checkpoint
from llmtune.train.distributed import any_process, run_on_main
from llmtune.train.objective import TrainedTask
from llmtune.train.resume import restore_checkpoint, save
from llmtune.train.setup import TrainContext, peak_bytes

LARGE_TOKENS = 512
"""Micro-batches of fewer tokens take little time, and are tried completely."""
RESERVED = 64 * 2**20
"""Most bytes to leave unused."""
PARTS = 4
"""One in so many rows of a large micro-batch is tried first."""


def check_examples(rows: Rows, examples: Examples, task: TrainedTask, selected: SelectedModel, recipe: Recipe) -> None:
    """Raise DataError for the rows that the loaded model would read wrongly."""
    problems: list[Problem] = []
    for split in examples.files:
        reader = ExampleReader(examples, split, task.example_type)
        checked = task.check_examples(selected.model, selected.processor, recipe, reader)
        wrong = {int(reader.rows[number]): reason for number, reason in checked}
        origins = enumerate(iterate_texts(rows, split)) if wrong else ()
        problems += [Problem(wrong[row], origin) for row, (origin, _) in origins if row in wrong]
    if problems:
        fix = "The files of its processor may be another model's."
        raise DataError(Problem(f"the model would read {len(problems):,} rows wrongly", fix=fix), *problems[:SHOWN])


def run_preflight(
    training: TrainContext, state: TrainState, console: Console, on_budget: Callable[[int], None]
) -> None:
    """Try the heaviest work of the training, shrink `state.budget` until it fits, then restore all states bit for bit.

    Calls `on_budget` with each smaller budget, in tokens. Checkpoints for the trial are deleted afterwards.

    Raises:
        TrainingError: not even the longest example alone fits into memory.
        EnvironmentProblem: a checkpoint cannot be written, or reads back differently; or layers cannot be compiled.
    """
    with ExitStack() as stack:
        if training.recipe.train.torch_compile:
            from llmtune.train.torch_compile import check_compiled  # imports the compiler, which takes a second

            stack.enter_context(check_compiled(console))
        stack.enter_context(spinner(console, "rehearsing the largest batch, a validation and a checkpoint"))
        token_seconds = _try_heaviest_work(training, state, console, on_budget)
    console.print(
        f"Rehearsed: micro-batches of {state.budget:,} tokens fit, peak so far {peak_bytes(training.device) / 1e9:.2f} "
        "GB; a checkpoint was written and read back."
    )
    expected = _expected_time(training, state, token_seconds)
    console.print(f"{training.plan.total_steps:,} steps, {expected}", highlight=False)


def _expected_time(training: TrainContext, state: TrainState, token_seconds: float) -> str:
    """Format the expected time: an upper bound, as the rehearsed step takes more `token_seconds` than later ones."""
    epochs = (training.plan.total_steps - state.step) / training.plan.steps_per_epoch
    seconds = token_seconds * float(training.examples.lengths.sum()) * epochs / training.accelerator.num_processes
    return f"about {seconds / 60:.0f} minutes at most" if seconds >= 90 else "about a minute at most"


def _try_heaviest_work(
    training: TrainContext, state: TrainState, console: Console, on_budget: Callable[[int], None]
) -> float:
    """Rehearse until the budget fits, and restore all states; return the seconds per token."""
    before, after = training.checkpoints / ".tmp-before", training.checkpoints / ".tmp-after"
    with _restored_random_states():
        save(training, state, before)
        try:
            while (token_seconds := _rehearse(training, state, before, after)) is None:
                shrink_budget(training, state, console, on_budget, "the rehearsal")
        except MicroBatchTooLarge as error:
            shrink_budget(training, state, console, on_budget, "the rehearsal", error)
            raise
        except BaseException:
            if training.accelerator.is_main_process:
                _discard(before, after)
            raise
        run_on_main(training.accelerator, lambda: _discard(before, after))
    return token_seconds


def _rehearse(training: TrainContext, state: TrainState, before: Path, after: Path) -> float | None:
    """Try a step, a validation, a save to `after` and a reload, then restore the state saved in `before`.

    Returns the seconds per token of the step; None if any process ran out of memory.
    """
    token_seconds = _fits(training, state.budget)
    if token_seconds is not None:
        save(training, state, after)
        token_seconds = token_seconds if _read_back(training, after) else None
    return token_seconds if _read_back(training, before) else None


def shrink_budget(
    training: TrainContext,
    state: TrainState,
    console: Console,
    on_budget: Callable[[int], None],
    occasion: str,
    error: MicroBatchTooLarge | None = None,
) -> None:
    """Halve the token budget, but not below the longest example, and print it; `occasion` names the work.

    Raises TrainingError if it cannot shrink, or if the `error` occurred in this process `alone`.
    """
    if state.budget <= training.longest:
        raise _does_not_fit(training)
    state.budget = max(state.budget // 2, training.longest)
    on_budget(state.budget)
    if error is not None and error.alone:
        raise TrainingError.of(
            f"out of memory in {occasion}",
            f"process {training.accelerator.process_index}",
            f"Run the same command again: it resumes with micro-batches of {state.budget:,} tokens.",
        )
    console.print(f"[yellow]Out of memory in {occasion}: micro-batches shrink to {state.budget:,} tokens.[/]")


def _fits(training: TrainContext, budget: int) -> float | None:
    """Run the heaviest micro-batches through a complete step, and the heaviest validation batch, in every process.

    If memory is ample, some rows of a large micro-batch are enough (`_try_rows`). Returns the seconds per token of the
    step; None if it does not fit in every process.
    """
    most = len(training.examples) if training.recipe.train.batch_tokens else training.recipe.train.batch_size
    reader, held_out = training.examples, training.validation
    chunked = takes_head_loss(training.adapted.selected.model)  # then the memory of logits does not grow with tokens

    def weigh(reader: ExampleReader, supervised: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        return [supervised, reader.pictures] if reader.pictures.any() else [supervised]

    def train_on(rows: Indexes) -> None:
        batch = make_batch(training, reader, rows)
        with training.compute():
            loss = training.objective.complete_loss(training.model, batch)
        training.accelerator.backward(loss.sum / max(1, loss.count))

    def measure(rows: Indexes) -> None:
        assert held_out is not None
        batch = make_batch(training, held_out, rows)
        with torch.no_grad(), training.compute():
            training.objective.complete_loss(training.model, batch)

    def step() -> None:
        for index, rows in enumerate(batches):
            seed_micro_batch(training, 0, index)
            tried.append(_try_rows(training, train_on, rows, reader))
        training.optimizer.step()

    def validate() -> None:
        assert held_out is not None
        supervised = held_out.lengths if chunked else held_out.supervised
        for rows in heaviest(held_out.lengths, weigh(held_out, supervised), budget, training.packed, len(held_out)):
            _try_rows(training, measure, rows, held_out)

    supervised = reader.lengths if chunked else reader.supervised
    batches, tried = heaviest(reader.lengths, weigh(reader, supervised), budget, training.packed, most), list[int]()
    with training.accelerator.no_sync(training.model), whole_documents(), _reserve():
        began = time.perf_counter()
        fits = try_memory(training, step)
        token_seconds = (time.perf_counter() - began) / max(1, sum(tried))
        if fits and held_out is not None:
            training.model.eval()
            fits = try_memory(training, validate)
            training.model.train()
    training.optimizer.zero_grad(set_to_none=True)
    return None if any_process(training.accelerator, not fits) else token_seconds


@contextmanager
def _reserve() -> Iterator[None]:
    """Leave a tenth of the free address space, at most `RESERVED` bytes, unused inside the block.

    The steps find the same memory in smaller pieces, between gradients and the states of the optimiser.
    """
    block = torch.empty(min(free_memory() // 10, RESERVED), dtype=torch.uint8)
    yield
    del block


def _try_rows(training: TrainContext, work: Callable[[Indexes], object], rows: Indexes, reader: ExampleReader) -> int:
    """Run `work` on `rows`, which are sorted with the heaviest first; return the number of tokens tried.

    On a CPU a large micro-batch takes longer than the rest of the rehearsal, so the first `1 / PARTS` of its rows are
    tried first. The memory of a micro-batch grows at most with the square of its tokens, because of attention. If by
    this bound all rows would take less than half of the free memory, the others are not tried.
    """
    first, lengths, tokens = rows[: -(-len(rows) // PARTS)], reader.lengths, 0
    if len(first) < len(rows) and lengths[rows].sum() >= LARGE_TOKENS and _grows_with_tokens(training, reader):
        release_memory()
        before, free, tokens = resident_bytes(), free_memory(), int(lengths[first].sum())
        work(first)
        growth = resident_peak_bytes() - before
        if growth * (int(lengths[rows].max()) * len(rows) / tokens) ** 2 <= free / 2:
            return tokens
    work(rows)
    return tokens + int(lengths[rows].sum())


def _grows_with_tokens(training: TrainContext, reader: ExampleReader) -> bool:
    """Whether the growth of resident memory depends only on the number of tokens of the micro-batch."""
    recipe, alone = training.recipe, training.accelerator.num_processes == 1
    on_cpu = training.device.type == "cpu" and sys.platform == "linux"  # only Linux reports the resident peak
    has_fixed_part = recipe.adapter.method == "full" or recipe.train.torch_compile  # gradients of all weights; graphs
    return on_cpu and alone and not has_fixed_part and not reader.pictures.any()


def _read_back(training: TrainContext, folder: Path) -> bool:
    """Load the checkpoint in `folder` into the training; return False if any process ran out of memory.

    Raises EnvironmentProblem if the checkpoint is damaged.
    """

    def work() -> None:
        training.optimizer.optimizer.state.clear()  # free it before reading: it can be twice as large as the model
        release_memory()
        checkpoint = read_checkpoint(folder)
        if isinstance(checkpoint, Damage):
            raise EnvironmentProblem.of(
                f"a checkpoint did not read back as it was written: {checkpoint.reason}",
                str(folder.parent),
                "The disk or its driver loses data. Choose a folder on another disk with --out.",
            )
        restore_checkpoint(training, checkpoint)

    return not any_process(training.accelerator, not try_memory(training, work))


def _does_not_fit(training: TrainContext) -> LlmtuneError:
    reader, device = training.examples, training.device
    limit = device_memory(str(device))
    size = f": {limit / 1e9:.2f} GB" if limit else " is full"
    ways = ["Lower data.max_length"]
    if training.recipe.train.gradient_checkpointing is not True:
        ways.append("set train.gradient_checkpointing: true")
    if not training.adapted.selected.quantized:
        ways.append("set adapter.method: " + ("lora" if training.recipe.adapter.method == "full" else "qlora"))
    return TrainingError.of(
        f"out of memory: the longest row ({training.longest:,} tokens) does not fit alone; {device.type} memory{size}",
        f"training example {int(reader.lengths.argmax())}, micro-batch of one row",
        f"{'; or '.join(ways)}; or use a smaller model.",
    )


def _discard(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _restored_random_states() -> Iterator[None]:
    """Restore all random number generators after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
