"""Lists the runs below the working folder; finds a run by folder, recipe name or `latest`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from llmtune.errors import LlmtuneError, RecipeError, nearest
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.store.atomic_files import read_json
from llmtune.store.json_shapes import find_misfit
from llmtune.store.release_store import resolve_release
from llmtune.store.run_folder import MANIFEST, RunFolder, read_manifest, read_run

RUNS = Path("runs")
LATEST = "latest"
HASH = re.compile(r"-[0-9a-f]{8}$")


@dataclass(frozen=True)
class ListedRun:
    """One run in a list of runs."""

    folder: Path
    name: str
    """The name of its recipe."""
    task: str
    started: float
    """Start of its last step, in seconds since 1970."""
    step: str
    """The last step, with its state unless it is done."""
    trained: bool
    verdict: str | None


class HasVerdict(TypedDict):
    """The part of report.json used in a list of runs."""

    verdict: dict[str, str]


def list_runs() -> list[ListedRun]:
    """List the runs in `runs/`, the latest first."""
    found = [_look(path.parent) for path in RUNS.glob(f"*/{MANIFEST}")]
    return sorted((run for run in found if run), key=lambda run: run.started, reverse=True)


def _look(path: Path) -> ListedRun | None:
    recipe, name = path / "recipe.yaml", HASH.sub("", path.name)
    try:
        manifest = read_manifest(path)
    except LlmtuneError:
        return ListedRun(path, name, "", 0.0, f"{MANIFEST} is damaged", trained=False, verdict=None)
    if manifest is None or not manifest["steps"] or not recipe.is_file():
        return None
    task = re.search(r"^task: (\S+)", recipe.read_text("utf-8", errors="replace"), re.MULTILINE)
    step, last = max(manifest["steps"].items(), key=lambda item: item[1]["started"])
    step = step if last["state"] == "done" else f"{step} ({last['state']})"
    report = read_json(path / "report.json")
    verdict = None if find_misfit(report, HasVerdict) else report["verdict"].get("word")
    trained = RunFolder(path, manifest).is_done("train")
    return ListedRun(path, name, task[1] if task else "", last["started"], step, trained, verdict)


def match_run(name: str) -> Path | None:
    """Return the folder of a run, given its folder, the name of its recipe or `latest`; None if not found.

    `release:NAME[@HASH]` is the folder of a release; raises RecipeError if it does not exist.
    """
    if name.startswith(RELEASE_PREFIX):
        return resolve_release(name)
    if (Path(name) / MANIFEST).exists():
        return Path(name)
    runs = list_runs()
    named = [run for run in runs if name in (LATEST, run.name, run.folder.name)]
    return next((run.folder for run in sorted(named, key=lambda run: not run.trained)), None)


def find_run(name: Path) -> Path:
    """Return the folder of a run, as `match_run` does.

    Raises:
        RecipeError: it was not found, or is not a run.
    """
    found = match_run(str(name))
    if found is None:
        if not name.exists():
            runs = [known for run in list_runs() for known in (run.name, str(run.folder))]
            fix = "Name a run folder, a recipe with a run here, or `latest`; `llmtune runs` lists the runs."
            fix += nearest(str(name), runs)
            raise RecipeError.of("run folder not found", str(name), fix)
        found = name
    return read_run(found).path
