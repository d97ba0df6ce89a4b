"""A Ray cluster for the rows: its cores take the batches that processes of this machine would take."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from llmtune import __version__
from llmtune.data.worker_pool import Workers, elsewhere
from llmtune.errors import EnvironmentProblem

LOCAL = "local"
"""As address: a cluster of this machine alone, that is started and ended here."""
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
    """Let the batches of every `WorkerPool` in the block be worked on by a Ray cluster, once that is worth it.

    Raises:
        EnvironmentProblem: Ray is not installed, or `offline` forbids the address; in the block, that the cluster
            cannot be reached, has another llmtune, or lost a batch.
    """
    if find_spec("ray") is None:
        raise EnvironmentProblem.of("Ray is not installed", "--ray", "pip install 'llmtune-cli[ray]'")
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
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster that is started here: this process waits for it
    import ray

    if ray.is_initialized():
        return
    _reach(address)
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment = {"env_vars": {**kept, "TOKENIZERS_PARALLELISM": "false"}}  # a worker is a core
    more = {"include_dashboard": False} if address == LOCAL else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level="ERROR", **more)
    except (ConnectionError, ValueError, RuntimeError) as error:
        what = f"no Ray cluster can be reached at {address!r} ({str(error).strip().partition(chr(10))[0]})"
        raise EnvironmentProblem.of(what, "--ray", CHECK) from error
    for number, handler in handlers.items():  # Ray puts its own there
        signal.signal(number, handler)


def _reach(address: str) -> None:
    """Raise EnvironmentProblem where nothing answers at HOST:PORT: Ray would try for a minute and a half."""
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

    work = ray.remote(num_cpus=1, max_retries=3)(_work)
    name, sent = uuid.uuid4().hex, ray.put(function)

    def submit(batch: object) -> Future[Any]:
        future: Future[Any] = work.remote(name, __version__, sent, batch).future()
        return future

    try:
        yield Workers(max(int(ray.cluster_resources().get("CPU", 1)), 1), submit)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # what the function raised there
    except ray.exceptions.RayError as error:
        what = f"the Ray cluster lost rows that it worked on ({type(error).__name__})"
        raise EnvironmentProblem.of(what, "--ray", "See its log. The same command goes on.") from error


_functions: dict[str, Callable[[object], object]] = {}
"""In a worker: the function that it was given last, by name."""


def _work(name: str, version: str, function: bytes, batch: object) -> object:
    """Work on a batch, on any machine of the cluster."""
    if version != __version__:
        what = f"{os.uname().nodename} of the Ray cluster has llmtune {__version__}, and this machine {version}"
        raise EnvironmentProblem.of(what, "--ray", "Install the same version on all machines.")
    if name not in _functions:
        _functions.clear()
        _functions[name] = pickle.loads(function)  # noqa: S301 - our own, from the process that started this
    return _functions[name](batch)
