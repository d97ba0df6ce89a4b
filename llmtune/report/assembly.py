"""Put the report together from what a run folder knows, and write it down as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune import __version__
from llmtune.recipe import Recipe
from llmtune.records import Evaluation, GateResult, Json, StepTiming
from llmtune.report.report_record import Report, Seeds
from llmtune.report.text_files import as_json
from llmtune.report.verdict import verdict

DATA_KEYS = ("dropped", "examples", "tokens", "supervised_share", "longest", "example")
"""Of the facts of `encode`; what it dropped includes the rows that `prepare` did."""
RENAMED = {"total": "all", "adapter_bytes": "bytes"}
"""Facts of the adapter that the report has under another name."""


def assemble(
    recipe: Recipe,
    manifest: Mapping[str, Any],
    *,
    recipe_yaml: str,
    timings: Sequence[StepTiming],
    curve: Sequence[Mapping[str, object]],
    evaluation: Evaluation | None,
    gates: Sequence[GateResult],
    hardware: Mapping[str, object],
    explanations: Sequence[str] = (),
    seeds: Seeds | None = None,
) -> Report:
    """Return the report; parts that a stopped run has not reached are None.

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
    done: Json = {name: step["facts"] for name, step in manifest["steps"].items() if step["state"] == "done"}
    prepared, encoded, adapted, trained = (done.get(name) for name in ("prepare", "encode", "adapt", "train"))
    data: Any = {key: prepared[key] for key in ("rows_in", "kept", "dropped")} if prepared else None
    if data and encoded:
        data |= {key: encoded[key] for key in DATA_KEYS}
        data |= {"supervised_tokens": encoded["supervised"], "lengths": encoded["histogram"]}
        data |= {"classes": encoded.get("classes") or {}}
    train: Any = {**trained, "curve": curve} if trained else None
    adapter: Any = {RENAMED.get(key, key): value for key, value in adapted.items()} if adapted else None
    return Report(
        llmtune=__version__,
        name=recipe.name,
        task=recipe.task,
        verdict=verdict(evaluation, seeds),
        recipe=recipe.model_dump(mode="json"),
        recipe_yaml=recipe_yaml,
        fingerprint=manifest["fingerprint"],
        hardware=hardware,
        steps=timings,
        data=data,
        model=done.get("select"),
        adapter=adapter,
        train=train,
        evaluation=evaluation,
        seeds=seeds,
        gates=gates,
        deploy=done.get("deploy"),
        explanations=explanations,
    )


def report_json(report: Report) -> Json:
    """Return what report.json holds: the fields of the report, the seeds among the scores."""
    values: Json = as_json(report)
    seeds, verdict = values.pop("seeds"), values.pop("verdict")
    if values["evaluation"]:
        del values["evaluation"]["gates"]  # they stand beside it
        values["evaluation"]["seeds"] = seeds
    return values | {"verdict": verdict}
