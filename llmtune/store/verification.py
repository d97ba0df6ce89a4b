"""What a run was made from and what it made, held against what is there now, file by file; without torch.

It finds accidents, not forgers: whoever changes a file and its hash in run.json is not found out.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import Problem, RecipeError
from llmtune.recipe.builtin import recipes_folder
from llmtune.store.atomic_files import (
    find_cache,
    hash_file,
    hash_folder,
    hash_recording,
    hash_value,
    list_folder,
    list_model,
)
from llmtune.store.run_folder import RunFolder, read_run
from llmtune.store.run_lock import LOCK, git_commit, hardware, hash_keys, package_versions, read_lock

BUILTIN = "builtin:"
INPUTS = {"data": 3, "model": 4, "start_from": 4}
"""What training starts from, and the exit code of a command that needs it and finds it changed."""
CHOICES = ("adapter", "weights")
"""The subfolders of which a run has one: what was trained."""


@dataclass(frozen=True)
class Finding:
    """One claim of a run, held against what is there."""

    kind: str
    name: str
    """A file, a package, a key."""
    state: str
    """same, changed, missing, added; differs (told, no failure); unknown (nothing to hold it against)."""
    was: str | None = None
    now: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the result rests on it and it is not what it was."""
        return self.state in {"changed", "missing", "added"}


@dataclass(frozen=True)
class Verification:
    """All that was found out about a run."""

    run: Path
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> list[Finding]:
        """What is not as it was, of that which the result rests on."""
        return [finding for finding in self.findings if finding.failed]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"run": str(self.run), "verified": not self.failed, "findings": findings}

    def problems(self) -> Iterator[Problem]:
        """Say of each failed finding what is wrong and what to do."""
        for finding in self.failed:
            yield describe(finding)


def describe(finding: Finding) -> Problem:
    """Say what is wrong with a failed finding and what to do."""
    if finding.state == "added":
        return Problem(f"{finding.kind}: it was not there when the run was made", finding.name, "take it away")
    if finding.state == "missing":
        fix = "put it back, or run the recipe again"
        return Problem(f"{finding.kind}: it is missing; its hash was {_short(finding.was)}", finding.name, fix)
    was, now = _short(finding.was), _short(finding.now)
    what = f"{finding.kind}: changed since the run: its hash was {was} and is {now}"
    return Problem(what, finding.name, "put back what it was, or run the recipe again with what is there")


def _short(value: str | None) -> str:
    return (value or "unknown")[:12]


def verify(run: Path, *, strict: bool = False) -> Verification:
    """Hold every claim of a run's lock and manifest against what is there now; with `strict`, versions count as well.

    Raises:
        RecipeError: not a run folder, or not trained yet.
    """
    folder = read_run(run)
    if not (run / LOCK).exists():
        what = "this run has no llmtune.lock" if "train" in folder.manifest["steps"] else "this run was not trained yet"
        raise RecipeError.of(what, str(run), "run the recipe again: the lock is written before training")
    lock = read_lock(run / LOCK)
    findings = [
        *_check_lock(folder),
        *_check_recipe(folder, lock),
        *_check_data(folder, lock),
        *_check_model(lock, run),
        *_check_start(lock, run),
        *_check_template(folder, lock),
        *_check_outputs(folder, lock),
        *_check_evaluated(folder),
        *_compare("packages", lock["packages"], package_versions(tuple(lock["packages"])), strict),
        *_compare("hardware", lock["hardware"], hardware()),
        *_compare("git", {"commit": lock.get("git_commit")}, {"commit": git_commit()}),
    ]
    return Verification(run, tuple(findings))


def moved(path: str, then: str | None, now: Path) -> Path:
    """Return where a path of a run is now: there, as far from the run folder as it was, or among the shipped recipes.

    `then` is where the run folder was. Where none of these exists, it is the path itself.
    """
    places = [Path(path)]
    if then:
        places.append(Path(os.path.normpath(now.absolute() / os.path.relpath(path, then))))
    parts = Path(path).parts
    if "recipes" in parts:
        last = len(parts) - parts[::-1].index("recipes")
        places.append(recipes_folder().joinpath(*parts[last:]))
    return next((place for place in places if os.path.lexists(place)), places[0])


def _check_lock(folder: RunFolder) -> Iterator[Finding]:
    known = folder.manifest.get("lock")
    found = hash_file(folder.path / LOCK)
    if known is None:
        yield Finding("lock", str(folder.path / LOCK), "unknown", now=found)
    else:
        yield Finding("lock", str(folder.path / LOCK), _state(known, found), known, found)


def _check_recipe(folder: RunFolder, lock: Mapping[str, Any]) -> Iterator[Finding]:
    path = folder.path / "recipe.yaml"
    if not path.exists():
        yield Finding("recipe", str(path), "missing")
        return
    yield from _compare_keys(path, lock.get("recipe"), hash_keys(path))
    facts = folder.manifest["steps"].get("evaluate", {}).get("facts", {})
    if "recipe" in facts:
        yield from _compare_keys(path, facts["recipe"], hash_keys(path, judging=True))


def _compare_keys(path: Path, then: Mapping[str, str] | None, now: Mapping[str, str]) -> Iterator[Finding]:
    if then is None:
        yield Finding("recipe", str(path), "unknown")
        return
    for key in sorted(then.keys() | now.keys()):
        yield Finding("recipe", f"{path}: {key}", _state(then.get(key), now.get(key)), then.get(key), now.get(key))


def _check_data(folder: RunFolder, lock: Mapping[str, Any]) -> Iterator[Finding]:
    files = lock["data"].get("files")
    if not files:
        yield Finding("data", "the files", "unknown", lock["data"]["sha256"])
        return
    listed: dict[str, set[Path]] = {}
    for entry in files:
        if "commit" in entry:
            yield Finding("data", f"{entry['source']} at {entry['commit']}", "unknown", entry["commit"])
            continue
        place = _data_file(entry, lock.get("folder"), folder.path)
        listed.setdefault(entry["source"], set()).add(place)
        if "xxh3_128" in entry:
            yield _check_file("data", place, entry["xxh3_128"], hash_recording)
        else:
            yield _check_file("data", place, entry["sha256"])
    for source, places in listed.items():
        for new in _added(source, places, lock.get("folder"), folder.path):
            yield Finding("data", str(new), "added")


def _data_file(entry: Mapping[str, Any], then: str | None, now: Path) -> Path:
    if entry["source"].startswith(BUILTIN):
        parts = Path(entry["path"]).parts
        place = recipes_folder().joinpath(*parts[len(parts) - parts[::-1].index("data") - 1 :])
        return place if place.exists() else moved(entry["path"], then, now)
    return moved(entry["path"], then, now)


def _added(source: str, known: set[Path], then: str | None, now: Path) -> Iterator[Path]:
    """Yield files that a folder or a pattern has now and had not then, of the kinds that were read."""
    if source.startswith(BUILTIN):
        return
    endings = {path.suffix for path in known}
    if any(path.name.startswith("metadata.") for path in known):
        return  # it says all of its folder
    below, pattern = split_pattern(source)
    place = moved(str(below), then, now)
    found = place.glob(pattern) if pattern else place.rglob("*") if place.is_dir() else ()
    those = {path for path in found if path.suffix in endings and not _hidden(path.relative_to(place))}
    yield from sorted(path for path in those - known if path.is_file())


def split_pattern(source: str) -> tuple[Path, str]:
    """Return the folder that a pattern looks in, and the rest of it; a path without a pattern as it is, and nothing."""
    path = Path(source)
    if os.path.lexists(path) or not glob.has_magic(source):
        return path, ""
    first = next(at for at, part in enumerate(path.parts) if glob.has_magic(part))
    return Path(*path.parts[:first]), str(Path(*path.parts[first:]))


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _check_model(lock: Mapping[str, Any], run: Path) -> Iterator[Finding]:
    model = lock["model"]
    if not model.get("files"):
        yield Finding("model", model["name"], "unknown", model["sha256"])
        return
    folder = _model_folder(model, lock.get("folder"), run)
    if not folder.is_dir() and (model["revision"] or model["name"].startswith(BUILTIN)):
        yield Finding("model", f"{model['name']}, which is not in the cache here", "unknown", model["sha256"])
    elif not folder.is_dir():
        yield Finding("model", str(folder), "missing", model["sha256"])
    else:
        yield from _compare_files("model", folder, model["files"], list_model(folder))


def _model_folder(model: Mapping[str, Any], then: str | None, now: Path) -> Path:
    """Return where the model is: in llmtune's cache if it is a packaged one, in the hub's, or in its own folder."""
    folder = Path(model["folder"])
    if model["name"].startswith(BUILTIN):
        return find_cache() / "models" / folder.name
    if model["revision"] and not folder.is_dir():
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).joinpath(*folder.parts[-3:])
    return moved(model["folder"], then, now)


def _check_start(lock: Mapping[str, Any], run: Path) -> Iterator[Finding]:
    start = lock.get("start_from")
    if start:
        folder = moved(start["folder"], lock.get("folder"), run)
        yield from _compare_files("start_from", folder, start["files"], list_folder(folder))


def _check_template(folder: RunFolder, lock: Mapping[str, Any]) -> Iterator[Finding]:
    """Hold the template that lies beside what was trained against the one that it was trained with."""
    known = lock["template"]["sha256"]
    if known == hash_value(None):
        return
    for choice in CHOICES:
        path = folder.path / choice / "chat_template.jinja"
        if path.is_file():
            found = hash_value(path.read_text(encoding="utf-8"))
            yield Finding("template", str(path), _state(known, found), known, found)


def _check_outputs(folder: RunFolder, lock: Mapping[str, Any]) -> Iterator[Finding]:
    for step, entry in folder.manifest["steps"].items():
        for name, known in entry["outputs"].items():
            place = folder.path / name
            files = lock.get("trained", {}).get(name) or entry.get("files", {}).get(name)
            kind = Path(name).name if step != "evaluate" else "evaluation"
            if files:
                yield from _compare_files(kind, place, files, list_folder(place))
            else:
                found = hash_folder(place)
                yield Finding(kind, str(place), _state(known, found or None), known, found or None)


def _check_evaluated(folder: RunFolder) -> Iterator[Finding]:
    """Tell whether what was trained is what was evaluated."""
    entry = folder.manifest["steps"].get("evaluate", {})
    known = entry.get("facts", {}).get("trained")
    place = next((folder.path / name for name in CHOICES if (folder.path / name).is_dir()), None)
    if known and place:
        found = hash_folder(place)
        yield Finding("evaluated", str(place), _state(known, found), known, found)


def _compare_files(kind: str, folder: Path, then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted(then.keys() | now.keys()):
        was, found = then.get(name), now.get(name)
        yield Finding(kind, str(folder / name), _state(was, found), was, found)


def _check_file(kind: str, path: Path, known: str, hasher: Callable[[Path], str] = hash_file) -> Finding:
    found = hasher(path) if path.is_file() else None
    return Finding(kind, str(path), _state(known, found), known, found)


def _state(was: str | None, now: str | None) -> str:
    if was == now:
        return "same"
    return "missing" if now is None else "added" if was is None else "changed"


def _compare(kind: str, then: Mapping[str, Any], now: Mapping[str, Any], strict: bool = False) -> Iterator[Finding]:
    """Compare what may differ; what this process cannot know (the card, without torch) is left out."""
    for name, was in then.items():
        if name in now:
            told, found = (None if value is None else str(value) for value in (was, now[name]))
            state = "same" if told == found else "changed" if strict else "differs"
            yield Finding(kind, name, state, told, found)
