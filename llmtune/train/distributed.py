"""Collectives over the processes of one training; all of them are free with a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from llmtune.store.processes import offloads_params, once, world_size

T = TypeVar("T")
SILENCE_SECONDS = 1800
"""How long a process waits for the others before it gives up: longer than rank 0 needs for a checkpoint."""


def join_processes(device: str) -> int:
    """Connect this process to the others that it was started with, if any; return the number of processes."""
    if world_size() == 1:
        return 1
    # Shards in main memory are exchanged by gloo, those on cards by NCCL.
    both = {"backend": "cuda:nccl,cpu:gloo"} if device == "cuda" and offloads_params() else {}
    return int(PartialState(cpu=device == "cpu", timeout=timedelta(seconds=SILENCE_SECONDS), **both).num_processes)


def wait_for_processes() -> None:
    """Wait until all processes are here; `join_processes` has connected them."""
    if world_size() > 1:
        PartialState().wait_for_everyone()


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Return the sums of `values` over all processes, in double precision if the device supports it."""
    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    total = torch.tensor(values, dtype=dtype, device=accelerator.device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total.tolist()]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether `flag` is set in any process; all processes get the same answer."""
    return sum_over_processes(accelerator, [float(flag)])[0] > 0


def gather_lists(accelerator: Accelerator, values: list[T]) -> list[T]:
    """Return the lists of all processes joined, in order of rank."""
    return values if accelerator.num_processes == 1 else list(gather_object(values))


def run_on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do `work` in the main process only, after a barrier: it may change files that others still read.

    The others wait outside any collective, so no timeout limits it. See `once`.
    """
    accelerator.wait_for_everyone()
    return once(work)
