"""Attention as a graph: words as nodes, weights as edges above a threshold; as SVG, GraphML and JSON.

Shapes: Q words that look, T words that are looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import networkx  # type: ignore[import-untyped]
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from llmtune.explain.attention_summary import Line, Mask, Matrix
from llmtune.explain.attention_view import DIFFERENCE, TITLES
from llmtune.explain.figures import BLUE, GREY, INK, ORANGE, WARN, figure_settings, label_width, save_figure
from llmtune.explain.target import BASE, TUNED
from llmtune.explain.token_text import label
from llmtune.report.number_format import signed
from llmtune.report.text_files import replace_file

EDGES_PER_WORD = 1.5
"""About how many edges are left where no threshold is given."""
LOWEST = 0.01
MOST_DRAWN = 600
"""Edges of one picture; those that are left out are the weakest."""
FAINT = 0.02
"""Share of the strongest edge of a picture from which on an edge is drawn."""
MOST_WRITTEN = 200_000
"""Edges of one GraphML or JSON file."""
ROW_IN, ARC_IN, GAP_IN = 0.21, 1.5, 2.2
"""Inches: a row's height, the space for arcs, the space between two columns of words."""


@dataclass(frozen=True)
class Edge:
    """Who looks at what, and how strongly: a weight for each model."""

    start: int
    end: int
    weights: Mapping[str, float]
    layer: int
    head: str

    def strength(self, model: str) -> float:
        """Return the weight of a model; of the difference tuned minus base."""
        return self.weights[TUNED] - self.weights[BASE] if model == DIFFERENCE else self.weights[model]


@dataclass(frozen=True)
class Graph:
    """Words and the edges between them. Where `columns` is `rows` itself, they are the same words."""

    rows: Line
    columns: Line
    edges: Sequence[Edge]
    about: Mapping[str, str | float]
    """What the edges are: model, kind of attention, threshold."""

    @property
    def crosses(self) -> bool:
        """Whether words of one text look at those of another."""
        return self.rows is not self.columns

    def among_words(self) -> Graph:
        """Return it without edges to special tokens and to the first one, where models park attention."""
        parked = {at for at, token in enumerate(self.columns.tokens) if token.special}
        if not self.crosses:
            parked.add(0)
        return replace(self, edges=[edge for edge in self.edges if edge.end not in parked or edge.start == edge.end])


def find_threshold(weights_QT: Matrix, words_QT: Mask) -> float:
    """Return a threshold that leaves about EDGES_PER_WORD edges a word among those between words."""
    between = weights_QT[words_QT] if words_QT.any() else weights_QT.ravel()
    count = min(between.size, math.ceil(EDGES_PER_WORD * len(weights_QT)))
    strongest = np.partition(between, -count)[-count]
    return max(LOWEST, round(float(strongest), 3))


def find_edges(maps: Mapping[str, Matrix], threshold: float, layer: int, head: str) -> list[Edge]:
    """Return the edges that are at least `threshold` in one of the models, the strongest first."""
    strongest_QT = np.max(list(maps.values()), axis=0)
    found = np.argwhere((strongest_QT >= threshold) & (strongest_QT > 0))
    order = np.argsort(-strongest_QT[tuple(found.T)], kind="stable")
    return [
        Edge(int(i), int(k), {model: float(weights[i, k]) for model, weights in maps.items()}, layer, head)
        for i, k in found[order]
    ]


def to_networkx(graph: Graph) -> networkx.MultiDiGraph:
    """Return it for networkx: nodes with their text and place, edges with `weight` (of a run the tuned model's)."""
    made = networkx.MultiDiGraph(**graph.about)
    lines = (("t", graph.columns, "source"), ("q", graph.rows, "target"))
    for prefix, line, name in lines if graph.crosses else (("t", graph.rows, "text"),):
        for place, token in enumerate(line.tokens):
            text = {"label": label(token, 80), "place": place, "line": name}
            made.add_node(f"{prefix}{place}", **text, special=token.special, token=token.id)
    first = "q" if graph.crosses else "t"
    for edge in graph.edges[:MOST_WRITTEN]:
        weights = {model: round(weight, 6) for model, weight in edge.weights.items()}
        numbers = {"weight": weights[TUNED] if TUNED in weights else next(iter(weights.values()))}
        if TUNED in weights:
            numbers |= {"base": weights[BASE], "difference": round(weights[TUNED] - weights[BASE], 6)}
        made.add_edge(f"{first}{edge.start}", f"t{edge.end}", **numbers, layer=edge.layer, head=edge.head)
    return made


def write_graph(stem: Path, graph: Graph) -> list[Path]:
    """Write `stem`.graphml and `stem`.json (nodes and edges, as `networkx.node_link_data` has them)."""
    made = to_networkx(graph)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("graphml", "json")]
    replace_file(paths[0], "\n".join(networkx.generate_graphml(made)) + "\n")
    data = networkx.node_link_data(made, edges="edges")
    replace_file(paths[1], json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return paths


def draw_graph(stem: Path, graph: Graph, models: Sequence[str], title: str) -> list[Path]:
    """Draw it as SVG, the models (or DIFFERENCE) side by side; all edges are of one layer and head."""
    labels = [label(token) for line in (graph.rows, graph.columns) for token in line.tokens]
    words = label_width(labels) + 0.15
    wide = 2 * words + GAP_IN if graph.crosses else words + 2 * ARC_IN
    rows = max(len(graph.rows), len(graph.columns))
    with figure_settings([*labels, title], stem.name):
        width = max(wide * len(models), 1.25 * label_width([title]))
        figure = Figure(figsize=(width, ROW_IN * rows + 0.9))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        figure.subplots_adjust(left=0, right=1, bottom=0.02, top=1 - 0.65 / figure.get_figheight(), wspace=0)
        for model, axes in zip(models, figure.subplots(1, len(models), squeeze=False)[0], strict=True):
            axes.set(xlim=(0, width / len(models)), ylim=(rows - 0.5, -0.5))
            axes.axis("off")
            _draw_panel(axes, graph, model, (width / len(models), GAP_IN if graph.crosses else words))
        return save_figure(figure, stem, ("svg",))


def _draw_panel(axes: Axes, graph: Graph, model: str, widths: tuple[float, float]) -> None:
    edges = strongest_edges(graph, model)
    most = abs(edges[-1].strength(model)) if edges else 1.0
    name = TITLES[model]
    if model == DIFFERENCE and edges:
        name += f" (up to {signed(edges[-1].strength(model))})"
    axes.set_title(name, fontsize=9.5, loc="left", color=GREY)
    middle = widths[0] / 2
    left, right = middle - widths[1] / 2, middle + widths[1] / 2
    for edge in edges:
        weight = edge.strength(model)
        size = min(1.0, abs(weight) / (most if model == DIFFERENCE else 1))
        colour = GREY if model == BASE else ORANGE if model == DIFFERENCE and weight > 0 else BLUE
        outline = _cross(edge, left, right) if graph.crosses else _arc(edge, left, right)
        line = PathPatch(outline, fill=False, edgecolor=colour, linewidth=0.5 + 4 * size, alpha=0.15 + 0.8 * size**0.5)
        line.set_gid(f"{model}-{edge.start}-{edge.end}")
        axes.add_patch(line)
    sides = ((graph.rows, left - 0.05, "right"), (graph.columns, right + 0.05, "left"))
    for line_of, x, anchor in sides if graph.crosses else ((graph.rows, middle, "center"),):
        for at, token in enumerate(line_of.tokens):
            colour, style = (WARN, "italic") if token.special else (INK, "normal")
            axes.text(x, at, label(token), ha=anchor, va="center", color=colour, fontstyle=style)


def strongest_edges(graph: Graph, model: str) -> list[Edge]:
    """Return the edges of one picture, the weakest first, so that the strongest lie on top."""
    edges = sorted(graph.edges, key=lambda edge: abs(edge.strength(model)))[-MOST_DRAWN:]
    least = FAINT * abs(edges[-1].strength(model)) if edges else 0
    return [edge for edge in edges if abs(edge.strength(model)) > least]


def _cross(edge: Edge, left: float, right: float) -> Outline:
    """Lead from a word on the left to one on the right."""
    middle = (left + right) / 2
    points = [(left, edge.start), (middle, edge.start), (middle, edge.end), (right, edge.end)]
    return Outline(points, [Outline.MOVETO, *[Outline.CURVE4] * 3])


def _arc(edge: Edge, left: float, right: float) -> Outline:
    """Lead back to an earlier word on the left, or on to a later one on the right; a word to itself by a loop."""
    near, turn = (left, -1) if edge.end <= edge.start else (right, 1)
    span = abs(edge.start - edge.end)
    over = near + turn * min(1.28 * ARC_IN, 0.18 + 0.12 * span**0.8)
    start, end = (edge.start - 0.2, edge.end + 0.2) if not span else (edge.start, edge.end)
    return Outline([(near, start), (over, start), (over, end), (near, end)], [Outline.MOVETO, *[Outline.CURVE4] * 3])
