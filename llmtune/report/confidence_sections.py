"""Sections on probabilities: their calibration, and the decisions that are taken by them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from llmtune.display.blocks import (
    Beside,
    Block,
    Cell,
    Column,
    Compared,
    Details,
    Html,
    Section,
    Table,
    TableColumns,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.charts import Curve, draw_curves, draw_reliability
from llmtune.display.number_format import DASH, count, missing, score
from llmtune.evaluate.metric_info import METRIC_NOTES, better_side, metric_note
from llmtune.recipe.task_facts import DECISIONS
from llmtune.store.score_records import Calibration, Decision, Evaluation

Bins = Sequence[tuple[float, float, float]]
EXPLANATION = (
    "Each dot is a bin of answers with similar probabilities, and its size their number. On the diagonal, the model is "
    "right as often as it says; below, it is too sure. "
)


def decision_section(evaluation: Evaluation) -> Section:
    """Return the decisions and their scores; empty without decisions."""
    decided = evaluation.decided
    if decided is None:
        return Section("Decisions", [])
    if decided.record is None:
        return Section("Decisions", [Text(f"No decisions: {decided.why}.", "note")])
    record, rows = decided.record, TableRows()
    for metric in chain.from_iterable(DECISIONS.values()):
        if interval := evaluation.intervals.get(metric):
            ends = DASH if missing(interval.low) else f"{score(interval.low)} to {score(interval.high)}"
            name = Cell(metric, note=metric_note(metric, None), code=True)
            rows.append([name, score(interval.value), ends, count(interval.n)])
    columns: TableColumns = ["metric", *(Column(name, "number") for name in ("test rows", "95 % interval", "rows"))]
    blocks: list[Block] = [Text(text) for text in describe_rules(record)]
    table, chart = [Table(columns, rows)] if rows else [], draw_risk(evaluation, record)
    blocks += [Beside(table, chart)] if chart else table
    text = "Fitted on validation rows, measured on test rows. The guarantees hold for new rows of the same kind as the "
    text += "validation rows. A confidence is a probability before the temperature of the calibration."
    return Section("Decisions", [*blocks, Text(text, "soft")], anchor="decisions")


def describe_rules(record: Decision) -> list[str]:
    """Return a sentence or two for each rule."""
    texts, threshold = [], record.threshold
    if threshold is not None:
        proven = f"{percent(threshold.risk)} of the decided answers are wrong, with {percent(threshold.confidence)} "
        proven += "confidence"
        if record.checkpoints > 1:
            proven += f" (whichever of {record.checkpoints} checkpoints was best on the same rows)"
        if threshold.value is None:
            text = (
                f"{count(threshold.rows)} validation rows do not prove for any answers that at most {proven}. So every "
            )
            text += "answer asks a person. Add validation rows, or raise evaluate.decide.risk."
        else:
            text = (
                f"An answer with a confidence of {score(threshold.value)} or more is decided, any other asks a person. "
            )
            text += f"At most {proven}: of {count(threshold.rows)} validation rows, {count(threshold.decided)} are "
            text += f"decided, and {count(threshold.wrong)} of these are wrong (Learn-then-Test)."
        texts.append(text)
    if record.coverage is not None:
        what = f"A prediction set has the right label in {percent(record.coverage)} of the rows"
        if record.many:
            what = f"A prediction set has on average {percent(record.coverage)} of a row's right labels"
        method = "conformal risk control of the false negative rate" if record.many else "split conformal prediction"
        text = f"{what}{' of each class' if record.per_class else ''}"
        text += f" ({'split conformal prediction by class' if record.per_class else method})."
        if record.outside > (1 - record.coverage) * record.rows and not record.per_class:
            text += f" No set can reach this: {describe_outside(record)}."
        elif record.free_labels:
            text += f" Always in the set, for lack of validation rows: {', '.join(record.free_labels)}."
        texts.append(text)
    if record.false_alarms is not None:
        text = "A row is out of scope if its score is lower than that of nearly all validation rows. At most "
        text += f"{percent(record.false_alarms)} of such rows are called so by mistake. Not guaranteed: that rows of "
        text += "another kind have low scores."
        text += "" if record.lowest_score is not None else " The validation rows are too few to call any."
        texts.append(text)
    if record.outside:
        texts.append(f"{describe_outside(record)}. They count as errors, because no choice is right.")
    return texts


def describe_outside(record: Decision | Calibration) -> str:
    """Return how many validation rows have a reference that is none of the choices."""
    return (
        f"{count(record.outside)} of {count(record.rows)} validation rows have a reference that is none of the choices"
    )


def percent(value: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * value:.4g} %"


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


def calibration_section(evaluation: Evaluation) -> Section:
    """Return the metrics and reliability plots of the probabilities before and after the temperature."""
    calibration = evaluation.reliability
    if calibration is None:
        return Section("Calibration", [])
    record = calibration.record
    blocks: list[Block] = [Text(f"Not calibrated: {calibration.why}.", "note")]
    if record is not None:
        text = f"The temperature is {score(record.temperature)}, fitted on {count(record.rows)} validation rows. "
        text += "`generate`, `serve` and exports divide the model's outputs by it before they compute probabilities. "
        text += "Predicted labels stay the same. Of the scores above, only ece, brier and nll use it."
        text += f" {describe_outside(record)}. No choice is right for them." if record.outside else ""
        blocks = [Text(text)]
    rows = [
        Compared(
            metric, before, calibration.after.get(metric), calibration.difference.get(metric), better_side(metric), note
        )
        for metric, before in calibration.before.items()
        for note in [f"{METRIC_NOTES[metric]}; lower is better"]
    ]
    blocks += [difference_table(rows, base="before", tuned="after", code=True)] if rows else []
    parts = [("Before: temperature 1", calibration.bins_before, "other"), ("After", calibration.bins_after, "train")]
    shown = [(name, bins, style) for name, bins, style in parts if bins]
    pictures = [
        Html(draw_reliability(bins, title=name, label=describe_bins(name, bins), style=style))
        for name, bins, style in shown
    ]
    if pictures:
        blocks.append(Beside(pictures[:1], pictures[1:]))
        blocks.append(Text(EXPLANATION + "Bins of few answers move by chance.", "soft"))
        blocks.append(Details("The bins", [bin_table(name, bins) for name, bins, _ in shown]))
    return Section("Calibration", blocks, "Calibration", "calibration")


def describe_bins(name: str, bins: Bins) -> str:
    """Return a reliability plot in words, for screen readers."""
    parts = ", ".join(f"{probability:.2f}: {right:.2f}" for probability, right, _ in bins)
    return f"{name}; probability and share right by bin: {parts}"


def bin_table(name: str, bins: Bins) -> Table:
    """Return a table of bins."""
    rows = [[score(probability), score(right), count(int(size))] for probability, right, size in bins]
    columns: TableColumns = ["mean probability", Column("share right", "number"), Column("answers", "number")]
    return Table(columns, rows, name)
