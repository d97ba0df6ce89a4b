"""Real commands in children of a process that has imported everything: separate processes without import time.

A child is a fork: its files, signals, limits and memory are real. `python -m support.warm` is that process; it reads a
JSON line for each command, and writes one when a command has started and one when it has ended.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import llmtune

LAZY = (
    *("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert", "torch._dynamo"),
    *("transformers.models.bert.tokenization_bert", "scipy.stats", "sacrebleu", "pyarrow.parquet", "pyarrow.csv"),
)
"""Modules that are imported late, in addition to llmtune's."""
PAGE = resource.getpagesize()
BUG = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Conditions:
    """The system's conditions for a command."""

    limits: Mapping[str, int] = field(default_factory=dict)
    """Limits by name (RLIMIT_NOFILE, ...); RLIMIT_AS counts from what the process has when the command starts."""
    environment: Mapping[str, str] = field(default_factory=dict)
    before: str | None = None
    """MODULE:FUNCTION that is called in the child just before the command."""
    fresh: bool = False
    """Whether the child becomes a new interpreter, which imports everything anew."""


@dataclass
class Command:
    """A started command."""

    warm: Warm
    pid: int
    outputs: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def said(self) -> str:
        """Stderr so far."""
        return (self.outputs / "stderr").read_text(errors="replace")

    @property
    def printed(self) -> str:
        """Stdout so far."""
        return (self.outputs / "stdout").read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether it is still running."""
        self.warm.listen(0)
        return self.pid not in self.warm.ended

    def wait(self, seconds: float = 300) -> Ended:
        """Wait for its end; kill a command that does not end in time, and mark it as too late."""
        late = not self.warm.listen(self.began + seconds - time.monotonic(), self.pid)
        if late:
            self.send(signal.SIGKILL)
            self.warm.listen(30, self.pid)
        return Ended(**self.warm.ended[self.pid], said=self.said, printed=self.printed, late=late)

    def send(self, number: int) -> None:
        """Send a signal; does nothing if the command has ended."""
        if self.running:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), time and memory."""

    code: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    said: str
    printed: str
    late: bool

    @property
    def crashed(self) -> bool:
        """Whether it ended with a traceback."""
        return BUG in self.said or self.code == 1


class Warm:
    """The warm process, seen from a test."""

    def __init__(self) -> None:
        self.ended: dict[int, dict[str, float]] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        self._line()  # it is ready

    def start(self, arguments: Sequence[object], cwd: Path, outputs: Path, given: Conditions | None = None) -> Command:
        """Start `llmtune ARGUMENTS` in `cwd`; its output goes to files in `outputs`."""
        outputs.mkdir(parents=True, exist_ok=True)
        request = {"arguments": [str(one) for one in arguments], "cwd": str(cwd), "outputs": str(outputs)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request | asdict(given or Conditions())).encode() + b"\n")
        while "started" not in (line := self._line()):
            self.ended[int(line.pop("pid"))] = line
        return Command(self, int(line["started"]), outputs)

    def run(
        self, arguments: Sequence[object], cwd: Path, given: Conditions | None = None, seconds: float = 300
    ) -> Ended:
        """Run a command to its end; its output is in the folder `said` in `cwd`."""
        return self.start(arguments, cwd, cwd / "said", given).wait(seconds)

    def listen(self, seconds: float, pid: int | None = None) -> bool:
        """Record ended commands until a timeout or until that of `pid` has ended; return whether it has."""
        end = time.monotonic() + seconds
        while pid not in self.ended and select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
            line = self._line()
            self.ended[int(line.pop("pid"))] = line
        return pid in self.ended

    def _line(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the warm process is gone"
        return dict(json.loads(line))

    def close(self) -> None:
        """End the warm process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def serve() -> dict[str, object]:
    """Start a child for each input line; return in the child, with the line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    began: dict[int, float] = {}
    answers.write("{}\n")
    while True:
        ready, _, _ = select.select([0, awake], [], [])
        if awake in ready:
            os.read(awake, 4096)
            _reap(began, answers.write)
        if 0 in ready:
            line = sys.stdin.buffer.raw.readline()  # type: ignore[attr-defined]
            if not line:
                sys.exit()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return dict(json.loads(line))
            began[pid] = time.monotonic()
            answers.write(json.dumps({"started": pid}) + "\n")


def _reap(began: dict[int, float], answer) -> None:  # type: ignore[no-untyped-def]
    while began:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        figures = {
            "pid": pid,
            "code": os.waitstatus_to_exitcode(status),
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "wall_seconds": time.monotonic() - began.pop(pid),
            "peak_bytes": used.ru_maxrss * 1024,
        }
        answer(json.dumps(figures) + "\n")


def become(request: dict[str, object]) -> None:
    """Make this child the process that a shell would have started."""
    outputs, conditions = str(request["outputs"]), request
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    handles = [os.open("/dev/null", os.O_RDONLY)] + [os.open(f"{outputs}/{n}", flags) for n in ("stdout", "stderr")]
    for stream, handle in enumerate(handles):
        os.dup2(handle, stream)
    os.closerange(3, 1024)
    os.chdir(str(request["cwd"]))
    os.environ.update({"COLUMNS": "200", **conditions["environment"]})  # type: ignore[dict-item]
    sys.argv = ["llmtune", *request["arguments"]]  # type: ignore[misc]
    random.seed()
    numpy, torch = sys.modules["numpy"], sys.modules["torch"]
    numpy.random.seed()
    torch.seed()
    if conditions["before"]:
        module, _, name = str(conditions["before"]).partition(":")
        getattr(importlib.import_module(module), name)()
    for name, limit in conditions["limits"].items():  # type: ignore[attr-defined]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE if name == "RLIMIT_AS" else 0
        resource.setrlimit(getattr(resource, name), (used + limit, used + limit))
    if conditions["fresh"]:
        os.execv(sys.executable, [sys.executable, "-m", *sys.argv])


if __name__ == "__main__":
    own = [module.name for module in pkgutil.walk_packages(llmtune.__path__, "llmtune.")]
    for module in [*(name for name in own if not name.endswith("__main__")), *LAZY]:
        importlib.import_module(module)
    become(serve())
    from llmtune.cli import main

    main()
