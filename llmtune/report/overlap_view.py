"""How the report shows test rows that overlap with training rows, of this run or of those that it starts from."""

from __future__ import annotations

from llmtune.display.blocks import Column, Table, TableColumns, TableRows
from llmtune.display.number_format import count, share
from llmtune.store.score_records import Contamination


def overlap_kinds(overlap: Contamination) -> list[tuple[str, str, int, int]]:
    """Return the kinds of overlap: name in the table, name in a sentence, overlapping rows, and rows searched."""
    long, short = overlap.rows - overlap.short, overlap.short
    return [
        ("equal", "equal", overlap.equal, overlap.rows),
        ("nearly equal (shares 80 % of word triples)", "nearly equal", overlap.near, overlap.rows),
        ("same prompt, any answer", "with the same prompt", overlap.prompted, overlap.rows),
        ("shares a 13-word passage (rows of 13 words or more)", "with a shared 13-word passage", overlap.shared, long),
        ("same words in the same order (shorter rows)", "short, with the same words", overlap.worded, short),
        ("same input in a run that this one starts from", "learned before this run", overlap.inherited, overlap.rows),
    ]


def overlap_table(overlap: Contamination) -> Table:
    """Return a table of the test rows with each kind of overlap."""
    columns: TableColumns = [
        "overlap with a training row",
        *(Column(name, "number") for name in ("rows", "of", "share")),
    ]
    rows: TableRows = [[name, count(part), count(of), share(part, of)] for name, _, part, of in overlap_kinds(overlap)]
    return Table(columns, rows)


def overlap_sentence(overlap: Contamination) -> str:
    """Return how many test rows overlap, by kind, and how many rows were already dropped for overlap."""
    number = overlap.overlapping
    text = f"None of the {count(overlap.rows)} test rows overlaps with a training row "
    text += "(equal, nearly equal, same prompt, or a shared 13-word passage)."
    if number:
        kinds = ", ".join(f"{count(part)} {name}" for _, name, part, _ in overlap_kinds(overlap) if part)
        verb = "overlaps" if number == 1 else "overlap"
        text = f"{count(number)} of {count(overlap.rows)} test rows ({share(number, overlap.rows)}) {verb} with a "
        text += f"training row: {kinds}."
    if overlap.prompted:
        text += " Set data.split_by to a column that identifies the question, or remove the test questions from "
        text += "training."
    if left := sum(overlap.dropped.values()):
        were = "row was" if left == 1 else "rows were"
        text += f" {count(left)} other {were} dropped from training or validation for overlap."
    return " ".join([text, *inherited_sentences(overlap)])


def inherited_sentences(overlap: Contamination) -> list[str]:
    """Return how many test rows earlier runs learned that this one starts from, and starts with unknown rows."""
    texts = []
    if number := overlap.inherited:
        were = "was a training row" if number == 1 else "were training rows"
        text = f"{count(number)} of {count(overlap.rows)} test rows {were} of the run that this one starts from."
        texts.append(f"{text} Test on rows that no earlier run learned.")
    if overlap.unknown:
        folders = ", ".join(f"`{folder}`" for folder in overlap.unknown)
        texts.append(f"It is unknown which rows {folders} learned: no run folder with its rows was found.")
    return texts
