"""The report's section on calibration: the temperature, its effect on the test rows, and a reliability plot."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune.display.blocks import (
    Beside,
    Block,
    Column,
    Compared,
    Details,
    Html,
    Section,
    Table,
    TableColumns,
    Text,
    difference_table,
)
from llmtune.display.charts import draw_reliability
from llmtune.display.number_format import count, score
from llmtune.evaluate.metric_info import METRIC_NOTES, better_side
from llmtune.report.decision_view import describe_outside
from llmtune.store.score_records import Evaluation

Bins = Sequence[tuple[float, float, float]]
EXPLANATION = (
    "Each dot is a bin of answers with similar probabilities, and its size their number. On the diagonal, the model is "
    "right as often as it says; below, it is too sure. "
)


def calibration_section(evaluation: Evaluation) -> Section:
    """Return the metrics and reliability plots of the probabilities before and after the temperature."""
    found = evaluation.reliability
    if found is None:
        return Section("Calibration", [])
    record = found.record
    blocks: list[Block] = [Text(f"Not calibrated: {found.why}.", "note")]
    if record is not None:
        text = f"The temperature is {score(record.temperature)}, fitted on {count(record.rows)} validation rows. "
        text += "`generate`, `serve` and exports divide the model's outputs by it before they compute probabilities. "
        text += "Predicted labels stay the same. Of the scores above, only ece, brier and nll use it."
        text += f" {describe_outside(record)}. No choice is right for them." if record.outside else ""
        blocks = [Text(text)]
    rows = [
        Compared(metric, before, found.after.get(metric), found.difference.get(metric), better_side(metric), note)
        for metric, before in found.before.items()
        for note in [f"{METRIC_NOTES[metric]}; lower is better"]
    ]
    blocks += [difference_table(rows, base="before", tuned="after", code=True)] if rows else []
    parts = [("Before: temperature 1", found.bins_before, "other"), ("After", found.bins_after, "train")]
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
