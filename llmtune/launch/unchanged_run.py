"""Recognise a run that has nothing left to do by its files, and show its result without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.data.example import Example
from llmtune.errors import GateFailed
from llmtune.evaluate.cache_keys import evaluation_files
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.gates import require_gates
from llmtune.recipe.loader import LoadedRecipe
from llmtune.records import Json
from llmtune.report.terminal import print_scores, print_verdict
from llmtune.store.atomic_files import hash_file, hash_listing, hash_value, list_model, write_json
from llmtune.store.machine import likely_device
from llmtune.store.release_store import list_stored
from llmtune.store.report_record import Verdict, read_report
from llmtune.store.run_folder import MANIFEST, REPORTS, RunFolder, read_run, updating_reports
from llmtune.store.run_lock import LOCK, package_versions
from llmtune.store.score_records import GateResult
from llmtune.store.verification import verify_run

CONCLUDING = ("evaluate", "run")
"""Values of `until` after which a run has its verdict."""
LOOSE = ("hardware", "git")
"""Findings that may differ: no step depends on them."""


@contextmanager
def finish_noted(loaded: LoadedRecipe, path: Path, until: str) -> Iterator[None]:
    """Record that a command completed, even if a gate failed at its end."""
    try:
        yield
    except GateFailed:
        _note(loaded, path, until)
        raise
    _note(loaded, path, until)


def _note(loaded: LoadedRecipe, path: Path, until: str) -> None:
    recipe = loaded.recipe
    if until in CONCLUDING and not (recipe.train.seeds or recipe.control_run or recipe.evaluate.looks):
        folder = read_run(path)
        folder.manifest["finished"] = _hash_command(loaded, folder, until)
        folder.write()


def find_unchanged(loaded: LoadedRecipe, path: Path, until: str) -> Json | None:
    """Return the report of a run that the same command has completed, with every step skipped.

    None if any input of the run or any file that it wrote has changed, or cannot be checked.
    """
    report = read_report(path)
    if report is None or not all((path / name).is_file() for name in (MANIFEST, LOCK, *REPORTS)):
        return None
    folder = read_run(path)
    if folder.manifest.get("finished") != _hash_command(loaded, folder, until):
        return None
    if is_outdated(report.get("release")):
        return None
    findings = verify_run(path, strict=True).findings
    if any(finding.state != "same" for finding in findings if finding.kind not in LOOSE):
        return None
    steps = [step | {"skipped": True} for step in report["steps"]]
    with updating_reports(path):
        write_json(path / "report.json", report | {"steps": steps})
    return report | {"steps": steps}


def is_outdated(outcome: Json | None) -> bool:
    """Return whether another release is current than a run noted at its end, or its files are gone."""
    if outcome is None:
        return False
    current = next((one.hash for one in list_stored(outcome["name"]) if one.current), None)
    return bool(outcome["current"] != current)


def _hash_command(loaded: LoadedRecipe, folder: RunFolder, until: str) -> str:
    recipe = loaded.recipe
    template = [Path(recipe.model.chat_template)] if recipe.model.chat_template else []
    files = [hash_file(path) for path in (*evaluation_files(recipe, folder.path), *template) if path.is_file()]
    candidates = recipe.model.candidates if isinstance(recipe.model.candidates, tuple) else ()  # the lock has only one
    files += [hash_listing(list_model(folder)) for folder in map(Path, candidates) if folder.is_dir()]
    inputs = {name: step["inputs"] for name, step in folder.manifest["steps"].items() if step["state"] == "done"}
    machine = [likely_device(), package_versions(("lm-eval",)), list(Example.__annotations__)]
    return hash_value([__version__, str(folder.path), until, recipe.model_dump(mode="json"), files, inputs, machine])


def print_unchanged(report: Json, path: Path, console: Console) -> None:
    """Print what the command printed at its end; raises GateFailed if a gate failed."""
    console.print(f"[bold]llmtune {__version__}[/] {escape(report['name'])} -> {escape(str(path))}")
    for step in report["steps"]:
        console.print(f"[bold cyan]{step['name']}[/] [dim]unchanged, skipped[/]")
    gates = tuple(TypeAdapter(list[GateResult]).validate_python(report["gates"]))
    if evaluation := load_evaluation(path / "evaluation"):
        print_scores(evaluation, console, report["task"])
    print_verdict(Verdict(**report["verdict"]), gates, console)
    if report.get("release"):
        console.print(report["release"]["message"], highlight=False, markup=False)
    console.print(read_run(path).findings.get("next_steps", ""), highlight=False, markup=False, soft_wrap=True)
    require_gates(gates, report)
