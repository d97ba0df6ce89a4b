"""llmtune.lock: what a run was made from, so that the same numbers can be had next year."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.run.files import read_json, write_json

LOCK = "llmtune.lock"
PACKAGES = (
    "llmtune-cli",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "bitsandbytes",
    "safetensors",
    "numpy",
)


@dataclass(frozen=True)
class Pins:
    """What a lock holds still."""

    model: str
    revision: str | None
    model_hash: str
    data_hash: str


def write_lock(folder: Path, pins: Pins, *, fingerprint: str, template_hash: str, seed: int, threads: int) -> None:
    """Write llmtune.lock into the run folder."""
    lock = {
        "fingerprint": fingerprint,
        "model": {"name": pins.model, "revision": pins.revision, "sha256": pins.model_hash},
        "data": {"sha256": pins.data_hash},
        "template": {"sha256": template_hash},
        "packages": package_versions(),
        "seed": seed,
        "threads": threads,
        "hardware": hardware(),
        "git_commit": git_commit(),
    }
    write_json(folder / LOCK, lock)


def read_pins(path: Path) -> Pins:
    """Read a lock.

    Raises:
        RecipeError: the file is missing or not a lock.
    """
    lock = read_json(path)
    if not isinstance(lock, dict) or not {"model", "data"} <= lock.keys():
        what = "not a readable llmtune.lock" if path.exists() else "no such lock file"
        raise RecipeError.of(what, str(path), "name the llmtune.lock of a run folder")
    model = lock["model"]
    return Pins(model["name"], model["revision"], model["sha256"], lock["data"]["sha256"])


def own_pins(folder: Path) -> Pins | None:
    """Return what the lock of a run folder holds; None before it has one."""
    return read_pins(folder / LOCK) if (folder / LOCK).exists() else None


def check_pin(what: str, wanted: str, found: str) -> None:
    """Raise EnvironmentProblem if what was found is not what a lock holds."""
    if wanted != found:
        fix = "put back what it was; a run without that lock starts from what is here"
        raise EnvironmentProblem.of(f"{what} differs from the lock: {wanted[:12]} there, {found[:12]} here", LOCK, fix)


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions; None where a package is missing."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores and operating system; no host name."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def git_commit() -> str | None:
    """The commit of the working folder, with `+` if it has changes; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S607
        state = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if state.stdout.strip() else "")
