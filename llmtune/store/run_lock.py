"""llmtune.lock: what a run was made from, so that the same numbers can be had next year."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.recipe.evaluate_section import GATE_KEYS
from llmtune.recipe.yaml_reader import read_recipe_text
from llmtune.store.atomic_files import hash_file, hash_value, list_folder, list_model, read_json, write_json
from llmtune.store.json_shapes import find_misfit

LOCK = "llmtune.lock"
LOCK_VERSION = 2
"""Version 1 had no number, and no list of files."""
PACKAGES = (
    *("llmtune-cli", "torch", "transformers", "peft", "accelerate"),
    *("datasets", "tokenizers", "bitsandbytes", "safetensors", "numpy"),
)
JUDGING_KEYS = ("evaluate", "generation")
"""Keys of a recipe that decide how what was trained is judged."""


class SourceRecord(TypedDict):
    """A file of the data, or a data set of the hub at a commit."""

    source: str
    """As the recipe has it."""
    path: str | None
    """None for what is not on this machine."""
    sha256: NotRequired[str]
    xxh3_128: NotRequired[str]
    """Hash of a recording."""
    commit: NotRequired[str]
    etag: NotRequired[str]
    """Of a file that an address names: the store's tag and its size."""


class LockedModel(TypedDict):
    """The model that training started from."""

    name: str
    revision: str | None
    sha256: str
    folder: NotRequired[str]
    files: NotRequired[dict[str, str]]


class LockedData(TypedDict):
    """The data, as a whole and file by file."""

    sha256: str
    files: NotRequired[list[SourceRecord]]


class LockedFolder(TypedDict):
    """A folder with the hash of each file in it."""

    folder: str
    files: dict[str, str]


class Lock(TypedDict):
    """What llmtune.lock holds; what version 1 does not have is not required."""

    lock_version: NotRequired[int]
    fingerprint: str
    folder: NotRequired[str]
    """Where the run folder was."""
    recipe: NotRequired[dict[str, str]]
    """Hash of each key that decides what is trained."""
    model: LockedModel
    data: LockedData
    start_from: NotRequired[LockedFolder | None]
    template: dict[str, str]
    packages: dict[str, str | None]
    seed: int
    threads: int
    hardware: dict[str, object]
    git_commit: NotRequired[str | None]
    trained: NotRequired[dict[str, dict[str, str]]]
    """The subfolder with what was trained, file by file; added once it is."""


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
    sources: Sequence[SourceRecord] = (),
    start_from: Path | None = None,
    device: Mapping[str, object] | None = None,
) -> None:
    """Write llmtune.lock into the run folder, which holds recipe.yaml already.

    `model` is the model's folder, `start_from` the adapter that training goes on from, `device` what computes.
    """
    lock = Lock(
        lock_version=LOCK_VERSION,
        fingerprint=fingerprint,
        folder=str(folder.absolute()),
        recipe=hash_keys(folder / "recipe.yaml"),
        model={
            "name": pins.model,
            "revision": pins.revision,
            "sha256": pins.model_hash,
            "folder": str(model),
            "files": list_model(model),
        },
        data={"sha256": pins.data_hash, "files": list(sources)},
        start_from={"folder": str(start_from), "files": list_folder(start_from)} if start_from else None,
        template={"sha256": template_hash},
        packages=package_versions(),
        seed=seed,
        threads=threads,
        hardware={**hardware(), **(device or {})},
        git_commit=git_commit(),
    )
    write_json(folder / LOCK, lock)


def note_trained(folder: Path, name: str) -> str:
    """Add to the lock what was trained: the hash of each file in the subfolder `name`; return the hash of the lock."""
    lock = read_lock(folder / LOCK)
    lock["trained"] = {name: list_folder(folder / name)}
    write_json(folder / LOCK, lock)
    return hash_file(folder / LOCK)


def hash_keys(recipe: Path, judging: bool = False) -> dict[str, str]:
    """Hash each key of a resolved recipe that decides what is trained, or with `judging` how it is judged.

    Of a path the last part counts alone: what lies there has a hash of its own. Gates judge scores that are there, and
    what is trained with further seeds has a lock of its own.
    """
    content = read_resolved(recipe)
    others = {"recipe_version", "name", "deploy", *JUDGING_KEYS}
    names = [key for key in content if (key in JUDGING_KEYS if judging else key not in others)]
    return {name: hash_value(_without_folders(content[name])) for name in names}


def read_resolved(recipe: Path) -> dict[str, Any]:
    """Read the recipe.yaml of a run, as plain values; raises RecipeError where it is damaged."""
    text = read_recipe_text(recipe)
    try:
        content = YAML(typ="safe").load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        content = error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError.of("damaged: it holds no recipe", str(recipe), "Put the file back as the run wrote it.")
    return content


def _without_folders(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: [] if key == "seeds" else _without_folders(item) for key, item in value.items() if key not in GATE_KEYS
        }
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def read_lock(path: Path) -> Lock:
    """Read a lock, of this version or an older one, which has fewer keys.

    Raises:
        RecipeError: the file is missing, not a lock, or written by a later llmtune.
    """
    fix = "name the llmtune.lock of a run folder"
    lock: Lock | None = read_json(path)
    if not isinstance(lock, dict) or not {"model", "data"} <= lock.keys():
        what = "not a readable llmtune.lock" if path.exists() else "no such lock file"
        raise RecipeError.of(what, str(path), fix)
    if misfit := find_misfit(lock, Lock):
        raise RecipeError.of(f"not a lock as llmtune writes it ({misfit})", str(path), fix)
    number = lock.get("lock_version", 1)
    if number > LOCK_VERSION:
        what = f"a lock of version {number}, and this llmtune reads up to {LOCK_VERSION}"
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


def check_pin(what: str, locked: str, actual: str) -> None:
    """Raise EnvironmentProblem if a hash is not the one that a lock holds."""
    if locked != actual:
        fix = "put back what it was; a run without that lock starts from what is here"
        what = f"{what} differs from the lock: {locked[:12]} there, {actual[:12]} here"
        raise EnvironmentProblem.of(what, LOCK, fix)


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions; None where a package is missing."""
    versions: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def hardware() -> dict[str, object]:
    """Processor, cores and operating system; no host name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        processor = platform.processor()
    return {
        "machine": platform.machine(),
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def git_commit() -> str | None:
    """The commit of the working folder, with `+` if it has changes; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S607
        state = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if state.stdout.strip() else "")
