"""The run folder and its manifest: open it, refuse another recipe's, skip steps whose inputs did not change."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from ruamel.yaml import YAML

from llmtune import __version__
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.recipe import LoadedRecipe, keep_origins, load_recipe
from llmtune.records import StepTiming
from llmtune.store.atomic_files import (
    explained,
    hash_file,
    hash_folder,
    hash_listing,
    list_folder,
    read_json,
    write_json,
)
from llmtune.store.profile import Meter

MANIFEST = "run.json"
OWN = (
    "data",
    "model",
    "adapter",
    "weights",
    "checkpoints",
    "trackers",
    "evaluation",
    "merged",
    "gguf",
    "explain",
    "seeds",
)
OWN_FILES = (
    "metrics.jsonl",
    "merged.failed.json",
    "endpoint.certificate.json",
    "report.html",
    "report.md",
    "report.json",
    "junit.xml",
    "recipe.yaml",
    "llmtune.lock",
    "reproduction.json",
)
LATER_FIX = "of a run only evaluate, generation and deploy can be set; else run the recipe itself"
STEPS = ("prepare", "encode", "select", "adapt", "train", "evaluate", "deploy")


@dataclass
class RunFolder:
    """One run on disk. `manifest` mirrors run.json; every change is written at once."""

    path: Path
    manifest: dict[str, Any]

    @property
    def findings(self) -> dict[str, Any]:
        """What was found out on the way and must be kept, such as the micro-batch budget."""
        found: dict[str, Any] = self.manifest["findings"]
        return found

    def note(self, **findings: Any) -> None:
        """Keep findings in the manifest."""
        self.findings.update(findings)
        self.write()

    def write(self) -> None:
        """Write run.json in one step."""
        with explained(self.path):
            write_json(self.path / MANIFEST, self.manifest)

    def is_valid(self, step: str, inputs: str) -> bool:
        """Whether `step` was done from exactly these inputs and its outputs are still what it wrote."""
        entry = self.manifest["steps"].get(step)
        if not entry or entry["state"] != "done" or entry["inputs"] != inputs:
            return False
        return all(_hash(self.path / name) == value for name, value in entry["outputs"].items())

    @contextmanager
    def step(self, name: str, inputs: str, outputs: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Run one step: note that it runs, measure it, and at the end the hashes of its outputs.

        Yields a dictionary for facts about the step, kept in the manifest.
        """
        facts: dict[str, Any] = {}
        entry = {"state": "running", "inputs": inputs, "started": time.time(), "outputs": {}, "facts": facts}
        self.manifest["steps"][name] = entry
        self.write()
        meter = Meter()
        try:
            with explained(self.path):
                yield facts
        except BaseException:
            entry["state"] = "failed"
            if self.path.is_dir():
                self.write()
            raise
        entry |= {"state": "done", "seconds": meter.seconds, "peak_bytes": meter.peak_bytes}
        listed = {output: list_folder(self.path / output) for output in outputs}
        entry["files"] = listed
        entry["outputs"] = {
            name: hash_listing(found) if found else _hash(self.path / name) for name, found in listed.items()
        }
        self.write()

    def facts(self, step: str) -> dict[str, Any]:
        """What a step that is done left in the manifest."""
        facts: dict[str, Any] = self.manifest["steps"][step]["facts"]
        return facts

    def require_trained(self) -> None:
        """Raise a RecipeError unless the run has a trained model."""
        if self.manifest["steps"].get("train", {}).get("state") != "done":
            fix = "finish it first: run the same recipe again"
            raise RecipeError.of("this run has no trained model yet", str(self.path), fix)

    def timings(self, skipped: Mapping[str, bool]) -> list[StepTiming]:
        """How each step went, in order; `skipped` tells which were not run this time."""
        done = self.manifest["steps"]
        return [
            StepTiming(name, done[name]["seconds"], done[name]["peak_bytes"], skipped.get(name, True))
            for name in STEPS
            if name in done and done[name]["state"] == "done"
        ]


def _hash(path: Path) -> str:
    return hash_file(path) if path.is_file() else hash_folder(path)


def default_path(name: str, fingerprint: str) -> Path:
    """`runs/<name>-<8 hex>` under the working folder."""
    return Path("runs") / f"{name}-{fingerprint[:8]}"


@contextmanager
def open_run(path: Path, fingerprint: str, *, resume: bool = False, fresh: bool = False) -> Iterator[RunFolder]:
    """Open (or make) a run folder for the recipe with this fingerprint and hold it against a second process.

    Raises:
        RecipeError: the folder belongs to another recipe, holds something else, or `resume` finds nothing.
        EnvironmentProblem: it cannot be written, or another process works in it.
    """
    with explained(path):
        if path.exists() and not path.is_dir():
            raise RecipeError.of("the run folder is a file", str(path), "choose another folder with --out")
        if not (path / MANIFEST).exists():
            _refuse_foreign(path, None, fingerprint, resume)
        path.mkdir(parents=True, exist_ok=True)
        with (path / ".lock").open("a") as hold:
            _hold(hold, path)
            known = read_json(path / MANIFEST)
            _refuse_foreign(path, known, fingerprint, resume)
            _clear(path, everything=fresh)
            new = {"fingerprint": fingerprint, "steps": {}, "findings": {}}
            folder = RunFolder(path, new if fresh or known is None else known)
            folder.manifest["llmtune"] = __version__
            folder.write()
            yield folder


def _hold(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = "another llmtune process works in this folder"
        raise EnvironmentProblem.of(what, str(path), "wait for it, or choose another folder with --out") from None


def look_at_run(path: Path, fingerprint: str, *, resume: bool = False) -> RunFolder:
    """Look at what a folder holds, with `open_run`'s refusals, and change nothing."""
    known = read_json(path / MANIFEST)
    _refuse_foreign(path, known, fingerprint, resume)
    return RunFolder(path, known or {"fingerprint": fingerprint, "steps": {}, "findings": {}})


def read_run(path: Path) -> RunFolder:
    """Open a finished or stopped run for reading.

    Raises:
        RecipeError: the folder is missing or is not a run.
    """
    known = read_json(path / MANIFEST)
    if known is None:
        what = "not a run folder: it has no run.json" if path.is_dir() else "no such run folder"
        raise RecipeError.of(what, str(path), "name the folder that 'llmtune run' printed (runs/<name>-<hash>)")
    return RunFolder(path, known)


def _refuse_foreign(path: Path, known: dict[str, Any] | None, fingerprint: str, resume: bool) -> None:
    if known is not None and known["fingerprint"] != fingerprint:
        what = f"this folder holds the run of another recipe ({known['fingerprint'][:8]}, not {fingerprint[:8]})"
        raise RecipeError.of(what, str(path), "choose another folder with --out, or leave --out away")
    if known is None and path.is_dir():
        names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        strange = sorted(names - {*OWN, *OWN_FILES})
        if strange:
            what = f"this folder is not empty and not a run: it holds {', '.join(strange[:3])}"
            raise RecipeError.of(what, str(path), "choose an empty or new folder with --out")
    if resume and not (known and known["steps"]):
        raise RecipeError.of("nothing to resume", str(path), "leave --resume away to start")


def _clear(path: Path, *, everything: bool) -> None:
    """Sweep what a process that was killed left half-written; with `everything`, the whole run."""
    for place in (path, path / "data"):
        for pattern in (".*.tmp", ".*.new", ".*.old"):
            for left in place.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    if everything:
        for name in OWN:
            shutil.rmtree(path / name, ignore_errors=True)
        for name in (*OWN_FILES, MANIFEST):
            (path / name).unlink(missing_ok=True)


def recipe_of_run(folder: RunFolder, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Load the resolved recipe of a run; `sets` may change how it is evaluated, not what it is.

    Raises:
        RecipeError: a value is set that would make it another run.
    """
    strange = [Problem(f"--set {item}: this would be another run", fix=LATER_FIX) for item in sets if not _later(item)]
    RecipeError.collect(strange)
    path = folder.path / "recipe.yaml"
    text = path.read_text(encoding="utf-8")
    loaded = keep_origins(load_recipe(path), text)
    if sets:
        with _without_defaults(text, loaded.origins) as bare:
            loaded = replace(keep_origins(load_recipe(bare, sets), text), file=path)
    return replace(loaded, fingerprint=folder.manifest["fingerprint"])


@contextmanager
def _without_defaults(text: str, origins: Mapping[str, str]) -> Iterator[Path]:
    """Give a file without what was a default then: it is not stated now, and must not be in the way of what is set."""
    yaml = YAML(typ="safe")
    content = yaml.load(text)
    for key in [key for key, origin in origins.items() if origin == "default" and _later(key)]:
        section, _, name = key.partition(".")
        if not name:
            content.pop(section, None)
        elif isinstance(content.get(section), dict):
            content[section].pop(name.split(".")[0], None)
    with TemporaryDirectory() as place:
        bare = Path(place) / "recipe.yaml"
        with bare.open("w", encoding="utf-8") as file:
            yaml.dump(content, file)
        yield bare


def _later(item: str) -> bool:
    return item.split("=", 1)[0].split(".", 1)[0] in {"evaluate", "generation", "deploy"}
