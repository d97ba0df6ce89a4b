"""Runs one metric of the user's own in its own process, on rows from stdin. Imports the standard library only.

    python -P -m llmtune.evaluate.suites.own_metric_process JSON    with "file", "function", "seconds", "network", ...

Each line of stdin is a row and an answer, `[row, answer]`. Each line of stdout is the value of one of them, or the
error that ended the work, with the line of the file that raised it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from llmtune.store.resource_limits import LimitExceeded, limited

BLOCKED = "it used the network"
SEED = 0


def compute_values() -> None:
    """Read the request and the rows, and write the values."""
    request, pid = json.loads(sys.argv[1]), os.getpid()
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # prints of the user's code must not mix with the values
        lines = sys.stdin.read().split("\n")[:-1]
        uses = [] if request["network"] else block_network(request["file"])
        random.seed(SEED)
        try:
            with limited(request["seconds"]):
                function = load_function(request["file"], request["function"])
                for line in lines:
                    value = as_number(function(*json.loads(line)), request["kind"])
                    if os.getpid() != pid:
                        os._exit(1)  # the code forked, and this is the copy
                    if uses:
                        raise PermissionError(BLOCKED)  # even if the code caught the first one
                    print(json.dumps({"value": value}), file=results, flush=True)
        except BaseException as error:  # noqa: BLE001 - also SystemExit: the code must not end this process unseen
            if os.getpid() != pid:
                os._exit(1)
            line_number = uses[0] if uses else find_line(error, request["file"])
            print(
                json.dumps({"error": describe_failed_call(error, uses), "line": line_number}), file=results, flush=True
            )


def load_function(file: str, name: str) -> Callable[[Any, Any], object]:
    """Import the file under a name of its own, and return its function."""
    spec = importlib.util.spec_from_file_location("own_metrics", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_metrics"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    function: Callable[[Any, Any], object] = getattr(module, name)
    return function


class WrongValueError(Exception):
    """The function returned something that is not a value of its kind."""


def as_number(value: Any, kind: str) -> float:
    """Return a value as a number; raises WrongValueError if it is not one, or not of its kind."""
    value = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
    shown = f"it returned {repr(value)[:80]}"
    if kind == "bool" and not isinstance(value, bool):
        raise WrongValueError(f"{shown}, but is annotated to return bool")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise WrongValueError(f"{shown}, which is not a finite number")
    if kind == "share" and not 0 <= value <= 1:
        raise WrongValueError(f"{shown}, but is annotated to return numbers from 0 to 1")
    return float(value)


def block_network(file: str) -> list[int | None]:
    """Refuse internet sockets and name look-ups from now on; the returned list gets the line of each attempt.

    An audit hook cannot be removed, and also sees sockets that C code opens through Python.
    """
    lines: list[int | None] = []

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith("socket."):
            return
        is_local = event == "socket.__new__" and arguments[1] == getattr(socket, "AF_UNIX", None)
        is_local |= event in ("socket.connect", "socket.bind") and isinstance(arguments[1], str | bytes)
        if not is_local and event not in ("socket.gethostname", "socket.sethostname"):
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename != file:
                frame = frame.f_back
            lines.append(frame.f_lineno if frame else None)
            raise PermissionError(BLOCKED)

    sys.addaudithook(refuse)
    return lines


def find_line(error: BaseException, file: str) -> int | None:
    """Return the last line of the file that an error passed through."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    passed = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return passed[-1] if passed else None


def describe_failed_call(error: BaseException, uses: list[int | None]) -> str:
    """Return what went wrong, as the end of a sentence about the metric."""
    if uses:
        return BLOCKED
    text = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, WrongValueError | LimitExceeded):
        return text
    return f"it raised {type(error).__name__}{': ' if text else ''}{text}"


if __name__ == "__main__":
    compute_values()
    os._exit(0)  # do not wait for threads that the code left
