"""Running out of memory on the device or the host: recognised, cleaned up after, and explained."""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llmtune.errors import EnvironmentProblem
from llmtune.model.device import memory_limit
from llmtune.report.number_format import size as format_bytes

MEMORY_ERRORS = (MemoryError, RuntimeError, OSError)
"""What an allocation can fail with (torch.OutOfMemoryError is a RuntimeError): ask `is_out_of_memory` which it was."""
_ALLOCATOR_WORDS = (
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # the system's word for ENOMEM
    "not enough memory",
    "out of memory",  # CUDA errors that are not torch.OutOfMemoryError, e.g. from cuBLAS
    "bad allocation",
    "bad_alloc",
    "could not create a memory object",  # oneDNN
    "could not create a primitive",
    "failed to allocate",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, one of `MEMORY_ERRORS`, means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in text for words in _ALLOCATOR_WORDS)


def fits_in_memory(work: Callable[[], object]) -> bool:
    """Do `work`; return False if memory ran out in it. `release_memory` then gives back what it left behind."""
    try:
        work()
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def release_memory() -> None:
    """Give back what is no longer used, so that a smaller attempt or another model finds the room."""
    gc.collect()  # a model's modules refer to one another
    torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc keeps what is freed, for each thread apart: room of gradients is none for weights


@contextmanager
def explain_oom(doing: str, device: str) -> Iterator[None]:
    """Run a block that allocates on `device`; `doing` names the work, such as "loading NAME".

    Raises EnvironmentProblem where memory runs out; any other error passes.
    """
    try:
        yield
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        if device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info()
            memory = f"{format_bytes(total)}, of which {format_bytes(free)} are free"
        else:
            memory = format_bytes(limit) if (limit := memory_limit(device)) else "too little"
        raise EnvironmentProblem.of(
            f"out of memory while {doing}: {device} has {memory}",
            "model.name",
            "End other programs that use this memory, name a smaller model, or set adapter.method: qlora.",
        ) from error
