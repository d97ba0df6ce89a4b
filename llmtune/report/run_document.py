"""The JSON document that `run --json` prints however it ends, and its JSON Schema. It has no texts of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from llmtune.evaluate.metric_info import better_side
from llmtune.recipe.section import descriptions
from llmtune.records import Json
from llmtune.store.atomic_files import read_json
from llmtune.store.json_shapes import ReleaseOutcome
from llmtune.store.report_record import list_exports
from llmtune.store.run_folder import CERTIFICATE

SCHEMA_VERSION = 1
"""Raised if a key is removed or changes its meaning; new keys do not raise it."""
Command = Literal["run", "prepare", "select", "adapt", "train", "evaluate", "launch local"]
COMMANDS: tuple[str, ...] = get_args(Command)
BETTER: dict[int, Literal["higher", "lower"]] = {1: "higher", -1: "lower"}
CHANGE_KEYS = ("value", "interval", "p", "n")


class ProblemPart(TypedDict):
    """One problem, its place and its fix."""

    what: str
    where: str | None
    fix: str | None


class ErrorPart(TypedDict):
    """The error that ended the command; a failed gate is one too."""

    kind: str
    """The class of `llmtune.errors`, such as DataError; or the Python exception of a bug."""
    exit_code: int
    problems: list[ProblemPart]


class VerdictPart(TypedDict):
    """The verdict on the run."""

    word: str
    """better, worse, mixed, within margin or inconclusive."""
    reason: str


class GatePart(TypedDict):
    """One gate of `evaluate.gates`."""

    name: str
    """As the recipe has it."""
    passed: bool | None
    """null: inconclusive."""
    wanted: str
    got: str
    note: str
    applies: bool
    """false: it has nothing to judge yet, such as a champion in the first week; it passed."""


class ChangePart(TypedDict):
    """Tuned minus base, or minus champion, on the same rows."""

    value: float | None
    interval: list[float | None]
    """Low and high end of the 95 % interval."""
    p: float | None
    n: int
    """Number of rows."""


class ScorePart(TypedDict):
    """One metric of both models; null if it is not measured or undefined."""

    better: Literal["higher", "lower"] | None
    base: float | None
    tuned: float | None
    difference: ChangePart | None


class ChampionScorePart(TypedDict):
    """One metric of champion and tuned model on the rows that both held out."""

    better: Literal["higher", "lower"] | None
    champion: float | None
    tuned: float | None
    difference: ChangePart | None


class ChampionPart(TypedDict):
    """The champion of `evaluate.champion`."""

    name: str
    rows: int
    scores: dict[str, ChampionScorePart]


class ReportPaths(TypedDict):
    """Absolute paths of the report files that exist."""

    html: str | None
    md: str | None
    json: str | None
    """All results, with sample rows and answers."""
    junit: str | None


class ExportPart(TypedDict):
    """One export of the recipe's `deploy`."""

    name: str
    state: Literal["done", "failed", "unfinished"]
    passed: bool | None
    """Outcome of its certificate; null without one."""
    folder: str
    certificate: str | None
    """Path of the certificate, or of a failed one's numbers."""
    rows: int | None
    """Number of scored test rows; `deploy.limit` may leave some out."""
    test_rows: int | None


class StepPart(TypedDict):
    """One step of the run."""

    name: str
    seconds: float
    peak_bytes: int
    skipped: bool
    """Whether it was skipped as unchanged."""


class BaseModelFacts(TypedDict):
    """The base model."""

    name: str
    revision: str | None


class PlanPart(TypedDict):
    """The result of --dry-run."""

    would_run: list[str]
    """Steps that are not valid yet."""
    plans: dict[str, dict[str, Any]]
    """Memory plan by model, in bytes."""
    power: dict[str, Any]
    """What the test rows can show."""


class RunDocument(TypedDict):
    """The result of `llmtune run` or one of its steps."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    schema_version: Literal[1]
    llmtune: str
    """Version of llmtune."""
    command: Command
    recipe: str | None
    """As typed; null if the command line cannot be parsed."""
    name: str | None
    """The recipe's name; null if the recipe is not valid."""
    task: str | None
    folder: str | None
    """Absolute path of the run folder; null if it is unknown."""
    out: str | None
    """The run folder as typed with --out."""
    exit_code: int
    error: ErrorPart | None
    verdict: VerdictPart | None
    """This and the following keys are empty if the command ended before the evaluation: no earlier run's results."""
    gates: list[GatePart]
    scores: dict[str, ScorePart]
    """By metric, on the test rows; of studies by `study.metric`."""
    champion: ChampionPart | None
    properties: dict[str, str]
    """Verdict, scores, classes of the champion that come, go or may be renamed, and doubtful files, as in junit.xml."""
    exports: list[ExportPart]
    release: ReleaseOutcome | None
    """What became of `release` in the recipe's `deploy`."""
    model: BaseModelFacts | None
    rows: dict[str, int]
    """Rows kept, by split."""
    steps: list[StepPart]
    reports: ReportPaths
    plan: PlanPart | None
    """null without --dry-run."""
    seconds: float


def document_schema() -> Json:
    """Return the JSON Schema (2020-12) of the document."""
    schema = TypeAdapter(RunDocument).json_schema()
    for name, part in [("RunDocument", schema), *schema["$defs"].items()]:
        for key, text in descriptions(globals()[name]).items():
            part["properties"][key]["description"] = text
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "llmtune run --json"}


def describe_report(report: Json | None, folder: Path) -> Json:
    """Return the keys of the document that come from a run's report; without a report they are empty.

    `folder` is the absolute path of the run.
    """
    content = report or {}
    evaluation = content.get("evaluation") or {}
    model, data = content.get("model"), content.get("data") or {}
    return {
        "verdict": content.get("verdict") if evaluation else None,
        "gates": [pick({"applies": True, **gate}, GatePart.__annotations__) for gate in content.get("gates", ())],
        "scores": _list_scores(evaluation),
        "champion": _describe_champion(evaluation.get("champion")),
        "properties": content.get("properties", {}) if evaluation else {},
        "exports": list(_list_exports(content, folder)),
        "release": content.get("release"),
        "model": model and {"name": model["name"], "revision": model.get("revision")},
        "rows": data.get("kept") or {},
        "steps": [pick(step, StepPart.__annotations__) for step in content.get("steps", ())],
    }


def pick(values: Mapping[str, Any], keys: Iterable[str]) -> Json:
    """Return some keys of a mapping."""
    return {key: values[key] for key in keys}


def _list_scores(evaluation: Mapping[str, Any]) -> dict[str, Json]:
    scores: dict[str, Json] = {}
    studies = {f"{name}.": study for name, study in (evaluation.get("studies") or {}).items()}
    for prefix, one in {"": evaluation, **studies}.items():
        for metric in dict.fromkeys([*one.get("base", {}), *one.get("tuned", {})]):
            side = one["better"].get(metric, 0) if prefix else better_side(metric)
            scores[f"{prefix}{metric}"] = _describe_score(metric, side, "base", one["base"], one)
    return scores


def _describe_score(metric: str, side: int, name: str, before: Json, after: Mapping[str, Any]) -> Json:
    scores = {"better": BETTER.get(side), name: before.get(metric), "tuned": after["tuned"].get(metric)}
    change = after["difference"].get(metric)
    return scores | {"difference": change and pick(change, CHANGE_KEYS)}


def _describe_champion(champion: Json | None) -> Json | None:
    if champion is None:
        return None
    before = champion["scores"]
    scores = {one: _describe_score(one, better_side(one), "champion", before, champion) for one in before}
    return {"name": champion["folder"], "rows": champion["rows"], "scores": scores}


def _list_exports(report: Json, folder: Path) -> Iterable[Json]:
    for one in list_exports(report.get("deploy")):
        place = folder / one.folder
        file = place / CERTIFICATE if one.state == "done" else place.with_name(f"{place.name}.failed.json")
        numbers = one.certificate or (read_json(file) if one.state == "failed" else None) or {}
        scored = numbers.get("score") or {}
        yield {
            "name": one.name,
            "state": one.state,
            "passed": numbers.get("passed"),
            "folder": str(place),
            "certificate": str(file) if numbers else None,
            "rows": scored.get("rows"),
            "test_rows": scored.get("test_rows"),
        }
