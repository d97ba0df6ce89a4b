"""Report sections of embedding models and rerankers: negatives, scores by vector length."""

from __future__ import annotations

from collections.abc import Mapping

from llmtune.display.blocks import Block, Column, Section, Table, TableColumns, TableRows, Text
from llmtune.display.number_format import count, score, share
from llmtune.records import Json

LONGEST = 160
"""Characters of a shown passage."""


def negatives_blocks(mined: Json | None, surveyed: Json | None) -> list[Block]:
    """Return how many negatives were mined, how many negatives are likely right passages, and an example."""
    blocks: list[Block] = []
    if mined:
        blocks.append(Text(describe_mining(mined)))
        if found := mined.get("test_passages"):
            blocks.append(Text(describe_test_passages(**found)))
        blocks += example_blocks("A skipped passage", mined.get("example"))
    if not surveyed:
        return blocks
    rows: TableRows = [
        [
            kind,
            count(found["pairs"]),
            share(found["near"], found["pairs"], 2),
            share(found["nearer"], found["pairs"], 2),
        ]
        for kind, found in surveyed["kinds"].items()
    ]
    heads = ("pairs", f"at {surveyed['below']:g} × its score or more", "nearer than the passage")
    columns: TableColumns = ["negatives", *(Column(name, "number") for name in heads)]
    title = "Likely false negatives: negatives that the base scores like the right passage, "
    blocks.append(Table(columns, rows, title + f"in {count(surveyed['rows'])} training rows"))
    text = f"In a step, {share(surveyed['queries'], surveyed['rows'])} of the queries have at least one such in-batch "
    text += "negative. Some may be right; name all right passages of a query in its rows, or mine with data.negatives."
    blocks += [Text(text, "soft"), *example_blocks("The nearest of them", surveyed.get("example"))]
    text = f"Before training, two unrelated passages have a cosine of {score(surveyed['random_cosine'])} on average, "
    blocks.append(Text(text + f"and the vectors an effective rank of {score(surveyed['effective_rank'])}.", "soft"))
    return blocks


def describe_mining(mined: Json) -> str:
    """Describe where negatives were searched, how many were found per query, and what was skipped."""
    searched = ", ".join(f"{count(number)} ({split})" for split, number in mined["searched"].items())
    corpus = f" and the {count(mined['corpus'])} of data.corpus" if mined["corpus"] else ""
    mean = mined["negatives"] / max(1, mined["queries"])
    return (
        f"Searched passages, with {mined['model']}: {searched}. They are those of the rows of the same split{corpus}. "
        f"Mined {count(mined['negatives'])} negatives for {count(mined['queries'])} queries: {mean:.1f} per query on "
        f"average; {count(mined['short'])} queries have fewer than {mined['mine']}, {count(mined['without'])} have "
        f"none. Skipped {count(mined['skipped'])} nearer passages, which score above {mined['below']:g} × the query’s "
        "own."
    )


def describe_test_passages(all: int, searched: int, mined: int) -> str:
    """Describe how many right passages of test queries could become negatives, and did."""
    text = f"Of {count(all)} right passages of test queries, {count(searched)} were searched like all other passages, "
    text += f"and {count(mined)} are negatives of training queries. Which of them are right was not used."
    if searched < all:
        text += f" The other {count(all - searched)} were never negatives, unlike the passages that they are ranked "
        text += "among, so test scores may be too high. Add them to data.corpus."
    return text


def example_blocks(title: str, example: Mapping[str, object] | None) -> list[Block]:
    """Return a query with its own passage and a negative, with their scores."""
    if not example:
        return []
    rows: TableRows = [
        [
            name,
            shorten(str(example[name])),
            score(number) if isinstance(number := example.get(f"{name}_score"), float) else "",
        ]
        for name in ("query", "passage", "negative")
    ]
    return [Table(["", "text", Column("score", "number")], rows, f"{title} ({example['origin']})")]


def shorten(text: str) -> str:
    """Return a text on one line, cut to a readable length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


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
