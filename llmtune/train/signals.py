"""Ctrl-C and SIGTERM: finish the step, save, stop; a second Ctrl-C quits at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rich.console import Console


@dataclass
class StopRequest:
    """The signal that requested a stop; None if there was none."""

    signal_number: int | None = None


@contextmanager
def catch_signals(console: Console) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a `StopRequest` inside the block; afterwards restore the old handlers.

    A second SIGINT raises KeyboardInterrupt immediately. Outside the main thread, where Python allows no handlers,
    nothing is caught.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if request.signal_number is None:
            request.signal_number = number
            again = " (Ctrl-C again quits at once)" if number == signal.SIGINT else ""
            console.print(f"Stopping after this step is finished and saved{again}.")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
