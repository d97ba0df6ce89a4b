"""llmtune.lock: what a run was made from, so that the same numbers can be had next year."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.store.atomic_files import hash_file, hash_value, list_folder, list_model, read_json, write_json

LOCK = "llmtune.lock"
LOCK_VERSION = 2
"""Version 1 had no number, and no list of files."""
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


JUDGING_KEYS = ("evaluate", "generation")
"""Keys of a recipe that decide how what was trained is judged."""


@dataclass(frozen=True)
class Pins:
    """What a lock holds still."""

    model: str
    revision: str | None
    model_hash: str
    data_hash: str


def write_lock(
    folder: Path,
    pins: Pins,
    *,
    fingerprint: str,
    template_hash: str,
    seed: int,
    threads: int,
    model: Path,
    sources: Sequence[Mapping[str, Any]] = (),
    start_from: Path | None = None,
    device: Mapping[str, Any] | None = None,
) -> None:
    """Write llmtune.lock into the run folder, which holds recipe.yaml already.

    `model` is the model's folder; `sources` has an entry a file of the data: `source` as the recipe has it, `path`, and
    its hash by its kind; `start_from` is the adapter that training goes on from; `device` says what computes.
    """
    lock = {
        "lock_version": LOCK_VERSION,
        "fingerprint": fingerprint,
        "folder": str(folder.absolute()),
        "recipe": hash_keys(folder / "recipe.yaml"),
        "model": {
            "name": pins.model,
            "revision": pins.revision,
            "sha256": pins.model_hash,
            "folder": str(model),
            "files": list_model(model),
        },
        "data": {"sha256": pins.data_hash, "files": list(sources)},
        "start_from": start_from and {"folder": str(start_from), "files": list_folder(start_from)},
        "template": {"sha256": template_hash},
        "packages": package_versions(),
        "seed": seed,
        "threads": threads,
        "hardware": {**hardware(), **(device or {})},
        "git_commit": git_commit(),
    }
    write_json(folder / LOCK, lock)


def note_trained(folder: Path, name: str) -> str:
    """Add to the lock what was trained: the hash of each file in the subfolder `name`; return the hash of the lock."""
    write_json(folder / LOCK, read_lock(folder / LOCK) | {"trained": {name: list_folder(folder / name)}})
    return hash_file(folder / LOCK)


def hash_keys(recipe: Path, judging: bool = False) -> dict[str, str]:
    """Hash each key of a resolved recipe that decides what is trained, or with `judging` how it is judged.

    Of a path the last part counts alone: what lies there has a hash of its own. Gates judge scores that are there, and
    what is trained with further seeds has a lock of its own.
    """
    content = YAML(typ="safe").load(recipe.read_text(encoding="utf-8")) or {}
    own = {"recipe_version", "name", "deploy", *JUDGING_KEYS}
    names = [key for key in content if (key in JUDGING_KEYS if judging else key not in own)]
    return {name: hash_value(_placeless(content[name])) for name in names}


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: [] if key == "seeds" else _placeless(item) for key, item in value.items() if key != "gates"}
    if isinstance(value, list):
        return [_placeless(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lock, of this version or an older one, which has fewer keys.

    Raises:
        RecipeError: the file is missing, not a lock, or written by a later llmtune.
    """
    lock = read_json(path)
    if not isinstance(lock, dict) or not {"model", "data"} <= lock.keys():
        what = "not a readable llmtune.lock" if path.exists() else "no such lock file"
        raise RecipeError.of(what, str(path), "name the llmtune.lock of a run folder")
    if (found := lock.get("lock_version", 1)) > LOCK_VERSION:
        what = f"a lock of version {found}, and this llmtune reads up to {LOCK_VERSION}"
        raise RecipeError.of(what, str(path), "update llmtune")
    return lock


def read_pins(path: Path) -> Pins:
    """Read what a lock holds still; raises as `read_lock` does."""
    lock = read_lock(path)
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
