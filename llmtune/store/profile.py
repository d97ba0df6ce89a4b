"""Seconds and peak memory of a stretch of work."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import psutil

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class Meter:
    """Starts counting when made. On Linux the kernel's high-water mark is reset first: the peak is the step's own."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        with suppress(OSError):
            CLEAR_REFS.write_text("5")  # proc(5): reset VmHWM
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        """Wall seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def peak_bytes(self) -> int:
        """Peak bytes on the GPU where one is in use, else resident in this process."""
        if (cuda := _cuda()) is not None:
            return int(cuda.max_memory_allocated())
        return resident_peak_bytes()


def seconds_of_process() -> float:
    """Wall seconds since this process was started; the system counts its start in hundredths."""
    return time.time() - psutil.Process().create_time()


def resident_peak_bytes() -> int:
    """The largest resident size since the last reset (Linux), else the resident size now."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)
    return int(line.split()[1]) * 1024


def _cuda() -> ModuleType | None:
    """Return torch.cuda if a GPU is in use; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
