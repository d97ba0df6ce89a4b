"""The figures of `llmtune explain attention`: heatmaps, small maps of all heads, graphs.

Shapes: L layers, H heads, Q queries (rows), T keys (columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from llmtune.explain.attention_capture import CROSS, MASKED, SELF, Kind
from llmtune.explain.attention_graph import MOST_WRITTEN, Edge, Graph, draw_graph, find_edges, write_graph
from llmtune.explain.attention_summary import MEAN, ROLLOUT, Head, Line, Matrix
from llmtune.explain.attention_view import DIFFERENCE, TITLES, AttentionOptions, AttentionView
from llmtune.explain.figures import Panel, Ticks, draw_heatmaps
from llmtune.explain.token_text import label

STEM = "attention"
NAMES: dict[Kind, str] = {SELF: "Self-attention", MASKED: "Masked self-attention", CROSS: "Cross-attention"}
AXES: dict[Kind, tuple[str, str]] = {
    SELF: ("who looks", "what is looked at"),
    MASKED: ("who looks", "what is looked at"),
    CROSS: ("decoder: who looks", "encoder: what is looked at"),
}
LARGEST_IN, SMALLEST_IN = 0.3, 0.012
"""Edge of a cell in inches."""
MAP_IN, BESIDE_IN = 7.0, 5.6
"""Edge of a whole map, alone and beside others, where its cells are not the largest already."""
GRID_CELL = 48
"""Pixels of a small map, at most."""


def draw_figures(view: AttentionView, options: AttentionOptions, out: Path, console: Console) -> list[Path]:
    """Draw what is selected; by default a heatmap and a graph of one layer, and all heads as small maps."""
    files: list[Path] = []
    missing: set[str] = set()
    for kind in view.layers:
        if options.view in ("both", "heatmap"):
            written, letters = _draw_maps(view, kind, out, console)
            files += written
            missing |= set(letters)
        if options.view in ("both", "graph"):
            files += _draw_graphs(view, kind, options.special, out, console)
    if missing:
        what = f"no font of this machine has {' '.join(sorted(missing)[:10])}"
        console.print(f"{what}: the PNG shows boxes for them, {STEM}.html shows them rightly", markup=False)
    return files


def describe(head: Head, layer: int | None) -> str:
    """Return which layer and head a figure shows, in words."""
    if head == ROLLOUT:
        return "rollout" if layer is None else f"rollout up to layer {layer}"
    name = "mean over heads" if head == MEAN else f"head {head}"
    return name if layer is None else f"layer {layer}, {name}"


def _stem(view: AttentionView, what: str, kind: Kind, out: Path) -> Path:
    return out / (f"{STEM}-{what}" if len(view.layers) == 1 else f"{STEM}-{what}-{kind}")


def _draw_maps(view: AttentionView, kind: Kind, out: Path, console: Console) -> tuple[list[Path], str]:
    selection = view.selection
    files: list[Path] = []
    missing = ""
    if not selection.layers and not selection.heads:
        files, missing = _draw_one(view, kind, _stem(view, "heatmap", kind, out))
    everything = selection.layer is None and selection.head == MEAN and not selection.layers
    if selection.layers or selection.heads or everything:
        numbers = [view.layers[kind]] if selection.layer is not None else view.numbers(kind)
        heads: list[Head] = [*range(view.heads(kind))] if selection.heads or everything else [selection.head]
        stem = _stem(view, "heads", kind, out)
        small = _draw_many(view, kind, numbers, heads, stem)
        files += small
        if not small:
            what = "left out: the heads of all layers are too many on this text; --layer chooses those of one"
            console.print(f"{stem.name}: {what}", markup=False)
    return files, missing


def _draw_one(view: AttentionView, kind: Kind, stem: Path) -> tuple[list[Path], str]:
    rows, columns = view.lines.of(kind)
    panels = []
    for model in view.shown:
        weights_QT = view.drawn(model, kind)
        shown = blank_masked(weights_QT) if kind == MASKED else weights_QT
        panels.append(Panel(TITLES[model], shown, model == DIFFERENCE))
    edge = MAP_IN if len(panels) == 1 else BESIDE_IN
    cell = min(LARGEST_IN, max(SMALLEST_IN, edge / max(len(rows), len(columns))))
    title = f"{NAMES[kind]}, {describe(view.selection.head, view.layers[kind])}"
    ticks = (_ticks(name, line) for name, line in zip(AXES[kind], (rows, columns), strict=True))
    return draw_heatmaps(stem, panels, *ticks, title=title, cell=(cell, cell))


def _ticks(name: str, line: Line) -> Ticks:
    return Ticks(name, [label(token) for token in line.tokens], special=[token.special for token in line.tokens])


def _draw_many(
    view: AttentionView, kind: Kind, numbers: Sequence[int], heads: Sequence[Head], stem: Path
) -> list[Path]:
    """Draw small maps, of a run those of the tuned model and of the difference; nothing where heads were not kept."""
    panels = []
    edge = 1.0
    for model in view.shown[-2:]:
        maps = [[view.weights(model, kind, number, head) for head in heads] for number in numbers]
        small = [[shrink(weights) for weights in row if weights is not None] for row in maps]
        if any(len(row) != len(heads) for row in small):
            return []
        if kind == MASKED:
            small = [[blank_masked(weights) for weights in row] for row in small]
        picture = tile(np.array(small))
        edge = picture.shape[0] / len(numbers)  # a small map with its gap, in cells
        panels.append(Panel(TITLES[model], picture, model == DIFFERENCE, unseen="white"))
    several = len(heads) > 1
    which = "all layers and heads" if len(numbers) > 1 and several else f"layer {numbers[0]}, all heads"
    which = which if several else f"all layers, {describe(heads[0], None)}"
    small_in = min(0.42, 11 / len(numbers), 12 / (len(heads) * len(panels))) / edge
    across = panels[0].values.shape[1] / len(heads)
    rows = Ticks("layer", [str(number) for number in numbers], [(i + 0.5) * edge - 1 for i in range(len(numbers))])
    names = [str(head) for head in heads] if several else []
    columns = Ticks("head" if several else "", names, [(i + 0.5) * across - 1 for i in range(len(names))])
    cell = (small_in * edge / across if not several else small_in, small_in)
    return draw_heatmaps(stem, panels, rows, columns, title=f"{NAMES[kind]}, {which}", cell=cell)[0]


def tile(weights_LHQT: Matrix) -> Matrix:
    """Put small maps into one picture, with a blank line between them."""
    layers, heads, rows, columns = weights_LHQT.shape
    padded = np.pad(weights_LHQT, ((0, 0), (0, 0), (0, 2), (0, 2)), constant_values=np.nan)
    picture: Matrix = padded.transpose(0, 2, 1, 3).reshape(layers * (rows + 2), heads * (columns + 2))
    return picture


def shrink(weights_QT: Matrix) -> Matrix:
    """Bring a map to GRID_CELL pixels at most: of the cells on one pixel the strongest is left."""
    for axis in (0, 1):
        size = weights_QT.shape[axis]
        if size > GRID_CELL:
            starts = np.arange(GRID_CELL) * size // GRID_CELL
            high, low = (part.reduceat(weights_QT, starts, axis=axis) for part in (np.maximum, np.minimum))
            weights_QT = np.where(high >= -low, high, low)
    return weights_QT


def blank_masked(weights_QT: Matrix) -> Matrix:
    """Return masked attention with what a row cannot see as no number, which is drawn as blank."""
    blank: Matrix = weights_QT.copy()
    blank[np.triu_indices_from(blank, 1)] = np.nan
    return blank


def _draw_graphs(view: AttentionView, kind: Kind, special: bool, out: Path, console: Console) -> list[Path]:
    """Draw one layer and head; write the edges of all that are selected."""
    rows, columns = view.lines.of(kind)
    selection, layer, threshold = view.selection, view.layers[kind], view.thresholds[kind]
    stem = _stem(view, "graph", kind, out)
    about: dict[str, str | float] = {
        "model": view.target.name,
        "attention": kind,
        "threshold": threshold,
        "weights": "base, tuned (weight) and difference" if DIFFERENCE in view.shown else "weight",
    }
    edges = _edges(view, kind, layer, selection.head)
    graph = Graph(rows, columns, edges, about)
    title = (
        f"{NAMES[kind]}, {describe(selection.head, layer)}, from {threshold:.3g}{'' if special else ', between words'}"
    )
    files = draw_graph(stem, graph if special else graph.among_words(), view.shown, title)
    if selection.layers or selection.heads:
        heads: list[Head] = [*range(view.heads(kind))] if selection.heads else [selection.head]
        numbers = view.numbers(kind) if selection.layers or selection.layer is None else [layer]
        edges = [edge for number in numbers for head in heads for edge in _edges(view, kind, number, head)]
    if len(edges) > MOST_WRITTEN:
        what = f"{MOST_WRITTEN:,} of {len(edges):,} edges are written, the strongest; --threshold chooses"
        console.print(f"{stem.name}: {what}", markup=False)
        edges = sorted(edges, key=lambda edge: -max(edge.weights.values()))[:MOST_WRITTEN]
    return [*files, *write_graph(stem, Graph(rows, columns, edges, about))]


def _edges(view: AttentionView, kind: Kind, layer: int, head: Head) -> list[Edge]:
    maps = {model: view.weights(model, kind, layer, head) for model in view.maps}
    kept = {model: weights for model, weights in maps.items() if weights is not None}
    return find_edges(kept, view.thresholds[kind], layer, str(head))
