"""Put the report together from what a run folder knows: manifest, recipe, metrics, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmtune import __version__
from llmtune.recipe import Recipe
from llmtune.records import Contamination, Difference, Evaluation, GateResult, Slice, StepTiming, Study


def assemble(
    recipe: Recipe,
    manifest: Mapping[str, Any],
    *,
    recipe_yaml: str,
    timings: Sequence[StepTiming],
    curve: Sequence[Mapping[str, Any]],
    evaluation: Evaluation | None,
    gates: Sequence[GateResult],
    hardware: Mapping[str, Any],
    explanations: Sequence[str] = (),
    seeds: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the dictionary that becomes report.json; parts that a stopped run has not reached are None.

    Args:
        recipe: the recipe, resolved.
        manifest: run.json; each step's facts are taken from it.
        recipe_yaml: the resolved recipe with its origins, as text.
        timings: seconds and peak bytes of each step that is done.
        curve: the lines of metrics.jsonl.
        evaluation: scores of base and tuned model.
        gates: what became of each gate.
        hardware: where it ran.
        explanations: names of the pages that look inside its model.
        seeds: what the scores of several seeds come to.
    """
    steps = manifest["steps"]
    prepare, encode = _facts(steps, "prepare"), _facts(steps, "encode")
    select, trained = _facts(steps, "select"), _facts(steps, "train")
    return {
        "llmtune": __version__,
        "name": recipe.name,
        "task": recipe.task,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_yaml": recipe_yaml,
        "fingerprint": manifest["fingerprint"],
        "hardware": dict(hardware),
        "steps": [asdict(timing) for timing in timings],
        "data": _data(prepare, encode) if prepare else None,
        "model": select,
        "adapter": _adapter(_facts(steps, "adapt")),
        "train": {**trained, "curve": list(curve)} if trained else None,
        "evaluation": {**_scores(evaluation), "seeds": seeds} if evaluation else None,
        "gates": [asdict(gate) for gate in gates],
        "deploy": _facts(steps, "deploy"),
        "explanations": list(explanations),
    }


def _facts(steps: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    entry = steps.get(name)
    return dict(entry["facts"]) if entry and entry["state"] == "done" else None


def _data(prepare: Mapping[str, Any], encode: Mapping[str, Any] | None) -> dict[str, Any]:
    about_rows = {key: prepare[key] for key in ("rows_in", "kept", "dropped")}
    if encode is None:
        return about_rows
    return {
        **about_rows,
        "dropped": encode["dropped"],  # of rows and of examples together
        "examples": encode["examples"],
        "tokens": encode["tokens"],
        "supervised_tokens": encode["supervised"],
        "supervised_share": encode["supervised_share"],
        "longest": encode["longest"],
        "lengths": encode["histogram"],
        "example": encode["example"],
        "classes": encode.get("classes") or {},
    }


def _adapter(facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if facts is None:
        return None
    renamed = {"total": "all", "adapter_bytes": "bytes"}
    return {renamed.get(key, key): value for key, value in facts.items()}


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "base": evaluation.base,
        "tuned": evaluation.tuned,
        "baseline": evaluation.baseline,
        "difference": {metric: difference_json(value) for metric, value in evaluation.difference.items()},
        "samples": list(evaluation.samples),
        "signatures": evaluation.signatures,
        "rows": evaluation.rows,
        "details": evaluation.details,
        "flips": {metric: asdict(found) for metric, found in evaluation.flips.items()},
        "studies": {name: _study(one) for name, one in evaluation.studies.items()},
        "slices": {column: [_slice(one) for one in parts] for column, parts in evaluation.slices.items()},
        "contamination": _contamination(evaluation.contamination) if evaluation.contamination else None,
    }


def _study(found: Study) -> dict[str, Any]:
    changes = {metric: difference_json(value) for metric, value in found.difference.items()}
    return {**asdict(found), "difference": changes}


def _contamination(found: Contamination) -> dict[str, Any]:
    return {**asdict(found), "scores": [_slice(one) for one in found.scores]}


def _slice(found: Slice) -> dict[str, Any]:
    changes = {metric: difference_json(value) for metric, value in found.difference.items()}
    return {**asdict(found), "difference": changes}


def difference_json(difference: Difference) -> dict[str, Any]:
    """`{value, interval: [low, high], p, n, test}`."""
    interval = [difference.low, difference.high]
    about = {"p": difference.p, "n": difference.n, "test": difference.test}
    return {"value": difference.value, "interval": interval, **about}
