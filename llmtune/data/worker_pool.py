"""Maps a function over batches on every core available to this process; results keep the order of the batches."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

from llmtune import __version__
from llmtune.errors import EnvironmentProblem
from llmtune.recipe.extras import require_extra

BatchT = TypeVar("BatchT")
ResultT = TypeVar("ResultT")

FIRST_SECONDS = 0.3
"""How long this process works alone before it estimates the rest: the first batches load things."""
WORTH_SECONDS = 8.0
"""A worker must save more work than its start costs (imports, its copy of the tokenizer)."""
AHEAD = 2
"""Queued batches per worker."""

HELD = 64
"""Limit on finished results that wait for an earlier one: they are in memory."""


def usable_cores() -> int:
    """Return the number of cores available to this process: by affinity, control group and `--threads`."""
    from joblib import cpu_count

    return min(int(cpu_count()), int(os.environ.get("RAYON_NUM_THREADS") or 2**16))


class Workers(NamedTuple):
    """Processes that take batches in addition to this one."""

    cores: int
    submit: Callable[[Any], Future[Any]]
    """Submits a batch to one of them."""


elsewhere: ContextVar[Callable[[bytes], AbstractContextManager[Workers]] | None] = ContextVar("elsewhere", default=None)
"""Starts workers outside this machine, with a pickled function."""


class WorkerPool(Generic[BatchT, ResultT]):
    """Maps a function over batches: in this process first, on the other cores as well once that saves time.

    Workers are fresh processes, here or `elsewhere`, with a pickled copy of the function. This process works too.
    """

    def __init__(
        self,
        function: Callable[[BatchT], ResultT],
        *,
        cores: int | None = None,
        eager: bool = False,
        worth_seconds: float = WORTH_SECONDS,
    ) -> None:
        """Take a function that can be pickled.

        Args:
            function: Runs in this process and in workers.
            cores: The largest number of processes, this one included; by default the number of usable cores.
            eager: Start the workers at once.
            worth_seconds: Start them if more work than this remains. Functions whose modules import little need less
                than the default.
        """
        self._function = function
        self._cores = cores
        self._eager = eager
        self._worth_seconds = worth_seconds

    @cached_property
    def _start(self) -> Callable[[bytes], AbstractContextManager[Workers]] | None:
        """Return what starts workers; None without any. Counting cores imports joblib, so small data do without."""
        workers = (usable_cores() if self._cores is None else self._cores) - 1
        return elsewhere.get() or (partial(_start_processes, workers) if workers else None)

    def map(self, batches: Iterable[BatchT], size: Callable[[BatchT], int], total: int) -> Iterator[ResultT]:
        """Yield the result of each batch in order; sizes add up to `total`, used to estimate the remaining work."""
        began, done = time.monotonic(), 0
        batches = iter(batches)
        if not (self._eager and self._start):
            for batch in batches:
                yield self._function(batch)
                done += size(batch)
                elapsed = time.monotonic() - began
                worth = elapsed > FIRST_SECONDS and elapsed * (total / max(done, 1) - 1) > self._worth_seconds
                if worth and self._start is not None:
                    break
        first = next(batches, None)
        if first is not None and self._start is not None:
            with self._start(pickle.dumps(self._function)) as workers:
                yield from self._spread(chain([first], batches), workers)

    def _spread(self, batches: Iterator[BatchT], workers: Workers) -> Iterator[ResultT]:
        waiting: deque[Future[ResultT]] = deque()
        for batch in batches:
            if sum(not future.done() for future in waiting) < AHEAD * workers.cores:
                waiting.append(workers.submit(batch))
            else:
                waiting.append(Future())
                waiting[-1].set_result(self._function(batch))
            while waiting and (waiting[0].done() or len(waiting) > HELD + AHEAD * workers.cores):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _start_processes(count: int, function: bytes) -> Iterator[Workers]:
    from joblib.externals.loky import (  # its processes do not run the user's script again
        BrokenProcessPool,
        ProcessPoolExecutor,
    )

    pool = ProcessPoolExecutor(count, initializer=_start_worker, initargs=(os.getpid(), function))
    try:
        yield Workers(count, partial(pool.submit, _work))
    except BrokenProcessPool as error:
        what = "a process that helped with the rows was killed, most likely for lack of memory"
        raise EnvironmentProblem.of(what, fix="Use one core: --threads 1.") from error
    finally:
        pool.shutdown(wait=True, kill_workers=True)


_function: Callable[[object], object]
"""The worker's function, in a worker process."""


def _start_worker(parent: int, pickled: bytes) -> None:
    global _function
    gc.freeze()  # spare the garbage collector the imported modules
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    _function = pickle.loads(pickled)  # noqa: S301 - our own, from the parent process


def _exit_with(parent: int) -> None:
    """Exit if the parent process was killed; otherwise the worker would remain."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(batch: object) -> object:
    return _function(batch)


# A Ray cluster: its cores take batches in place of local processes


LOCAL = "local"
"""The address of a local cluster, started and stopped by this process."""
INHERITED = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
)
CHECK = "Start one (`ray start --head`), or give its HOST:PORT; `local` starts one on this machine."


@contextmanager
def spread_on_ray(address: str, *, offline: bool) -> Iterator[None]:
    """Let a Ray cluster work on the batches of every `WorkerPool` in the block, once that saves time.

    Raises:
        EnvironmentProblem: Ray is not installed, or `offline` forbids the address; in the block: the cluster is
            unreachable, has another llmtune version, or lost a batch.
    """
    require_extra("ray", "--ray")
    if offline and address != LOCAL:
        what = f"a cluster at {address!r} is reached over the network, which --offline forbids"
        raise EnvironmentProblem.of(what, "--ray", "Omit it, or give --ray local.")
    token = elsewhere.set(lambda function: _workers(address, function))
    try:
        yield
    finally:
        elsewhere.reset(token)
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


def _connect(address: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a local cluster: this process waits for it
    import ray

    if ray.is_initialized():
        return
    _check_reachable(address)
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment = {"env_vars": {**kept, "TOKENIZERS_PARALLELISM": "false"}}  # one core per worker
    more = {"include_dashboard": False} if address == LOCAL else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level="ERROR", **more)
    except (ConnectionError, ValueError, RuntimeError) as error:
        what = f"no Ray cluster can be reached at {address!r} ({str(error).strip().partition(chr(10))[0]})"
        raise EnvironmentProblem.of(what, "--ray", CHECK) from error
    for number, handler in handlers.items():  # Ray puts its own there
        signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Raise EnvironmentProblem if nothing answers at HOST:PORT: Ray would try for a minute and a half."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise EnvironmentProblem.of(f"nothing answers at {address!r} ({error})", "--ray", CHECK) from error


@contextmanager
def _workers(address: str, function: bytes) -> Iterator[Workers]:
    _connect(address)
    import ray

    work = ray.remote(num_cpus=1, max_retries=3)(_work_remotely)
    name, sent = uuid.uuid4().hex, ray.put(function)

    def submit(batch: object) -> Future[Any]:
        future: Future[Any] = work.remote(name, __version__, sent, batch).future()
        return future

    try:
        yield Workers(max(int(ray.cluster_resources().get("CPU", 1)), 1), submit)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # the function's own error
    except ray.exceptions.RayError as error:
        what = f"the Ray cluster lost a batch of rows ({type(error).__name__})"
        raise EnvironmentProblem.of(what, "--ray", "See its log. The same command resumes.") from error


_functions: dict[str, Callable[[object], object]] = {}
"""In a worker: its latest function, by name."""


def _work_remotely(name: str, version: str, function: bytes, batch: object) -> object:
    """Work on a batch on any machine of the cluster."""
    if version != __version__:
        what = f"{os.uname().nodename} of the Ray cluster has llmtune {__version__}, and this machine {version}"
        raise EnvironmentProblem.of(what, "--ray", "Install the same version on all machines.")
    if name not in _functions:
        _functions.clear()
        _functions[name] = pickle.loads(function)  # noqa: S301 - our own, from the process that started this
    return _functions[name](batch)
