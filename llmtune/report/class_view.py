"""Classes in the section on the champion: what changed, and the scores of new classes."""

from __future__ import annotations

from llmtune.display.blocks import (
    TONES,
    Block,
    Cell,
    Column,
    Compared,
    Table,
    TableColumns,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.number_format import count, missing, score
from llmtune.evaluate.class_sentences import list_class_changes
from llmtune.evaluate.metric_info import better_side
from llmtune.recipe.class_names import show_name
from llmtune.records import Difference
from llmtune.store.score_records import ClassChanges, NewClass


def class_blocks(changes: ClassChanges, key: str) -> list[Block]:
    """Return both models on the champion's classes, what changed, and the tuned model's scores on each new class."""
    blocks: list[Block] = [Text(sentence, "note") for sentence in list_class_changes(changes, key)]
    if known := changes.known:
        rows_known = [
            Compared(name, known.base[name], known.tuned[name], change, better_side(name))
            for name, change in known.difference.items()
        ]
        title = f"On the {count(known.rows)} rows of the champion’s classes"
        blocks.insert(0, difference_table(rows_known, title=title, base="champion", code=True))
    if changes.renamed:
        listed = ", ".join(f"{show_name(old)} is {show_name(new)}" for old, new in changes.renamed.items())
        blocks.insert(0, Text(f"Renamed classes of the champion: {listed}."))
    if changes.new:
        heads = ("test rows", "recall", "precision", "F1")
        columns: TableColumns = ["new class", *(Column(name, "number") for name in heads), "result"]
        rows: TableRows = [
            [
                Cell(one.label, code=True),
                count(one.rows),
                *(write_interval(one.scores.get(metric)) for metric in ("recall", "precision", "f1")),
                Cell(one.verdict, TONES[{"learned": 1, "not learned": -1}.get(one.verdict, 0)]),
            ]
            for one in changes.new
        ]
        text = "The champion cannot answer a new class, so its answers to these rows count as wrong above. A new class "
        text += "is learned if more than half of its test rows get it: the whole interval of its recall decides. Fewer "
        text += "than ten test rows are not judged."
        blocks += [Table(columns, rows, "Classes that the champion does not have, tuned model"), Text(text, "soft")]
    return blocks


def write_interval(own: Difference | None) -> str:
    """Return a score with its own 95 % interval."""
    if own is None:
        return score(None)
    ends = "" if missing(own.low) else f" ({score(own.low)} to {score(own.high)})"
    return f"{score(own.value)}{ends}"


def describe_new_class(one: NewClass) -> str:
    """Return test rows, recall and result of a new class on one line."""
    recall = f", recall {write_interval(one.scores['recall'])}" if "recall" in one.scores else ""
    return f"{one.verdict}: {count(one.rows)} test rows{recall}"
