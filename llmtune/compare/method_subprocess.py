"""One method's run in a process of its own: started, told when to stop, and what became of it.

As a program (`python -m llmtune.compare.method_subprocess run ...`) it is llmtune itself, but stops when its parent is
gone.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from llmtune import errors
from llmtune.errors import EnvironmentProblem, GateFailed, LlmtuneError, Problem, Stopped

PARENT = "LLMTUNE_TRIAL_PARENT"
"""Environment variable: the process that a trial must not outlive."""
SECONDS = 0.5
KINDS = {
    kind.exit_code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LlmtuneError)
}


class TrialBug(RuntimeError):
    """A trial failed in a way that no user can mend; its traceback stands above."""


def run_trial(method: str, arguments: Sequence[str]) -> None:
    """Run `llmtune` with `arguments` in a process of its own; its messages go to stderr as they come.

    SIGINT and SIGTERM are handed on: the trial saves a checkpoint and stops.

    Raises:
        LlmtuneError: what the trial ended with, its method named. Failed gates are none of ours.
        TrialBug: it ended with a traceback.
    """
    words = [sys.executable, "-m", "llmtune.compare.method_subprocess", *arguments]
    environment = {**os.environ, PARENT: str(os.getpid())}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = subprocess.Popen(  # noqa: S603
            words, stdin=subprocess.DEVNULL, stdout=output, env=environment, process_group=0
        )
        with handed_on(child):
            code = child.wait()
        if code not in (0, GateFailed.exit_code):
            raise explain(method, code, output)


@contextmanager
def handed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand signals on to the child inside the block, and wait for what it makes of them."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(method: str, code: int, output: IO[str]) -> Exception:
    """Turn how a trial ended into an error."""
    again = "The same command again goes on from there."
    if code < 0:
        name = signal.Signals(-code).name
        fix = f"Most often the system had too little memory. {again}" if -code == signal.SIGKILL else again
        return EnvironmentProblem.of(f"the run was killed by {name}", method, fix)
    if code > 128:
        return Stopped(Problem("stopped; what was done is saved", method, again), signal_number=code - 128)
    output.seek(0)
    try:
        problems = json.loads(output.read())["error"]["problems"]
    except (ValueError, KeyError, TypeError):
        return TrialBug(f"the run with method {method} ended with exit code {code}: see above")
    kind = KINDS.get(code, LlmtuneError)
    return kind(*(Problem(f"with method {method}: {one['what']}", one["where"], one["fix"]) for one in problems))


def stop_with_parent() -> None:
    """Ask this process to stop as soon as its parent is another one: what goes on alone would keep the run folder."""
    while os.getppid() == int(os.environ[PARENT]):
        time.sleep(SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=stop_with_parent, daemon=True).start()
    runpy.run_module("llmtune", run_name="__main__", alter_sys=True)
