"""Run rows of different lengths in batches of a token budget; out of memory only shrinks the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, takewhile
from typing import TypeVar, cast

import torch
from torch import distributed
from transformers.utils import ModelOutput

from llmtune.data.collators import pad_texts
from llmtune.data.example import Example
from llmtune.errors import EnvironmentProblem
from llmtune.model.causal_lm_loss import model_inputs, move_to
from llmtune.model.device import fits_in_memory, release_memory
from llmtune.model.layer_requests import own_passes
from llmtune.model.tensor_parallel import in_lockstep, is_split
from llmtune.records import Advance
from llmtune.store.processes import world_size

T = TypeVar("T")
P = TypeVar("P")
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}
"""Positions in one batch, padding included, for losses and likelihoods."""
GENERATION_BUDGET = {"cpu": 8192, "cuda": 65536}
"""Positions in one batch of generated answers, prompt plus answer; only keys and values are kept."""


def run_in_batches(
    lengths: Sequence[int],
    budget: int,
    work: Callable[[list[int]], Sequence[T]],
    advance: Advance = lambda rows: None,
    *,
    most: int | None = None,
    packed: bool = False,
) -> list[T]:
    """Return the results of `work` for each row; it gets lists of indexes into `lengths`, longest rows first.

    A batch has as many rows as fit into `budget` positions, concatenated if `packed`, else padded to the longest; at
    most `most` rows. A batch that runs out of memory is halved, and the budget stays halved from then on.
    Raises EnvironmentProblem when a single row does not fit, or any batch of a split model: the other processes wait
    for this one within a pass.
    """
    results: dict[int, T] = {}

    def run(batch: list[int]) -> None:
        results.update(zip(batch, work(batch), strict=True))
        advance(len(batch))

    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        fitting = count_packed(lengths, left, budget) if packed else batch_size(lengths[left[0]], budget)
        batch = left[: fitting if most is None else min(fitting, most)]
        if fits_in_memory(partial(run, batch)):
            left = left[len(batch) :]
            continue
        if len(batch) == 1 or in_lockstep():
            described = "a single row" if len(batch) == 1 else f"{len(batch)} rows"
            raise EnvironmentProblem.of(
                f"out of memory while evaluating {described} of {lengths[batch[0]]} tokens",
                fix="Lower data.max_length or generation.max_new_tokens, or use a larger device.",
            )
        half = batch[: len(batch) // 2]
        budget = sum(lengths[i] for i in half) if packed else lengths[left[0]] * len(half)
        release_memory()
    return [results[i] for i in range(len(lengths))]


def batch_size(longest: int, budget: int) -> int:
    """Return how many rows padded to `longest` fit into `budget` positions; at least one."""
    return max(1, budget // max(1, longest))


def count_packed(lengths: Sequence[int], left: Sequence[int], budget: int) -> int:
    """Return how many of the first rows in `left` fit into `budget` positions concatenated; at least one."""
    totals = accumulate(lengths[i] for i in left)
    return max(1, sum(1 for _ in takewhile(lambda total: total <= budget, totals)))


def budget_for(device: str, budgets: dict[str, int]) -> int:
    """Return the budget of the device's kind; an unknown kind gets the CPU's."""
    return budgets.get(device.split(":")[0], budgets["cpu"])


def cut_evenly(count: int, limit: int | None) -> Iterator[int]:
    """Yield at most `limit` indexes out of `count`, spread evenly: neighbouring rows of a file are often similar."""
    taken = count if limit is None else min(limit, count)
    return (i * count // taken for i in range(taken))


def run_encoder(
    model: torch.nn.Module,
    examples: Sequence[Example],
    pad_id: int | None,
    device: str,
    read: Callable[[int, ModelOutput, int], T],
    advance: Advance = lambda rows: None,
) -> list[T]:
    """Run encoded texts through a model without gradients; `read(i, output, row of the batch)` returns each result."""

    def work(batch: list[int]) -> list[T]:
        tensors = move_to(device, pad_texts([examples[i] for i in batch], pad_id))
        output = model(**model_inputs(model, tensors))
        return [read(i, output, row) for row, i in enumerate(batch)]

    lengths = [len(example.input_ids) for example in examples]
    return run_in_batches(lengths, budget_for(device, TOKEN_BUDGET), work, advance)


# Rows divided among processes


def over_processes(
    model: torch.nn.Module, items: Sequence[P], work: Callable[[Sequence[P]], Sequence[T]], *, divide: bool = True
) -> list[T]:
    """Return `work(items)`, one result each; every process does every Nth item, so all of them must call this.

    `work` may run `model`, which may be sharded. Without `divide`, or if `model` is split, every process does all
    items; the results of a split model are those of the first process.
    """
    count = world_size()
    if count == 1:
        return list(work(items))
    split = is_split(model)
    divide = divide and not split
    share = items[distributed.get_rank() :: count] if divide else items
    with own_passes(model):
        results = list(work(share)) if share else []
    if split:  # rewards of the user's own may differ
        return of_first_process(results)
    if not divide:
        return results
    parts: list[list[T]] = [[] for _ in range(count)]
    distributed.all_gather_object(parts, results)
    return [parts[i % count][i // count] for i in range(len(items))]


def of_first_process(value: T | None) -> T:
    """Return the first process's `value` in all processes; all must call this."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return cast(T, values[0])
