"""The section on the control run and the teacher: a column for each model on the same test rows."""

from __future__ import annotations

from llmtune.display.blocks import Block, Cell, Column, Compared, Section, Table, TableColumns, TableRows, Text
from llmtune.display.number_format import DASH, count, score, size
from llmtune.evaluate.control_run_verdict import explain_gain
from llmtune.evaluate.metric_info import better_side, full_note
from llmtune.store.score_records import Evaluation

TITLE = "What the gain comes from"
SHARE = (
    "A share of the gap is (tuned - base) / (teacher - base) on the same rows, with a 95 % interval from draws of the "
    "rows; only for metrics in which the teacher is clearly better than the base."
)


def control_run_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return the scores of base, control run, tuned model and teacher, and the differences from the tuned model."""
    control, teacher = evaluation.control_run, evaluation.teacher
    if control is None and teacher is None:
        return Section(TITLE, [])
    scored = [("base", evaluation.base), *([(control.name, control.scores)] if control and control.scores else [])]
    scored += [("tuned", evaluation.tuned), *([("teacher", teacher.scores)] if teacher else [])]
    changes = [(f"tuned − {control.name}", control.difference)] if control and control.scores else []
    changes += [("tuned − teacher", teacher.difference)] if teacher else []
    rows: TableRows = []
    for metric in dict.fromkeys(name for _, one in changes for name in one):
        cells = [Compared(metric, None, None, one.get(metric), better_side(metric)).tone_cell for _, one in changes]
        share = teacher.shares.get(metric) if teacher else None
        closed = f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})" if share else DASH
        values = (score(one.get(metric)) for _, one in scored)
        name = Cell(metric, note=full_note(metric, task), code=True)
        rows.append([name, *values, *cells, *([closed] if teacher else [])])
    columns: TableColumns = ["metric", *(Column(name, "number") for name, _ in (*scored, *changes))]
    columns = [*columns, *([Column("share of the gap", "number")] if teacher else [])]
    blocks: list[Block] = [Table(columns, rows)] if rows else []
    blocks += [Text(sentence) for sentence in explain_gain(evaluation, ())]
    if control and not control.why_none:
        note = f"`{control.name}` is the control run: {control.note}, on the same rows with the same seed. "
        blocks.append(Text(f"{note}Its own report is in `controls/{control.name}/`.", "soft"))
    left_out = control.left_out if control else {}
    blocks += [Text(f"`{name}` is not compared: {why}.") for name, why in sorted(left_out.items())]
    if teacher:
        blocks += [Text(SHARE, "soft"), *([model_cost_table(evaluation)] if teacher.costs else [])]
    return Section(TITLE, blocks, "Control run", "control-run")


def model_cost_table(evaluation: Evaluation) -> Table:
    """Return size and speed of tuned model and teacher."""
    costs = evaluation.teacher.costs if evaluation.teacher else {}
    rows: TableRows = [
        [name, count(one.parameters), size(one.bytes), score(one.rows_per_second)] for name, one in costs.items()
    ]
    return Table(["model", *(Column(name, "number") for name in ("parameters", "memory", "rows per second"))], rows)
