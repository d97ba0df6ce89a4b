"""Running out of memory where weights are made or read, as an error that says what there is and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmtune.errors import EnvironmentProblem
from llmtune.model.device import is_out_of_memory, memory_limit
from llmtune.model.memory_plan import format_bytes


@contextmanager
def enough_memory(doing: str, device: str) -> Iterator[None]:
    """Run a block that allocates on `device`; `doing` says what, in words.

    Raises EnvironmentProblem where memory runs out; any other error passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentProblem.of(
            f"out of memory while {doing}: {_describe_memory(device)}",
            "model.name",
            "End other programs that use this memory, name a smaller model, or set adapter.method: qlora.",
        ) from error


def _describe_memory(device: str) -> str:
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        return f"{device} has {format_bytes(total)}, of which {format_bytes(free)} are free"
    limit = memory_limit(device)
    return f"{device} has {format_bytes(limit)}" if limit else f"{device} has too little"
