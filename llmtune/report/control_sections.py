"""The sections on controls: the control run and the teacher; and test rows that were answered with other pictures."""

from __future__ import annotations

from llmtune.display.blocks import Block, Cell, Column, Compared, Section, Table, TableColumns, TableRows, Text
from llmtune.display.number_format import DASH, count, score, size
from llmtune.evaluate.control_run_verdict import explain_gain
from llmtune.evaluate.metric_info import better_side, full_note
from llmtune.recipe.task_facts import CONTROLS
from llmtune.store.score_records import Control, Evaluation

TITLE = "What the gain comes from"
SHARE = (
    "A share of the gap is (tuned - base) / (teacher - base) on the same rows, with a 95 % interval from draws of the "
    "rows; only for metrics in which the teacher is clearly better than the base."
)
HEADINGS = {"blind": "grey picture", "swapped": "another row's"}
TEXT = (
    "Both models answered these rows again with other pictures: `blind` is a grey picture of the same size, `swapped` "
    "the picture of another row, with another reference answer if possible. A difference is the score with the row's "
    "own picture minus the score with the other. The tf-idf baseline and a judge read the text alone."
)


def control_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return the scores of both models with the rows' own pictures and under each control."""
    controls = evaluation.controls
    if not controls:
        off = "`evaluate.controls` is off, so it is unknown whether answers depend on the pictures."
        return Section("With other pictures", [Text(off, "note")] if evaluation.pictured else [], anchor="controls")
    names = [(heading, f"difference, {name}") for name, heading in HEADINGS.items() if name in controls]
    columns: TableColumns = ["metric", "model", *(Column(one, "number") for one in ("own picture", *sum(names, ())))]
    metrics = dict.fromkeys(metric for control in controls.values() for metric in control.difference)
    rows: TableRows = [
        [Cell(metric, note=full_note(metric, task), code=True), model, *control_cells(metric, model, evaluation)]
        for metric in metrics
        for model in ("tuned", "base")
    ]
    blocks: list[Block] = [Table(columns, rows)]
    for name, control in controls.items():
        left = f"; {control.note}" if control.note else ""
        blocks.append(
            Text(f"`{name}` ({CONTROLS[name]}): {count(control.rows)} rows{left}.", "note" if left else "soft")
        )
    return Section("With other pictures", [*blocks, Text(TEXT, "soft")], "Controls", "controls")


def control_cells(metric: str, model: str, evaluation: Evaluation) -> list[Cell | str]:
    """Return a model's score with the rows' own pictures, then under each control with the difference."""
    cells: list[Cell | str] = []
    for name in (name for name in HEADINGS if name in evaluation.controls):
        control: Control = evaluation.controls[name]
        scores = control.scores.tuned if model == "tuned" else control.scores.base
        controlled = control.tuned if model == "tuned" else control.base
        change = (control.difference if model == "tuned" else control.base_difference).get(metric)
        cells += [] if cells else [score(scores.get(metric))]
        cells += [score(controlled.get(metric)), Compared(metric, None, None, change, better_side(metric)).tone_cell]
    return cells


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
