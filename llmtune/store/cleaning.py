"""Find what may be removed from run folders, llmtune's cache and the releases, and remove it.

It keeps what later commands need: rows, encoded rows, weights, evaluations, exports of the present weights, and the
checkpoints that an unfinished training resumes from.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.store.atomic_files import (
    UNFINISHED,
    describe_link,
    exclusive,
    explained,
    find_cache,
    hash_file,
    read_json,
    remove,
)
from llmtune.store.release_store import RELEASES, changing, is_stored, list_release_names, list_stored, read_history
from llmtune.store.run_folder import CERTIFICATE, MANIFEST, RunFolder, read_manifest
from llmtune.store.run_listing import RUNS
from llmtune.store.run_lock import LOCK

CHECKPOINTS, MODELS = "checkpoints", "models"
PUT_ASIDE = {"other-*": "checkpoints of other rows or settings", "damaged-*": "damaged checkpoint"}
"""Descriptions of checkpoints that no training resumes from, by pattern."""
_STEP = re.compile(r"step-([1-9][0-9]*)")
_WRITER = re.compile(r"\.(\d+)\.tmp$")


@dataclass(frozen=True)
class Removable:
    """A file or folder that no command needs."""

    path: Path
    bytes: int
    reason: str


@dataclass
class Cleaning:
    """What may go, and the folders that were skipped, with the reason."""

    dry_run: bool
    removable: list[Removable] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: bool = False
    """Whether something could not be removed; it is skipped."""

    @property
    def bytes(self) -> int:
        """Size of all that may go."""
        return sum(one.bytes for one in self.removable)

    def add(self, path: Path, reason: str, root: Path) -> None:
        """Add a file or folder below `root`, unless its parent is already listed; skip paths through a link."""
        below = [path, *path.parents][: len(path.parts) - len(root.parts)]
        if links := [one for one in below if one.is_symlink()]:
            self.skipped[str(links[-1])] = describe_link(links[-1])
        elif not any(one.path in (path, *path.parents) for one in self.removable):
            self.removable.append(Removable(path, measure_bytes(path), reason))

    def remove(self) -> None:
        """Remove what was added and still exists, unless this is a dry run. Skip what cannot be removed."""
        for one in () if self.dry_run else [*self.removable]:
            if not (one.path.exists() or one.path.is_symlink()):
                continue
            try:
                with explained(one.path):
                    _remove_at_once(one.path)
            except EnvironmentProblem as error:
                self.skipped[str(one.path)] = error.problems[0].what
                self.removable.remove(one)
                self.failed = True


def clean_run(folder: Path, *, dry_run: bool) -> Cleaning:
    """Clean a run folder with the runs inside it.

    Raises RecipeError for a release, which never changes.
    """
    if is_stored(folder.absolute()):
        fix = "Remove releases that are not current with: llmtune clean --all --keep-releases N"
        raise RecipeError.of("a release never changes, so nothing in it can go", str(folder), fix)
    cleaning = Cleaning(dry_run=dry_run)
    _clean_runs_below(folder, cleaning)
    return cleaning


def clean_all(*, keep_releases: int | None, keep_models: Collection[str] | None, dry_run: bool) -> Cleaning:
    """Clean all runs in `runs/`, the releases, and llmtune's cache.

    `keep_models` names packaged models in the cache that stay; None keeps all, because runs of other folders share the
    cache. `keep_releases` is the number of releases that each name keeps, besides the current one; None keeps all.
    """
    cleaning = Cleaning(dry_run=dry_run)
    for folder in _list_folders():
        _clean_runs_below(folder, cleaning)
    if keep_models is not None:
        _find_models(cleaning, keep_models)
    cleaning.remove()
    _clean_releases(cleaning, keep_releases)
    return cleaning


def _list_folders() -> list[Path]:
    return sorted(path for path in RUNS.glob("*") if path.is_dir())


def _find_in_runs(name: str) -> list[Path]:
    """Return the files of that name in all runs, also in those that are links to another disk."""
    return [file for folder in _list_folders() for file in sorted(folder.rglob(name))]


def measure_bytes(path: Path) -> int:
    """Return the size of a file or of all files in a folder, in bytes."""
    files = [path] if path.is_symlink() or path.is_file() else [one for one in path.rglob("*") if not one.is_dir()]
    return sum(one.lstat().st_size for one in files)


def _clean_releases(cleaning: Cleaning, keep: int | None) -> None:
    """Remove what killed processes left in the releases and, unless `keep` is None, old releases."""
    for name in list_release_names():
        try:
            with changing(name):
                _find_leftovers(list((RELEASES / name).glob(".*")), cleaning, RELEASES)
                if keep is not None:
                    _find_old_releases(name, cleaning, keep)
                cleaning.remove()
        except EnvironmentProblem as error:
            cleaning.skipped[str(RELEASES / name)] = error.problems[0].what


def _remove_at_once(path: Path) -> None:
    """Rename a folder before deleting it: no command then sees a part of it, and the next cleaning finds the rest."""
    if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}.old"))
    remove(path)


def _clean_runs_below(folder: Path, cleaning: Cleaning) -> None:
    """Clean a run folder and the runs inside it (further seeds, methods, trials); skip those in use."""
    for path in sorted(file.parent for file in folder.rglob(MANIFEST)):
        if any(str(parent) in cleaning.skipped for parent in path.parents):
            continue
        with ExitStack() as stack:
            try:
                manifest = read_manifest(path)
                stack.enter_context(exclusive(path / ".lock", path))
            except LlmtuneError as error:
                cleaning.skipped[str(path)] = error.problems[0].what
                continue
            if manifest is not None:
                _find_in_run(RunFolder(path, manifest), cleaning)
                cleaning.remove()


def _find_in_run(run: RunFolder, cleaning: Cleaning) -> None:
    checkpoints = run.path / CHECKPOINTS
    for pattern, reason in PUT_ASIDE.items():
        for path in sorted(checkpoints.glob(pattern)):
            cleaning.add(path, reason, run.path)
    steps = sorted((int(match[1]), path) for path in checkpoints.glob("*") if (match := _STEP.fullmatch(path.name)))
    trained = run.is_whole("train")
    kept = set() if trained else _needed_checkpoints([path for _, path in reversed(steps)])
    for _, path in steps:
        if path not in kept:
            cleaning.add(path, "training is finished" if trained else "there is a newer checkpoint", run.path)
    for file in _search(run.path, CERTIFICATE):
        certificate = read_json(file)
        if isinstance(certificate, dict) and not run.certifies(certificate):
            cleaning.add(file.parent, "export of an earlier training in this folder", run.path)
    _find_leftovers(_search(run.path, ".*"), cleaning, run.path)


def _search(run: Path, pattern: str) -> list[Path]:
    """Return the paths in a run folder that match, without those of the runs inside it."""
    inner = [file.parent for file in run.rglob(MANIFEST) if file.parent != run]
    return [path for path in sorted(run.rglob(pattern)) if not any(one in (path, *path.parents) for one in inner)]


def _needed_checkpoints(newest_first: list[Path]) -> set[Path]:
    """Return what an unfinished training needs: its newest complete checkpoint, all after it, and the best one."""
    for at, path in enumerate(newest_first):
        content = read_json(path / "state.json")
        files = content.get("files") if isinstance(content, dict) else None
        if isinstance(files, dict) and all(
            (path / name).is_file() and hash_file(path / name) == sha256 for name, sha256 in files.items()
        ):
            best = path.with_name(f"step-{content['state'].get('best_step')}")
            return {*newest_first[: at + 1], best}
    return {*newest_first}


def _find_leftovers(hidden: list[Path], cleaning: Cleaning, root: Path) -> None:
    for path in hidden:
        if any(path.match(pattern) for pattern in UNFINISHED) and (path.is_symlink() or not _is_being_written(path)):
            cleaning.add(path, "left by a killed process", root)


def _is_being_written(path: Path) -> bool:
    """Return whether a process still writes to a temporary file or folder."""
    if (writer := _WRITER.search(path.name)) is not None:
        return psutil.pid_exists(int(writer[1]))
    if not path.name.endswith(".new"):
        return False
    try:
        with exclusive(path, path):
            return False
    except EnvironmentProblem:
        return True


def _find_models(cleaning: Cleaning, kept: Collection[str]) -> None:
    """Add the packaged models in the cache, without those in `kept`."""
    for path in sorted((find_cache() / MODELS).glob("*")):
        if path.is_dir() and path.name not in kept:
            cleaning.add(path, "packaged model; its next use converts it again from its package", find_cache())


def _read_folder(file: Path) -> str:
    with explained(file):
        return file.read_text("utf-8", errors="replace")


def _find_old_releases(name: str, cleaning: Cleaning, keep: int) -> None:
    """Add releases that are neither current, nor among the last promoted, nor named by a run."""
    named = "".join(_read_folder(file) for wanted in ("recipe.yaml", LOCK) for file in _find_in_runs(wanted))
    stored = list_stored(name)
    current = {one.hash for one in stored if one.current}
    last = [*dict.fromkeys(line["after"] for line in reversed(read_history(name)) if line["after"] not in current)]
    for one in stored:
        uses = f"{name}@{one.hash}" in named or f"{name}/{one.hash}" in named
        if not one.current and one.hash not in last[:keep] and not uses:
            cleaning.add(one.folder, f"release {one.address}, not current", RELEASES)
