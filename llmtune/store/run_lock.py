"""llmtune.lock: the exact inputs of a run, for reproducing its numbers later."""

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

from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.recipe.evaluate_section import GATE_KEYS
from llmtune.recipe.yaml_reader import file_label, parse_yaml, read_recipe_text
from llmtune.records import ModelRef
from llmtune.store.atomic_files import hash_file, hash_value, list_folder, list_model, read_json, write_json
from llmtune.store.json_shapes import find_misfit

LOCK = "llmtune.lock"
LOCK_VERSION = 2
"""Version 1 had no version number and no list of files."""
PACKAGES = (
    *("llmtune-cli", "torch", "transformers", "peft", "accelerate"),
    *("datasets", "tokenizers", "bitsandbytes", "safetensors", "numpy"),
)
JUDGING_KEYS = ("evaluate", "generation")
"""Recipe sections that affect evaluation but not training."""


class SourceRecord(TypedDict):
    """A data file, or a hub data set at a commit."""

    source: str
    """The source as written in the recipe."""
    path: str | None
    """None for remote data."""
    sha256: NotRequired[str]
    xxh3_128: NotRequired[str]
    """Hash of a recording."""
    commit: NotRequired[str]
    etag: NotRequired[str]
    """For a file at a URL: the store's tag and its size."""
    lines: NotRequired[int]
    """Lines of a text file."""


class LockedModel(TypedDict):
    """The model that training started from."""

    name: str
    revision: str | None
    sha256: str
    folder: NotRequired[str]
    files: NotRequired[dict[str, str]]


class LockedData(TypedDict):
    """The data: one hash over all rows, and the files."""

    sha256: str
    files: NotRequired[list[SourceRecord]]


class LockedFolder(TypedDict):
    """A folder with the hash of each file in it."""

    folder: str
    files: dict[str, str]


class Lock(TypedDict):
    """The content of llmtune.lock; keys that version 1 does not have are optional."""

    lock_version: NotRequired[int]
    fingerprint: str
    folder: NotRequired[str]
    """Where the run folder was."""
    recipe: NotRequired[dict[str, str]]
    """Hash of each recipe key that affects training."""
    model: LockedModel
    data: LockedData
    start_from: NotRequired[LockedFolder | None]
    miner: NotRequired[LockedModel]
    """The model that mined negatives, if the recipe names another one."""
    teacher: NotRequired[LockedModel]
    """The model of `distil.teacher`."""
    rewards: NotRequired[dict[str, str]]
    """Hash of each file of the user's own rewards, as training used it."""
    template: dict[str, str]
    packages: dict[str, str | None]
    seed: int
    threads: int
    hardware: dict[str, object]
    judge: NotRequired[dict[str, str]]
    """Model and host of `evaluate.judge`."""
    git_commit: NotRequired[str | None]
    trained: NotRequired[dict[str, dict[str, str]]]
    """Hash of each file in the subfolder of the trained weights; added after training."""
    metrics: NotRequired[dict[str, str]]
    """Hash of each file of the user's own metrics; added after each evaluation."""


@dataclass(frozen=True)
class Pins:
    """The values that a lock pins."""

    model: str
    revision: str | None
    model_hash: str
    data_hash: str
    teacher_hash: str | None = None


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
    judge: Mapping[str, str] | None = None,
    miner: ModelRef | None = None,
    teacher: ModelRef | None = None,
    rewards: Mapping[str, str] | None = None,
) -> None:
    """Write llmtune.lock to a run folder that already has recipe.yaml.

    `model` is the model's folder, `start_from` the adapter that training continues, `device` the compute device,
    `judge` the model and host of `evaluate.judge`, `miner` the model of `data.negatives`,
    `teacher` that of `distil`, `rewards` the hashes of the user's own reward files.
    """
    lock = Lock(
        lock_version=LOCK_VERSION,
        fingerprint=fingerprint,
        folder=str(folder.absolute()),
        recipe=hash_keys(folder / "recipe.yaml"),
        model=_lock_model(ModelRef(pins.model, model, pins.revision, pins.model_hash)),
        data={"sha256": pins.data_hash, "files": list(sources)},
        start_from={"folder": str(start_from), "files": list_folder(start_from)} if start_from else None,
        template={"sha256": template_hash},
        packages=package_versions(),
        seed=seed,
        threads=threads,
        hardware={**hardware(), **(device or {})},
        git_commit=git_commit(),
    )
    if judge:
        lock["judge"] = dict(judge)
    if miner:
        lock["miner"] = _lock_model(miner)
    if teacher:
        lock["teacher"] = _lock_model(teacher)
    if rewards:
        lock["rewards"] = dict(rewards)
    write_json(folder / LOCK, lock)


def _lock_model(one: ModelRef) -> LockedModel:
    model = LockedModel(name=one.name, revision=one.revision, sha256=one.content_hash)
    return model | {"folder": str(one.path), "files": list_model(one.path)}


def note_trained(folder: Path, name: str) -> str:
    """Add the hash of each trained file in the subfolder `name` to the lock; return the hash of the lock."""
    lock = read_lock(folder / LOCK)
    lock["trained"] = {name: list_folder(folder / name)}
    write_json(folder / LOCK, lock)
    return hash_file(folder / LOCK)


def hash_keys(recipe: Path, judging: bool = False) -> dict[str, str]:
    """Hash each key of a resolved recipe that affects training, or with `judging` evaluation.

    Only the last part of a path counts, because its content has its own hash. Gates are excluded because they judge
    existing scores, additional seeds because they have their own locks.
    """
    content = read_resolved(recipe)
    others = {"recipe_version", "name", "deploy", *JUDGING_KEYS}
    names = [key for key in content if (key in JUDGING_KEYS if judging else key not in others)]
    return {name: hash_value(_without_folders(content[name])) for name in names}


def read_resolved(recipe: Path) -> dict[str, Any]:
    """Read the recipe.yaml of a run as plain values; raises RecipeError if it is damaged."""
    content = parse_yaml(read_recipe_text(recipe), file_label(recipe), recipe.parent).plain()
    if not isinstance(content, dict):
        raise RecipeError.of("damaged: it is not a recipe", str(recipe), "Restore the file that the run wrote.")
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
    """Read a lock of this or an older version; older versions have fewer keys.

    Raises:
        RecipeError: the file is missing, not a lock, or from a later llmtune.
    """
    fix = "Name the llmtune.lock of a run folder."
    lock: Lock | None = read_json(path)
    if not isinstance(lock, dict) or not {"model", "data"} <= lock.keys():
        what = "not a readable llmtune.lock" if path.exists() else "lock file not found"
        raise RecipeError.of(what, str(path), fix)
    if misfit := find_misfit(lock, Lock):
        raise RecipeError.of(f"not a valid lock ({misfit})", str(path), fix)
    number = lock.get("lock_version", 1)
    if number > LOCK_VERSION:
        what = f"the lock has version {number}, but this llmtune reads versions up to {LOCK_VERSION}"
        raise RecipeError.of(what, str(path), "Update llmtune.")
    return lock


def read_pins(path: Path) -> Pins:
    """Read the values that a lock pins; raises as `read_lock` does."""
    lock = read_lock(path)
    model = lock["model"]
    teacher = lock["teacher"]["sha256"] if "teacher" in lock else None
    return Pins(model["name"], model["revision"], model["sha256"], lock["data"]["sha256"], teacher)


def own_pins(folder: Path) -> Pins | None:
    """Return the values that the lock of a run folder pins; None before it has a lock."""
    return read_pins(folder / LOCK) if (folder / LOCK).exists() else None


def check_pin(what: str, locked: str, actual: str) -> None:
    """Raise EnvironmentProblem if a hash differs from the lock."""
    if locked != actual:
        fix = "Restore the original, or run without --lock to use the current version."
        what = f"{what} differs from the lock: {locked[:12]} there, {actual[:12]} here"
        raise EnvironmentProblem.of(what, LOCK, fix)


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Return installed versions; None for missing packages."""
    versions: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def hardware() -> dict[str, object]:
    """Return processor, cores and operating system, without the host name."""
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
    """Return the commit of the working folder, with `+` for uncommitted changes; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S607
        state = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if state.stdout.strip() else "")
