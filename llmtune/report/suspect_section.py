"""Builds the report's section on labels that are likely wrong."""

from __future__ import annotations

from llmtune.display.blocks import Block, Cell, Column, Section, Table, TableColumns, TableRows, Text
from llmtune.display.number_format import count, score, share
from llmtune.errors import write_origin
from llmtune.evaluate.source_labels import unchecked_sentence
from llmtune.store.report_record import SuspectFacts


def suspect_section(suspects: SuspectFacts | None) -> Section:
    """Return the labels that are likely wrong: how many, and a table of the first."""
    title = "Likely label errors"
    if suspects is None:
        return Section(title, [])
    found = ", ".join(f"{count(number)} in {split}" for split, number in suspects["found"].items())
    text = "A regression on the tuned model’s hidden states, fitted without the row, finds another label more likely "
    text += (
        "(confident learning). These are candidates to read, not proven errors. `evaluation/suspects.jsonl` has all."
    )
    cells: TableRows = []
    for label in suspects["listed"]:
        shown = label["text"] if label["word"] is None else f"{label['word']} (in: {label['text']})"
        line, number = label["line"], label.get("row")
        place = label["file"] if line is None and number is None else write_origin(label["file"], line=line, row=number)
        cells.append(
            [shown, label["given"], label["suggested"], score(label["score"]), Cell(place, note=label["split"])]
        )
    columns: TableColumns = ["text", "label", "suggested", Column("probability of the label", "number"), "row"]
    table: list[Block] = [Table(columns, cells, scroll=True)] if cells else []
    left_out: list[Block] = [Text(unchecked_sentence(suspects["unchecked"]), "note")] if suspects["unchecked"] else []
    by_file: TableRows = [
        [
            Cell(one.file, "worse" if one.stands_out else ""),
            count(one.labels),
            count(one.doubtful),
            share(one.doubtful, one.labels),
        ]
        for one in suspects.get("sources", [])
    ]
    heads: TableColumns = ["source file", *(Column(name, "number") for name in ("labels", "suspects", "share"))]
    left_out = [*([Table(heads, by_file, "By source file")] if len(by_file) > 1 else []), *left_out]
    first = Text(f"Labels that are likely wrong: {found or 'none'}.")
    return Section(title, [first, *left_out, *table, Text(text, "soft")])
