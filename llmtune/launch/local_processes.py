"""The processes of this machine, through torch's elastic launcher: gloo on CPUs, nccl on GPUs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llmtune import errors
from llmtune.errors import EnvironmentProblem, LlmtuneError, Problem, Stopped
from llmtune.executor import Executor
from llmtune.launch.machines import Board, joined_board, own_address
from llmtune.launch.topology import Topology
from llmtune.launch.worker import LAST_WORDS, PARENT, QUIET, RESULTS
from llmtune.records import Json
from llmtune.session import trained_name
from llmtune.store.atomic_files import read_json

if TYPE_CHECKING:
    from llmtune.records import Examples, ModelRef
    from llmtune.session import RunContext

TRAIN_RUN = "llmtune.launch.worker:train_run"
EVALUATE_RUN = "llmtune.launch.worker:evaluate_run"
SAVE_SECONDS = 300
"""How long workers may take to finish their step and save after a signal, before they are killed."""
JOIN_SECONDS = 900
"""How long the machines of a run wait for each other before processes start, for the first time or again."""
CARDS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the network card of a machine."""
SHOWN_LINES = 8
"""Lines of what a process wrote last that are shown when it died, and of what Python adds."""


class WorkerBug(RuntimeError):
    """A worker failed in a way that no user can fix; the message is its traceback."""


def process_executor(topology: Topology, board: Board | None = None, *, threads: int | None = None) -> Executor:
    """Return what the pipeline works with: it adapts, trains and evaluates in workers, all else stays in the parent.

    Raises EnvironmentProblem where there are too few GPUs.
    """
    _check_devices(topology)

    def train(context: RunContext, place: ModelRef, examples: Examples, adapt_inputs: str, train_inputs: str) -> None:
        context.begin("adapt")
        with context.step("train", train_inputs, [trained_name(context.recipe)], always=True) as step:
            found = launch_local(
                [str(context.folder.path.resolve()), topology.strategy],
                topology,
                context.console,
                board=board,
                threads=threads,
                on_notes=lambda notes: context.folder.note(**notes),
            )
            # Inside: once training counts as done, nothing would note adapt any more.
            with context.folder.step("adapt", adapt_inputs, always=True) as adapted:
                adapted.facts.update(found["adapt"])
            step.facts.update(found["train"], processes=topology.layout.processes, strategy=topology.strategy)

    def score(context: RunContext, *_: object, folder: Path) -> None:
        base = "" if context.base is None else str(context.base.resolve())
        arguments = [str(context.folder.path.resolve()), str(folder.resolve()), base]
        launch_local(arguments, topology, context.console, entry=EVALUATE_RUN, board=board, threads=threads)

    return Executor(train, score)


def launch_local(
    worker_args: Sequence[str],
    topology: Topology,
    console: Console,
    *,
    entry: str = TRAIN_RUN,
    board: Board | None = None,
    threads: int | None = None,
    on_notes: Callable[[Json], None] = lambda notes: None,
) -> Any:
    """Run `entry(*worker_args)` in the processes of this machine and, with a board, of the others; return the result.

    It is what rank 0 returned. `threads` (default: all cores) are divided among the workers. SIGINT and SIGTERM are
    passed on; a second one kills. `on_notes` gets what `worker.note` was told, also after a failure.

    Raises:
        LlmtuneError: what the first failing worker raised, with its rank.
        EnvironmentProblem: a worker was killed by the system, or a machine is gone.
        WorkerBug: a worker ended with a traceback.
    """
    meet = uuid.uuid4().hex if board is None else board.post(entry, [*worker_args])
    found, stopped_by = _run_workers([entry, *worker_args], topology, console, meet, threads)
    if board and stopped_by is not None:
        board.close(meet)
    others, gone = board.collect() if board else ([], [])
    found = sorted([*found, *others], key=lambda one: float(one["time"]))
    results = {one["name"]: one["value"] for one in found}
    if "notes.json" in results:
        on_notes(results["notes.json"])
    if "result.json" in results and not any("signal" in one for one in found):
        return results["result.json"]
    raise _explain(found, stopped_by, gone)


def serve_machine(topology: Topology, recipe: str, console: Console, *, threads: int | None = None) -> None:
    """On another machine than 0: start what machine 0 posts, until its run ends; `recipe` is a hash.

    Raises LlmtuneError: the run ended with it, machine 0 is gone, or this machine was told to stop.
    """
    _check_devices(topology)
    done = 0
    with joined_board(topology, recipe, console) as board:
        while (job := board.next_job(done)) is not None:
            done = job["number"]
            found, stopped_by = _run_workers([job["entry"], *job["arguments"]], topology, console, job["meet"], threads)
            board.report(done, found)
            if stopped_by is not None:
                board.close(job["meet"])
                raise _explain(found, stopped_by, [])


def _run_workers(
    command: list[str], topology: Topology, console: Console, meet: str, threads: int | None
) -> tuple[list[Json], signal.Signals | None]:
    """Run the workers of this machine; return what they left behind, and the signal that stopped all of them."""
    share = max(1, (threads or _count_cores()) // topology.processes)
    failures: dict[int, ProcessFailure] = {}
    stopped_by, trouble = None, None
    with (
        tempfile.TemporaryDirectory(prefix="llmtune-") as place,
        _surroundings(share, Path(place), topology, quiet=console.quiet) as address,
    ):
        with _no_orphans(), _deaths_shown(console, topology):
            machines = f" of each of {topology.machines} machines" if topology.machines > 1 else ""
            plural = "es" if topology.processes > 1 else ""
            console.print(
                f"{topology.processes} process{plural}{machines}, of {share} thread{'s' if share > 1 else ''} each."
            )
            try:
                launch = elastic_launch(_configure(topology, place, meet, address), sys.executable)
                launch("-m", "llmtune.launch.worker", *command)
            except ChildFailedError as error:
                failures = error.failures
            except SignalException as stop:
                stopped_by = signal.Signals(stop.sigval)
            except (RendezvousError, DistError) as error:
                trouble = f"the machines did not come together: {error}"
        found = [*_read_left(Path(place)), *(_describe_death(Path(place), *one) for one in failures.items())]
    if trouble is not None:
        found.append({"name": "trouble", "time": time.time(), "value": trouble})
    return found, stopped_by


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _check_devices(topology: Topology) -> None:
    processes = topology.processes
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards and processes > cards:
        raise EnvironmentProblem.of(
            f"{processes} processes, but {cards} GPU{'s' if cards > 1 else ''}",
            "--processes",
            f"Set --processes to {cards} or less; each process has a GPU of its own.",
        )


def _configure(topology: Topology, place: str, meet: str, address: str) -> LaunchConfig:
    late: Json = {"shutdown_timeout": SAVE_SECONDS}  # not in every torch that is supported
    known = {field.name for field in fields(LaunchConfig)}
    alone = topology.machines == 1
    return LaunchConfig(
        min_nodes=topology.machines,
        max_nodes=topology.machines,
        nproc_per_node=topology.processes,
        run_id=meet,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if alone else str(topology.address),
        rdzv_configs={"timeout": JOIN_SECONDS, "join_timeout": JOIN_SECONDS, "is_host": topology.rank == 0},
        local_addr=address,
        max_restarts=topology.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=place),
        **{name: value for name, value in late.items() if name in known},
    )


@contextmanager
def _surroundings(threads: int, place: Path, topology: Topology, *, quiet: bool) -> Iterator[str]:
    """Set what workers inherit, and keep torch's launcher quiet; afterwards all of it is as before, signals too.

    Gives the address of this machine for the others.
    """
    environment = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    os.environ |= {RESULTS: str(place), PARENT: str(os.getpid())} | ({QUIET: "1"} if quiet else {})
    if topology.machines > 1 or topology.max_restarts:
        # torch's shared store keeps the addresses of those that are gone, for whoever starts again.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    address, card = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"
    if topology.machines > 1:
        address, interface = own_address(topology)
        os.environ |= {name: os.environ.get(name, interface) for name in CARDS if interface}
    elif not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
    logger, nowhere = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    logger.propagate = False  # a level would not do: modules below have their own
    logger.addHandler(nowhere)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield address
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logger.propagate = True
        logger.removeHandler(nowhere)
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


@contextmanager
def _deaths_shown(console: Console, topology: Topology) -> Iterator[None]:
    """Print each process that dies while others are to be started again; torch tells it to its log alone."""

    def show(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("failed (exitcode") and isinstance(record.args, tuple):
            code, local_rank = record.args[:2]
            console.print(f"[yellow]Process {local_rank} of this machine ended with {code}.[/]")
        return False

    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    if topology.max_restarts:
        logger.addFilter(show)
    try:
        yield
    finally:
        logger.removeFilter(show)


def _read_left(place: Path) -> list[Json]:
    """Return what workers left behind: notes, a result, and why they ended."""
    files = sorted(place.glob("*.json"))
    return [{"name": file.name, "time": file.stat().st_mtime, "value": read_json(file)} for file in files]


def _describe_death(place: Path, rank: int, failure: ProcessFailure) -> Json:
    """Return the signal that a process ended by (0: none), and its last words."""
    log = place / LAST_WORDS.format(rank)
    said, fatal, dump = (log.read_text(errors="replace") if log.exists() else "").partition("Fatal Python error")
    words = said.splitlines()[-SHOWN_LINES:] + (fatal + dump).splitlines()[:SHOWN_LINES]
    died = {"rank": rank, "signal": max(0, -failure.exitcode), "exit": failure.exitcode, "words": words}
    return {"name": "death", "time": float(failure.timestamp), **died, "value": None}


def _explain(found: Sequence[Json], stopped_by: signal.Signals | None, gone: Sequence[int]) -> Exception:
    """Turn what the workers left behind into the error of the one that failed first.

    When one fails, its peers lose their connection and fail too: an error with a message goes before a death by signal,
    that before a machine that is gone, that before a traceback, and a worker that was told to stop comes last.
    """
    left = [(int(one["name"][5:-5]), one["value"]) for one in found if one["name"].startswith("rank-")]
    named = [(rank, value) for rank, value in left if "kind" in value]
    for rank, value in named:
        if value["kind"] != Stopped.__name__:
            return _rebuild(rank, value)
    if stopped_by is None:
        for one in found:
            if one.get("signal", 0) not in (0, signal.SIGTERM, signal.SIGINT):
                return _killed(one["rank"], one["signal"], one["words"])
        if gone:
            who = f"machine {' and '.join(map(str, gone))}"
            fix = "The same command on each machine goes on from the last checkpoint."
            return EnvironmentProblem.of("does not answer any more", who, fix)
        for rank, value in left:
            if "traceback" in value:
                return WorkerBug(f"process {rank} failed:\n{value['traceback']}")
    for _, value in named:
        return Stopped(*(Problem(*problem) for problem in value["problems"]), signal_number=value["exit"] - 128)
    for one in found:
        if one["name"] == "trouble":
            fix = "Give the same command on each machine, with a --rank of its own."
            return EnvironmentProblem.of(one["value"], "--address", fix)
    ends = [one["signal"] for one in found if one["name"] == "death"]
    if stopped_by is not None or (ends and all(ends)):
        number = stopped_by or signal.Signals(ends[0])
        what = f"stopped by {number.name} before a checkpoint was saved"
        return Stopped(Problem(what, fix="The same command again goes on."), signal_number=int(number))
    deaths = {one["rank"]: one["exit"] for one in found if one["name"] == "death"}
    return WorkerBug(f"workers ended with the exit codes {deaths} and said nothing")


def _rebuild(rank: int, found: Json) -> LlmtuneError:
    kind: type[LlmtuneError] = getattr(errors, found["kind"])
    problems = [Problem(*problem) for problem in found["problems"]]
    first = problems[0]
    place = f"process {rank}" if first.where is None else f"process {rank}, {first.where}"
    return kind(Problem(first.what, place, first.fix), *problems[1:])


def _killed(rank: int, number: int, words: Sequence[str]) -> EnvironmentProblem:
    fix = "The same command again goes on from the last checkpoint."
    if number == signal.SIGKILL:
        fix = f"Most often the system had too little memory: start fewer processes. {fix}"
    last = "".join(f"\n    {line}" for line in words)
    problem = EnvironmentProblem.of(
        f"process {rank} was killed by {signal.Signals(number).name}{'; its last words:' if last else ''}{last}",
        f"process {rank}",
        fix,
    )
    assert isinstance(problem, EnvironmentProblem)
    return problem
