"""The pictures of `llmtune explain attention` beside its page: heatmaps, small maps of all heads, graphs.

Shapes: L layers, H heads, Q rows (who looks), T columns (what is looked at).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llmtune.explain.attention_graph import (
    MOST_WRITTEN,
    Edge,
    Graph,
    draw_graph,
    find_edges,
    find_threshold,
    write_graph,
)
from llmtune.explain.attention_heatmap import Panel, blank_unseen, draw_grid, draw_heatmap, shrink
from llmtune.explain.attention_selection import DIFFERENCE, Seen, Wishes
from llmtune.explain.attention_summary import MEAN, ROLLOUT, Head, among_words
from llmtune.explain.capture import CROSS, MASKED, SELF, Kind
from llmtune.explain.rollout import Matrix

STEM = "attention"
KINDS: dict[Kind, str] = {SELF: "self-attention", MASKED: "masked self-attention", CROSS: "cross-attention"}
AXES: dict[Kind, tuple[str, str]] = {
    SELF: ("who looks", "what is looked at"),
    MASKED: ("who looks", "what is looked at"),
    CROSS: ("decoder: who looks", "encoder: what is looked at"),
}
SIDES = {"model": "", "base": "base", "tuned": "tuned", DIFFERENCE: "difference: tuned − base"}


@dataclass
class Drawn:
    """The files, and of each kind of attention the weight from which an edge is drawn."""

    files: list[Path] = field(default_factory=list)
    thresholds: dict[Kind, float] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)


def draw_pictures(seen: Seen, wishes: Wishes, out: Path, console: Console) -> Drawn:
    """Draw what was asked for; without a wish a heatmap and a graph of one layer, and all heads as small maps."""
    drawn = Drawn()
    for kind, layer in seen.layers.items():
        drawn.thresholds[kind] = wishes.threshold if wishes.threshold is not None else _threshold(seen, kind, layer)
        if wishes.view in ("both", "heatmap"):
            _draw_maps(seen, kind, layer, out, drawn, console)
        if wishes.view in ("both", "graph"):
            _draw_graphs(seen, kind, layer, wishes, out, drawn, console)
    if drawn.missing:
        letters = " ".join(sorted(drawn.missing)[:10])
        told = f"no font of this machine has {letters}: the PNG shows boxes for them, {STEM}.html shows them rightly"
        console.print(told, markup=False)
    return drawn


def describe(head: Head, layer: int | None) -> str:
    """Say which layer and head a picture shows."""
    if head == ROLLOUT:
        return "rollout" if layer is None else f"rollout up to layer {layer}"
    whose = "mean over heads" if head == MEAN else f"head {head}"
    return whose if layer is None else f"layer {layer}, {whose}"


def _stem(seen: Seen, what: str, kind: Kind, out: Path) -> Path:
    return out / (f"{STEM}-{what}" if len(seen.layers) == 1 else f"{STEM}-{what}-{kind}")


def _draw_maps(seen: Seen, kind: Kind, layer: int, out: Path, drawn: Drawn, console: Console) -> None:
    choice = seen.choice
    if not choice.layers and not choice.heads:
        files, missing = _draw_one(seen, kind, layer, _stem(seen, "heatmap", kind, out))
        drawn.files += files
        drawn.missing |= set(missing)
    heads: list[Head] = [*range(seen.heads(kind))]
    everything = choice.layer is None and choice.head == MEAN and not choice.layers
    if choice.layers or choice.heads or everything:
        numbers = [layer] if choice.layer is not None else seen.numbers(kind)
        if not choice.heads and not everything:
            heads = [choice.head]
        stem = _stem(seen, "heads", kind, out)
        files = _draw_many(seen, kind, numbers, heads, stem)
        drawn.files += files
        if not files:
            told = "left out: the heads of all layers are too many on this text; --layer chooses those of one"
            console.print(f"{stem.name}: {told}", markup=False)


def _draw_one(seen: Seen, kind: Kind, layer: int, stem: Path) -> tuple[list[Path], str]:
    rows, columns = seen.lines.of(kind)
    panels = []
    for side in seen.shown:
        weights_QT = _head_of(seen, side, kind, layer)
        panels.append(Panel(SIDES[side], weights_QT, side == DIFFERENCE))
    title = f"{KINDS[kind].capitalize()}, {describe(seen.choice.head, layer)}"
    return draw_heatmap(stem, panels, rows, columns, title=title, masked=kind == MASKED, axes=AXES[kind])


def _head_of(seen: Seen, side: str, kind: Kind, layer: int) -> Matrix:
    weights_QT = seen.weights(side, kind, layer, seen.choice.head)
    assert weights_QT is not None, "what is asked for is kept"
    return weights_QT


def _draw_many(seen: Seen, kind: Kind, numbers: Sequence[int], heads: Sequence[Head], stem: Path) -> list[Path]:
    """Draw small maps, of a run those of the tuned model and of the difference; nothing where heads were not kept."""
    panels = []
    for side in seen.shown[-2:]:
        rows = [[seen.weights(side, kind, number, head) for head in heads] for number in numbers]
        small: list[list[Any]] = [[shrink(w) for w in row if w is not None] for row in rows]
        if kind == MASKED:
            small = [[blank_unseen(w) for w in row] for row in small]
        if any(len(row) != len(heads) for row in small):
            return []
        panels.append(Panel(SIDES[side], np.array(small), side == DIFFERENCE))
    several = len(heads) > 1
    which = "all layers and heads" if len(numbers) > 1 and several else f"layer {numbers[0]}, all heads"
    which = which if several else f"all layers, {describe(heads[0], None)}"
    names = heads if several else None
    return draw_grid(stem, panels, title=f"{KINDS[kind].capitalize()}, {which}", layers=numbers, heads=names)


def _threshold(seen: Seen, kind: Kind, layer: int) -> float:
    weights_QT = _head_of(seen, seen.subject.sides[-1], kind, layer)
    return find_threshold(weights_QT, among_words(*seen.lines.of(kind), kind))


def _draw_graphs(seen: Seen, kind: Kind, layer: int, wishes: Wishes, out: Path, drawn: Drawn, console: Console) -> None:
    """Draw one layer and head; write the edges of all that were asked for."""
    rows, columns = seen.lines.of(kind)
    choice, threshold, stem = seen.choice, drawn.thresholds[kind], _stem(seen, "graph", kind, out)
    about = {
        "model": seen.subject.name,
        "attention": kind,
        "threshold": threshold,
        "weights": "base, tuned (weight) and difference" if DIFFERENCE in seen.shown else "weight",
    }
    shown = _edges(seen, kind, layer, choice.head, threshold)
    title = f"{KINDS[kind].capitalize()}, {describe(choice.head, layer)}, from {threshold:.3g}"
    title += "" if wishes.special else ", between words"
    panels = [(side, SIDES[side]) for side in seen.shown]
    graph = Graph(rows, columns, shown, about)
    graph = graph if wishes.special else graph.among_words()
    drawn.files.append(draw_graph(stem.with_name(f"{stem.name}.svg"), graph, panels, title))
    edges = shown
    if choice.layers or choice.heads:
        heads: list[Head] = [*range(seen.heads(kind))] if choice.heads else [choice.head]
        numbers = seen.numbers(kind) if choice.layers or choice.layer is None else [layer]
        edges = [edge for n in numbers for head in heads for edge in _edges(seen, kind, n, head, threshold)]
    if len(edges) > MOST_WRITTEN:
        told = f"{stem.name}: {MOST_WRITTEN:,} of {len(edges):,} edges are written, the strongest; --threshold chooses"
        console.print(told, markup=False)
        edges = sorted(edges, key=lambda edge: -max(edge.weights.values()))[:MOST_WRITTEN]
    drawn.files += write_graph(stem, Graph(rows, columns, edges, about))


def _edges(seen: Seen, kind: Kind, layer: int, head: Head, threshold: float) -> list[Edge]:
    sides = {side: seen.weights(side, kind, layer, head) for side in seen.sides}
    kept = {side: weights for side, weights in sides.items() if weights is not None}
    return find_edges(kept, threshold, layer, str(head))
