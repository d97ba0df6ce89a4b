"""The checks of `llmtune doctor`: versions, devices, memory, disk, models, network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.data.worker_pool import usable_cores
from llmtune.display.number_format import size
from llmtune.errors import first_line
from llmtune.model.builtin_models import PACKAGED
from llmtune.model.cached_models import list_cached_models
from llmtune.recipe.extras import EXTRAS, find_missing_extra
from llmtune.records import Json
from llmtune.store.atomic_files import find_cache
from llmtune.store.machine import has_bfloat16, likely_device, list_cards, process_memory_limit, torch_cuda
from llmtune.store.process_environment import offline_switches
from llmtune.store.run_lock import hardware, package_versions

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers", "safetensors")
SCARCE_DISK_BYTES = 5_000_000_000
SCARCE_MEMORY_BYTES = 4_000_000_000
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)
"""Errors of an import if a library is absent, lacks a shared library, or conflicts with another one."""
CheckState = Literal["good", "note", "missing"]
STATE_STYLES = {"good": "green", "note": "yellow", "missing": "bold red"}
STATE_WIDTH = max(map(len, STATE_STYLES))


@dataclass(frozen=True)
class Check:
    """One check: its state, the finding, and the command to fix it."""

    name: str
    state: CheckState
    found: str
    fix: str | None = None


def examine(console: Console, switched_off: Sequence[str] | None = None, *, imports: bool = False) -> Json:
    """Check this machine, print a table, and return the same as a dictionary.

    `switched_off` names the user's own offline variables, if the process has since set them all. `imports` loads every
    library, which takes a while and finds broken ones. `ready` is whether nothing is missing.
    """
    if switched_off is None:
        switched_off = offline_switches()
    with Console(stderr=True).status("importing the libraries" if imports else "looking"):
        python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
        checks = [
            Check("python", "good", python),
            *(_check_library(name, imports) for name in PACKAGES),
            *_check_bounds(),
            *_check_extras(),
        ]
    checks += [_check_device()]
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or psutil.cpu_count(logical=False) or 1
    cores = usable_cores()
    checks += [check_threads(threads if "OMP_NUM_THREADS" in os.environ else min(threads, cores), cores)]
    checks += [
        _check_number_formats(),
        _check_memory(),
        _check_disk(),
        *_check_cache(),
        *_check_models(),
        _check_network(switched_off),
    ]
    print_checks(checks, console)
    ready = all(check.state != "missing" for check in checks)
    console.print("ready" if ready else "[bold red]something is missing[/]: run the commands after the arrows")
    return {
        "llmtune": __version__,
        "ready": ready,
        "checks": [asdict(check) for check in checks],
        **_machine_numbers(),
    }


def _check_library(name: str, imports: bool) -> Check:
    version = package_versions([name])[name]
    if version is None:
        return Check(name, "missing", "not installed", f"pip install {name}")
    try:
        if imports:
            importlib.import_module(name)
        elif importlib.util.find_spec(name) is None:
            raise ImportError(f"module {name} not found")
    except BROKEN as error:
        culprit = getattr(error, "name", None)
        if culprit in PACKAGES and culprit != name:
            return Check(name, "note", f"{version}, waits for {culprit}")
        finding = f"{version}, but it cannot be imported: {first_line(error)}"
        return Check(name, "missing", finding, f"pip install --force-reinstall {name}")
    return Check(name, "good", version)


def _check_bounds() -> list[Check]:
    """Name every library whose installed version is outside the bounds in llmtune's metadata."""
    try:
        stated = [Requirement(line) for line in requires("llmtune-cli") or ()]
    except PackageNotFoundError:  # run from source
        return []
    tested = {one.name: one.specifier for one in stated if not one.marker or "test" not in str(one.marker)}
    installed = package_versions([*tested])
    return [
        Check(name, "note", f"{version}; llmtune is tested with {bounds}", f"pip install '{name}{bounds}'")
        for name, bounds in tested.items()
        if (version := installed[name]) and not bounds.contains(version, prereleases=True)
    ]


def _check_device() -> Check:
    cards = list_cards()
    if cards and torch_cuda():
        return Check("device", "good", "; ".join(f"{card.name}, {_size(card.memory_bytes)}" for card in cards))
    if cards:
        finding = f"CPU; there is {cards[0].name}, but torch is built without CUDA"
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return Check("device", "note", finding, fix)
    if shutil.which("nvidia-smi"):
        return Check("device", "note", "CPU; an NVIDIA driver is installed but lists no card", "nvidia-smi")
    if likely_device() == "mps":
        return Check("device", "good", "mps (Apple)")
    return Check("device", "good", f"CPU, {hardware()['processor'] or platform.machine()}")


def _check_number_formats() -> Check:
    name = likely_device()
    slow = f"float32; bfloat16 runs, but {name} does not have it in hardware"
    return Check("dtype: auto", "good", "bfloat16 (fast here)" if has_bfloat16(name) else slow)


def check_threads(threads: int, cores: int) -> Check:
    """Compare torch's threads with the cores that this process may use."""
    finding = f"{threads} threads on {cores} cores"
    if threads > cores:
        fix = f"llmtune run RECIPE --threads {cores}"
        return Check("threads", "note", f"{finding}: they would wait for each other", fix)
    return Check("threads", "good", finding)


def _check_memory() -> Check:
    memory, limit = psutil.virtual_memory(), process_memory_limit()
    finding = f"{_size(memory.available)} free of {_size(memory.total)}"
    if limit < memory.total:
        finding += f"; this process may use {_size(limit)}"
    if min(limit, memory.available) < SCARCE_MEMORY_BYTES:
        return Check("memory", "note", finding, "llmtune run RECIPE --dry-run   (prints the recipe's memory plan)")
    return Check("memory", "good", finding)


def _check_disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    finding = f"{_size(free)} free in {Path.cwd()}"
    if free < SCARCE_DISK_BYTES:
        return Check("disk", "note", finding, "llmtune run RECIPE --out FOLDER   (on a larger disk)")
    return Check("disk", "good", finding)


def _check_cache() -> list[Check]:
    folder = find_cache()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        checks = [Check("cache", "good", str(folder))]
    else:
        checks = [Check("cache", "missing", f"{folder} cannot be written", "export LLMTUNE_CACHE=FOLDER")]
    for name, entry in PACKAGED.items():
        version = package_versions([entry.distribution])[entry.distribution]
        finding = f"{entry.distribution} {version}" if version else "not installed; recipes that name it need it"
        checks.append(
            Check(f"builtin:{name}", "good" if version else "note", finding, None if version else entry.install)
        )
    return checks


def _check_extras() -> list[Check]:
    """Name the packages of optional features that are not installed."""
    checks = []
    for name in EXTRAS:
        missing = next(find_missing_extra(name, name), None)
        if missing is None:
            checks.append(Check(f"extra {name}", "good", "installed"))
        else:
            checks.append(Check(f"extra {name}", "note", missing.what, missing.fix))
    return checks


def _check_models() -> list[Check]:
    """List the models that need no download, and those whose download was interrupted."""
    checks = []
    for one in list_cached_models():
        finding = f"{size(one.bytes)} in {one.folder}"
        if one.missing is None:
            checks.append(Check(f"cached {one.name}", "good", finding))
        else:
            fix = f"hf download {one.name}"
            checks.append(Check(f"cached {one.name}", "note", f"incomplete, {one.missing} missing; {finding}", fix))
    return checks or [Check("cached models", "good", "none; a model of the hub is downloaded at its first use")]


def _check_network(offline: Sequence[str]) -> Check:
    """Report the network settings without sending anything."""
    if offline:
        return Check(
            "network", "good", f"disabled by {offline[0]}; otherwise only for files that a recipe names on a hub"
        )
    proxy = next((name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY") if os.environ.get(name)), None)
    finding = "used only for files that a recipe names on a hub; --offline forbids it"
    return Check("network", "good", f"{finding}; proxy from {proxy}" if proxy else finding)


def _machine_numbers() -> Json:
    """Return the findings as numbers, for programs."""
    device = likely_device()
    return {
        "packages": package_versions(PACKAGES),
        "device": device,
        "cuda_devices": len(list_cards()) if device == "cuda" else 0,
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": process_memory_limit(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "cores": usable_cores(),
    }


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def print_checks(checks: list[Check], console: Console) -> None:
    """Print a line per check; commands are never wrapped, to allow copying."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = f"[{STATE_STYLES[check.state]}]{check.state:<{STATE_WIDTH}}[/]"
        console.print(f"{check.name:<{width}}  {state}  {escape(check.found)}", highlight=False, soft_wrap=True)
        if check.fix:
            console.print(f"{'':<{width}}  [green]->[/] {escape(check.fix)}", highlight=False, soft_wrap=True)
