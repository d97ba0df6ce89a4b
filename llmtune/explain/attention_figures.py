"""The figures of `llmtune explain attention`: a heatmap, and a graph of the strongest weights.

Shapes: Q queries (rows), T keys (columns).
"""

from __future__ import annotations

from pathlib import Path

import networkx  # type: ignore[import-untyped]
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from rich.console import Console

from llmtune.explain.attention_maps import (
    CROSS,
    DIFFERENCE,
    MASKED,
    MEAN,
    ROLLOUT,
    SELF,
    AttentionKind,
    AttentionMaps,
    Matrix,
    strongest_pairs,
)
from llmtune.explain.explainer import BASE, MODEL, TUNED
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
from llmtune.explain.token_text import TokenLine, token_label
from llmtune.store.atomic_files import write_text

STEM = "attention"
KIND_NAMES: dict[AttentionKind, str] = {
    SELF: "Self-attention",
    MASKED: "Masked self-attention",
    CROSS: "Cross-attention",
}
MODEL_TITLES = {MODEL: "", BASE: "base", TUNED: "tuned", DIFFERENCE: "difference: tuned − base"}
AXES: dict[AttentionKind, tuple[str, str]] = {
    SELF: ("token that looks", "token that is looked at"),
    MASKED: ("token that looks", "token that is looked at"),
    CROSS: ("decoder: token that looks", "encoder: token that is looked at"),
}
LARGEST_IN, SMALLEST_IN = 0.3, 0.012
"""Edge of a cell in inches."""
MAP_IN, BESIDE_IN = 7.0, 5.6
"""Maximum edge of a map in inches, alone and next to others."""
MOST_EDGES = 600
"""Edges per graph; the weakest are omitted."""
ROW_IN, GAP_IN = 0.21, 2.2
"""Row height and the space between two columns of words, in inches."""


def draw_attention(maps: AttentionMaps, out: Path, console: Console) -> list[Path]:
    """Draw a heatmap and a graph of the selected layer and head for each kind of attention."""
    files: list[Path] = []
    missing: set[str] = set()
    for kind in maps.kinds:
        end = "" if len(maps.kinds) == 1 else f"-{kind}"
        layer = maps.drawn_layers[kind]
        head = "mean over heads" if maps.head == MEAN else f"head {maps.head}"
        shown = f"rollout up to layer {layer}" if maps.head == ROLLOUT else f"layer {layer}, {head}"
        title = f"{KIND_NAMES[kind]}, {shown}"
        drawn, letters = _draw_heatmap(maps, kind, out / f"{STEM}-heatmap{end}", title)
        missing |= set(letters)
        files += [*drawn, *_draw_graph(maps, kind, out / f"{STEM}-graph{end}", title)]
    if missing:
        what = f"no font on this machine has {' '.join(sorted(missing)[:10])}"
        console.print(f"{what}: the PNG shows boxes for them, {STEM}.html shows them correctly", markup=False)
    return files


def _draw_heatmap(maps: AttentionMaps, kind: AttentionKind, stem: Path, title: str) -> tuple[list[Path], str]:
    rows, columns = maps.lines.of(kind)
    panels = []
    for model in maps.shown:
        weights_QT = maps.drawn(model, kind).copy()
        if kind == MASKED:
            weights_QT[np.triu_indices_from(weights_QT, 1)] = np.nan  # drawn as blank
        panels.append(Panel(MODEL_TITLES[model], weights_QT, model == DIFFERENCE))
    edge = MAP_IN if len(panels) == 1 else BESIDE_IN
    cell = min(LARGEST_IN, max(SMALLEST_IN, edge / max(len(rows), len(columns))))
    ticks = [Ticks(name, line.labels, line.special) for name, line in zip(AXES[kind], (rows, columns), strict=True)]
    return draw_heatmaps(stem, panels, *ticks, title=title, cell=(cell, cell))


# Graphs


def find_edges(maps: AttentionMaps, kind: AttentionKind) -> list[tuple[int, int]]:
    """Return row and column of the weights that become edges, the strongest first.

    An edge reaches the threshold in at least one model. Edges to tokens where models park attention are omitted.
    """
    strongest_QT = np.max([maps.drawn(model, kind) for model in maps.models], axis=0)
    parked_T = np.array(maps.lines.of(kind)[1].special)
    parked_T[0] |= kind != CROSS
    edges_QT = (strongest_QT >= maps.threshold(kind)) & ~parked_T
    return list(strongest_pairs(strongest_QT, edges_QT, MOST_EDGES))


def _draw_graph(maps: AttentionMaps, kind: AttentionKind, stem: Path, title: str) -> list[Path]:
    """Draw a graph as SVG with the models side by side, and write it as GraphML."""
    rows, columns = maps.lines.of(kind)
    edges, graph_file = find_edges(maps, kind), stem.with_name(f"{stem.name}.graphml")
    write_text(graph_file, "\n".join(networkx.generate_graphml(build_graph(maps, kind, edges))) + "\n")
    words = [label_width(line.labels) + 0.15 for line in (rows, columns)]
    count, title = max(len(rows), len(columns)), f"{title}, from {maps.threshold(kind):.3g}, between words"
    with figure_settings([*rows.labels, *columns.labels, title], stem.name):
        width = max((sum(words) + GAP_IN) * len(maps.shown), 1.25 * label_width([title]))
        figure = Figure(figsize=(width, ROW_IN * count + 0.9))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        figure.subplots_adjust(left=0, right=1, bottom=0.02, top=1 - 0.65 / figure.get_figheight(), wspace=0)
        for model, axes in zip(maps.shown, figure.subplots(1, len(maps.shown), squeeze=False)[0], strict=True):
            axes.set(xlim=(0, width / len(maps.shown)), ylim=(count - 0.5, -0.5))
            axes.axis("off")
            axes.set_title(MODEL_TITLES[model], fontsize=9.5, loc="left", color=GREY)
            _draw_edges(axes, maps.drawn(model, kind), edges, model, words[0])
            for line, x, anchor in ((rows, words[0] - 0.05, "right"), (columns, words[0] + GAP_IN + 0.05, "left")):
                _write_words(axes, line, x, anchor)
        return [*save_figure(figure, stem, ("svg",)), graph_file]


def build_graph(maps: AttentionMaps, kind: AttentionKind, edges: list[tuple[int, int]]) -> networkx.DiGraph:
    """Return a graph: nodes are words with text and position, edges have each model's weight and the difference."""
    rows, columns = maps.lines.of(kind)
    graph = networkx.DiGraph(attention=kind, threshold=maps.threshold(kind))
    lines = (("t", columns, "source"), ("q", rows, "target")) if kind == CROSS else (("t", rows, "text"),)
    for prefix, line, name in lines:
        for place, token in enumerate(line.tokens):
            text = {"label": token_label(token, 80), "place": place, "line": name}
            graph.add_node(f"{prefix}{place}", **text, special=token.special, token=token.id)
    for i, k in edges:
        weights = {model: round(float(maps.drawn(model, kind)[i, k]), 6) for model in maps.shown}
        graph.add_edge(f"{'q' if kind == CROSS else 't'}{i}", f"t{k}", **weights)
    return graph


def _draw_edges(axes: Axes, weights_QT: Matrix, edges: list[tuple[int, int]], model: str, left: float) -> None:
    """Draw weights as lines, stronger ones wider and on top; differences in two colours."""
    drawn = sorted(((float(weights_QT[i, k]), i, k) for i, k in edges), key=lambda edge: abs(edge[0]))
    drawn = [edge for edge in drawn if edge[0]]
    most = abs(drawn[-1][0]) if drawn and model == DIFFERENCE else 1.0
    sizes = [min(1.0, abs(weight) / most) for weight, _, _ in drawn]
    more = ORANGE if model == DIFFERENCE else GREY if model == BASE else BLUE
    lines = LineCollection(
        [((left, i), (left + GAP_IN, k)) for _, i, k in drawn],
        linewidths=[0.5 + 4 * size for size in sizes],
        colors=[
            to_rgba(more if weight > 0 else BLUE, 0.15 + 0.8 * size**0.5)
            for (weight, _, _), size in zip(drawn, sizes, strict=True)
        ],
    )
    lines.set_gid(f"edges-{model}")
    axes.add_collection(lines)


def _write_words(axes: Axes, line: TokenLine, x: float, anchor: str) -> None:
    for at, (word, special) in enumerate(zip(line.labels, line.special, strict=True)):
        colour, style = (WARN, "italic") if special else (INK, "normal")
        axes.text(x, at, word, ha=anchor, va="center", color=colour, fontstyle=style)
