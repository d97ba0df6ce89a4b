"""Reports of a finished run (report.json), of a classifier (headed.json), and with suites (suites.json)."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from llmtune.evaluate.verdict import verdict
from llmtune.records import StepTiming
from llmtune.store.report_record import Report
from llmtune.store.score_records import Evaluation, GateResult

HERE = Path(__file__).parent


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text("utf-8"))
    return found


def as_report(values: dict[str, Any]) -> Report:
    steps = [StepTiming(**step) for step in values["steps"]]
    gates = [GateResult(**gate) for gate in values["gates"]]
    evaluation = TypeAdapter(Evaluation).validate_python(values["evaluation"])
    parts = {"steps": steps, "gates": gates, "evaluation": evaluation, "verdict": verdict(evaluation)}
    return Report(**{**values, **parts})


@pytest.fixture
def report() -> Report:
    return as_report(load("report"))


@pytest.fixture
def evaluation(report: Report) -> Evaluation:
    assert report.evaluation is not None
    return report.evaluation


@pytest.fixture
def measured() -> Evaluation:
    """Return an evaluation with slices, flips, a suite and rows that overlap with training."""
    found: Evaluation = TypeAdapter(Evaluation).validate_python(load("report")["evaluation"] | load("suites"))
    return found


@pytest.fixture
def headed() -> Report:
    return as_report(load("report") | load("headed"))
