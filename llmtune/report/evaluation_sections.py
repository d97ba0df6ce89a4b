"""All sections of an evaluation in their order, and those on gates and on what the test rows can show."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune.display.blocks import (
    TONES,
    Block,
    Cell,
    Column,
    Section,
    Table,
    TableColumns,
    TableRows,
    Text,
)
from llmtune.display.number_format import count, score, signed
from llmtune.evaluate.significance import INCONCLUSIVE, NOT_APPLICABLE
from llmtune.recipe.task_facts import answer_kind
from llmtune.report.confidence_sections import calibration_section, decision_section
from llmtune.report.control_sections import control_run_section, control_section
from llmtune.report.row_sections import (
    NO_PICTURES,
    Thumbnails,
    flip_section,
    overlap_section,
    sample_section,
    slice_section,
)
from llmtune.report.score_sections import (
    base_name,
    champion_section,
    class_section,
    length_section,
    new_section,
    score_section,
    seed_section,
    simple_baseline_section,
    suite_sections,
)
from llmtune.store.report_record import Power, Seeds
from llmtune.store.score_records import Evaluation, GateResult


def gate_section(gates: Sequence[GateResult], look: str | None = None) -> Section:
    """Return the result of each gate, and which look at the test rows this is."""
    rows: TableRows = [[Cell(gate.name, code=True), gate.wanted, gate.got, passed_cell(gate)] for gate in gates]
    table = Table(["gate", "wanted", Column("got", "number"), "result"], rows)
    return Section("Gates", [table, *([Text(f"This is {look}.", "soft")] if look else [])] if rows else [])


def count_gates(gates: Sequence[GateResult]) -> str:
    """Return how many gates failed, else how many are inconclusive, else how many passed; empty without gates."""
    noun = "gate" if len(gates) == 1 else "gates"
    for outcome, word in ((False, "failed"), (None, INCONCLUSIVE)):
        if number := sum(gate.passed is outcome for gate in gates):
            return f"{number} of {len(gates)} {noun} {word}"
    idle = sum(not gate.applies for gate in gates)
    passed = f"{len(gates) - idle} {'gate' if len(gates) - idle == 1 else 'gates'} passed" if len(gates) > idle else ""
    return ", ".join(part for part in (passed, f"{idle} {NOT_APPLICABLE}" if idle else "") if part)


def passed_cell(gate: GateResult) -> Cell:
    """Return the result of a gate as a word, with its note."""
    if not gate.applies:
        return Cell(NOT_APPLICABLE, TONES[0], note=gate.note)
    word = {True: "passed", False: "failed", None: INCONCLUSIVE}[gate.passed]
    return Cell(word, TONES[0 if gate.passed is None else 1 if gate.passed else -1], note=gate.note)


def power_section(power: Sequence[Power]) -> Section:
    """Return the smallest difference that the test rows can detect per metric, and the rows that each gate needs."""
    rows: TableRows = []
    for one in power:
        planned = [signed(one.assumed), count(one.rows_needed)] if one.gate else ["", ""]
        name = Cell(one.gate or one.metric, code=True)
        rows.append([name, one.against, count(one.rows), score(one.smallest), *planned])
    numbers = ("test rows", "smallest difference", "planned with", "rows needed")
    columns: TableColumns = ["gate or metric", "against", *(Column(name, "number") for name in numbers)]
    text = "At 80 % power, four of five such evaluations detect a true difference of that size, or decide the gate "
    text += "with that many rows. A gate with a margin is planned with a difference of zero, any other with "
    text += "the observed one, which is optimistic. A dash: the difference is at the gate's limit: no number of rows "
    text += "is enough."
    blocks: list[Block] = [Table(columns, rows), Text(text, "soft")] if rows else []
    return Section("Power of the test rows", blocks, "Power", "power", brief=any(one.gate for one in power))


def score_sections(
    evaluation: Evaluation,
    task: str | None,
    seeds: Seeds | None = None,
    section: str | None = None,
    thumbnails: Thumbnails = NO_PICTURES,
) -> list[Section]:
    """Return the sections of an evaluation, the most informative first; sections without blocks are not shown.

    Without `task` metrics have no notes; then `section` is the recipe's section with the classes.
    """
    base = base_name(evaluation)
    return [
        score_section(evaluation, task),
        control_run_section(evaluation, task),
        control_section(evaluation, task),
        simple_baseline_section(evaluation, task),
        sample_section(evaluation, task, thumbnails),
        calibration_section(evaluation),
        champion_section(evaluation, task, section),
        new_section(evaluation, task),
        seed_section(seeds, base),
        decision_section(evaluation),
        class_section(evaluation.details, base, entities=answer_kind(task) == "tags"),
        length_section(evaluation.details, base),
        slice_section(evaluation.slices, base),
        *suite_sections(evaluation),
        overlap_section(evaluation),
        flip_section(evaluation, task, thumbnails),
    ]
