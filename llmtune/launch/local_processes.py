"""Start the processes of this machine with torch's elastic launcher: gloo on CPUs, nccl on GPUs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # torch does not list it
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llmtune.errors import (
    BY_EXIT_CODE,
    EnvironmentProblem,
    GateFailed,
    LlmtuneError,
    LostProcess,
    Problem,
    RecipeError,
    Stopped,
    describe_end,
)
from llmtune.launch.topology import Topology, why_not
from llmtune.recipe.loader import load_recipe
from llmtune.records import Json
from llmtune.store.atomic_files import read_json
from llmtune.store.bounded_process import no_orphans
from llmtune.store.processes import ERROR, LEFT, OFFLOAD, STRATEGY, WORDS, host_store, rebuild_error
from llmtune.store.run_request import RunRequest

SAVE_SECONDS = 300
"""How long workers may take to finish their step and save after a signal; then they are killed."""
JOIN_SECONDS = 900
"""How long the machines of a run wait for each other before processes start or restart."""
TRY_SECONDS = 5
MEETING = "llmtune"
"""The run id of a rendezvous of several machines."""
CARDS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the network interface of a machine."""
SHOWN_LINES = 8
"""Number of lines shown of a dead process's last output, and of Python's fatal error."""


class WorkerBug(RuntimeError):
    """A process failed because of a bug; the message is its traceback."""


@dataclass(frozen=True)
class Death:
    """How a process ended: its exit code (negative for a signal), the time, and its last output."""

    code: int
    time: float
    words: list[str]


def launch_run(
    recipe: str | Path,
    sets: Sequence[str],
    request: RunRequest,
    topology: Topology,
    console: Console,
    words: Sequence[str] = (),
) -> None:
    """Run a recipe as `llmtune` does in the processes of this machine; `words` are further options of that command.

    Raises what `launch` raises, and RecipeError if the strategy does not support the recipe.
    """
    loaded = load_recipe(recipe, sets)
    RecipeError.collect(why_not(topology.strategy, loaded.recipe))
    chosen = [word for one in sets for word in ("--set", one)]
    stated = replace(request, threads=None).words()  # each process gets its share of the threads
    words = ["-m", "llmtune", request.until, str(recipe), *chosen, *stated, *words]
    launch(words, topology, console, threads=request.threads)


def launch(words: Sequence[str], topology: Topology, console: Console, *, threads: int | None = None) -> None:
    """Run `python WORDS` in the processes of this machine; each machine of a run calls it.

    `threads` (default: all cores) are divided among the processes. A SIGINT or SIGTERM is passed on; a second kills.

    Raises:
        LlmtuneError: the error of the first process that failed, with its rank.
        EnvironmentProblem: there are too few GPUs, the system killed a process, or a machine is unreachable.
        WorkerBug: a process ended with a traceback.
    """
    _check_devices(topology)
    if topology.rank:
        console.print(f"Machine {topology.rank} of {topology.machines}: waiting for machine 0 at {topology.address}.")
        _wait_for_machine_0(topology)
    share = max(1, (threads or _count_cores()) // topology.processes)
    failures: dict[int, ProcessFailure] = {}
    stopped_by, trouble = None, None
    with (
        nullcontext(_host_rendezvous(topology, console)),  # torch ends the store with this object
        tempfile.TemporaryDirectory(prefix="llmtune-") as place,
        _surroundings(share, Path(place), topology) as address,
    ):
        with no_orphans(), _deaths_shown(console, topology):
            machines = f" of each of {topology.machines} machines" if topology.machines > 1 else ""
            plural = "es" if topology.processes > 1 else ""
            console.print(
                f"{topology.processes} process{plural}{machines}, {share} thread{'s' if share > 1 else ''} each."
            )
            try:
                elastic_launch(_configure(topology, place, address), sys.executable)(*words)
                return
            except ChildFailedError as error:
                failures = error.failures
            except SignalException as stop:
                stopped_by = signal.Signals(stop.sigval)
                _close_rendezvous(topology)
            except (RendezvousError, DistError) as error:
                trouble = str(error)
        left = {number: read_json(Path(place) / ERROR.format(number)) for number in _ranks(Path(place))}
        raise _first_error(
            left, {r: _describe_death(Path(place), r, f) for r, f in failures.items()}, stopped_by, trouble
        )


def _close_rendezvous(topology: Topology) -> None:
    """Tell the other machines that a signal stopped this one, which torch elastic does not do: else they would wait."""
    if not topology.rank:
        return  # the store ends with machine 0
    with suppress(DistError, RendezvousError):
        store = TCPStore(topology.host, topology.port, is_master=False, timeout=timedelta(seconds=TRY_SECONDS))
        backend, count = C10dRendezvousBackend(store, MEETING), topology.machines
        DynamicRendezvousHandler.from_backend(MEETING, store, backend, count, count).shutdown()


def _ranks(place: Path) -> list[int]:
    """Return the ranks of the processes that left an error, the earliest first."""
    files = sorted(place.glob(ERROR.format("*")), key=lambda file: file.stat().st_mtime)
    return [int(file.stem.removeprefix("rank-")) for file in files]


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _check_devices(topology: Topology) -> None:
    processes = topology.processes
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards and processes > cards:
        raise EnvironmentProblem.of(
            f"{processes} processes, but {cards} GPU{'s' if cards > 1 else ''}",
            "--processes",
            f"Set --processes to {cards} or less; each process needs its own GPU.",
        )


def _configure(topology: Topology, place: str, address: str) -> LaunchConfig:
    late: dict[str, Any] = {"shutdown_timeout": SAVE_SECONDS}  # not in every torch that is supported
    names = {field.name for field in fields(LaunchConfig)}
    # torch unpickles data from the rendezvous. On one machine that is a file which no other user can write.
    alone = topology.machines == 1
    meeting: dict[str, Any] = {"timeout": JOIN_SECONDS, "join_timeout": JOIN_SECONDS}
    meeting |= {"store_type": "file"} if alone else {"is_host": False}  # see `_host_rendezvous`
    return LaunchConfig(
        min_nodes=topology.machines,
        max_nodes=topology.machines,
        nproc_per_node=topology.processes,
        run_id=uuid.uuid4().hex if alone else MEETING,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{place}/rendezvous" if alone else str(topology.address),
        rdzv_configs=meeting,
        local_addr=address,
        max_restarts=topology.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=place),
        **{name: value for name, value in late.items() if name in names},
    )


@contextmanager
def _surroundings(threads: int, place: Path, topology: Topology) -> Iterator[str]:
    """Set the workers' environment and silence torch's launcher; afterwards restore both, and the signal handlers.

    Yields the address at which other machines reach this one.
    """
    environment = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    os.environ |= {LEFT: str(place), STRATEGY: topology.strategy, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.environ |= {OFFLOAD: str(topology.offload_params).lower()}
    # torch's shared store listens on all interfaces, and would give restarted processes the addresses of dead ones.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    address, card = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"
    if topology.machines > 1:
        address, interface = _own_address(topology)
        os.environ |= {name: os.environ.get(name, interface) for name in CARDS if interface}
    elif not torch.cuda.is_available():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
    logger, nowhere = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    logger.propagate = False  # a level is not enough: its child loggers have their own
    logger.addHandler(nowhere)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield address
    finally:
        if threading.current_thread() is threading.main_thread():  # else nobody could change them
            for number, handler in handlers.items():
                signal.signal(number, handler)
        logger.propagate = True
        logger.removeHandler(nowhere)
        os.environ.clear()
        os.environ |= environment


@contextmanager
def _deaths_shown(console: Console, topology: Topology) -> Iterator[None]:
    """Print each process that dies while restarts are allowed; torch only logs it."""

    def show(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("failed (exitcode") and isinstance(record.args, tuple):
            code, local_rank = record.args[:2]
            console.print(f"[yellow]Process {local_rank} of this machine ended with exit code {code}.[/]")
        return False

    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    if topology.max_restarts:
        logger.addFilter(show)
    try:
        yield
    finally:
        logger.removeFilter(show)


def _describe_death(place: Path, number: int, failure: ProcessFailure) -> Death:
    """Return how a process ended, with its last output."""
    log = place / WORDS.format(number)
    output, fatal, dump = (log.read_text(errors="replace") if log.exists() else "").partition("Fatal Python error")
    words = output.splitlines()[-SHOWN_LINES:] + (fatal + dump).splitlines()[:SHOWN_LINES]
    return Death(failure.exitcode, float(failure.timestamp), words)


def _first_error(
    left: Mapping[int, Json], deaths: Mapping[int, Death], stopped_by: signal.Signals | None, trouble: str | None
) -> BaseException:
    """Turn the error files and exit codes of the processes into the error of the one that failed first.

    When one process fails, its peers lose their connection and fail too. An error with a message therefore takes
    precedence over a death by signal, that over a traceback, and a process stopped on request comes last.
    """
    named = {number: value for number, value in left.items() if "kind" in value}
    for value in named.values():
        if value["kind"] not in (Stopped.__name__, LostProcess.__name__):
            return _with_rank(value, [number for number in named if named[number]["problems"] == value["problems"]])
    if stopped_by is None:
        for number, death in sorted(deaths.items(), key=lambda one: one[1].time):
            if -death.code > 0 and -death.code not in (signal.SIGTERM, signal.SIGINT):
                return _killed(number, -death.code, death.words)
        for number, value in left.items():
            if "traceback" in value:
                return WorkerBug(f"process {number} failed:\n{value['traceback']}")
    for value in sorted(named.values(), key=lambda one: one["kind"] != Stopped.__name__):
        return rebuild_error(value)
    if trouble is not None:
        fix = "Run the same command on each machine, each with its own --rank."
        return EnvironmentProblem.of(f"Rendezvous failed: {trouble}", "--address", fix)
    codes = {number: death.code for number, death in deaths.items()}
    ends = {-code if code < 0 else code - 128 for code in codes.values()}
    ended = stopped_by or next((one for one in (signal.SIGTERM, signal.SIGINT) if one in ends), None)
    if ended is not None:
        what = f"stopped by {ended.name}; finished steps and checkpoints are kept"
        return Stopped(Problem(what, fix="Run the same command again to resume."), signal_number=int(ended))
    if exit_codes := [code for code in codes.values() if code in BY_EXIT_CODE]:
        return SystemExit(exit_codes[0])  # with --json the process has printed the reason
    return WorkerBug(f"processes ended with the exit codes {codes} and printed no error")


def _with_rank(left: Json, ranks: Sequence[int]) -> LlmtuneError:
    """Rebuild the error that processes left; add the rank if only one of them has it."""
    error = rebuild_error(left)
    first = error.problems[0]
    alone = f"process {ranks[0]}" if len(ranks) == 1 and ranks[0] else None
    place = first.where if alone is None else ", ".join(filter(None, (alone, first.where)))
    named = type(error)(replace(first, where=place), *error.problems[1:])
    named.exit_code = error.exit_code
    if isinstance(named, GateFailed) and isinstance(error, GateFailed):
        named.report = error.report
    return named


def _killed(rank: int, number: int, words: Sequence[str]) -> LlmtuneError:
    fix = "Run the same command again: it resumes from the last checkpoint."
    if number == signal.SIGKILL:
        fix = f"The system probably ran out of memory: start fewer processes. {fix}"
    last = "".join(f"\n    {line}" for line in words)
    return EnvironmentProblem.of(
        f"process {rank} {describe_end(-number)}{'; its last output:' if last else ''}{last}",
        f"process {rank}",
        fix,
    )


def _wait_for_machine_0(topology: Topology) -> None:
    """Wait until machine 0 listens at the address. Raises EnvironmentProblem if it cannot be reached."""
    end = time.monotonic() + JOIN_SECONDS
    while topology.rank:
        try:
            socket.create_connection((topology.host, topology.port), timeout=TRY_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                fix = "Start the same command with --rank 0 there, and check that the port is reachable."
                what = f"machine 0 cannot be reached: {error}"
                raise EnvironmentProblem.of(what, f"--address {topology.address}", fix) from error
            time.sleep(1)


def _host_rendezvous(topology: Topology, console: Console) -> TCPStore | None:
    """Host the store at which the machines meet, at the named address only; None if this is not machine 0.

    Raises EnvironmentProblem if it cannot listen there; torch would try for minutes.
    """
    if topology.machines == 1 or topology.rank:
        return None
    where, port = "at this address only", topology.port
    try:
        addresses = [one[4][0] for one in socket.getaddrinfo(topology.host, topology.port, type=socket.SOCK_STREAM)]
        # Debian gives a machine's own name a loopback address, which other machines cannot reach.
        address = str(next((one for one in addresses if not ip_address(one).is_loopback), addresses[0]))
        if ip_address(address).is_loopback and topology.host not in (address, "localhost"):
            where = f"on all interfaces, because {topology.host} is {address} here: better give its IP address"
            address = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - as the line below says
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with (  # torch would try to reach its own store for minutes
            socket.create_server((address, port), family=family, dualstack_ipv6=address == "::"),
            socket.create_connection((topology.host, port), timeout=TRY_SECONDS),
        ):
            pass
        store: TCPStore = host_store(address, port)
    except OSError as error:
        fix = "Use the address of this machine (machine 0) and a free port."
        raise EnvironmentProblem.of(f"cannot listen: {error}", f"--address {topology.address}", fix) from error
    shown = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    console.print(f"Machine 0: waiting for {topology.machines - 1} more at {shown}, {where}.", markup=False)
    console.print("torch runs what it receives there as code: only trusted machines may reach this port.")
    return store


def _own_address(topology: Topology) -> tuple[str, str | None]:
    """Return this machine's IP address on the network of machine 0, and the interface that has it.

    Raises EnvironmentProblem if there is no route to machine 0.
    """
    family = socket.getaddrinfo(topology.host, topology.port, type=socket.SOCK_STREAM)[0][0]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((topology.host, topology.port))
            number: str = probe.getsockname()[0]
    except OSError as error:
        fix = "Check the address, and the network of this machine."
        raise EnvironmentProblem.of(f"no route: {error}", f"--address {topology.address}", fix) from error
    cards = {one.address: name for name, addresses in psutil.net_if_addrs().items() for one in addresses}
    return number, cards.get(number)
