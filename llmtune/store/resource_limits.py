"""Limits time and memory of untrusted code, such as templates and regular expressions."""

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
"""Interval of repeated stop signals: Python ignores errors raised in destructors and garbage collector callbacks."""


LARGEST_NUMBER = 1e30
"""Size of the largest number accepted from the user's code and files: sums and squares of such numbers are finite."""
TOOK_LONGER = "it took more than"
"""How the text of a LimitExceeded about time begins."""


class LimitExceeded(Exception):
    """The code took too long or too much memory; the text says which."""


@contextmanager
def limited(seconds: float, extra_bytes: int | None = None) -> Iterator[None]:
    """Limit the block to `seconds`, and to `extra_bytes` more memory than the process uses now.

    Python handles signals in the main thread only; other threads have no limit. Without /proc memory has no limit.
    Memory is the address space of the process, so allocations of other threads count too.

    Raises LimitExceeded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitExceeded(f"{TOOK_LONGER} {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)  # `left`: of an outer timer
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if extra_bytes is not None:
            _limit_memory(extra_bytes, limits)
        yield
    except MemoryError:
        raise LimitExceeded("it took too much memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_memory(extra_bytes: int, limits: tuple[int, int]) -> None:
    with suppress(OSError, ValueError):
        used = int(MEMORY.read_text().split()[0]) * resource.getpagesize()
        finite_limits = [limit for limit in limits if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([used + extra_bytes, *finite_limits]), limits[1]))
