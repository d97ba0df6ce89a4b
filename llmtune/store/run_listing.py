"""Lists the runs below the working folder, and finds the run or release that an address names.

A run's address is its folder, `NAME` (the newest run of that recipe that passed its gates), `NAME@HASH`, or `latest`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from llmtune.errors import LlmtuneError, RecipeError, nearest
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.store.atomic_files import read_json
from llmtune.store.json_shapes import find_misfit
from llmtune.store.release_store import (
    RECORD_FILE,
    find_opponent,
    list_release_names,
    list_stored,
    resolve_release,
)
from llmtune.store.run_folder import MANIFEST, RunFolder, read_manifest, read_run

RUNS = Path("runs")
LATEST = "latest"
HASH = re.compile(r"-([0-9a-f]{8})$")
GateOutcome = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class ListedRun:
    """One run in a list of runs."""

    folder: Path
    name: str
    """The name of its recipe."""
    hash: str | None
    """The hash in its address `NAME@HASH`; None for a folder that the user named."""
    task: str
    started: float
    """Start of its last step, in seconds since 1970."""
    step: str
    """The last step, with its state unless it is done."""
    trained: bool
    trained_at: float
    """Start of its training, in seconds since 1970; 0 before."""
    verdict: str | None
    gates: GateOutcome | None
    """The outcome of all gates, passed if there are none; None until they are judged."""
    reproduces: str | None
    """The run that this one reproduces."""

    @property
    def address(self) -> str:
        """Its shortest address that never names another run."""
        return f"{self.name}@{self.hash}" if self.hash else str(self.folder)


class HasVerdict(TypedDict):
    """The part of report.json used in a list of runs."""

    verdict: dict[str, str]


class HasPassed(TypedDict):
    """A gate in report.json."""

    passed: bool | None


class HasGates(TypedDict):
    """The part of report.json with the gates."""

    gates: list[HasPassed]


def list_runs() -> list[ListedRun]:
    """List the runs in `runs/`, the latest first."""
    runs = [_look(path.parent) for path in RUNS.glob(f"*/{MANIFEST}")]
    return sorted((run for run in runs if run), key=lambda run: run.started, reverse=True)


def _look(path: Path) -> ListedRun | None:
    recipe, digest = path / "recipe.yaml", HASH.search(path.name)
    try:
        manifest = read_manifest(path)
    except LlmtuneError:
        step, name = f"{MANIFEST} is damaged", HASH.sub("", path.name)
        return ListedRun(path, name, digest and digest[1], "", 0.0, step, False, 0.0, None, None, None)
    if manifest is None or not manifest["steps"] or not recipe.is_file():
        return None
    text, run = recipe.read_text("utf-8", errors="replace"), RunFolder(path, manifest)
    name = _find_value(text, "name") or HASH.sub("", path.name)
    step, last = max(manifest["steps"].items(), key=lambda item: item[1]["started"])
    report = read_json(path / "report.json")
    return ListedRun(
        folder=path,
        name=name,
        hash=digest[1] if digest and path.name == f"{name}-{digest[1]}" else None,
        task=_find_value(text, "task"),
        started=last["started"],
        step=step if last["state"] == "done" else f"{step} ({last['state']})",
        trained=run.is_done("train"),
        trained_at=manifest["steps"]["train"]["started"] if "train" in manifest["steps"] else 0.0,
        verdict=None if find_misfit(report, HasVerdict) else report["verdict"].get("word"),
        gates=_read_outcome(run, report),
        reproduces=run.findings.get("reproduces"),
    )


def _find_value(recipe: str, key: str) -> str:
    """Return the value of a top-level key in a resolved recipe."""
    line = re.search(rf"^{key}: (\S+)", recipe, re.MULTILINE)
    return line[1].strip("\"'") if line else ""


def _read_outcome(run: RunFolder, report: object) -> GateOutcome | None:
    if not run.is_done("train"):
        return None
    if "gates" in run.findings:
        return run.findings["gates"]  # type: ignore[no-any-return]
    if not run.is_done("evaluate") or find_misfit(report, HasGates):
        return None
    assert isinstance(report, dict)
    passed = [gate["passed"] for gate in report["gates"]]  # the run is older than the finding
    return "failed" if False in passed else "undecided" if None in passed else "passed"


def choose_run(runs: Sequence[ListedRun], name: str) -> ListedRun | None:
    """Return the run that `name` means: of the runs of that recipe that passed their gates, the one trained last.

    Reproductions do not count.
    """
    passed = [run for run in runs if run.name == name and run.gates == "passed" and run.reproduces is None]
    return max(passed, key=lambda run: run.trained_at, default=None)


def match_run(name: str, other_than: Path | None = None) -> Path | None:
    """Return the folder that an address of a run or release names; None if there is no such run.

    `other_than` is the folder of a run that `NAME` and `latest` do not mean.

    Raises RecipeError if the recipe has runs, but none of them passed its gates or has this hash, and for a missing
    release.
    """
    if name.startswith(RELEASE_PREFIX):
        return resolve_release(name)
    if (Path(name) / MANIFEST).exists():
        return Path(name)
    itself = other_than and other_than.resolve()
    runs = [run for run in list_runs() if run.folder.resolve() != itself]
    if name == LATEST:
        return next((run.folder for run in sorted(runs, key=lambda run: not run.trained)), None)
    if chosen := choose_run(runs, name):
        return chosen.folder
    if exact := [run.folder for run in runs if name in (run.address, run.folder.name)]:
        return exact[0]
    recipe, _, digest = name.partition("@")
    candidates = [f"{run.address} ({describe_gates(run)})" for run in runs if run.name == recipe]
    if candidates:
        what = f"{recipe} has no run {digest}" if digest else f"no run of {recipe} passed its gates"
        raise RecipeError.of(what, name, f"Name one of its runs: {', '.join(candidates)}.")
    return None


def find_start(recipe: Recipe, run: Path) -> str | None:
    """Return the folder that `adapter.start_from` names for the run in folder `run`; None if it names none.

    A run never starts from itself: if it is what the address means, it starts from the one before.

    Raises RecipeError if it is the address of a run or release that does not exist.
    """
    start = recipe.adapter.start_from
    if start is None or os.path.isabs(start):
        return start
    release = find_opponent(start, run) if start.startswith(RELEASE_PREFIX) else None
    return str((release or find_run(Path(start), other_than=run)).absolute())


def pin_start(loaded: LoadedRecipe, start: str | None) -> LoadedRecipe:
    """Return a recipe that starts from a folder, with the same fingerprint."""
    adapter = loaded.recipe.adapter.model_copy(update={"start_from": start})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"adapter": adapter}))


def describe_gates(run: ListedRun) -> str:
    """Return the state of a run's gates in words."""
    if not run.trained:
        return "not trained"
    if run.reproduces is not None:
        return f"reproduces {run.reproduces}"
    return f"gates {run.gates}" if run.gates else "gates not judged"


def find_run(name: Path, other_than: Path | None = None) -> Path:
    """Return the folder of a run or release, as `match_run` does.

    Raises:
        RecipeError: it was not found, or is not a run.
    """
    run_path = match_run(str(name), other_than)
    if run_path is None:
        if not name.exists():
            runs = [word for run in list_runs() for word in (run.name, str(run.folder), run.address)]
            fix = "Name a run folder, a recipe with a run here, NAME@HASH, or `latest`; `llmtune runs` lists the runs."
            fix += nearest(str(name), runs)
            raise RecipeError.of("run folder not found", str(name), fix)
        run_path = name
    return read_run(run_path).path


def list_names(runs: Sequence[ListedRun]) -> dict[Path, list[str]]:
    """Return what names each run, by its folder: its recipe's name, and addresses of releases made from it."""
    names: dict[Path, list[str]] = {run.folder: [] for run in runs}
    for name in dict.fromkeys(run.name for run in runs):
        if chosen := choose_run(runs, name):
            names[chosen.folder].append(name)
    for release in (one for name in list_release_names() for one in list_stored(name)):
        record = read_json(release.folder / RECORD_FILE)
        source = RUNS / record["run"] if isinstance(record, dict) and isinstance(record.get("run"), str) else None
        if source in names:
            names[source].append(f"{RELEASE_PREFIX}{release.name}" if release.current else release.address)
    return names
