"""The report's section on the exports of a run: size, speed, certificate and scores of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.display.blocks import (
    Block,
    Cell,
    Column,
    Compared,
    Section,
    Table,
    TableColumns,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.number_format import count, score, size
from llmtune.evaluate.metric_info import better_side, rank_metrics
from llmtune.report.score_sections import spell_metrics
from llmtune.store.report_record import list_exports
from llmtune.store.score_records import Evaluation


def export_section(evaluation: Evaluation | None, deploy: Mapping[str, Any] | None) -> Section:
    """Return size, speed, certificate and scores of each export, next to those of the tuned model."""
    exports = list_exports(deploy)
    rows: TableRows = []
    made = [one.certificate["score"] for one in exports if one.state == "done"]
    if made:
        rows.append(["tuned model", "", "", *write_usage(made[0]["tuned_bytes"], made[0]["tuned_usage"]), ""])
    for export in exports:
        if export.state == "done":
            scored = export.certificate["score"]
            about = [scored["runtime"], write_scored(scored), *write_usage(scored["bytes"], scored["usage"])]
            rows.append([Cell(export.name, code=True), *about, Cell("passed", "better")])
        else:
            state = Cell(export.state, "worse" if export.state == "failed" else "unsure")
            rows.append([Cell(export.name, code=True), "", "", "", "", "", state])
    numbers = ("scored rows", "weights", "rows/s", "memory")
    columns: TableColumns = ["", "runtime", *(Column(name, "number") for name in numbers), "certificate"]
    blocks: list[Block] = [Table(columns, rows)] if rows else []
    blocks += [Text(f"`{one.name}`: {one.failure['message']}", "note") for one in exports if one.failure]
    if any(one.state == "unfinished" for one in exports):
        blocks.append(Text("To make the unfinished exports, run the same command again.", "note"))
    studies = evaluation.exports if evaluation else {}
    for metric in rank_metrics(dict.fromkeys(metric for one in studies.values() for metric in one.difference)):
        compared = [
            Compared(name, one.base[metric], one.tuned[metric], one.difference[metric], better_side(metric))
            for name, one in studies.items()
            if metric in one.difference
        ]
        heads = {"heading": "export", "base": "tuned", "tuned": "export"}
        blocks.append(difference_table(compared, title=spell_metrics([metric]), code=True, **heads))
    if made:
        note = "Each export was loaded by its own runtime, and answered the test rows. Differences are paired with the "
        blocks.append(Text(note + "tuned model's answers. Rows per second: one row at a time.", "soft"))
    return Section("Exports", blocks, anchor="exports")


def write_scored(scored: Mapping[str, Any]) -> str:
    """Return the number of scored rows, and of all test rows if `deploy.limit` left some out."""
    rows, every = scored.get("rows"), scored.get("test_rows")
    return count(rows) if rows == every or every is None else f"{count(rows)} of {count(every)}"


def write_usage(weights: int, usage: Mapping[str, Any] | None) -> list[str]:
    """Return size on disk, rows per second and added memory as text."""
    known = usage or {}
    return [size(weights), score(known.get("rows_per_second")), size(known.get("peak_bytes"))]
