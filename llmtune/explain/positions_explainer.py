"""`llmtune explain positions`: the sinusoidal encoding of any length, or how a model knows the order of words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from llmtune.errors import Problem, RecipeError
from llmtune.explain.explanation import PAGE_STYLE, Explanation, figure_block, write_explanation
from llmtune.explain.figures import BLUE, LINE, MUTED, Panel, Ticks, draw_heatmap, figure_settings, save_figure
from llmtune.explain.position_encodings import Scheme, find_schemes, similarity_by_distance, sinusoidal_scheme
from llmtune.explain.target import Target
from llmtune.explain.token_text import label, name_tokens
from llmtune.model.memory_plan import context_length
from llmtune.report.blocks import Block, Column, KeyValues, Page, Section, Table, Text
from llmtune.store.atomic_files import explained

LONGEST, WIDEST = 4096, 4096
"""Positions and dimensions of an encoding: more than that is no table any more."""
MOST_CELLS = 1 << 20
"""Of one encoding."""
FIRST = 512
"""Positions of a model that are shown where no text and no length is given."""
DEFAULT_LENGTH, DEFAULT_DIMENSION, DEFAULT_BASE = 64, 64, 10_000.0
ROWS, COLUMNS, HEADS = 40, 8, 8
"""Of a table: what a longer or a wider one has first."""
LABELLED = 40
"""Words beside the rows of a heatmap; there is no room for more."""
WIDTH_IN, HEIGHT_IN = 11.0, 4.2
LEAD = (
    "Attention by itself does not know the order of words: every word looks at all the others at once. Something has "
    "to tell it which word stands where, and how far apart two of them are."
)
NONE_FOUND = (
    "No table, rotation or bias of positions was found in this model: it knows the order of words in another way "
    "(convolutions, recurrence), or in one that is not known here."
)
MEANINGS = {
    "sinusoidal": "Each row is a position; each wavelength has a column of sines and one of cosines. Short waves tell "
    "neighbours apart, long ones tell near from far. The row is added to the word’s embedding.",
    "learned": "Each row is a position, learned in training like a word’s embedding and added to it. There is no row, "
    "and so no position, behind the last one.",
    "rotary": "Each pair of dimensions of a query and of a key is turned by an angle that grows with the position. "
    "What two words make of one another then depends on how far apart they are, not on where they stand.",
    "bias": "Each head adds a number to its scores, which depends only on how far the word that is looked at lies "
    "behind or ahead. Distances share a number in buckets that grow wider with the distance.",
    "slopes": "Each head takes off its scores what it takes for one position of distance, times the distance: steep "
    "heads look at what is near.",
}


@dataclass(frozen=True)
class PositionsRequest:
    """The options of the command; None is not given."""

    text: str | None = None
    length: int | None = None
    dimension: int | None = None
    base: float | None = None


@dataclass(frozen=True)
class Positions:
    """How positions are known, over how many of them, and which words stand at them."""

    name: str
    """Of the model; empty for an encoding by itself."""
    schemes: list[Scheme]
    length: int
    words: list[str]
    """Empty where there is no text."""
    tuned: str = ""
    """Of a run, what the tuning did to its positions."""


def explain_positions(request: PositionsRequest, target: Target | None, folder: Path, console: Console) -> Explanation:
    """Write page and figures into `folder`.

    Raises:
        RecipeError: a text that is empty or longer than the model's positions; an option out of range or of no use.
    """
    positions = encode(request) if target is None else read_positions(request, target, console)
    with explained(folder):
        figures = draw_schemes(positions, folder / "positions") if positions.schemes else []
        page = make_page(positions, figures[-1] if figures else None)
        return write_explanation(folder / "positions", to_json(positions), page, figures)


def encode(request: PositionsRequest) -> Positions:
    """Compute the sinusoidal encoding of a text's words, which are cut at spaces, or of a number of positions."""
    words = (request.text or "").split()
    length = len(words) if request.text is not None else request.length or DEFAULT_LENGTH
    dimension = DEFAULT_DIMENSION if request.dimension is None else request.dimension
    base = DEFAULT_BASE if request.base is None else request.base
    problems = _text_problems(request, bool(words))
    if length > LONGEST:
        option = "--length" if request.text is None else "--text"
        problems.append(Problem(f"{length:,} positions are too many", option, f"The most is {LONGEST:,}."))
    if dimension < 2 or dimension % 2 or dimension > WIDEST:
        fix = f"Give an even number from 2 to {WIDEST:,}."
        problems.append(Problem(f"{dimension:,}: dimensions come in pairs of sine and cosine", "--dimension", fix))
    elif length * dimension > MOST_CELLS and length <= LONGEST:
        what = f"{length:,} × {dimension:,} numbers are too many for a figure"
        problems.append(Problem(what, "--dimension", f"The most is {MOST_CELLS:,}."))
    if not (math.isfinite(base) and base > 1):
        problems.append(Problem(f"{base:g}: waves would not grow longer", "--base", "Give a number above 1."))
    RecipeError.collect(problems)
    return Positions("", [sinusoidal_scheme(length, dimension, base)], length, words)


def _text_problems(request: PositionsRequest, some: bool) -> list[Problem]:
    problems = []
    if request.text is not None and not some:
        problems.append(Problem("it is empty", "--text", "Give at least one word."))
    if request.text is not None and request.length is not None:
        problems.append(Problem("the text says how many positions there are", "--length", "Omit it."))
    return problems


def read_positions(request: PositionsRequest, target: Target, console: Console) -> Positions:
    """Find how a model knows positions; of a run, whether the tuning changed that, and then the tuned model's."""
    ids = list(target.processor(request.text, verbose=False)["input_ids"]) if (request.text or "").strip() else []
    problems = _text_problems(request, bool(ids))
    for name, value in (("dimension", request.dimension), ("base", request.base)):
        if value is not None:
            problems.append(Problem("a model has its own", f"--{name}", "Omit it, or name no model."))
    limit = context_length(target.config)
    most, asked = min(limit or LONGEST, LONGEST), len(ids) or request.length or 0
    if asked > most:
        known = "the model has" if limit == most else "the most that is shown is"
        what = f"{asked:,} positions, and {known} {most:,}"
        problems.append(Problem(what, "--text" if ids else "--length", "Give a shorter one."))
    RecipeError.collect(problems)
    by_model: list[list[Scheme]] = []
    for name in target.models:
        with console.status("loading the model"), target.open_model(name) as model:
            by_model.append(find_schemes(model))
    schemes = by_model[-1]
    changed = [new.name for new in schemes if not any(old.equals(new) for old in by_model[0])]
    tuned = f"Changed by the tuning: {', '.join(changed)}. What is shown is the tuned model's." if changed else ""
    tables = [len(scheme.values) for scheme in schemes if scheme.kind in ("sinusoidal", "learned")]
    length = asked or min(max(tables, default=most), FIRST)
    words = [label(token) for token in name_tokens(target.processor, ids)]
    if len(by_model) > 1 and not changed:
        tuned = "Unchanged by the tuning."
    return Positions(target.short_name, schemes, length, words, tuned)


def to_json(positions: Positions) -> dict[str, object]:
    """Return it as JSON values; a model's own tables are too large, of those it is how alike positions are."""
    schemes = []
    for scheme in positions.schemes:
        told: dict[str, object] = {"kind": scheme.kind, "title": scheme.title, "module": scheme.name or None}
        told["facts"] = scheme.facts
        if not (positions.name and scheme.kind in ("sinusoidal", "learned")):
            key = {"sinusoidal": "encoding", "rotary": "angles"}.get(scheme.kind, scheme.kind)
            told[key] = scheme.values.tolist()
        if scheme.kind == "bias":
            told["distances"] = list(scheme.distances)
        elif scheme.kind != "slopes":
            told["similarity_by_distance"] = similarity_by_distance(scheme, positions.length).tolist()
        schemes.append(told)
    return {
        "model": positions.name or None,
        "length": positions.length,
        "words": positions.words,
        "tuned": positions.tuned or None,
        "schemes": schemes,
    }


def make_page(positions: Positions, figure: Path | None) -> Page:
    """Return what was found, a section for each way to know positions."""
    sections = [Section(scheme.title, list(_describe(scheme, positions))) for scheme in positions.schemes]
    if figure is not None:
        drawn = figure_block(figure, "Position tables and how alike positions are")
        sections.insert(0, Section("", [drawn], brief=False))
    else:
        sections.append(Section("", [Text(NONE_FOUND, "note")]))
    if positions.tuned:
        sections.append(Section("", [Text(positions.tuned)]))
    title = f"Positions: {positions.name}" if positions.name else "Positions: sinusoidal encoding"
    return Page(title, sections, lead=LEAD, navigation=False, style=PAGE_STYLE)


def _describe(scheme: Scheme, positions: Positions) -> Iterator[Block]:
    yield Text(MEANINGS[scheme.kind])
    yield KeyValues([*([("module", scheme.name)] if scheme.name else []), *scheme.facts.items()])
    if scheme.kind in ("bias", "slopes"):
        yield _head_table(scheme, positions.length)
        return
    if scheme.kind != "rotary" and (not positions.name or positions.words):
        yield _encoding_table(scheme, positions)
    alike = similarity_by_distance(scheme, positions.length)
    chosen = [distance for distance in (0, *(2**i for i in range(10))) if distance < len(alike)]
    columns = [Column("apart by"), *(Column(str(distance), "number") for distance in chosen)]
    yield Table(columns, [["alike", *(f"{alike[distance]:z.2f}" for distance in chosen)]])


def _encoding_table(scheme: Scheme, positions: Positions) -> Table:
    """Return a row a position: its word, and its first numbers with two decimals."""
    values, words = scheme.table(positions.length), positions.words
    columns = [Column("position", "number"), *([Column("word")] if words else [])]
    columns += [Column(str(column), "number") for column in range(min(COLUMNS, values.shape[1]))]
    rows = [
        [str(at), *words[at : at + 1], *(f"{value:z.2f}" for value in values[at, :COLUMNS])]
        for at in range(min(ROWS, len(values)))
    ]
    cut = len(values) > ROWS or values.shape[1] > COLUMNS
    return Table(columns, rows, note=f"The first of {len(values):,} × {values.shape[1]:,} numbers." if cut else "")


def _head_table(scheme: Scheme, length: int) -> Table:
    """Return what the first heads add to their scores at some distances; below zero is behind."""
    distances, values = scheme.added(length)
    chosen = [distance for distance in (-64, -16, -4, -1, 0, 1, 4, 16, 64) if distance in distances]
    rows = [
        [str(head), *(f"{line[distances.index(distance)]:z.2f}" for distance in chosen)]
        for head, line in enumerate(values[:HEADS])
    ]
    names = ["head", *(f"{distance:+d}" if distance else "0" for distance in chosen)]
    note = f"The first {HEADS} of {len(values)} heads." if len(values) > HEADS else ""
    return Table([Column(name, "number") for name in names], rows, note=note)


# Figures


def draw_schemes(positions: Positions, stem: Path) -> list[Path]:
    """Draw all ways to know positions, one below the other, into `stem` with .png and .svg."""
    count = len(positions.schemes)
    with figure_settings(positions.words, "positions"):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN * count), layout="constrained")
        for row, scheme in enumerate(positions.schemes):
            if scheme.kind in ("bias", "slopes"):
                _draw_added(figure.add_subplot(count, 1, row + 1), scheme, positions.length)
            else:
                _draw_table(figure, figure.add_subplot(count, 2, 2 * row + 1), scheme, positions)
                _draw_similarity(figure.add_subplot(count, 2, 2 * row + 2), scheme, positions.length)
        return save_figure(figure, stem)


def _draw_table(figure: Figure, axes: Axes, scheme: Scheme, positions: Positions) -> None:
    """Draw a row a position and a column a dimension (of rotations: a pair of them)."""
    table = scheme.table(positions.length)
    rows, columns = table.shape
    clipped = np.quantile(np.abs(table), 0.995) if scheme.kind == "learned" else 1.0
    written = ".2f" if columns <= 16 and rows <= 12 else ""
    panel = Panel(scheme.title, np.clip(table, -clipped, clipped), True, gamma=1.0, written=written)
    words = positions.words if len(positions.words) <= LABELLED else []
    down = [f"{word}  {at}" for at, word in enumerate(words)] or [str(at) for at in range(rows)]
    name = "pair of dimensions (cosine of its angle)" if scheme.kind == "rotary" else "dimension"
    cell = (0.4 * WIDTH_IN / columns, 0.75 * HEIGHT_IN / rows)
    draw_heatmap(figure, axes, panel, Ticks("position", down), Ticks(name, [str(k) for k in range(columns)]), cell)


def _draw_similarity(axes: Axes, scheme: Scheme, length: int) -> None:
    """Draw how alike positions are by how far they are apart."""
    alike = similarity_by_distance(scheme, length)
    axes.plot(alike, color=BLUE, linewidth=1.4, marker="o" if len(alike) <= 16 else None, markersize=4)
    axes.axhline(0, color=LINE, linewidth=1, zorder=0)
    axes.set_title("How alike two positions are", fontsize=9.5, loc="left", color=MUTED)
    axes.set(xlabel="positions apart", ylabel="mean cosine", ylim=(min(-0.1, float(alike.min()) - 0.05), 1.05))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_added(axes: Axes, scheme: Scheme, length: int) -> None:
    """Draw a line a head: what is added to its scores by distance."""
    distances, values = scheme.added(length)
    for head, line in enumerate(values):
        colour = colormaps["viridis"](0.9 * head / max(1, len(values) - 1))
        style = "steps-mid" if scheme.kind == "bias" else "default"
        axes.plot(distances, line, color=colour, linewidth=1.2, drawstyle=style, label=f"head {head}")
    axes.set_title(scheme.title, fontsize=9.5, loc="left", color=MUTED)
    axes.set(xlabel="distance of the word that is looked at (left: behind)", ylabel="added to the score")
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) <= 16:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
