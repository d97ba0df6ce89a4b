"""CPU, GPUs and memory of the machine without importing torch, and meters of time and memory."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import psutil

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
CPUINFO = Path("/proc/cpuinfo")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_tile"}
BFLOAT16_CAPABILITY = 8.0
"""Minimum compute capability of NVIDIA cards: Ampere."""
QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Card:
    """An NVIDIA card, as listed by its driver."""

    name: str
    memory_bytes: int
    capability: float


def list_cards() -> list[Card]:
    """List the NVIDIA cards that this process may use; empty if the driver is missing or does not answer."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which(QUERY[0]) is None:
        return []
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 - fixed words
        rows = [line.rsplit(",", 2) for line in done.stdout.splitlines() if line.strip()]
        return [Card(name.strip(), int(memory) * 2**20, float(capability)) for name, memory, capability in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def torch_cuda() -> str | None:
    """Return the CUDA version of the installed torch; None for a CPU build, or without torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    match = re.search(r"^cuda[^=]*= '([\d.]+)'", file.read_text(), re.MULTILINE) if file and file.is_file() else None
    return match[1] if match else None


def likely_device() -> str:
    """Return the device that a run will probably use: cuda, mps or cpu."""
    if torch_cuda() and list_cards():
        return "cuda"
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


def has_bfloat16(device: str) -> bool:
    """Return whether a device multiplies bfloat16 in hardware."""
    if device == "cuda":
        return all(card.capability >= BFLOAT16_CAPABILITY for card in list_cards())
    if device != "cpu" or not CPUINFO.is_file():
        return False
    flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    return bool(flags and BFLOAT16_FLAGS & set(flags[1].split()))


def process_memory_limit() -> int:
    """Return the bytes this process may use: the minimum of RAM, control group and address space (`ulimit -v`)."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # absent, or the word "max"
            continue
    if os.name == "posix":
        import resource

        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            limits.append(address_space)
    return min(limits)


def free_memory() -> int:
    """Return the bytes that this process may still take: available RAM, within its control group and address space."""
    now = psutil.Process().memory_info()
    free = [psutil.virtual_memory().available, process_memory_limit() - now.rss]
    if os.name == "posix":
        import resource

        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        free += [address_space - now.vms] if address_space != resource.RLIM_INFINITY else []
    return max(0, min(free))


class Meter:
    """Measures time and peak memory from its creation. On Linux it first resets the kernel's high-water mark."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        with suppress(OSError):
            CLEAR_REFS.write_text("5")  # proc(5): reset VmHWM
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        """Return wall seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def peak_bytes(self) -> int:
        """Return peak bytes on the GPU if one is in use, else resident peak bytes of this process."""
        if (cuda := _cuda()) is not None:
            return int(cuda.max_memory_allocated())
        return resident_peak_bytes()


def seconds_of_process() -> float:
    """Return wall seconds since the start of this process, to about 0.01 s."""
    return time.time() - psutil.Process().create_time()


def resident_bytes() -> int:
    """Return the current resident size of this process."""
    return int(psutil.Process().memory_info().rss)


def resident_peak_bytes() -> int:
    """Return the peak resident size since the last reset (Linux), else the current resident size."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resident_bytes()
    return int(line.split()[1]) * 1024


def _cuda() -> ModuleType | None:
    """Return torch.cuda if a GPU is in use; does not import torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
