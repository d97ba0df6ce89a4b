"""Several machines of one run: machine 0 does what is done once, and posts to the others what they are to start.

They meet at torch's TCPStore, which torch elastic uses too. The run folder has to be at the same path on all of them.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
from rich.console import Console
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # torch does not list it
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from llmtune import __version__, errors
from llmtune.errors import EnvironmentProblem, LlmtuneError, Problem, RecipeError
from llmtune.launch.topology import Topology
from llmtune.records import Json

CONNECT_SECONDS = 600
"""How long a machine waits for machine 0 to be there."""
CONNECT_TRY_SECONDS = 5
REPORT_SECONDS = 15
"""How long machine 0 waits for what became of the others' processes, once its own have ended."""
END_SECONDS = 5
POLL_SECONDS = 0.5
_TERMS, _JOB, _END = "llmtune/terms", "llmtune/job", "llmtune/end"


@dataclass
class Board:
    """What machine 0 posts and the others read: the job of now, what became of it, and the end of the run."""

    topology: Topology
    store: TCPStore
    recipe: str
    """A hash of it, with what --set changes."""
    number: int = 0
    run_id: str = field(default_factory=lambda: str(time.time_ns()))

    @property
    def terms(self) -> Json:
        """What has to be the same on all machines."""
        where = self.topology
        options = {"--machines": where.machines, "--strategy": where.strategy, "--max-restarts": where.max_restarts}
        return {"version of llmtune": __version__, "recipe with its --set": self.recipe, **options}

    def check_terms(self) -> None:
        """Raise RecipeError where machine 0 was given something else than this machine."""
        theirs = json.loads(self.store.get(_TERMS))
        RecipeError.collect(
            Problem(
                f"{own} on this machine, {theirs[name]} on machine 0", name, "Give the same command on each machine."
            )
            for name, own in self.terms.items()
            if own != theirs[name]
        )

    def post(self, entry: str, arguments: list[str]) -> str:
        """Let the other machines start `entry` in their processes; return the name under which all meet."""
        self.number += 1
        self.put(_JOB, {"number": self.number, "entry": entry, "arguments": arguments, "meet": self._meet()})
        return self._meet()

    def collect(self) -> tuple[list[Json], list[int]]:
        """Return what the other machines report of the job, and the machines that do not answer."""
        self.put(_JOB, {"number": self.number, "entry": None})
        left, reports = set(range(1, self.topology.machines)), []
        end = time.monotonic() + REPORT_SECONDS
        while left and time.monotonic() < end:
            for rank in sorted(left):
                if self.store.check([self._report_key(rank)]):
                    reports += json.loads(self.store.get(self._report_key(rank)))
                    left.remove(rank)
            time.sleep(POLL_SECONDS / 5)
        return reports, sorted(left)

    def close(self, meet: str) -> None:
        """Let no machine wait for others under this name: torch elastic leaves it open when a signal comes."""
        backend = C10dRendezvousBackend(self.store, meet)
        count = self.topology.machines
        DynamicRendezvousHandler.from_backend(meet, self.store, backend, count, count).shutdown()

    def report(self, number: int, reports: list[Json]) -> None:
        """Tell machine 0 what became of the processes of this one."""
        self.number = number
        self.put(self._report_key(self.topology.rank), reports)

    def next_job(self, done: int) -> Json | None:
        """Wait for a job after number `done`, and return it; None when the run has ended well.

        Raises LlmtuneError: the run ended with it on machine 0.
        """
        while True:
            if self.store.check([_END]):
                ended = json.loads(self.store.get(_END))
                self.put(f"{_END}/{self.topology.rank}", True)
                if ended is None:
                    return None
                kind: type[LlmtuneError] = getattr(errors, ended["kind"])
                error = kind(*(Problem(*problem) for problem in ended["problems"]))
                error.exit_code = ended["exit"]
                raise error
            job: Json = json.loads(self.store.get(_JOB)) if self.store.check([_JOB]) else {"number": 0, "entry": None}
            if job["entry"] is not None and job["number"] > done:
                return job
            time.sleep(POLL_SECONDS)

    def end(self, error: LlmtuneError | None) -> None:
        """Tell the other machines that the run is over, and wait a little until they know."""
        ended: Json | None = None
        if error is not None:
            problems = [[one.what, one.where, one.fix] for one in error.problems]
            ended = {"kind": type(error).__name__, "problems": problems, "exit": error.exit_code}
        self.put(_END, ended)
        keys = [f"{_END}/{rank}" for rank in range(1, self.topology.machines)]
        with suppress(DistError):
            self.store.wait(keys, timedelta(seconds=END_SECONDS))

    def put(self, key: str, value: Any) -> None:
        """Let the others read a value."""
        self.store.set(key, json.dumps(value))

    def _meet(self) -> str:
        return f"{self.run_id}-{self.number}"

    def _report_key(self, rank: int) -> str:
        return f"llmtune/report/{self.number}/{rank}"


@contextmanager
def opened_board(topology: Topology, recipe: str) -> Iterator[Board]:
    """Give the board of machine 0 for as long as its run takes, and post how that ended.

    Raises EnvironmentProblem where nothing can listen at the address.
    """
    try:
        _check_own(topology)
        store = TCPStore(topology.host, topology.port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except (OSError, RuntimeError, ValueError) as error:
        fix = "Give the address of this machine (machine 0) and a free port."
        raise EnvironmentProblem.of(
            f"cannot listen: {_first_line(error)}", f"--address {topology.address}", fix
        ) from error
    board = Board(topology, store, recipe)
    board.put(_TERMS, board.terms)
    try:
        yield board
    except LlmtuneError as error:
        board.end(error)
        raise
    except BaseException:
        board.end(EnvironmentProblem.of("machine 0 failed", fix="Its own last lines say why."))
        raise
    board.end(None)


@contextmanager
def joined_board(topology: Topology, recipe: str, console: Console) -> Iterator[Board]:
    """Give the board of machine 0 to another machine.

    Raises EnvironmentProblem where it cannot be reached, RecipeError where it was given something else.
    """
    console.print(f"Machine {topology.rank} of {topology.machines}: waiting for machine 0 at {topology.address}.")
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((topology.host, topology.port), timeout=CONNECT_TRY_SECONDS).close()
            break
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                fix = "Start the same command with --rank 0 there, and see that the port can be reached."
                what = f"machine 0 cannot be reached: {error}"
                raise EnvironmentProblem.of(what, f"--address {topology.address}", fix) from error
            time.sleep(1)
    try:
        store = TCPStore(topology.host, topology.port, is_master=False, timeout=timedelta(seconds=60))
        board = Board(topology, store, recipe)
        board.check_terms()
        yield board
    except DistError as error:
        fix = "When machine 0 runs again, give the same command here."
        what = f"the connection to machine 0 is lost: {_first_line(error)}"
        raise EnvironmentProblem.of(what, f"--address {topology.address}", fix) from error


def _check_own(topology: Topology) -> None:
    """Raise OSError where the address is not one of this machine; torch would try for minutes and hear no signal."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with (
        socket.create_server(("", topology.port), family=family, dualstack_ipv6=dual) as server,
        socket.create_connection((topology.host, topology.port), timeout=CONNECT_TRY_SECONDS),
    ):
        server.settimeout(CONNECT_TRY_SECONDS)
        server.accept()[0].close()


def own_address(topology: Topology) -> tuple[str, str | None]:
    """Return this machine's number on the network of machine 0, and the interface that has it.

    Raises EnvironmentProblem where there is no way to machine 0.
    """
    family = socket.getaddrinfo(topology.host, topology.port, type=socket.SOCK_STREAM)[0][0]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((topology.host, topology.port))
            number: str = probe.getsockname()[0]
    except OSError as error:
        fix = "Check the address, and the network of this machine."
        raise EnvironmentProblem.of(f"there is no way: {error}", f"--address {topology.address}", fix) from error
    cards = {one.address: name for name, addresses in psutil.net_if_addrs().items() for one in addresses}
    return number, cards.get(number)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
