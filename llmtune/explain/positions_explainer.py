"""`llmtune explain positions`: the sinusoidal encoding of any length, or a model's own position encodings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from llmtune.display.blocks import Block, Column, KeyValues, Section, Table, Text
from llmtune.errors import Problem, RecipeError
from llmtune.explain.explainer import Explainer, Target, figure_block
from llmtune.explain.figures import BLUE, LINE, MUTED, Panel, Ticks, draw_heatmap, figure_settings, save_figure
from llmtune.explain.position_encodings import Scheme, find_schemes, similarity_by_distance, sinusoidal_scheme
from llmtune.explain.token_text import name_tokens, token_label
from llmtune.model.memory_plan import context_length

LONGEST, WIDEST = 4096, 4096
"""Maximum positions and dimensions of an encoding."""
MOST_CELLS = 1 << 20
"""Maximum numbers of one encoding."""
FIRST = 512
"""Positions shown for a model without --text and --length."""
DEFAULT_LENGTH, DEFAULT_DIMENSION, DEFAULT_BASE = 64, 64, 10_000.0
ROWS, COLUMNS, HEADS = 40, 8, 8
"""Rows, columns and heads that a table shows."""
LABELLED = 40
"""Maximum words next to the rows of a heatmap."""
WIDTH_IN, HEIGHT_IN = 11.0, 4.2
NONE_FOUND = (
    "No position table, rotation or bias found in this model. It represents the order of words in another way "
    "(convolutions, recurrence), or by a method that llmtune does not detect."
)
MEANINGS = {
    "sinusoidal": "Each row is a position; each wavelength has a column of sines and one of cosines. Short waves tell "
    "neighbours apart, long waves near from far. The row is added to the word’s embedding.",
    "learned": "Each row is a position, learned in training like a word’s embedding and added to it. The last row "
    "is the last possible position.",
    "rotary": "Each pair of dimensions of queries and keys is rotated by an angle that grows with the position. "
    "The score of two words then depends on their distance, not on their positions.",
    "bias": "Each head adds a number to its scores that depends only on how far the key's word is "
    "before or after. Distances share a number in buckets that widen with the distance.",
    "slopes": "Each head subtracts its slope times the distance from its scores. Heads with steep slopes "
    "look at near words.",
}


@dataclass
class PositionsExplainer(Explainer):
    """Computes the sinusoidal encoding, or finds the position encodings of the target's model."""

    target: Target | None
    """None for the sinusoidal encoding."""
    console: Console
    text: str | None = None
    length: int | None = None
    dimension: int | None = None
    base: float | None = None

    stem = "positions"
    lead = (
        "Attention alone does not know the order of words: every word looks at all others at once. A position "
        "encoding adds where each word is, and how far apart two words are."
    )

    def read(self) -> None:
        """Determine the number of positions to show, and their words."""
        self.title = f"Positions: {self.target.short_name if self.target else 'sinusoidal encoding'}"
        self.tuned = ""
        if self.target is None:
            self._read_encoding()
        else:
            self._read_model(self.target)

    def _read_encoding(self) -> None:
        """Split the text at spaces, and fill in defaults."""
        self.words = (self.text or "").split()
        self.shown = len(self.words) if self.text is not None else self.length or DEFAULT_LENGTH
        dimension = DEFAULT_DIMENSION if self.dimension is None else self.dimension
        base = DEFAULT_BASE if self.base is None else self.base
        problems = self._text_problems(bool(self.words))
        if self.shown > LONGEST:
            option = "--length" if self.text is None else "--text"
            problems.append(Problem(f"{self.shown:,} positions are too many", option, f"Use at most {LONGEST:,}."))
        if dimension < 2 or dimension % 2 or dimension > WIDEST:
            fix = f"Use an even number from 2 to {WIDEST:,}."
            problems.append(Problem(f"{dimension:,}: dimensions come in pairs of sine and cosine", "--dimension", fix))
        elif self.shown * dimension > MOST_CELLS and self.shown <= LONGEST:
            what = f"{self.shown:,} × {dimension:,} numbers are too many for a figure"
            problems.append(Problem(what, "--dimension", f"Use at most {MOST_CELLS:,}."))
        if not (math.isfinite(base) and base > 1):
            problems.append(Problem(f"{base:g}: wavelengths would not grow", "--base", "Use a number above 1."))
        RecipeError.collect(problems)
        self.schemes = [sinusoidal_scheme(self.shown, dimension, base)]

    def _text_problems(self, some: bool) -> list[Problem]:
        problems = []
        if self.text is not None and not some:
            problems.append(Problem("it is empty", "--text", "Give at least one word."))
        if self.text is not None and self.length is not None:
            problems.append(Problem("the text already sets the number of positions", "--length", "Omit it."))
        return problems

    def _read_model(self, target: Target) -> None:
        """Tokenize the text, and check it against the model's number of positions."""
        ids = list(target.processor(self.text, verbose=False)["input_ids"]) if (self.text or "").strip() else []
        problems = self._text_problems(bool(ids))
        for name, value in (("dimension", self.dimension), ("base", self.base)):
            if value is not None:
                problems.append(Problem("a model has its own value", f"--{name}", "Omit it, or omit the model."))
        limit = context_length(target.config)
        self.most, self.shown = min(limit or LONGEST, LONGEST), len(ids) or self.length or 0
        if self.shown > self.most:
            limit_phrase = "the model has" if limit == self.most else "the maximum shown is"
            what = f"{self.shown:,} positions, and {limit_phrase} {self.most:,}"
            problems.append(Problem(what, "--text" if ids else "--length", "Give a shorter one."))
        RecipeError.collect(problems)
        self.words = [token_label(token) for token in name_tokens(target.processor, ids)]

    def run(self) -> None:
        """Find a model's position encodings; for a run, show the tuned model's if the tuning changed them."""
        if self.target is None:
            return
        by_model: list[list[Scheme]] = []
        for name in self.target.models:
            with self.console.status("loading the model"), self.target.open_model(name) as model:
                by_model.append(find_schemes(model))
        self.schemes = by_model[-1]
        changed = [new.name for new in self.schemes if not any(old.equals(new) for old in by_model[0])]
        if changed:
            self.tuned = f"Changed by the tuning: {', '.join(changed)}. This page shows the tuned model's."
        elif len(by_model) > 1:
            self.tuned = "Unchanged by the tuning."
        tables = [len(scheme.values) for scheme in self.schemes if scheme.kind in ("sinusoidal", "learned")]
        self.shown = self.shown or min(max(tables, default=self.most), FIRST)

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON values; for a model's large tables, only the similarity of positions."""
        schemes = []
        for scheme in self.schemes:
            values: dict[str, object] = {"kind": scheme.kind, "title": scheme.title, "module": scheme.name or None}
            values["facts"] = scheme.facts
            if not (self.target and scheme.kind in ("sinusoidal", "learned")):
                key = {"sinusoidal": "encoding", "rotary": "angles"}.get(scheme.kind, scheme.kind)
                values[key] = scheme.values.tolist()
            if scheme.kind == "bias":
                values["distances"] = list(scheme.distances)
            elif scheme.kind != "slopes":
                values["similarity_by_distance"] = similarity_by_distance(scheme, self.shown).tolist()
            schemes.append(values)
        return {
            "model": self.target.short_name if self.target else None,
            "length": self.shown,
            "words": self.words,
            "tuned": self.tuned or None,
            "schemes": schemes,
        }

    def sections(self, figures: Mapping[str, Path]) -> Iterator[Section]:
        """Yield the figure, and a section per position encoding."""
        if figures:
            drawn = figure_block(figures["positions"], "Position tables, and similarity by distance")
            yield Section("", [drawn], brief=False)
        for scheme in self.schemes:
            yield Section(scheme.title, list(self._scheme_blocks(scheme)))
        if not figures:
            yield Section("", [Text(NONE_FOUND, "note")])
        if self.tuned:
            yield Section("", [Text(self.tuned)])

    def _scheme_blocks(self, scheme: Scheme) -> Iterator[Block]:
        yield Text(MEANINGS[scheme.kind])
        yield KeyValues([*([("module", scheme.name)] if scheme.name else []), *scheme.facts.items()])
        if scheme.kind in ("bias", "slopes"):
            yield _head_table(scheme, self.shown)
            return
        if scheme.kind != "rotary" and (self.target is None or self.words):
            yield self._encoding_table(scheme)
        alike = similarity_by_distance(scheme, self.shown)
        chosen = [distance for distance in (0, *(2**i for i in range(10))) if distance < len(alike)]
        columns = [Column("apart by"), *(Column(str(distance), "number") for distance in chosen)]
        yield Table(columns, [["alike", *(f"{alike[distance]:z.2f}" for distance in chosen)]])

    def _encoding_table(self, scheme: Scheme) -> Table:
        """Return one row per position: its word and first numbers, with two decimals."""
        values, words = scheme.table(self.shown), self.words
        columns = [Column("position", "number"), *([Column("word")] if words else [])]
        columns += [Column(str(column), "number") for column in range(min(COLUMNS, values.shape[1]))]
        rows = [
            [str(at), *words[at : at + 1], *(f"{value:z.2f}" for value in values[at, :COLUMNS])]
            for at in range(min(ROWS, len(values)))
        ]
        cut = len(values) > ROWS or values.shape[1] > COLUMNS
        return Table(columns, rows, note=f"The first of {len(values):,} × {values.shape[1]:,} numbers." if cut else "")

    def draw(self, folder: Path) -> list[Path]:
        """Draw all position encodings, one below the other."""
        if not self.schemes:
            return []
        count = len(self.schemes)
        with figure_settings(self.words, "positions"):
            figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN * count), layout="constrained")
            for row, scheme in enumerate(self.schemes):
                if scheme.kind in ("bias", "slopes"):
                    _draw_added(figure.add_subplot(count, 1, row + 1), scheme, self.shown)
                else:
                    _draw_table(figure, figure.add_subplot(count, 2, 2 * row + 1), scheme, self.shown, self.words)
                    _draw_similarity(figure.add_subplot(count, 2, 2 * row + 2), scheme, self.shown)
            return save_figure(figure, folder / "positions")


def _head_table(scheme: Scheme, length: int) -> Table:
    """Return what the first heads add to their scores at some distances; negative means earlier."""
    distances, values = scheme.added(length)
    chosen = [distance for distance in (-64, -16, -4, -1, 0, 1, 4, 16, 64) if distance in distances]
    rows = [
        [str(head), *(f"{line[distances.index(distance)]:z.2f}" for distance in chosen)]
        for head, line in enumerate(values[:HEADS])
    ]
    names = ["head", *(f"{distance:+d}" if distance else "0" for distance in chosen)]
    note = f"The first {HEADS} of {len(values)} heads." if len(values) > HEADS else ""
    return Table([Column(name, "number") for name in names], rows, note=note)


def _draw_table(figure: Figure, axes: Axes, scheme: Scheme, length: int, words: list[str]) -> None:
    """Draw one row per position and one column per dimension (for rotations: per pair)."""
    table = scheme.table(length)
    rows, columns = table.shape
    clipped = np.quantile(np.abs(table), 0.995) if scheme.kind == "learned" else 1.0
    written = ".2f" if columns <= 16 and rows <= 12 else ""
    panel = Panel(scheme.title, np.clip(table, -clipped, clipped), True, gamma=1.0, written=written)
    some = words if len(words) <= LABELLED else []
    down = [f"{word}  {at}" for at, word in enumerate(some)] or [str(at) for at in range(rows)]
    name = "pair of dimensions (cosine of its angle)" if scheme.kind == "rotary" else "dimension"
    cell = (0.4 * WIDTH_IN / columns, 0.75 * HEIGHT_IN / rows)
    draw_heatmap(figure, axes, panel, Ticks("position", down), Ticks(name, [str(k) for k in range(columns)]), cell)


def _draw_similarity(axes: Axes, scheme: Scheme, length: int) -> None:
    """Draw the similarity of positions by distance."""
    alike = similarity_by_distance(scheme, length)
    axes.plot(alike, color=BLUE, linewidth=1.4, marker="o" if len(alike) <= 16 else None, markersize=4)
    axes.axhline(0, color=LINE, linewidth=1, zorder=0)
    axes.set_title("Similarity of two positions", fontsize=9.5, loc="left", color=MUTED)
    axes.set(xlabel="positions apart", ylabel="mean cosine", ylim=(min(-0.1, float(alike.min()) - 0.05), 1.05))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_added(axes: Axes, scheme: Scheme, length: int) -> None:
    """Draw one line per head: the number added to its scores by distance."""
    distances, values = scheme.added(length)
    for head, line in enumerate(values):
        colour = colormaps["viridis"](0.9 * head / max(1, len(values) - 1))
        style = "steps-mid" if scheme.kind == "bias" else "default"
        axes.plot(distances, line, color=colour, linewidth=1.2, drawstyle=style, label=f"head {head}")
    axes.set_title(scheme.title, fontsize=9.5, loc="left", color=MUTED)
    axes.set(xlabel="distance of the key (left: earlier)", ylabel="added to the score")
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) <= 16:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
