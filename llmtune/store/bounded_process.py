"""Runs a program of the user's: its time and output have limits, and no process that it started survives it."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

import psutil

SET_CHILD_SUBREAPER = 36
"""The prctl option that makes orphans below this process its children: `linux/prctl.h`."""
LOOK_SECONDS = 0.05
"""Interval of looking whether a program ended whose output another process keeps open."""


@dataclass(frozen=True)
class EndedProgram:
    """What a program wrote, and how it ended."""

    output: bytes
    status: int | None
    """Exit status, negative for a signal; None if the time or the output exceeded its limit."""
    in_time: bool


@contextmanager
def no_orphans() -> Iterator[None]:
    """Kill the processes that were started inside the block and are still running at its end."""
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        left = [child for child in psutil.Process().children(recursive=True) if child not in before]
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(left, timeout=10)


@contextmanager
def _adopted() -> Iterator[None]:
    """Adopt orphans inside the block, also those in a session of their own. Linux only; no-op elsewhere."""
    if sys.platform != "linux":
        yield
        return
    library = ctypes.CDLL(None)
    library.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        library.prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def run_bounded(
    words: Sequence[str], given: IO[bytes], seconds: float, most_bytes: int, environment: Mapping[str, str]
) -> EndedProgram:
    """Run a program in a session of its own, with `given` as its input; its messages on stderr are dropped."""
    with _adopted(), no_orphans():
        process = subprocess.Popen(  # noqa: S603
            words,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            output, in_time = _read_pipe(process.stdout.fileno(), process.pid, time.monotonic() + seconds, most_bytes)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            process.stdout.close()
    within = in_time and len(output) <= most_bytes
    return EndedProgram(output, status if within else None, in_time)


def _read_pipe(pipe: int, pid: int, end: float, most_bytes: int) -> tuple[bytes, bool]:
    """Return what a program wrote until it ended or exceeded a limit, and whether it kept to its time."""
    output, is_open = bytearray(), True
    while len(output) <= most_bytes:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        while is_open and len(output) <= most_bytes and select.select([pipe], [], [], 0 if ended else LOOK_SECONDS)[0]:
            part = os.read(pipe, 2**16)
            output += part
            is_open = bool(part)
            if time.monotonic() > end:
                break
        if ended:
            break
        if time.monotonic() > end:
            return bytes(output), False
        if not is_open:
            time.sleep(LOOK_SECONDS / 10)
    return bytes(output), True
