"""Runs one function of the user's own in its own process, on calls from stdin. Imports nothing heavy.

    python -P -m llmtune.evaluate.suites.own_metric_process JSON    with "file", "function", "seconds", "network", ...

Each line of stdin is a call, `[arguments, keywords]`. Each line of stdout is the value of one of them, or the error
that ended the work, with the line of the file that raised it, and whether the file was loaded. With "observe" an error
ends only its call, and each line also has the seconds of the call and the exceptions that the file caught.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from llmtune.recipe.secrets import environment_secrets, hide_environment
from llmtune.store.resource_limits import LARGEST_NUMBER, LimitExceeded, limited

BLOCKED = "it used the network"
RAISED = "it raised"
SEED = 0
SECRETS = environment_secrets()
"""Of before the user's code runs; hidden before a text is cut, as a part of one cannot be found."""


def compute_values() -> None:
    """Read the request and the calls, and write the values."""
    request, pid = json.loads(sys.argv[1]), os.getpid()
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # prints of the user's code must not mix with the values
        lines = sys.stdin.read().split("\n")[:-1]
        uses = [] if request["network"] else block_network(request["file"])
        random.seed(SEED)
        loaded = False
        try:
            with limited(request["seconds"]):
                function = load_function(request["file"], request["function"])
                if isinstance(function, type):  # a class whose objects are called
                    function = function()
                loaded = True
                for line in lines:
                    plain_call = {} if request.get("observe") else {"value": call(function, line, request["kind"])}
                    written = plain_call or observe_call(function, line, request)
                    if os.getpid() != pid:
                        os._exit(1)  # the code forked, and this is the copy
                    if uses:
                        raise PermissionError(BLOCKED)  # even if the code caught the first one
                    print(json.dumps(written), file=results, flush=True)
        except BaseException as error:  # noqa: BLE001 - also SystemExit: the code must not end this process unseen
            if os.getpid() != pid:
                os._exit(1)
            line_number = uses[0] if uses else find_line(error, request["file"])
            failure = {"error": describe_failed_call(error, uses), "line": line_number, "loaded": loaded}
            print(json.dumps(failure), file=results, flush=True)


def call(function: Callable[..., object], line: str, kind: str) -> float | None:
    """Call the function with the arguments of a line, and return its value as a number."""
    arguments, keywords = json.loads(line)
    return as_number(function(*arguments, **keywords), kind)


def observe_call(function: Callable[..., object], line: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the value or the error of a call, its seconds, and the first exception that the file caught in it."""
    seen: dict[str, Any] = {"value": None}
    started = time.perf_counter()
    try:
        with caught_exceptions(request["file"]) if request["observe"] == "exceptions" else nullcontext(()) as caught:
            seen["value"] = call(function, line, request["kind"])
        seen |= {"caught": caught[0]} if caught else {}
    except LimitExceeded:
        raise
    except BaseException as error:  # noqa: BLE001 - also SystemExit
        seen |= {"error": describe_failed_call(error, []), "line": find_line(error, request["file"])}
    return seen | {"seconds": round(time.perf_counter() - started, 9)}


@contextmanager
def caught_exceptions(file: str) -> Iterator[list[tuple[int, str]]]:
    """Collect the line and the type of each exception that passes through the file's code inside the block."""
    passed: list[tuple[int, str]] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        frame.f_trace_lines = False
        if event == "exception" and not issubclass(argument[0], StopIteration | GeneratorExit):
            passed.append((frame.f_lineno, hide_environment(argument[0].__name__, SECRETS)))
        return trace

    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(None)


def load_function(file: str, name: str) -> Callable[..., object]:
    """Import the file under a name of its own, and return its function."""
    spec = importlib.util.spec_from_file_location("own_metrics", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_metrics"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    function: Callable[..., object] = getattr(module, name)
    return function


class WrongValueError(Exception):
    """The function returned something that is not a value of its kind."""


def as_number(value: Any, kind: str) -> float | None:
    """Return a value as a number; raises WrongValueError if it is not one, or not of its kind.

    The kind "reward" also has None, for an answer that the reward does not apply to; "rewards" is a list of one.
    """
    if kind == "rewards":
        if hasattr(value, "tolist"):  # an array of numpy or torch
            value = value.tolist()
        if not isinstance(value, list | tuple) or len(value) != 1:
            raise WrongValueError(f"{show(value)}, which is not a list of one reward per completion")
        value = value[0]
    if kind in ("reward", "rewards") and value is None:
        return None
    value = value.item() if hasattr(value, "item") else value  # a number of numpy or torch
    shown = show(value)
    if kind == "bool" and not isinstance(value, bool):
        raise WrongValueError(f"{shown}, but is annotated to return bool")
    if not isinstance(value, int | float) or not abs(value) <= LARGEST_NUMBER:
        raise WrongValueError(f"{shown}, which is not a finite number of at most {LARGEST_NUMBER:g}")
    if kind == "share" and not 0 <= value <= 1:
        raise WrongValueError(f"{shown}, but is annotated to return numbers from 0 to 1")
    return float(value)


def show(value: object) -> str:
    """Return the beginning of a sentence on a value."""
    return f"it returned {hide_environment(repr(value), SECRETS)[:80]}"


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
    text = hide_environment((str(error).strip().splitlines() or [""])[0], SECRETS)[:200]
    if isinstance(error, WrongValueError | LimitExceeded):
        return text
    return f"{RAISED} {hide_environment(type(error).__name__, SECRETS)}{': ' if text else ''}{text}"


if __name__ == "__main__":
    compute_values()
    os._exit(0)  # do not wait for threads that the code left
