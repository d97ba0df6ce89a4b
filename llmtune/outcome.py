"""Everything that a run found out, put together from its folder: what becomes of it is the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtune import seeds
from llmtune.evaluate import check_gates, load_evaluation
from llmtune.model import pick_device
from llmtune.recipe import Recipe
from llmtune.records import Evaluation
from llmtune.report import assemble, find_explanations
from llmtune.report.report_record import Report
from llmtune.store.run_folder import RunFolder
from llmtune.store.run_lock import hardware, package_versions


def make_report(folder: RunFolder, recipe: Recipe, skipped: dict[str, bool]) -> Report:
    """Everything that a run found out."""
    curve = _curve(folder.path / "metrics.jsonl")
    evaluation = _evaluation(folder)
    gates = check_gates(recipe.evaluate.gates, evaluation) if evaluation else ()
    timings = folder.timings(skipped)
    return assemble(
        recipe,
        folder.manifest,
        recipe_yaml=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        timings=timings,
        curve=curve,
        evaluation=evaluation,
        gates=gates,
        hardware={**hardware(), "device": pick_device(), "packages": package_versions()},
        explanations=find_explanations(folder.path),
        seeds=seeds.collect(folder.path, recipe, evaluation),
    )


def _curve(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _evaluation(folder: RunFolder) -> Evaluation | None:
    done = folder.is_done("evaluate")
    return load_evaluation(folder.path / "evaluation") if done else None
