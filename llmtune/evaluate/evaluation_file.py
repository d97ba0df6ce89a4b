"""Save and load an evaluation: `evaluation.json`. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmtune.errors import Problem
from llmtune.evaluate.metric_info import better_side
from llmtune.recipe.secrets import hide_environment
from llmtune.records import Difference, Json
from llmtune.store.atomic_files import explained, read_json, write_json
from llmtune.store.run_folder import RunFolder
from llmtune.store.score_records import Evaluation, Study

EVALUATION = "evaluation.json"
PIECES = "loss.pieces"
"""Name of the note on the base model's loss per piece of a text."""
OUTSIDE = "generated.outside"
"""Name of the note on prompts that leave no room for an answer."""
SCORES = (
    *("base", "intervals", "tuned", "export", "difference", "base_difference", "from_old", "scores", "before", "after"),
    "shares",
)
"""Keys of `evaluation.json` below which null means NaN."""


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json` atomically."""
    with explained(folder):
        write_json(folder / EVALUATION, hide_environment(asdict(evaluation)))


def load_evaluation(folder: Path) -> Evaluation | None:
    """Read `evaluation.json`; None if it is missing or damaged."""
    saved = read_json(folder / EVALUATION)
    if saved is None:
        return None
    try:
        return _evaluation_reader().validate_python(restore_nan(name_baselines(saved)))
    except ValidationError:
        return None


def name_baselines(saved: Json) -> Json:
    """Return a saved evaluation or release; llmtune 0.2.0 wrote one baseline without its name as the key."""
    one = saved.get("simple_baseline") if isinstance(saved, dict) else None
    return {**saved, "simple_baselines": {one.get("name"): one}} if isinstance(one, dict) else saved


def answered_by_vllm(run: Path) -> bool:
    """Return whether a run's scores are of answers by vLLM."""
    return "engine" in getattr(load_evaluation(run / "evaluation"), "signatures", ())


@cache
def _evaluation_reader() -> TypeAdapter[Evaluation]:
    """Return the reader of evaluations; making it takes longer than reading one, and a run reads several."""
    return TypeAdapter(Evaluation)


def list_failed(folder: Path) -> list[Problem]:
    """Return the problems of the user's own metrics that failed in the evaluation in `folder`."""
    evaluation = load_evaluation(folder)
    return [Problem(*problem) for problem in evaluation.failed.values()] if evaluation else []


def load_with_exports(run: RunFolder) -> Evaluation | None:
    """Read a run's evaluation, with the scores of the exports that its recipe names; None if it has none."""
    evaluation = load_evaluation(run.path / "evaluation") if run.is_done("evaluate") else None
    certified = run.facts("deploy").get("exports", {}) if run.is_done("deploy") else {}
    if evaluation is None or not certified:
        return evaluation
    scored = {name: certificate["score"] for name, certificate in certified.items()}
    exports = {name: _as_study(name, restore_nan(one)) for name, one in scored.items() if "difference" in one}
    return replace(evaluation, exports=exports)


def _as_study(name: str, score: Any) -> Study:
    difference = TypeAdapter(dict[str, Difference]).validate_python(score["difference"])
    better = {metric: better_side(metric) for metric in score["export"]}
    return Study(name, score["tuned"], score["export"], difference, {}, better)


def restore_nan(value: object, numeric: bool = False) -> object:
    """Turn null back into NaN for scores; a task's `details` stay unchanged."""
    if isinstance(value, dict):
        return {
            key: part if key == "details" else restore_nan(part, numeric or key in SCORES)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [restore_nan(part, numeric) for part in value]
    return math.nan if value is None and numeric else value
