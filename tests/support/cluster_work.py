"""Functions that a worker of a cluster imports."""

import os
import signal
import time
from pathlib import Path


def node_of(batch: list[int]) -> str:
    """The node that the batch is worked on; nothing in the process that gives it."""
    import ray

    time.sleep(0.1)
    return ray.get_runtime_context().get_node_id() if ray.get_runtime_context().worker.mode == ray.WORKER_MODE else ""


def die_once(marker: Path, here: int, batch: list[int]) -> int:
    """The sum of the batch; the first worker that is not the process `here` is killed over it."""
    if os.getpid() != here and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return sum(batch)
