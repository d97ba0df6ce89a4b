"""Checks the inputs and outputs of a run against their hashes, file by file, without torch.

It detects accidental changes, not forgery: if the hash in run.json was changed too, it does not notice.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtune.errors import Problem, RecipeError
from llmtune.recipe.builtin import recipes_folder
from llmtune.store.atomic_files import (
    find_cache,
    hash_file,
    hash_path,
    hash_recording,
    hash_value,
    list_folder,
    list_model,
)
from llmtune.store.run_folder import RunFolder, read_run
from llmtune.store.run_lock import (
    LOCK,
    Lock,
    LockedModel,
    SourceRecord,
    git_commit,
    hardware,
    hash_keys,
    package_versions,
    read_lock,
)

BUILTIN = "builtin:"
TRAINED = ("adapter", "weights")
"""Subfolders for the trained weights; a run has one of them."""
Hashes = Mapping[str, str]


@dataclass(frozen=True)
class Finding:
    """One recorded hash or setting of a run, compared with its present value."""

    kind: str
    name: str
    """A file, a package, a key."""
    state: str
    """same, changed, missing, added; differs (not a failure); unknown (nothing to compare with)."""
    was: str | None = None
    now: str | None = None

    @property
    def failed(self) -> bool:
        """Return whether the change invalidates the result."""
        return self.state in {"changed", "missing", "added"}

    def to_problem(self) -> Problem:
        """Return the problem with its fix."""
        was, now = ((value or "unknown")[:12] for value in (self.was, self.now))
        if self.state == "added":
            return Problem(f"{self.kind}: it was added after the run", self.name, "Remove it.")
        if self.state == "missing":
            fix = "Restore it, or run the recipe again."
            return Problem(f"{self.kind}: it is missing; its hash was {was}", self.name, fix)
        what = f"{self.kind}: changed since the run: its hash was {was} and is {now}"
        return Problem(what, self.name, "Restore the original, or run the recipe again with the current version.")


@dataclass(frozen=True)
class Verification:
    """All recorded hashes and settings of a run, compared with their present values."""

    run: Path
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> list[Finding]:
        """Return the findings that invalidate the result."""
        return [finding for finding in self.findings if finding.failed]

    def to_dict(self) -> dict[str, object]:
        """Return the verification as JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"run": str(self.run), "verified": not self.failed, "findings": findings}

    def problems(self) -> list[Problem]:
        """Return the problem of each failed finding."""
        return [finding.to_problem() for finding in self.failed]


def verify_run(run: Path, *, strict: bool = False) -> Verification:
    """Check a run against its lock and manifest; with `strict`, package versions must match too.

    Raises:
        RecipeError: not a run folder, or not trained yet.
    """
    folder = read_run(run)
    if not (run / LOCK).exists():
        what = "this run has no llmtune.lock" if "train" in folder.manifest["steps"] else "this run is not trained yet"
        raise RecipeError.of(what, str(run), "Run the recipe again: it writes the lock before training.")
    lock = read_lock(run / LOCK)
    packages = package_versions(tuple(lock["packages"]))
    findings = [
        compare_hashes(
            "lock", str(run / LOCK), folder.manifest.get("lock"), hash_file(run / LOCK), unknown_if_new=True
        ),
        *_check_recipe(folder, lock),
        *_check_data(folder, lock),
        *_check_model(lock, run),
        *_check_template(folder, lock),
        *_check_metrics(lock, run),
        *_check_outputs(folder, lock),
        *_check_reports(folder),
        *_compare_settings("packages", lock["packages"], packages, strict),
        *_compare_settings("hardware", lock["hardware"], hardware()),
        *_compare_settings("git", {"commit": lock.get("git_commit")}, {"commit": git_commit()}),
    ]
    return Verification(run, tuple(findings))


def compare_hashes(kind: str, name: str, was: str | None, now: str | None, unknown_if_new: bool = False) -> Finding:
    """Compare two hashes; None means that the thing is missing, or with `unknown_if_new` was not recorded."""
    if was == now:
        state = "same"
    elif now is None:
        state = "missing"
    elif was is None:
        state = "unknown" if unknown_if_new else "added"
    else:
        state = "changed"
    return Finding(kind, name, state, was, now)


def _compare_all(kind: str, prefix: str, was: Hashes, now: Hashes) -> Iterator[Finding]:
    for name in sorted(was.keys() | now.keys()):
        yield compare_hashes(kind, f"{prefix}{name}", was.get(name), now.get(name))


def _compare_settings(
    kind: str, was: Mapping[str, object], now: Mapping[str, object], strict: bool = False
) -> Iterator[Finding]:
    """Compare settings that may differ; skip those unknown to this process, such as the GPU without torch."""
    for name in was:
        if name in now:
            before, after = (None if value is None else str(value) for value in (was[name], now[name]))
            state = "same" if before == after else "changed" if strict else "differs"
            yield Finding(kind, name, state, before, after)


def relocated(path: str, old_run: str | None, run: Path) -> Path:
    """Return the current location of a run's path: unchanged, moved with the run folder, or a shipped recipe file.

    `old_run` is the former run folder. If none of these exists, return the path itself.
    """
    candidates = [Path(path)]
    if old_run:
        candidates.append(Path(os.path.normpath(run.absolute() / os.path.relpath(path, old_run))))
    parts = Path(path).parts
    if "recipes" in parts:
        last = len(parts) - parts[::-1].index("recipes")
        candidates.append(recipes_folder().joinpath(*parts[last:]))
    return next((candidate for candidate in candidates if os.path.lexists(candidate)), candidates[0])


def split_pattern(source: str) -> tuple[Path, str]:
    """Split a glob pattern into its fixed folder and the rest; a plain path has an empty rest."""
    path = Path(source)
    if os.path.lexists(path) or not glob.has_magic(source):
        return path, ""
    first = next(at for at, part in enumerate(path.parts) if glob.has_magic(part))
    return Path(*path.parts[:first]), str(Path(*path.parts[first:]))


def _check_recipe(folder: RunFolder, lock: Lock) -> Iterator[Finding]:
    path = folder.path / "recipe.yaml"
    if not path.exists():
        yield Finding("recipe", str(path), "missing")
        return
    if "recipe" in lock:
        yield from _compare_all("recipe", f"{path}: ", lock["recipe"], hash_keys(path))
    else:
        yield Finding("recipe", str(path), "unknown")
    facts = folder.facts("evaluate")
    if "recipe" in facts:
        yield from _compare_all("recipe", f"{path}: ", facts["recipe"], hash_keys(path, judging=True))


def _check_data(folder: RunFolder, lock: Lock) -> Iterator[Finding]:
    records = lock["data"].get("files")
    if not records:
        yield Finding("data", "the files", "unknown", lock["data"]["sha256"])
        return
    old_run = lock.get("folder")
    source_paths: dict[str, set[Path]] = {}
    for record in records:
        if record["path"] is None:
            content = record.get("commit") or record.get("etag") or record.get("sha256")
            yield Finding("data", f"{record['source']} at {content}", "unknown", content)
            continue
        path = _data_file(record, old_run, folder.path)
        source_paths.setdefault(record["source"], set()).add(path)
        is_recording = "xxh3_128" in record
        now = (hash_recording if is_recording else hash_file)(path) if path.is_file() else None
        yield compare_hashes("data", str(path), record.get("xxh3_128") or record.get("sha256"), now)
    for source, paths in source_paths.items():
        for path in _added_files(source, paths, old_run, folder.path):
            yield Finding("data", str(path), "added")


def _data_file(record: SourceRecord, old_run: str | None, run: Path) -> Path:
    assert record["path"], "a data set of the hub has no file"
    if record["source"].startswith(BUILTIN):
        parts = Path(record["path"]).parts
        path = recipes_folder().joinpath(*parts[len(parts) - parts[::-1].index("data") - 1 :])
        if path.exists():
            return path
    return relocated(record["path"], old_run, run)


def _added_files(source: str, recorded_paths: set[Path], old_run: str | None, run: Path) -> Iterator[Path]:
    """Yield files added to a folder or pattern since the run, with the extensions that were read."""
    if source.startswith(BUILTIN) or any(path.name.startswith("metadata.") for path in recorded_paths):
        return  # a metadata file lists all files of its folder
    start, pattern = split_pattern(source)
    folder = relocated(str(start), old_run, run)
    endings = {path.suffix for path in recorded_paths}
    for path in sorted(folder.glob(pattern) if pattern else folder.rglob("*") if folder.is_dir() else ()):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        if path.suffix in endings and not hidden and path not in recorded_paths and path.is_file():
            yield path


def _check_model(lock: Lock, run: Path) -> Iterator[Finding]:
    """Check the model that training started from, the adapter that it continued, miner and teacher."""
    if start := lock.get("start_from"):
        folder = relocated(start["folder"], lock.get("folder"), run)
        yield from _compare_all("start_from", f"{folder}{os.sep}", start["files"], list_folder(folder))
    others = [lock.get("miner"), lock.get("teacher")]
    for model in (lock["model"], *(one for one in others if one)):
        yield from _check_model_files(model, lock.get("folder"), run)


def _check_model_files(model: LockedModel, old_run: str | None, run: Path) -> Iterator[Finding]:
    if not model.get("files"):
        yield Finding("model", model["name"], "unknown", model["sha256"])
        return
    folder = _model_folder(model, old_run, run)
    if folder.is_dir():
        yield from _compare_all("model", f"{folder}{os.sep}", model["files"], list_model(folder))
    elif model["revision"] or model["name"].startswith(BUILTIN):
        yield Finding("model", f"{model['name']}, which is not in the local cache", "unknown", model["sha256"])
    else:
        yield Finding("model", str(folder), "missing", model["sha256"])


def _model_folder(model: LockedModel, old_run: str | None, run: Path) -> Path:
    """Return the model's location: llmtune's cache if it is packaged, the hub's cache, or its own folder."""
    folder = Path(model.get("folder", model["name"]))
    if model["name"].startswith(BUILTIN):
        return find_cache() / "models" / folder.name
    if model["revision"] and not folder.is_dir():
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).joinpath(*folder.parts[-3:])
    return relocated(str(folder), old_run, run)


def _check_template(folder: RunFolder, lock: Lock) -> Iterator[Finding]:
    """Compare the template saved with the weights with the one used in training."""
    recorded_hash = lock["template"].get("sha256")
    for name in TRAINED if recorded_hash != hash_value(None) else ():
        path = folder.path / name / "chat_template.jinja"
        if path.is_file():
            yield compare_hashes(
                "template", str(path), recorded_hash, hash_value(path.read_text("utf-8", errors="replace"))
            )


def _check_metrics(lock: Lock, run: Path) -> Iterator[Finding]:
    """Check the files of the user's own metrics, and those of the rewards of training."""
    files = {"metrics": lock.get("metrics", {}), "rewards": lock.get("rewards", {})}
    for kind, file, recorded_hash in ((kind, *pair) for kind, hashes in files.items() for pair in hashes.items()):
        path = relocated(file, lock.get("folder"), run)
        yield compare_hashes(kind, str(path), recorded_hash, hash_file(path) if path.is_file() else None)


def _check_outputs(folder: RunFolder, lock: Lock) -> Iterator[Finding]:
    for step, record in folder.manifest["steps"].items():
        for name, recorded_hash in record["outputs"].items():
            path = folder.path / name
            files = lock.get("trained", {}).get(name) or record.get("files", {}).get(name)
            kind = Path(name).name if step != "evaluate" else "evaluation"
            if files:
                yield from _compare_all(kind, f"{path}{os.sep}", files, list_folder(path))
            else:
                yield compare_hashes(kind, str(path), recorded_hash, hash_path(path) or None)
    evaluated = folder.facts("evaluate").get("trained")
    for path in [folder.path / name for name in TRAINED if evaluated and (folder.path / name).is_dir()]:
        yield compare_hashes(
            "evaluated", str(path), evaluated, hash_path(path)
        )  # the trained weights must be the evaluated weights


def _check_reports(folder: RunFolder) -> Iterator[Finding]:
    for name, recorded_hash in folder.manifest.get("reports", {}).items():
        path = folder.path / name
        yield compare_hashes("report", str(path), recorded_hash, hash_path(path) or None)
