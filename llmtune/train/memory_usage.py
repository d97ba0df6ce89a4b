"""Running out of memory: what to catch, how to clean up, and how much was used at most."""

from __future__ import annotations

import gc
import resource
import sys

import torch

MEMORY_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError)
"""What an allocation can fail with; ask `llmtune.model.is_out_of_memory` which of them it was."""


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
