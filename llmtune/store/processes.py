"""The processes of one run, which all execute the same program. Only rank 0 does the work inside `once`.

torchrun, `accelerate launch` and `llmtune launch local` start them and set their ranks in the environment. Without a
launcher a command is a single process, and this module has no cost.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar, cast

from llmtune import errors
from llmtune.errors import GateFailed, LlmtuneError, LostProcess, Problem
from llmtune.records import ALONE, Layout
from llmtune.store.atomic_files import plain, read_json, write_json
from llmtune.store.process_environment import prepare_environment

T = TypeVar("T")
STRATEGY = "LLMTUNE_STRATEGY"
"""Environment variable: ddp (the complete model in each process) or fsdp (a shard)."""
OFFLOAD = "LLMTUNE_FSDP_OFFLOAD_PARAMS"
"""Environment variable: `true` keeps shards in main memory while they do not compute (fsdp)."""
LEFT = "LLMTUNE_LAUNCHER"
"""Environment variable: the folder in which processes write their errors for `llmtune launch local`."""
WORDS, ERROR = "stderr-{}.log", "rank-{}.json"
"""Files in that folder, by rank: the output of a process, and the error that ended it."""
POLL_SECONDS = 0.05
_BROKEN = ("gloo", "connection closed", "connection reset", "nccl")
"""Words in torch's errors when another process is gone."""
LOST_SECONDS = 10
"""How long a process waits for another one to report the cause; torch's agent ends it as soon as that one exits."""


class _Meeting:
    """The exchange between the processes of this start: torch's store, with a unique key prefix per start."""

    store: Any = None
    hosted: Any = None
    """The server of that store, in rank 0 if it listens at one address."""
    name = ""
    count = 0
    alone = False
    """Whether rank 0 is inside `once`, which exchanges nothing."""
    broken = False
    """Whether a lost process or a signal broke off an exchange."""
    terminal: tuple[int, int] | None = None
    """Original standard output and error of a process whose output is redirected."""


_here = _Meeting()


def rank() -> int:
    """Return the rank of this process; rank 0 does the work that happens once."""
    return int(os.environ["RANK"]) if _started() > 1 else 0


def world_size() -> int:
    """Return the number of cooperating processes: all, or 1 while rank 0 works alone in `once`."""
    return 1 if _here.alone else _started()


def _started() -> int:
    is_distributed = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if is_distributed else 1


def strategy() -> str:
    """Return the strategy from the environment: ddp or fsdp."""
    return os.environ.get(STRATEGY, "ddp")


def offloads_params() -> bool:
    """Return whether the environment asks to keep shards in main memory."""
    return strategy() == "fsdp" and os.environ.get(OFFLOAD, "").lower() == "true"


def layout() -> Layout:
    """Return the process layout for the memory plan."""
    count = _started()
    machines = count // int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return Layout(count, machines, strategy() == "fsdp", offloads_params()) if count > 1 else ALONE


def start() -> None:
    """Read the launcher's settings and redirect the output of all ranks but 0; every command calls this first."""
    stated = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(("ACCELERATE_", "FSDP_"))}
    for name, instead in (("ACCELERATE_USE_FSDP", "fsdp"), ("ACCELERATE_USE_DEEPSPEED", "deepspeed")):
        if stated.get(name, "").lower() == "true":  # the recipe decides all other settings of accelerate
            os.environ[STRATEGY] = instead
    if stated.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
        os.environ[OFFLOAD] = "true"
    if stated.get("ACCELERATE_USE_CPU", "").lower() == "true":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
            print(
                "accelerate started one process. Use torchrun --nproc-per-node N for several on CPUs.", file=sys.stderr
            )
    left = os.environ.get(LEFT)
    if left:
        _stop_if_tried(Path(left) / ERROR.format(rank()))
        faulthandler.enable()
    if left or _started() > 1:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if rank():
        words = Path(left) / WORDS.format(rank()) if left else os.devnull
        log = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _here.terminal = os.dup(1), os.dup(2)
        os.dup2(log, 1)
        os.dup2(log, 2)


def _stop_if_tried(file: Path) -> None:
    """Exit if this process was restarted after an error that would recur, i.e. any but a lost connection."""
    error = read_json(file)
    if error and error.get("kind", LostProcess.__name__) != LostProcess.__name__:
        sys.exit(error["exit"])
    file.unlink(missing_ok=True)


def _end_with_parent(parent: int) -> None:
    """Kill this process when torch's agent ends; an orphan would write to the folder of the next run."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def join() -> None:
    """Connect to the other processes through torch's store, with a new prefix because the store survives restarts."""
    if _started() == 1 or _here.store is not None:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its sockets log every connection attempt
    prepare_environment(network=True)  # before importing torch; the recipe decides the rest
    import torch
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _here.hosted = None if rank() else _host_workers_store()
    store, process_rank, count = next(rendezvous("env://"))
    if process_rank:
        me = uuid.uuid4().hex
        store.set(f"llmtune/hello/{process_rank}", me)
        _wait_until(lambda: _get(store, f"llmtune/welcome/{process_rank}").startswith(me))
        _here.name = _get(store, f"llmtune/welcome/{process_rank}").removeprefix(me)
        store.set(f"{_here.name}/met/{process_rank}", "")
    else:
        _here.name = f"/llmtune/{uuid.uuid4().hex}"
        left = set(range(1, count))
        while left:
            for other in sorted(left):
                store.set(f"llmtune/welcome/{other}", _get(store, f"llmtune/hello/{other}") + _here.name)
            time.sleep(POLL_SECONDS)
            left = {other for other in left if not store.check([f"{_here.name}/met/{other}"])}
        atexit.register(_wait_for_readers, store, count)
    _here.store = store


def _wait_for_readers(store: Any, count: int) -> None:
    """Keep rank 0, which may host the store, until the others have read its last result or are gone."""
    end = time.monotonic() + LOST_SECONDS
    keys = [f"{_here.name}/read/{other}/{_here.count}" for other in range(1, count)]
    with suppress(RuntimeError):  # the store of torch's agent is gone
        _wait_until(lambda: not _here.count or store.check(keys) or time.monotonic() > end)


def host_store(address: str, port: int) -> Any:
    """Host torch's store at one IP address, or at all with `::`, as torch itself does. Raises OSError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, port), family=family, dualstack_ipv6=address == "::")
    # A second store of this process at the same port, which torch makes, uses the same server (multi_tenant).
    options: dict[str, Any] = {"is_master": True, "multi_tenant": True, "wait_for_workers": False}
    return TCPStore(address, port, master_listen_fd=server.detach(), **options)


def _host_workers_store() -> Any:
    """Host the store of rank 0 at its address; None if that is a name, or if torch's agent hosts the store."""
    try:
        return host_store(str(ip_address(os.environ["MASTER_ADDR"])), int(os.environ["MASTER_PORT"]))
    except (ValueError, OSError):
        return None


def _get(store: Any, key: str) -> str:
    return cast(str, store.get(key).decode()) if store.check([key]) else ""


def _wait_until(reached: Callable[[], bool]) -> None:
    """Poll instead of blocking: signals are handled and nothing times out."""
    pause = POLL_SECONDS / 10
    while not reached():
        time.sleep(pause)
        pause = min(2 * pause, 10 * POLL_SECONDS)


def once(work: Callable[[], T]) -> T:
    """Run `work` only in rank 0; all processes return its result or raise its error, without a timeout.

    The result is sent as JSON, because the store is not authenticated. All processes must call this.
    """
    if world_size() == 1:
        return work()
    join()
    _here.count += 1
    key = f"{_here.name}/once/{_here.count}"
    if rank():
        _wait_until(lambda: bool(_here.store.check([key])))
        message = json.loads(_here.store.get(key))
        _here.store.set(f"{_here.name}/read/{rank()}/{_here.count}", "")
        if "kind" in message:
            raise rebuild_error(message)
        if "value" not in message:
            sys.exit(1)  # rank 0 reports the bug
        return cast(T, message["value"])
    _here.alone, outcome = True, {}
    try:
        result = work()
        outcome = {"value": plain(result)}
    except LlmtuneError as error:
        outcome = describe_error(error) | {"report": None}  # only rank 0 prints the report
        raise
    finally:
        _here.alone = False
        _here.store.set(key, json.dumps(outcome))
    return result


def describe_error(error: LlmtuneError) -> dict[str, Any]:
    """Return an error as JSON."""
    problems = [[problem.what, problem.where, problem.fix] for problem in error.problems]
    report = plain(error.report) if isinstance(error, GateFailed) else None
    return {"kind": type(error).__name__, "problems": problems, "exit": error.exit_code, "report": report}


def rebuild_error(described: dict[str, Any]) -> LlmtuneError:
    """Return the error from the JSON of `describe_error`."""
    kind: type[LlmtuneError] = getattr(errors, described["kind"])
    error = kind(*(Problem(*problem) for problem in described["problems"]))
    error.exit_code = described["exit"]
    if isinstance(error, GateFailed):
        error.report = described["report"]
    return error


def reports(error: BaseException) -> bool:
    """Return whether this process should print the error that ends it; exactly one process does.

    Under `llmtune launch local` the launcher prints it, from a file. Otherwise the first process to call this prints
    it. A process that lost its connection waits first, to let the failed process report the cause. If a gate failed,
    all but rank 0 wait, because only rank 0 has the report.
    """
    folder = os.environ.get(LEFT)
    if folder is None and _started() == 1:
        return True
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))  # torch's agent ends the others
    _here.broken = isinstance(error, LostProcess | KeyboardInterrupt)
    if isinstance(error, GateFailed) and rank():
        time.sleep(LOST_SECONDS)
    if folder is not None:
        if isinstance(error, LlmtuneError):
            write_json(Path(folder) / ERROR.format(rank()), describe_error(error))
        elif not isinstance(error, KeyboardInterrupt):
            text = "".join(traceback.format_exception(error))
            write_json(Path(folder) / ERROR.format(rank()), {"traceback": text})
    if isinstance(error, LostProcess):
        _let_others_report()
    if folder is not None:
        return False
    try:
        first = rank() == 0 if _here.store is None else _here.store.add(f"{_here.name}/failed", 1) == 1
    except RuntimeError:  # the machine with the store is gone
        first = os.environ.get("LOCAL_RANK") == "0" and not isinstance(error, GateFailed)  # rank 0 printed that
    if first and _here.terminal is not None:
        os.dup2(_here.terminal[0], 1)
        os.dup2(_here.terminal[1], 2)
    return first


def _let_others_report() -> None:
    """Give the process that failed time to report the cause, until torch's agent sends SIGTERM because it has ended."""
    sent: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: sent.append(number))
    end = time.monotonic() + LOST_SECONDS
    while not sent and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    signal.signal(signal.SIGTERM, before)


def lost_process(error: BaseException) -> LlmtuneError | None:
    """Return a LostProcess error if `error` is a lost connection to another process, else None."""
    torch = sys.modules.get("torch")
    if torch is None or _started() == 1 or not isinstance(error, RuntimeError):
        return None
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
    if not isinstance(error, torch.distributed.DistError) and not any(word in str(error).lower() for word in _BROKEN):
        return None
    fix = "Repeat the command to resume from the last checkpoint."
    return LostProcess.of(f"process {rank()} lost the connection to another process: {first}", None, fix)


def leave(code: int = 0) -> None:
    """Leave torch's process group, if any.

    If an exchange broke off, leaving would wait for it. The process then ends here, with the exit code.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        if _here.broken:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        torch.distributed.destroy_process_group()
