"""Sentences and tables on rows, for the terminal and the report: what was renamed, dropped, truncated, and mined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from llmtune.display.blocks import Block, Cell, Column, Table, TableColumns, TableRows, Text
from llmtune.display.number_format import count, score, share
from llmtune.recipe.class_names import show_name
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.records import FEWEST_ROWS, Json

SHOWN_NAMES = 8
"""How many changed names a sentence lists."""
SHOWN_LETTERS = 8
LONGEST = 160
"""Characters of a shown passage."""


def name_changes_sentences(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on the class names of rows that were normalised, and one on those that were renamed."""
    joined = {change["to"]: change["rows"] for change in changes if change["why"] == "joined"}
    sentences = []
    for why in ("normalised", "renamed"):
        some = [change for change in changes if change["why"] == why]
        if not some:
            continue
        listed = [
            f"{show_name(one['from'])} -> {show_name(one['to'])} ({count(one['rows'])})" for one in some[:SHOWN_NAMES]
        ]
        more = f" and {count(len(some) - SHOWN_NAMES)} more" if len(some) > SHOWN_NAMES else ""
        total = count(sum(one["rows"] for one in some))
        sentences.append(f"{total} class names were {why}: {', '.join(listed)}{more}.")
    new = {change["to"] for change in changes if change["why"] == "renamed"}
    for name in sorted(new & joined.keys()):
        sentences.append(f"{count(joined[name])} other rows have the class {show_name(name)}: they are one class now.")
    return sentences


def warn_of_few_test_rows(gates: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """Return a sentence if the test rows can hardly decide the gates on intervals."""
    gate, rows = next((text for text in gates if parse_gate(text).part), None), counts.get("test", 0)
    if gate is None or not 0 < rows < FEWEST_ROWS:
        return []
    text = f"{rows} test rows can hardly decide the gate {gate!r}: a difference is judged from {FEWEST_ROWS} rows on."
    return [f"{text} Give more rows, or raise data.test."]


def picture_blocks(facts: Json, thumbnails: Sequence[str] = ()) -> list[Block]:
    """Return how many pictures there are and what was converted, and a table of some with their rows.

    `thumbnails` are data URLs, which only HTML pages show.
    """
    if not facts:
        return []
    sizes = [" x ".join(map(count, facts[name])) for name in ("smallest", "largest")]
    text = f"{count(facts['pictures'])} pictures ({count(facts['different'])} different) in {count(facts['rows'])} rows"
    text += f", from {sizes[0]} to {sizes[1]} pixels."
    if facts["converted"]:
        most_first = sorted(facts["converted"].items(), key=lambda item: (-item[1], item[0]))
        text += f" Converted: {', '.join(f'{count(number)} {what}' for what, number in most_first)}."
    cells: TableRows = []
    for place, (name, size, *texts) in enumerate(facts["shown"]):
        image = Markup('<img alt="{}" src="{}">').format(name, thumbnails[place]) if thumbnails else None
        cells.append([Cell(name, note=size), Cell(picture=image), *texts])
    columns: TableColumns = ["picture", Column("", "picture"), "prompt", "answer"]
    return [Text(text), Table(columns, cells, "pictures of training rows")]


def filled_sentence(filled: int) -> str:
    """Return a sentence on null keys dropped from Parquet or hub rows (`llmtune.data.arrow_rows`)."""
    return f"{count(filled)} empty keys dropped: Arrow adds them to rows if other rows have a value."


def vanishing_sentence(vanishing: Mapping[str, int]) -> str:
    """Return a sentence on the characters that the tokenizer drops, the most frequent first."""
    most_first = sorted(vanishing, key=lambda letter: -vanishing[letter])
    listed = ", ".join(
        f"U+{ord(letter):04X} ({count(vanishing[letter])} rows)" for letter in most_first[:SHOWN_LETTERS]
    )
    more = f" and {len(vanishing) - SHOWN_LETTERS} more" if len(vanishing) > SHOWN_LETTERS else ""
    return f"The tokenizer drops these characters, so the model never sees them: {listed}{more}."


def long_answers_sentence(long_answers: Mapping[str, Any]) -> str:
    """Return a sentence on answers that the model learns and can never give (`count_long_answers`)."""
    rows = ", ".join(f"{count(number)} {split}" for split, number in long_answers["rows"].items() if number)
    total = count(sum(long_answers["rows"].values()))
    text = f"{total} answers have more than {long_answers['limit']} tokens ({rows}), "
    return f"{text}so the model can never give them. Set `{long_answers['key']}: {long_answers['longest']}`."


def lost_sentence(lost: Mapping[str, int], supervised: int) -> str:
    """Return a sentence on truncated rows; `supervised` is the number of tokens left to learn."""
    text = f"{count(lost['rows'])} examples were truncated to data.max_length and lost {count(lost['tokens'])} tokens"
    if lost["answers"]:
        part = share(lost["supervised"], supervised + lost["supervised"])
        text += f", including {count(lost['answers'])} answers: {part} of all tokens to learn"
    return f"{text}."


def negatives_blocks(mined: Json | None, surveyed: Json | None) -> list[Block]:
    """Return how many negatives were mined, how many negatives are likely right passages, and an example."""
    blocks: list[Block] = []
    if mined:
        blocks.append(Text(describe_mining(mined)))
        if test_passages := mined.get("test_passages"):
            blocks.append(Text(describe_test_passages(**test_passages)))
        blocks += example_blocks("A skipped passage", mined.get("example"))
    if not surveyed:
        return blocks
    rows: TableRows = [
        [
            kind,
            count(counts["pairs"]),
            share(counts["near"], counts["pairs"], 2),
            share(counts["nearer"], counts["pairs"], 2),
        ]
        for kind, counts in surveyed["kinds"].items()
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
