"""What `llmtune doctor` finds: versions, devices, memory, disk, the packaged models, the network; and what to type."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmtune import __version__
from llmtune.records import Json
from llmtune.store.atomic_files import find_cache
from llmtune.store.process_environment import offline_switches
from llmtune.store.run_lock import hardware, package_versions

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers", "safetensors")
SCARCE_DISK_BYTES = 5_000_000_000
SCARCE_MEMORY_BYTES = 4_000_000_000
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)
"""What an import raises where a library is absent, lacks a shared library, or does not fit another one."""
State = Literal["good", "note", "missing"]
STYLES = {"good": "green", "note": "yellow", "missing": "bold red"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: how it stands, what was found, and what to type where it is not good."""

    name: str
    state: State
    found: str
    fix: str | None = None


def examine(console: Console, switched_off: Sequence[str] | None = None) -> Json:
    """Look at this machine, print a table, and return the same as a dictionary.

    `switched_off` names the user's own offline switches, where the process has set them all since. `ready` says whether
    nothing is missing. Never raises for a library that is absent or broken.
    """
    if switched_off is None:
        switched_off = offline_switches()
    with console.status("importing the libraries"):
        device = _import("llmtune.model.device")  # first: it mutes what one library says while it is imported
        libraries = [_check_library(name) for name in PACKAGES]
    torch = _import("torch")
    checks = [_check_python(), *libraries]
    if torch is not None:
        checks += [_check_device(torch), check_threads(torch.get_num_threads(), count_cores())]
    if device is not None:
        checks.append(_check_number_formats(device))
    checks += [_check_memory(device), _check_disk(), *_check_cache(), _check_network(switched_off)]
    _show(checks, console)
    ready = all(check.state != "missing" for check in checks)
    console.print("ready" if ready else "[bold red]something is missing[/]: type what stands behind the arrows")
    return {
        "llmtune": __version__,
        "ready": ready,
        "checks": [asdict(check) for check in checks],
        **_facts(torch, device),
    }


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except BROKEN:
        return None


def _check_python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", "good", found)


def _check_library(name: str) -> Check:
    version = package_versions([name])[name]
    if version is None:
        return Check(name, "missing", "not installed", f"pip install {name}")
    try:
        importlib.import_module(name)
    except BROKEN as error:
        culprit = getattr(error, "name", None)
        if culprit in PACKAGES and culprit != name:
            return Check(name, "note", f"{version}, waits for {culprit}")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        found = f"{version}, but it cannot be imported: {reason}"
        return Check(name, "missing", found, f"pip install --force-reinstall {name}")
    return Check(name, "good", version)


def _check_device(torch: ModuleType) -> Check:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Check("device", "good", "; ".join(f"{card.name}, {_size(card.total_memory)}" for card in names))
    if shutil.which("nvidia-smi"):
        built = torch.version.cuda
        found = f"CPU; there is an NVIDIA driver, but torch {torch.__version__} sees no card"
        fix = (
            "nvidia-smi"
            if built
            else "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        )
        return Check("device", "note", found, fix)
    if torch.backends.mps.is_available():
        return Check("device", "good", "mps (Apple)")
    return Check("device", "good", f"CPU, {_processor()}")


def _check_number_formats(device: ModuleType) -> Check:
    name = device.pick_device()
    fast = device.has_fast_bfloat16(name)
    slow = f"float32; bfloat16 runs, but {name} does not have it in hardware"
    return Check("dtype: auto", "good", "bfloat16 (fast here)" if fast else slow)


def check_threads(threads: int, cores: int) -> Check:
    """Hold torch's threads against the cores that this process may use."""
    found = f"{threads} threads on {cores} cores"
    if threads > cores:
        fix = f"llmtune run RECIPE --threads {cores}"
        return Check("threads", "note", f"{found}: they would wait for each other", fix)
    return Check("threads", "good", found)


def count_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the cores that this process may use: by its affinity, and by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        microseconds, period = quota.read_text().split()
        return max(1, min(cores, round(int(microseconds) / int(period))))
    except (OSError, ValueError):  # no such file, or the word "max"
        return cores


def _check_memory(device: ModuleType | None) -> Check:
    memory = psutil.virtual_memory()
    limit = _memory_limit(device)
    found = f"{_size(memory.available)} free of {_size(memory.total)}"
    if limit < memory.total:
        found += f"; this process may use {_size(limit)}"
    if min(limit, memory.available) < SCARCE_MEMORY_BYTES:
        return Check("memory", "note", found, "llmtune run RECIPE --dry-run   (prints what the recipe needs)")
    return Check("memory", "good", found)


def _memory_limit(device: ModuleType | None) -> int:
    total = psutil.virtual_memory().total
    return total if device is None else device.memory_limit("cpu") or total


def _check_disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{_size(free)} free in {Path.cwd()}"
    if free < SCARCE_DISK_BYTES:
        return Check("disk", "note", found, "llmtune run RECIPE --out FOLDER   (on a larger disk)")
    return Check("disk", "good", found)


def _check_cache() -> list[Check]:
    packaged = _import("llmtune.model.builtin_models")
    if packaged is None:
        return []
    folder = find_cache()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        checks = [Check("cache", "good", str(folder))]
    else:
        checks = [Check("cache", "missing", f"{folder} cannot be written", "export LLMTUNE_CACHE=FOLDER")]
    for name, entry in packaged.PACKAGED.items():
        version = package_versions([entry.distribution])[entry.distribution]
        found = f"{entry.distribution} {version}" if version else "not installed; recipes that name it need it"
        checks.append(
            Check(f"builtin:{name}", "good" if version else "note", found, None if version else entry.install)
        )
    return checks


def _check_network(offline: Sequence[str]) -> Check:
    """Say what the settings are; nothing is sent to find out."""
    if offline:
        return Check("network", "good", f"switched off by {offline[0]}; used only for what a recipe names on a hub")
    proxy = next((name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY") if os.environ.get(name)), None)
    found = "used only for what a recipe names on a hub; --offline forbids it"
    return Check("network", "good", f"{found}; proxy from {proxy}" if proxy else found)


def _facts(torch: ModuleType | None, device: ModuleType | None) -> Json:
    """The same in numbers, for programs."""
    memory = psutil.virtual_memory()
    return {
        "packages": package_versions(PACKAGES),
        "device": None if device is None else device.pick_device(),
        "cuda_devices": 0 if torch is None else torch.cuda.device_count(),
        "memory_bytes": memory.total,
        "memory_limit_bytes": _memory_limit(device),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "cores": count_cores(),
    }


def _processor() -> str:
    return str(hardware()["processor"]) or platform.machine()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _show(checks: list[Check], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        table.add_row(check.name, f"[{STYLES[check.state]}]{check.state}[/]", escape(check.found))
        if check.fix:
            table.add_row("", "", f"[green]->[/] {escape(check.fix)}")
    console.print(table)
