"""Attention as a graph: words as nodes, weights as edges above a threshold; as SVG, GraphML and JSON.

Shapes: Q words that look, T words that are looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx  # type: ignore[import-untyped]
import numpy as np
from markupsafe import Markup

from llmtune.explain.attention_summary import Line, Mask
from llmtune.explain.rollout import Matrix
from llmtune.explain.target import BASE, TUNED
from llmtune.explain.token_text import label
from llmtune.report.number_format import signed
from llmtune.report.text_files import replace_file

EDGES_PER_WORD = 1.5
"""About how many edges are left where a person names no threshold."""
LOWEST = 0.01
MOST_DRAWN = 600
"""Edges of one picture; those that are left out are the weakest."""
FAINT = 0.02
"""Share of the strongest edge of a picture from which on an edge is drawn."""
MOST_WRITTEN = 200_000
"""Edges of one GraphML or JSON file."""
ROW, TOP, LETTER, ARC, CROSSING = 22, 56, 8.2, 150, 210
"""Pixels: a row's height, the head, a letter, the space for arcs, the space between two columns of words."""
STYLE = Markup("""
svg { background: #fff; font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
text { fill: #1b1f26; unicode-bidi: plaintext; } .special { fill: #8a5a00; font-style: italic; }
.title { font-size: 15px; font-weight: 600; } .soft { fill: #5c6470; font-size: 12px; }
path { fill: none; stroke: #2563c9; stroke-linecap: round; } .base path { stroke: #7d8593; }
path.more { stroke: #c9621a; } path.less { stroke: #2b6fc2; }
""")


@dataclass(frozen=True)
class Edge:
    """Who looks at what, and how strongly: a weight a side."""

    start: int
    end: int
    weights: Mapping[str, float]
    layer: int
    head: str


Shown = list[tuple[Edge, float]]
"""Edges with their weights in one picture, the weakest first."""


@dataclass(frozen=True)
class Graph:
    """Words and the edges between them. Where `columns` is `rows` itself, they are the same words."""

    rows: Line
    columns: Line
    edges: Sequence[Edge]
    about: Mapping[str, Any]
    """What the edges are: model, kind of attention, layer, head, threshold."""

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


def find_threshold(weights_QT: Matrix, telling_QT: Mask) -> float:
    """Return a threshold that leaves about EDGES_PER_WORD edges a word among those that tell something."""
    told = weights_QT[telling_QT] if telling_QT.any() else weights_QT.ravel()
    wanted = min(told.size, math.ceil(EDGES_PER_WORD * len(weights_QT)))
    strongest = np.partition(told, -wanted)[-wanted]
    return max(LOWEST, round(float(strongest), 3))


def find_edges(sides: Mapping[str, Matrix], threshold: float, layer: int, head: str) -> list[Edge]:
    """Return the edges that are at least `threshold` on one of the sides, the strongest first."""
    strongest_QT = np.max(list(sides.values()), axis=0)
    found = np.argwhere((strongest_QT >= threshold) & (strongest_QT > 0))
    order = np.argsort(-strongest_QT[tuple(found.T)], kind="stable")
    return [
        Edge(int(i), int(k), {side: float(weights[i, k]) for side, weights in sides.items()}, layer, head)
        for i, k in found[order]
    ]


def to_networkx(graph: Graph) -> networkx.MultiDiGraph:
    """Return it as networkx has it: nodes with their text and place, edges with `weight` (of a run the tuned one's)."""
    made = networkx.MultiDiGraph(**graph.about)
    lines = (("t", graph.columns), ("q", graph.rows)) if graph.crosses else (("t", graph.rows),)
    for prefix, line in lines:
        for place, token in enumerate(line.tokens):
            side = {"t": "source", "q": "target"}[prefix] if graph.crosses else "text"
            made.add_node(
                f"{prefix}{place}",
                label=label(token, 80),
                place=place,
                line=side,
                special=token.special,
                token=token.id,
            )
    first = "q" if graph.crosses else "t"
    for edge in graph.edges[:MOST_WRITTEN]:
        weights = {side: round(weight, 6) for side, weight in edge.weights.items()}
        numbers: dict[str, Any] = {"weight": weights[TUNED] if TUNED in weights else next(iter(weights.values()))}
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


def draw_graph(path: Path, graph: Graph, panels: Sequence[tuple[str, str]], title: str) -> Path:
    """Draw it as SVG.

    Args:
        path: the file.
        graph: of one layer and head.
        panels: what stands side by side, each with its title: a side, or `difference`.
        title: stands above.
    """
    words = _width(graph.rows, graph.columns)
    width = (2 * words + CROSSING if graph.crosses else words + 2 * ARC) + 24
    height = TOP + ROW * max(len(graph.rows), len(graph.columns)) + 20
    parts = [Markup('<text class="title" x="12" y="22">{}</text>').format(title)]
    draw = _draw_crossing if graph.crosses else _draw_arcs
    for number, (side, name) in enumerate(panels):
        shown = _shown(graph, side)
        if side == "difference" and shown:
            name += f" (up to {signed(shown[-1][1])})"
        inner = [Markup('<text class="soft" x="12" y="42">{}</text>').format(name), *draw(graph, side, words, shown)]
        group = Markup('<g class="{}" transform="translate({} 0)">{}</g>')
        parts.append(group.format(side, width * number, Markup("").join(inner)))
    whole = width * len(panels)
    svg = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0:.0f} {1}" width="{0:.0f}" height="{1}"'
    ).format(max(whole, 10.2 * len(title) + 24), height)
    label_ = Markup(' role="img" aria-label="{}"><style>{}</style>{}</svg>\n')
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, svg + label_.format(title, STYLE, Markup("").join(parts)))
    return path


def _width(*lines: Line) -> float:
    return max(_wide(label(token)) for line in lines for token in line.tokens) + 14


def _wide(text: str) -> float:
    return LETTER * sum(1.7 if ord(letter) >= 0x1100 else 1 for letter in text)


def strength(edge: Edge, side: str) -> float:
    """Return an edge's weight on a side; of the difference tuned minus base."""
    return edge.weights[TUNED] - edge.weights[BASE] if side == "difference" else edge.weights[side]


def _shown(graph: Graph, side: str) -> Shown:
    """Return the edges of one picture with their weights there, the weakest first, so that the strongest lie on top."""
    found = [(edge, strength(edge, side)) for edge in graph.edges]
    found.sort(key=lambda pair: abs(pair[1]))
    seen = FAINT * abs(found[-1][1]) if found else 0
    return [(edge, weight) for edge, weight in found[-MOST_DRAWN:] if abs(weight) > seen]


def _path(place: str, weight: float, most: float, side: str, told: str) -> Markup:
    """Draw an edge; differences are as wide as they are beside the largest one, weights as they are."""
    kind = "" if side != "difference" else "more" if weight > 0 else "less"
    size = min(1.0, abs(weight) / (most if side == "difference" else 1))
    return Markup(
        '<path class="{}" d="{}" stroke-width="{:.2f}" stroke-opacity="{:.2f}"><title>{}</title></path>'
    ).format(kind, place, 0.6 + 5 * size, 0.15 + 0.8 * size**0.5, told)


def _told(graph: Graph, edge: Edge, weight: float, side: str) -> str:
    number = signed(weight) if side == "difference" else f"{weight:.3f}"
    return f"{label(graph.rows.tokens[edge.start])} → {label(graph.columns.tokens[edge.end])}: {number}"


def _words(line: Line, x: float, anchor: str) -> list[Markup]:
    drawn = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return [
        drawn.format("special" if token.special else "", x, TOP + ROW * (i + 0.5) + 4.5, anchor, label(token))
        for i, token in enumerate(line.tokens)
    ]


def _draw_arcs(graph: Graph, side: str, words: float, shown: Shown) -> list[Markup]:
    """Draw one column of words: arcs on the left lead back to earlier words, those on the right on to later ones."""
    middle = 12 + ARC + words / 2
    edges = [_wide(label(token)) / 2 + 5 for token in graph.rows.tokens]
    parts = []
    for edge, weight in shown:
        start, end = (TOP + ROW * (at + 0.5) for at in (edge.start, edge.end))
        turn = -1 if edge.end <= edge.start else 1
        near, far = (middle + turn * edges[at] for at in (edge.start, edge.end))
        if edge.start == edge.end:
            place = f"M{near:.1f},{start - 4:.1f} c-13,-5 -13,13 0,8"
        else:
            reach = 1.3 * min(ARC, 14 + 9 * abs(edge.start - edge.end) ** 0.8)
            over = turn * (words / 2 + reach) + middle
            place = f"M{near:.1f},{start:.1f} C{over:.1f},{start:.1f} {over:.1f},{end:.1f} {far:.1f},{end:.1f}"
        parts.append(_path(place, weight, abs(shown[-1][1]), side, _told(graph, edge, weight, side)))
    return [*parts, *_words(graph.rows, middle, "middle")]


def _draw_crossing(graph: Graph, side: str, words: float, shown: Shown) -> list[Markup]:
    """Draw two columns: who looks on the left, what is looked at on the right."""
    left, right = 12 + words, 12 + words + CROSSING
    parts = []
    for edge, weight in shown:
        start, end = (TOP + ROW * (at + 0.5) for at in (edge.start, edge.end))
        middle = (left + right) / 2
        place = f"M{left:.1f},{start:.1f} C{middle:.1f},{start:.1f} {middle:.1f},{end:.1f} {right:.1f},{end:.1f}"
        parts.append(_path(place, weight, abs(shown[-1][1]), side, _told(graph, edge, weight, side)))
    return [*parts, *_words(graph.rows, left - 6, "end"), *_words(graph.columns, right + 6, "start")]
