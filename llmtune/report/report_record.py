"""What a report is made of, key by key as in report.json; parts that a stopped run has not reached are None."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Required

from typing_extensions import TypedDict

from llmtune.errors import RecipeError
from llmtune.records import Evaluation, GateResult, Json, StepTiming
from llmtune.store.json_shapes import (
    AdapterShape,
    Counts,
    Lengths,
    Number,
    PreparedFacts,
    SelectedFacts,
    TrainedFacts,
    read_record,
)

REPORT = "report.json"
DATA_KEYS = ("dropped", "examples", "tokens", "supervised_share", "longest", "example")
"""Of the facts of `encode`; what it dropped includes the rows that `prepare` did."""
RENAMED = {"total": "all", "adapter_bytes": "bytes"}
"""Facts of the adapter that the report has under another name."""


@dataclass(frozen=True)
class Verdict:
    """`better`, `worse`, `mixed`, `within margin` or `inconclusive`, and why."""

    word: str
    reason: str


@dataclass(frozen=True)
class Power:
    """What so many test rows can show of one metric, with 80 % power; and the rows that a gate about it needs."""

    metric: str
    against: str
    """base or champion."""
    rows: int
    smallest: float
    """The smallest true difference that the rows show."""
    gate: str = ""
    """As written; empty where no gate is on this interval."""
    assumed: Number = None
    """The true difference that `rows_needed` is for."""
    rows_needed: int | None = None
    """None where no number of rows would tell."""


@dataclass(frozen=True)
class SeedRun:
    """The scores of one seed, and the ends of their intervals."""

    seed: int
    tuned: Mapping[str, Number]
    interval: Mapping[str, Sequence[Number]]


@dataclass(frozen=True)
class Spread:
    """One metric over all seeds; numbers are None where there is nothing to say."""

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
    """Of the mean over the base."""
    larger: bool | None = None
    """Whether the gain, for better or worse, is larger than the spread."""
    better: bool | None = None


@dataclass(frozen=True)
class Seeds:
    """What the scores of several seeds come to, and which seeds have none yet."""

    runs: Sequence[SeedRun]
    missing: Sequence[int]
    metrics: Mapping[str, Spread]
    told: str


class DataFacts(PreparedFacts, total=False):
    """Rows in, kept and dropped by reason; examples and tokens by split."""

    lost: Counts
    filled: int
    vanishing: Counts
    examples: Counts
    tokens: Counts
    supervised_tokens: Counts
    supervised_share: Number
    longest: Counts
    lengths: Lengths
    example: list[tuple[str, bool]]
    classes: dict[str, Counts]


class AdapterFacts(AdapterShape, total=False):
    """What was put in, and how much of the model is trained."""

    all: Required[int]
    bytes: int
    share_under_adapter: float
    share_quantized: float
    quantized_bits: int


class TrainFacts(TrainedFacts):
    """The fields of `train.metrics_log.TrainedRun`, and the lines of metrics.jsonl."""

    curve: NotRequired[Sequence[Mapping[str, object]]]


@dataclass(frozen=True)
class Report:
    """All that a run found out."""

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
    power: Sequence[Power] = ()
    look: str | None = None
    """Which of `evaluate.looks` this is; None where they are not counted."""
    deploy: Mapping[str, object] | None = None
    explanations: Sequence[str] = ()
    date: str = ""
    """When its last step began, in UTC."""


class ReportScores(TypedDict):
    """The part of report.json about scores that other commands read; evaluation.json has all of them."""

    rows: int
    seeds: Seeds | None


class ReportDocument(TypedDict):
    """What report.json holds."""

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
    """Read the report.json of a run; None if it is missing or holds no JSON.

    Raises EnvironmentProblem for one that does not hold what llmtune writes.
    """
    report: Json | None = read_record(
        run / REPORT, ReportDocument, fix=f"Write it again: llmtune evaluate {shlex.quote(str(run))}"
    )
    return report


def require_report(run: Path) -> Json:
    """Read the report.json of a run; raises as `read_report` does, and RecipeError where there is none."""
    report = read_report(run)
    if report is None:
        raise RecipeError.of("this run has no report", str(run), f"Score it again: llmtune evaluate {run}")
    return report


def collect_facts(done: Mapping[str, Any], began: float | None, curve: Sequence[Mapping[str, object]]) -> Json:
    """Return what the steps found out, by the report's names; what a stopped run has not reached is None.

    `done` are the facts of each finished step, `began` is when the last step did, `curve` the lines of metrics.jsonl.
    """
    prepared, encoded, adapted, trained = (done.get(name) for name in ("prepare", "encode", "adapt", "train"))
    data = {key: prepared[key] for key in ("rows_in", "kept", "dropped")} if prepared else None
    if data and encoded:
        data |= {key: encoded[key] for key in DATA_KEYS}
        data |= {"supervised_tokens": encoded["supervised"], "lengths": encoded["histogram"]}
        data |= {"classes": encoded.get("classes") or {}, "lost": encoded.get("lost") or {}}
        data |= {"filled": encoded.get("filled", 0), "vanishing": encoded.get("vanishing") or {}}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)) if began else "",
        "data": data,
        "model": done.get("select"),
        "adapter": {RENAMED.get(key, key): value for key, value in adapted.items()} if adapted else None,
        "train": {**trained, "curve": curve} if trained else None,
        "deploy": done.get("deploy"),
    }
