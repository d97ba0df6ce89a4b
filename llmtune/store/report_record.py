"""Data of a report, with the keys of report.json; parts that a stopped run has not reached are None."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, Required

from typing_extensions import TypedDict

from llmtune.errors import RecipeError
from llmtune.records import Json, StepTiming
from llmtune.store.json_shapes import (
    AdapterShape,
    Counts,
    Lengths,
    Number,
    PreparedFacts,
    ReleaseOutcome,
    SelectedFacts,
    TrainedFacts,
    read_record,
)
from llmtune.store.score_records import Evaluation, GateResult

REPORT = "report.json"
SUSPECTS, UNCHECKED = "suspects.jsonl", "suspects_unchecked.json"
"""Files of the evaluation with the labels that are likely wrong, and with the classes that cannot be checked."""
LABELS_BY_SOURCE = "labels_by_source.json"
"""Number of labels in each source file."""
DATA_KEYS = ("dropped", "examples", "tokens", "supervised_share", "longest", "example")
"""Keys of the facts of `encode`; its `dropped` includes the rows dropped by `prepare`."""
RENAMED = {"total": "all", "adapter_bytes": "bytes"}
"""Facts of the adapter -> their names in the report."""


@dataclass(frozen=True)
class Verdict:
    """`better`, `worse`, `mixed`, `within margin` or `inconclusive`, and the reason."""

    word: str
    reason: str


@dataclass(frozen=True)
class Power:
    """The difference that the test rows can detect in one metric with 80 % power, and the rows that a gate needs."""

    metric: str
    against: str
    """base or champion."""
    rows: int
    smallest: float
    """The smallest true difference that the rows can detect."""
    gate: str = ""
    """The gate as written; empty if no gate uses this interval."""
    assumed: Number = None
    """The true difference assumed for `rows_needed`."""
    rows_needed: int | None = None
    """None if no number of rows would be enough."""


@dataclass(frozen=True)
class SeedRun:
    """The scores of one seed with their intervals."""

    seed: int
    tuned: Mapping[str, Number]
    interval: Mapping[str, Sequence[Number]]


@dataclass(frozen=True)
class Spread:
    """One metric over all seeds; numbers are None if they are undefined."""

    scores: Sequence[Number]
    base: Number
    mean: Number = None
    deviation: Number = None
    """Standard deviation of the sample."""
    lowest: Number = None
    highest: Number = None
    spread: Number = None
    """Highest minus lowest."""
    gain: Number = None
    """Mean minus base."""
    larger: bool | None = None
    """Whether the gain, positive or negative, is larger than the spread."""
    better: bool | None = None


@dataclass(frozen=True)
class Seeds:
    """Scores over several seeds, and the seeds without scores yet."""

    runs: Sequence[SeedRun]
    missing: Sequence[int]
    metrics: Mapping[str, Spread]
    told: str


class DataFacts(PreparedFacts, total=False):
    """Rows in, kept and dropped by reason; examples and tokens by split."""

    lost: Counts
    long_answers: Json
    filled: int
    vanishing: Counts
    pictures: Json
    """Facts of `data_report.describe_pictures`."""
    examples: Counts
    tokens: Counts
    supervised_tokens: Counts
    supervised_share: Number
    longest: Counts
    lengths: Lengths
    example: list[tuple[str, bool]]
    classes: dict[str, Counts]
    mined: Json | None
    """Facts of the step `mine`, and of the step `survey` (`llmtune.mining`)."""
    surveyed: Json | None


class AdapterFacts(AdapterShape, total=False):
    """The adapter's settings, and how much of the model it trains."""

    all: Required[int]
    bytes: int
    share_under_adapter: float
    share_quantized: float
    quantized_bits: int


class TrainFacts(TrainedFacts):
    """The fields of `train.metrics_log.TrainedRun`, and the lines of metrics.jsonl."""

    curve: NotRequired[Sequence[Mapping[str, object]]]


class SuspectRow(TypedDict):
    """A label that is likely wrong, as in `label_errors.Suspect`."""

    file: str
    line: int | None
    row: NotRequired[int | None]
    split: str
    given: str
    suggested: str
    score: float
    text: str
    word: str | None
    position: int | None


@dataclass(frozen=True)
class SourceLabels:
    """The labels of one source file."""

    file: str
    labels: int
    doubtful: int
    stands_out: bool = False
    """Whether far more of them are doubtful than of the others."""

    @property
    def rate(self) -> float:
        """Return the share of doubtful labels."""
        return self.doubtful / self.labels if self.labels else 0.0


class SuspectFacts(TypedDict):
    """The labels that are likely wrong: how many by split and by source file, and the first of them."""

    found: dict[str, int]
    listed: list[SuspectRow]
    unchecked: dict[str, int]
    """Classes that cannot be checked, with the number of their labels."""
    sources: list[SourceLabels]
    """By source file, the file with the largest share of suspects first."""


@dataclass(frozen=True)
class Report:
    """All results of a run."""

    llmtune: str
    name: str
    task: str
    verdict: Verdict
    recipe: Mapping[str, object]
    recipe_yaml: str
    fingerprint: str
    hardware: Mapping[str, object]
    steps: Sequence[StepTiming] = ()
    data: DataFacts | None = None
    model: SelectedFacts | None = None
    adapter: AdapterFacts | None = None
    train: TrainFacts | None = None
    evaluation: Evaluation | None = None
    seeds: Seeds | None = None
    gates: Sequence[GateResult] = ()
    doubts: Sequence[str] = ()
    """Sentences on source files whose labels stand out."""
    power: Sequence[Power] = ()
    look: str | None = None
    """Which of `evaluate.looks` this is; None if looks are not counted."""
    suspects: SuspectFacts | None = None
    """The labels that are likely wrong; None unless `evaluate.suspects` asks for them."""
    deploy: Mapping[str, object] | None = None
    release: ReleaseOutcome | None = None
    """What became of `deploy: release`; None unless the recipe names it."""
    explanations: Sequence[str] = ()
    date: str = ""
    """Start of its last step, in UTC."""


class ExportFailure(TypedDict):
    """The error that ended the making of an export."""

    kind: str
    exit_code: int
    message: str


UNFINISHED = "unfinished: the same command makes it"


@dataclass(frozen=True)
class ReportedExport:
    """An export that the recipe names: `done`, `failed` or `unfinished`."""

    name: str
    state: Literal["done", "failed", "unfinished"]
    folder: str
    """In the run folder."""
    certificate: Mapping[str, Any] = field(default_factory=dict)
    """Empty unless it is done."""
    failure: ExportFailure | None = None


def list_exports(deploy: Mapping[str, Any] | None) -> list[ReportedExport]:
    """Return the exports of a report's `deploy`."""
    facts = deploy or {}
    folders = facts.get("folders", {})
    done = [
        ReportedExport(name, "done", folders.get(name, ""), certificate)
        for name, certificate in facts.get("exports", {}).items()
    ]
    failed = [
        ReportedExport(name, "failed", folders.get(name, ""), failure=failure)
        for name, failure in facts.get("failed", {}).items()
    ]
    seen = {one.name for one in (*done, *failed)}
    return [
        *done,
        *failed,
        *(ReportedExport(name, "unfinished", folders[name]) for name in folders if name not in seen),
    ]


class ReportScores(TypedDict):
    """The scores in report.json that other commands read; evaluation.json has all scores."""

    rows: int
    seeds: Seeds | None


class ReportDocument(TypedDict):
    """The content of report.json."""

    llmtune: str
    name: str
    task: str
    verdict: Verdict
    recipe: dict[str, object]
    steps: list[StepTiming]
    data: DataFacts | None
    model: SelectedFacts | None
    adapter: AdapterFacts | None
    train: dict[str, object] | None
    evaluation: ReportScores | None
    gates: list[GateResult]
    date: str


def read_report(run: Path) -> Json | None:
    """Read the report.json of a run; None if it is missing or not JSON.

    Raises EnvironmentProblem if its content is not a report of llmtune.
    """
    report: Json | None = read_record(
        run / REPORT, ReportDocument, fix=f"Write it again: llmtune evaluate {shlex.quote(str(run))}"
    )
    return report


def require_report(run: Path) -> Json:
    """Read the report.json of a run; raises as `read_report` does, and RecipeError if it is missing."""
    report = read_report(run)
    if report is None:
        raise RecipeError.of("this run has no report", str(run), f"Score it again: llmtune evaluate {run}")
    return report


def collect_facts(
    done: Mapping[str, Any], began: float | None, curve: Sequence[Mapping[str, object]], deploy: Mapping[str, Any]
) -> Json:
    """Return the facts of the steps by the report's names; None for steps not reached.

    `done` has the facts of each finished step, `began` is the last step's start, `curve` the lines of metrics.jsonl.
    `deploy` has the facts of exports, finished or not.
    """
    prepared, encoded, adapted, trained = (done.get(name) for name in ("prepare", "encode", "adapt", "train"))
    data = {key: prepared[key] for key in ("rows_in", "kept", "dropped")} if prepared else None
    if data and prepared and (changes := prepared.get("class_changes")):
        data["class_changes"] = changes
    if data and encoded:
        data |= {key: encoded[key] for key in DATA_KEYS}
        data |= {"supervised_tokens": encoded["supervised"], "lengths": encoded["histogram"]}
        data |= {"classes": encoded.get("classes") or {}, "lost": encoded.get("lost") or {}}
        data |= {"filled": encoded.get("filled", 0), "vanishing": encoded.get("vanishing") or {}}
        data |= {"long_answers": encoded.get("long_answers") or {}, "pictures": encoded.get("pictures") or {}}
        data |= {"mined": done.get("mine"), "surveyed": done.get("survey")}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)) if began else "",
        "data": data,
        "model": done.get("select"),
        "adapter": {RENAMED.get(key, key): value for key, value in adapted.items()} if adapted else None,
        "train": {**trained, "curve": curve} if trained else None,
        "deploy": deploy or None,
    }
