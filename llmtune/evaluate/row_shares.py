"""Rows divided over the processes of an evaluation: each works on its share, and all get what came of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")


def count_processes() -> int:
    """Return in how many processes this evaluation is made."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def over_processes(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """Return `work(items)`, a result for each, where every process does every Nth item; all of them have to call it."""
    count = count_processes()
    if count == 1:
        return list(work(items))
    own = items[distributed.get_rank() :: count]
    parts: list[list[Result]] = [[] for _ in range(count)]
    distributed.all_gather_object(parts, list(work(own)) if own else [])
    return [parts[i % count][i // count] for i in range(len(items))]


def of_first_process(value: Result | None) -> Result:
    """Return the `value` of the first process in all of them; all have to call it."""
    values = [value]
    if count_processes() > 1:
        distributed.broadcast_object_list(values)
    return cast(Result, values[0])
