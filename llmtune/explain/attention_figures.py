"""The figures of `llmtune explain attention`: heatmaps, small maps of all heads, and graphs of who looks at what.

Shapes: L layers, H heads, Q queries (rows), T keys (columns).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import networkx  # type: ignore[import-untyped]
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from rich.console import Console

from llmtune.explain.attention_capture import CROSS, MASKED, MEAN, ROLLOUT, SELF, Head, Kind, Mask, Matrix
from llmtune.explain.attention_view import AXES, DIFFERENCE, TITLES, AttentionView
from llmtune.explain.figures import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    WARN,
    Panel,
    Ticks,
    draw_heatmaps,
    figure_settings,
    label_width,
    save_figure,
)
from llmtune.explain.target import BASE, TUNED
from llmtune.explain.token_text import Line, label
from llmtune.store.atomic_files import write_text

STEM = "attention"
NAMES: dict[Kind, str] = {SELF: "Self-attention", MASKED: "Masked self-attention", CROSS: "Cross-attention"}
LARGEST_IN, SMALLEST_IN = 0.3, 0.012
"""Edge of a cell in inches."""
MAP_IN, BESIDE_IN = 7.0, 5.6
"""Edge of a whole map, alone and beside others, where its cells are not the largest already."""
GRID_CELL = 48
"""Pixels of a small map, at most."""
MOST_DRAWN, MOST_WRITTEN = 600, 200_000
"""Edges of one picture, and of one GraphML or JSON file; those that are left out are the weakest."""
ROW_IN, GAP_IN = 0.21, 2.2
"""Inches: a row's height, the space between two columns of words."""


def draw_figures(view: AttentionView, out: Path, console: Console) -> list[Path]:
    """Draw what is selected; by default a heatmap and a graph of one layer, and all heads as small maps."""
    files: list[Path] = []
    missing: set[str] = set()
    for kind in view.kinds:
        if view.options.view in ("both", "heatmap"):
            written, letters = _draw_maps(view, kind, out, console)
            files += written
            missing |= set(letters)
        if view.options.view in ("both", "graph"):
            files += _draw_graph(view, kind, out, console)
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
    return out / (f"{STEM}-{what}" if len(view.kinds) == 1 else f"{STEM}-{what}-{kind}")


# Heatmaps


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
    ticks = [
        Ticks(name, line.labels, special=line.special) for name, line in zip(AXES[kind], (rows, columns), strict=True)
    ]
    return draw_heatmaps(stem, panels, *ticks, title=title, cell=(cell, cell))


def _draw_many(
    view: AttentionView, kind: Kind, numbers: Sequence[int], heads: Sequence[Head], stem: Path
) -> list[Path]:
    """Draw small maps, of a run those of the tuned model and of the difference; nothing where heads were not kept."""
    panels = []
    for model in view.shown[-2:]:
        maps = [[view.weights(model, kind, number, head) for head in heads] for number in numbers]
        small = [[shrink(weights) for weights in row if weights is not None] for row in maps]
        if any(len(row) != len(heads) for row in small):
            return []
        if kind == MASKED:
            small = [[blank_masked(weights) for weights in row] for row in small]
        panels.append(Panel(TITLES[model], tile(np.array(small)), model == DIFFERENCE, unseen="white"))
    several = len(heads) > 1
    which = "all layers and heads" if len(numbers) > 1 else f"layer {numbers[0]}, all heads"
    which = which if several else f"all layers, {describe(heads[0], None)}"
    tall, wide = (size / count for size, count in zip(panels[0].values.shape, (len(numbers), len(heads)), strict=True))
    small_in = min(0.42, 11 / len(numbers), 12 / (len(heads) * len(panels)))
    rows = Ticks("layer", [str(number) for number in numbers], [(i + 0.5) * tall - 1 for i in range(len(numbers))])
    names = [str(head) for head in heads] if several else []
    columns = Ticks("head" if several else "", names, [(i + 0.5) * wide - 1 for i in range(len(names))])
    cell = (small_in / wide, small_in / tall)
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


# Graphs


def _draw_graph(view: AttentionView, kind: Kind, out: Path, console: Console) -> list[Path]:
    """Draw one layer and head; write the edges of all that are selected, as GraphML and as JSON."""
    selection, layer, stem = view.selection, view.layers[kind], _stem(view, "graph", kind, out)
    heads: list[Head] = [*range(view.heads(kind))] if selection.heads else [selection.head]
    several = selection.layers or (selection.heads and selection.layer is None)
    channels = [(number, head) for number in (view.numbers(kind) if several else [layer]) for head in heads]
    graph, left_out = build_graph(view, kind, channels)
    if left_out:
        what = f"{MOST_WRITTEN:,} of {MOST_WRITTEN + left_out:,} edges are written, the strongest; --threshold chooses"
        console.print(f"{stem.name}: {what}", markup=False)
    files = draw_edges(view, kind, stem)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("graphml", "json")]
    write_text(paths[0], "\n".join(networkx.generate_graphml(graph)) + "\n")
    write_text(paths[1], json.dumps(networkx.node_link_data(graph, edges="edges"), indent=1, ensure_ascii=False) + "\n")
    return [*files, *paths]


def build_graph(
    view: AttentionView, kind: Kind, channels: Sequence[tuple[int, Head]]
) -> tuple[networkx.MultiDiGraph, int]:
    """Return words as nodes, with their text and place, and as edges the weights of some layers and heads.

    An edge has a `weight`; of a run that of the tuned model, with `base` and `difference` beside it. It is there if it
    is at least the threshold in one of the models. The number is that of the edges that were too many.
    """
    rows, columns = view.lines.of(kind)
    threshold = view.threshold(kind)
    graph = networkx.MultiDiGraph(model=view.target.name, attention=kind, threshold=threshold)
    for prefix, line, name in (
        (("t", columns, "source"), ("q", rows, "target")) if kind == CROSS else (("t", rows, "text"),)
    ):
        for place, token in enumerate(line.tokens):
            text = {"label": label(token, 80), "place": place, "line": name}
            graph.add_node(f"{prefix}{place}", **text, special=token.special, token=token.id)
    edges = []
    for layer, head in channels:
        maps = {model: view.weights(model, kind, layer, head) for model in view.maps}
        kept = {model: weights for model, weights in maps.items() if weights is not None}
        strongest_QT = np.max(list(kept.values()), axis=0)
        for i, k in np.argwhere((strongest_QT >= threshold) & (strongest_QT > 0)):
            weights = {model: round(float(found[i, k]), 6) for model, found in kept.items()}
            edges.append((float(strongest_QT[i, k]), int(i), int(k), weights, layer, str(head)))
    edges.sort(key=lambda edge: -edge[0])
    for _, i, k, weights, layer, head in edges[:MOST_WRITTEN]:
        numbers = {"weight": weights.get(TUNED, next(iter(weights.values())))}
        if TUNED in weights:
            numbers |= {"base": weights[BASE], "difference": round(weights[TUNED] - weights[BASE], 6)}
        graph.add_edge(f"{'q' if kind == CROSS else 't'}{i}", f"t{k}", **numbers, layer=layer, head=head)
    return graph, max(0, len(edges) - MOST_WRITTEN)


def edges_between(view: AttentionView, kind: Kind) -> Mask:
    """Return which weights [Q, T] are drawn as edges: without --special none to where models park attention."""
    strongest_QT = np.max([view.drawn(model, kind) for model in view.maps], axis=0)
    shown_QT: Mask = (strongest_QT >= view.threshold(kind)) & (strongest_QT > 0)
    if view.options.special:
        return shown_QT
    parked_T: Mask = np.array(view.lines.of(kind)[1].special)
    parked_T[0] |= kind != CROSS
    shown_QT &= ~parked_T
    return shown_QT


def draw_edges(view: AttentionView, kind: Kind, stem: Path) -> list[Path]:
    """Draw a layer and head as SVG: who looks on the left, what is looked at on the right, models side by side."""
    rows, columns = view.lines.of(kind)
    words = [label_width(line.labels) + 0.15 for line in (rows, columns)]
    count, shown_QT = max(len(rows), len(columns)), edges_between(view, kind)
    title = f"{NAMES[kind]}, {describe(view.selection.head, view.layers[kind])}, from {view.threshold(kind):.3g}"
    title += "" if view.options.special else ", between words"
    with figure_settings([*rows.labels, *columns.labels, title], stem.name):
        width = max((sum(words) + GAP_IN) * len(view.shown), 1.25 * label_width([title]))
        figure = Figure(figsize=(width, ROW_IN * count + 0.9))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        figure.subplots_adjust(left=0, right=1, bottom=0.02, top=1 - 0.65 / figure.get_figheight(), wspace=0)
        for model, axes in zip(view.shown, figure.subplots(1, len(view.shown), squeeze=False)[0], strict=True):
            axes.set(xlim=(0, width / len(view.shown)), ylim=(count - 0.5, -0.5))
            axes.axis("off")
            axes.set_title(TITLES[model], fontsize=9.5, loc="left", color=GREY)
            weights_QT = np.where(shown_QT, view.drawn(model, kind), 0)
            _draw_lines(axes, weights_QT, model, words[0])
            for line, x, anchor in ((rows, words[0] - 0.05, "right"), (columns, words[0] + GAP_IN + 0.05, "left")):
                _write_words(axes, line, x, anchor)
        return save_figure(figure, stem, ("svg",))


def _draw_lines(axes: Axes, weights_QT: Matrix, model: str, left: float) -> None:
    """Draw the strongest weights as lines, the stronger the wider; differences in two colours."""
    sizes = np.abs(weights_QT)
    places = np.argwhere(sizes > 0)
    places = places[np.argsort(sizes[tuple(places.T)], kind="stable")][-MOST_DRAWN:]
    most = sizes.max() if model == DIFFERENCE and places.size else 1.0
    share = np.minimum(1.0, sizes[tuple(places.T)] / most)
    more = [model == DIFFERENCE and weights_QT[i, k] > 0 for i, k in places]
    colours = [GREY if model == BASE else ORANGE if up else BLUE for up in more]
    lines = LineCollection(
        [((left, i), (left + GAP_IN, k)) for i, k in places],
        linewidths=0.5 + 4 * share,
        colors=[to_rgba(colour, 0.15 + 0.8 * size**0.5) for colour, size in zip(colours, share, strict=True)],
    )
    lines.set_gid(f"edges-{model}")
    axes.add_collection(lines)


def _write_words(axes: Axes, line: Line, x: float, anchor: str) -> None:
    for at, (word, special) in enumerate(zip(line.labels, line.special, strict=True)):
        colour, style = (WARN, "italic") if special else (INK, "normal")
        axes.text(x, at, word, ha=anchor, va="center", color=colour, fontstyle=style)
