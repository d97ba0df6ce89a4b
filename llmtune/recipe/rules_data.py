"""Rules of the section `data`."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.errors import nearest
from llmtune.recipe.finding import Finding, idle
from llmtune.recipe.schema import DataSection, Recipe, Source
from llmtune.recipe.source_map import Places
from llmtune.recipe.task_facts import COLUMNS, ROW_FORMATS, TASK_FACTS

CONTAINERS = ("jsonl", "json", "csv", "parquet")


def data_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield what is wrong with the rows, their split and what is learned of them."""
    data = recipe.data
    for side in ("train", "validation", "test"):
        sources = getattr(data, side)
        for i, source in enumerate(sources if isinstance(sources, tuple) else ()):
            yield from source_findings(f"data.{side}.{i}", source, recipe, places)
    yield from weight_findings(data, places)
    if data.split_by is not None and places.stated("data.split_by") and not splits(data):
        fix = "Give data.validation or data.test a share of the rows, or remove it."
        yield idle("data.split_by", "where no rows are split off", fix, "data.validation", "data.test")
    if shares(data) >= 1:
        what = f"data.validation and data.test together take {shares(data):g} of the rows"
        yield Finding("data.test", what, "Leave some for training.", ("data.validation",))


def shares(data: DataSection) -> float:
    """Return the share of rows that validation and test take out of training."""
    return sum(side for side in (data.validation, data.test) if isinstance(side, float))


def splits(data: DataSection) -> bool:
    """Whether some rows are split off."""
    return shares(data) > 0


def has_rows(side: object) -> bool:
    """Whether a side has rows: sources, or a share above 0."""
    return bool(side)


def source_findings(key: str, source: Source, recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield what is wrong with one source."""
    from_hub = source.path.startswith("hub:")
    named = source.path.split(":", 1)
    if named[0] in ("hub", "builtin") and not named[-1].strip():
        yield Finding(f"{key}.path", f"'{key}.path' is {source.path!r}, without a name", f"Write {named[0]}:NAME.")
    elif "://" in source.path:
        what = f"'{key}.path' is {source.path!r}, an address"
        yield Finding(f"{key}.path", what, "Use a file, a glob, a folder, hub:NAME or builtin:NAME.")
    for name in ("config", "split", "revision"):
        if getattr(source, name) is not None and places.stated(f"{key}.{name}") and not from_hub:
            yield idle(f"{key}.{name}", "but for hub:NAME", "Remove it, or name a hub data set.", f"{key}.path")
    if source.format in CONTAINERS and from_hub and places.stated(f"{key}.format"):
        yield idle(f"{key}.format", "for a hub data set", "Remove it, or name a row format.", f"{key}.path")
    formats = TASK_FACTS[recipe.task].formats
    if source.format in ROW_FORMATS and formats and source.format not in formats:
        what = f"'{key}.format' is '{source.format}', which task: {recipe.task} cannot use"
        yield Finding(f"{key}.format", what, f"Row formats of this task: {', '.join(formats)}.", ("task",))
    for column in source.columns:
        if column not in COLUMNS:
            what = f"'{key}.columns' maps '{column}', which is no column that llmtune knows"
            fix = f"{nearest(column, COLUMNS)} Ours stand on the left: {', '.join(COLUMNS)}.".strip()
            yield Finding(f"{key}.columns.{column}", what, fix)


def weight_findings(data: DataSection, places: Places) -> Iterator[Finding]:
    """Yield weights with nothing to be weighed against."""
    for side in ("train", "validation", "test"):
        sources = getattr(data, side)
        for i, _ in enumerate(sources if isinstance(sources, tuple) else ()):
            key = f"data.{side}.{i}.weight"
            if not places.stated(key):
                continue
            if side != "train":
                yield idle(key, "outside data.train", "Remove it: these rows are all used once.")
            elif len(sources) == 1:
                yield idle(key, "with a single source", "Remove it, or add another source.", "data.train")
