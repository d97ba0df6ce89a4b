"""Several processes on this machine, through torch's elastic launcher: gloo on CPUs, nccl on GPUs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llmtune import errors
from llmtune.errors import EnvironmentProblem, LlmtuneError, Problem, Stopped
from llmtune.launch.worker import PARENT, RESULTS
from llmtune.records import Json
from llmtune.session import trained_name
from llmtune.store.atomic_files import read_json

if TYPE_CHECKING:
    from llmtune.pipeline import Trainer
    from llmtune.records import Examples, ModelRef
    from llmtune.session import RunContext

TRAIN_RUN = "llmtune.launch.worker:train_run"
SAVE_SECONDS = 300
"""How long workers may take to finish their step and save after a signal, before they are killed."""


class WorkerBug(RuntimeError):
    """A worker failed in a way that no user can fix; the message is its traceback."""


def local_trainer(processes: int, *, threads: int | None = None) -> Trainer:
    """Return what the pipeline trains with: adapt and train in `processes` workers, all else stays in the parent."""

    def trainer(context: RunContext, place: ModelRef, examples: Examples, adapt_inputs: str, train_inputs: str) -> None:
        context.begin("adapt")
        with context.step("train", train_inputs, [trained_name(context.recipe)], always=True) as step:
            found = launch_local(
                [str(context.folder.path)],
                processes,
                context.console,
                threads=threads,
                on_notes=lambda notes: context.folder.note(**notes),
            )
            # Inside: once training counts as done, nothing would note adapt any more.
            with context.folder.step("adapt", adapt_inputs, always=True) as adapted:
                adapted.facts.update(found["adapt"])
            step.facts.update(found["train"], processes=processes)

    return trainer


def launch_local(
    worker_args: Sequence[str],
    processes: int,
    console: Console,
    *,
    entry: str = TRAIN_RUN,
    threads: int | None = None,
    on_notes: Callable[[Json], None] = lambda notes: None,
) -> Any:
    """Run `entry(*worker_args)` in `processes` workers; return what rank 0 returned.

    `threads` (default: all cores) are divided among the workers. SIGINT and SIGTERM are passed on; a second one kills.
    `on_notes` gets what `worker.note` was told, also after a failure.

    Raises:
        LlmtuneError: what the first failing worker raised, with its rank.
        EnvironmentProblem: a worker was killed by the system, or there are fewer GPUs than processes.
        WorkerBug: a worker ended with a traceback.
    """
    _check_devices(processes)
    share = max(1, (threads or _count_cores()) // processes)
    with tempfile.TemporaryDirectory(prefix="llmtune-") as place, _surroundings(share, Path(place)), _no_orphans():
        console.print(f"Training in {processes} processes of {share} thread{'s' if share > 1 else ''} each.")
        try:
            elastic_launch(_configure(processes, place), sys.executable)(
                "-m", "llmtune.launch.worker", entry, *worker_args
            )
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise _explain(Path(place), codes) from None
        except SignalException as stop:
            raise _explain(Path(place), {}, signal.Signals(stop.sigval)) from None
        finally:
            notes = read_json(Path(place) / "notes.json")
            if notes:
                on_notes(notes)
        return read_json(Path(place) / "result.json")


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _check_devices(processes: int) -> None:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards and processes > cards:
        raise EnvironmentProblem.of(
            f"{processes} processes, but {cards} GPU{'s' if cards > 1 else ''}",
            "--processes",
            f"Set --processes to {cards} or less; each process has a GPU of its own.",
        )


def _configure(processes: int, place: str) -> LaunchConfig:
    late: Json = {"shutdown_timeout": SAVE_SECONDS}  # not in every torch that is supported
    known = {field.name for field in fields(LaunchConfig)}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=place),
        **{name: value for name, value in late.items() if name in known},
    )


@contextmanager
def _surroundings(threads: int, place: Path) -> Iterator[None]:
    """Set what workers inherit, and keep torch's launcher quiet; afterwards all of it is as before, signals too."""
    environment = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    os.environ |= {RESULTS: str(place), PARENT: str(os.getpid())}
    if not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logger.setLevel(level)
        os.environ.clear()
        os.environ |= environment


@contextmanager
def _no_orphans() -> Iterator[None]:
    """Kill the processes that were started inside the block and are still there at its end."""
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    finally:
        left = [child for child in psutil.Process().children(recursive=True) if child not in before]
        for child in left:
            child.kill()
        psutil.wait_procs(left, timeout=10)


def _explain(place: Path, codes: Mapping[int, int], stopped_by: signal.Signals | None = None) -> Exception:
    """Turn what the workers left behind into the error of the one that failed first.

    When one fails, its peers lose their connection and fail too: an error with a message goes before a death by signal,
    that before a traceback, and a worker that was told to stop comes last.
    """
    files = sorted(place.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    left = {int(path.stem.removeprefix("rank-")): read_json(path) for path in files}
    named = {rank: found for rank, found in left.items() if "kind" in found}
    for rank, found in named.items():
        if found["kind"] != Stopped.__name__:
            return _rebuild(rank, found)
    if stopped_by is None:
        for rank, code in codes.items():
            if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
                return _killed(rank, -code)
        for rank, found in left.items():
            if "traceback" in found:
                return WorkerBug(f"process {rank} failed:\n{found['traceback']}")
    for found in named.values():
        problems = [Problem(*problem) for problem in found["problems"]]
        return Stopped(*problems, signal_number=found["exit"] - 128)
    if stopped_by is not None:
        what = f"stopped by {stopped_by.name} before a checkpoint was saved"
        return Stopped(Problem(what, fix="The same command again goes on."), signal_number=int(stopped_by))
    return WorkerBug(f"workers ended with the exit codes {dict(codes)} and said nothing")


def _rebuild(rank: int, found: Json) -> LlmtuneError:
    kind: type[LlmtuneError] = getattr(errors, found["kind"])
    problems = [Problem(*problem) for problem in found["problems"]]
    first = problems[0]
    place = f"process {rank}" if first.where is None else f"process {rank}, {first.where}"
    return kind(Problem(first.what, place, first.fix), *problems[1:])


def _killed(rank: int, number: int) -> EnvironmentProblem:
    fix = "The same command again goes on from the last checkpoint."
    if number == signal.SIGKILL:
        fix = f"Most often the system had too little memory: start fewer processes. {fix}"
    problem = EnvironmentProblem.of(
        f"process {rank} was killed by {signal.Signals(number).name}", f"process {rank}", fix
    )
    assert isinstance(problem, EnvironmentProblem)
    return problem
