"""Builds the report's section about decisions: their guarantee, their scores on test rows, and how risk grows."""

from __future__ import annotations

from itertools import chain

from llmtune.recipe.task_facts import DECISIONS
from llmtune.records import Decision, Evaluation
from llmtune.report.blocks import Block, Cell, Column, Html, Section, Table, TableColumns, TableRows, Text
from llmtune.report.charts import Curve, draw_curves
from llmtune.report.metric_info import metric_note
from llmtune.report.number_format import DASH, count, missing, score


def decision_section(evaluation: Evaluation) -> Section:
    """Return the decisions and their scores; empty without decisions."""
    decided = evaluation.decided
    if decided is None:
        return Section("Decisions", [])
    if decided.record is None:
        return Section("Decisions", [Text(f"No decisions: {decided.why}.", "note")])
    record, rows = decided.record, TableRows()
    for metric in chain.from_iterable(DECISIONS.values()):
        if own := evaluation.intervals.get(metric):
            ends = DASH if missing(own.low) else f"{score(own.low)} to {score(own.high)}"
            name = Cell(metric, note=metric_note(metric, None), code=True)
            rows.append([name, score(own.value), ends, count(own.n)])
    columns: TableColumns = ["metric", *(Column(name, "number") for name in ("test rows", "95 % interval", "rows"))]
    blocks: list[Block] = [Text(text) for text in describe_rules(record)]
    blocks += [Table(columns, rows)] if rows else []
    blocks += draw_risk(evaluation, record)
    text = (
        "Validation rows decide, test rows measure. The guarantees hold for new rows that are drawn as the validation "
    )
    text += "rows were. They do not hold for other kinds of rows. Confidences are probabilities at temperature 1."
    return Section("Decisions", [*blocks, Text(text, "soft")], anchor="decisions")


def describe_rules(record: Decision) -> list[str]:
    """Return a sentence or two for each rule."""
    texts, threshold = [], record.threshold
    best = f" The confidence covers the choice among {record.checkpoints} checkpoints by the same rows."
    if threshold is not None and threshold.value is None:
        text = (
            f"No confidence proves an error rate of at most {threshold.risk:g} on {count(threshold.rows)} validation "
        )
        texts.append(text + "rows, so every answer asks a person. Add validation rows, or raise evaluate.decide.risk.")
    elif threshold is not None:
        text = f"An answer is decided if its confidence is at least {score(threshold.value)}. Then it is wrong in at "
        text += f"most {threshold.risk:g} of the cases, with confidence {threshold.confidence:g} (Learn-then-Test): of "
        text += f"{count(threshold.rows)} validation rows {count(threshold.decided)} are decided, and "
        texts.append(text + f"{count(threshold.wrong)} of these are wrong." + (best if record.checkpoints > 1 else ""))
    if record.set_bounds:
        method = "conformal risk control of the false negative rate" if record.many else "split conformal prediction"
        method = "split conformal prediction by class" if record.per_class else method
        what = "is expected to have this share of a row's right labels" if record.many else "has the right label"
        text = f"A prediction set {what} with coverage {record.coverage:g} ({method})."
        if record.free_labels:
            names = ", ".join(record.free_labels)
            text += f" Too few validation rows, or too many errors, for {names}: always in the set."
        texts.append(text)
    if record.false_alarms is not None:
        text = f"A row is out of scope if its score is unusually low: at most {record.false_alarms:g} of usual rows. "
        text += "There is no guarantee that a row from elsewhere has a low score."
        text += "" if record.lowest_score is not None else " The validation rows are too few, so no row is."
        texts.append(text)
    return texts


def draw_risk(evaluation: Evaluation, record: Decision) -> list[Block]:
    """Return the risk-coverage plot of the test rows."""
    decided, threshold = evaluation.decided, record.threshold
    if decided is None or threshold is None or not decided.curve:
        return []
    share = evaluation.tuned.get("decided", 0.0)
    lines = [
        Curve("error rate of the most confident answers", decided.curve, "train"),
        Curve("risk", [(0.0, threshold.risk), (1.0, threshold.risk)], "validation"),
        *(
            [Curve("decided", [(share, 0.0), (share, max(rate for _, rate in decided.curve))], "other")]
            if share
            else []
        ),
    ]
    label = f"error rate of the most confident test answers by their share; {score(share)} are decided"
    return [Html(draw_curves(lines, label=label, title="Risk and coverage", axis="share of test rows"))]
