"""The section on controls: test rows with pictures, answered with other pictures."""

from __future__ import annotations

from llmtune.display.blocks import Block, Cell, Column, Compared, Section, Table, TableColumns, TableRows, Text
from llmtune.display.number_format import count, score
from llmtune.evaluate.metric_info import better_side, full_note
from llmtune.recipe.task_facts import CONTROLS
from llmtune.store.score_records import Control, Evaluation

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
