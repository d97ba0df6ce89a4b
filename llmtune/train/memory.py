"""Running out of memory: how it is recognised, how it is cleaned up, and how much was used at most."""

from __future__ import annotations

import gc
import resource
import sys

import torch

_ALLOCATOR_WORDS = (
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # the system's word for ENOMEM
    "not enough memory",
    "out of memory",  # CUDA errors that are not torch.OutOfMemoryError, e.g. from cuBLAS
    "bad allocation",
    "std::bad_alloc",
    "could not create a memory object",  # oneDNN
    "could not create a primitive",
    "failed to allocate",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED
)
MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError)
"""What an allocation can fail with; ask `is_out_of_memory` which of them it was."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that memory ran out on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in text for words in _ALLOCATOR_WORDS)


def release(device: torch.device) -> None:
    """Give back what a failed attempt left behind, so that a smaller one finds the room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Count the peak from now on, where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes in use so far: of the GPU's allocator, or else of the process (resident)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
