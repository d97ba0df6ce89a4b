"""Code of strangers (templates, regular expressions) run for so long and in so much memory, and no more."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

MEMORY = Path("/proc/self/statm")
AGAIN_SECONDS = 0.5
"""When a stop is tried again: Python ignores an error that falls into a destructor or a callback of its collector."""


class LimitExceeded(Exception):
    """What was tried took too long, or too much memory; the text says which."""


@contextmanager
def limited(seconds: float, extra_bytes: int | None = None) -> Iterator[None]:
    """Let the block run for so long, and take so much more memory than the process has.

    In the main thread alone, where Python hears of signals; elsewhere, and without /proc, there is no limit. Memory is
    the whole process's address space: another thread that allocates at this moment counts too.

    Raises LimitExceeded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitExceeded(f"it took more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)  # of a timer around this one
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if extra_bytes is not None:
            _limit_memory(extra_bytes, limits)
        yield
    except MemoryError:
        raise LimitExceeded("it took more memory than it may") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_memory(extra_bytes: int, limits: tuple[int, int]) -> None:
    with suppress(OSError, ValueError):
        used = int(MEMORY.read_text().split()[0]) * resource.getpagesize()
        known = [limit for limit in limits if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([used + extra_bytes, *known]), limits[1]))
