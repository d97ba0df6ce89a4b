"""Report sections of embedding models and rerankers: negatives, scores by vector length."""

from __future__ import annotations

from llmtune.display.blocks import Column, Section, Table, TableColumns, TableRows, Text
from llmtune.display.number_format import count, score
from llmtune.records import Json


def length_section(details: Json, base: str) -> Section:
    """Return the scores of vectors cut to each length of `embed.dimensions`, base and tuned."""
    title = "Scores by vector length"
    models = {name: details.get(key, {}).get("lengths") for name, key in ((base, "base"), ("tuned", "tuned"))}
    models = {name: found for name, found in models.items() if found}
    if "tuned" not in models:
        return Section(title, [])
    metrics = [name for name in models["tuned"][0] if name != "length"]
    rows: TableRows = [
        [count(cut["length"]), *(score(models[name][i].get(metric)) for metric in metrics for name in models)]
        for i, cut in enumerate(models["tuned"])
    ]
    heads = [f"{metric}, {name}" for metric in metrics for name in models]
    columns: TableColumns = [Column("numbers", "number"), *(Column(head, "number") for head in heads)]
    text = "Vectors of base and tuned model, cut to their first numbers. The longest is the complete vector."
    return Section(title, [Table(columns, rows, scroll=True), Text(text, "soft")], "Lengths", "lengths")
