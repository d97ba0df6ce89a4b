"""What report.json says was measured, as sections again: for texts that are written later, such as the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmtune.records import Difference, Evaluation, GateResult, Json, Study, StudyTable
from llmtune.report.blocks import Section
from llmtune.report.report_record import SeedRun, Seeds, Spread
from llmtune.report.score_sections import base_name, gate_section, score_section, seed_section, suite_sections


def read_sections(report: Mapping[str, Any]) -> list[Section]:
    """Return scores, gates, seeds and suites; a section without blocks has nothing to say."""
    found = report.get("evaluation") or {}
    suites = {name: read_suite(suite) for name, suite in (found.get("studies") or {}).items()}
    scores = (found.get("base") or {}, found.get("tuned") or {}, read_differences(found.get("difference") or {}))
    evaluation = Evaluation(*scores, (), (), found.get("rows") or 0, baseline=found.get("baseline"), studies=suites)
    seeds = read_seeds(found["seeds"]) if found.get("seeds") else None
    return [
        score_section(evaluation, report.get("task")),
        gate_section([GateResult(**gate) for gate in report.get("gates") or []]),
        seed_section(seeds, base_name(evaluation)),
        *suite_sections(evaluation),
    ]


def read_differences(found: Json) -> dict[str, Difference]:
    """Return the differences by metric; numbers that are null become NaN."""
    changes = {}
    for metric, change in found.items():
        ends = (change["value"], *change["interval"], change["p"])
        value, low, high, p = (math.nan if end is None else end for end in ends)
        changes[metric] = Difference(value, low, high, p, change["n"], change.get("test", ""))
    return changes


def read_suite(found: Json) -> Study:
    """Return a suite."""
    tables = tuple(StudyTable(**table) for table in found["tables"])
    return Study(**{**found, "difference": read_differences(found["difference"]), "tables": tables})


def read_seeds(found: Json) -> Seeds:
    """Return the scores of several seeds."""
    metrics = {metric: Spread(**spread) for metric, spread in found["metrics"].items()}
    return Seeds([SeedRun(**run) for run in found["runs"]], found["missing"], metrics, found["told"])
