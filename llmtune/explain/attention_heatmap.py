"""Attention as heatmaps in PNG and SVG: words as rows and columns, brighter is stronger; base, tuned and difference.

Shapes: L layers, H heads, Q rows (who looks), T columns (what is looked at).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, FuncNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from llmtune.explain.attention_summary import Line
from llmtune.explain.colours import UNSEEN, difference_map, weight_map
from llmtune.explain.fonts import families_for
from llmtune.explain.rollout import Matrix
from llmtune.explain.token_text import label

DPI = 160
LARGEST_IN, SMALLEST_IN = 0.3, 0.012
"""Edge of a cell in inches."""
MAP_IN, BESIDE_IN = 7.0, 5.6
"""Edge of a whole map, alone and beside others, where its cells are not the largest already."""
LABEL_IN = 0.098
"""What a label needs in height: where rows are closer, only each second, third... is labelled."""
LETTER_IN = 0.085
GRID_CELL = 48
"""Pixels of a small map, at most."""
GAMMA = 0.5
"""Colours follow the square root of a weight, so that small ones are seen."""


@dataclass(frozen=True)
class Panel:
    """One of several maps side by side."""

    title: str
    weights: Matrix
    """[Q, T], or in a grid of small ones [L, H, Q, T], each no larger than `shrink` makes it."""
    difference: bool = False
    """Whether the numbers are differences, which may be negative."""


def draw_heatmap(
    stem: Path, panels: Sequence[Panel], rows: Line, columns: Line, *, title: str, masked: bool, axes: tuple[str, str]
) -> tuple[list[Path], str]:
    """Draw maps side by side into `stem`.png and `stem`.svg.

    Args:
        stem: path without its ending.
        panels: what is shown.
        rows: who looks.
        columns: what is looked at.
        title: stands above all.
        masked: whether a row sees no later column: those are drawn as blank.
        axes: what rows and columns are called.

    Returns:
        The files, and the characters that no font of this machine has.
    """
    row_labels, column_labels = ([label(token) for token in line.tokens] for line in (rows, columns))
    families, missing = families_for([*row_labels, *column_labels, title])
    edge = MAP_IN if len(panels) == 1 else BESIDE_IN
    cell = min(LARGEST_IN, max(SMALLEST_IN, edge / max(len(rows), len(columns))))
    left, top = (LETTER_IN * max(map(_width, labels)) + 0.35 for labels in (row_labels, column_labels))
    wide, tall = cell * len(columns), cell * len(rows)
    head = 0.8 if any(panel.title for panel in panels) else 0.5
    step_x, height = left + max(wide, 1.9) + 0.9, top + tall + head + 0.05
    with mpl.rc_context(_settings(families)):
        figure = Figure(figsize=(max(step_x * len(panels), 4.5), height), dpi=DPI, facecolor="white")
        figure.text(0.14 / figure.get_figwidth(), 1 - 0.3 / height, title, fontsize=11, weight="bold", va="center")
        for number, panel in enumerate(panels):
            at = (step_x * number + left, 0.3, wide, tall)
            place = figure.add_axes(_share(figure, at))
            shown = blank_unseen(panel.weights) if masked else panel.weights
            image = place.imshow(shown, cmap=_map(panel), norm=_norm(panel), interpolation="none", aspect="auto")
            _name(place, row_labels, column_labels, (rows, columns), cell)
            place.set_ylabel(axes[0], fontsize=8, color="#5c6470")
            place.set_xlabel(axes[1], fontsize=8, color="#5c6470", labelpad=3)
            x = (step_x * number + 0.14) / figure.get_figwidth()
            figure.text(x, 1 - 0.62 / height, panel.title, fontsize=9.5, color="#5c6470", va="center")
            _key(figure, image, (at[0] + wide + 0.12, 0.3, 0.09, min(tall, 1.6)))
        return _save(figure, stem, ("png", "svg")), missing


def draw_grid(
    stem: Path, panels: Sequence[Panel], *, title: str, layers: Sequence[int], heads: Sequence[Any] | None
) -> list[Path]:
    """Draw layers (rows) and heads (columns, None where there is one alone) as small maps into a PNG and an SVG."""
    pictures = [tile(panel.weights) for panel in panels]
    edge = pictures[0].shape[0] / len(layers)  # a small map with its gap, in pixels
    head = 0.8 if any(panel.title for panel in panels) else 0.5
    small = min(0.42, 11 / len(layers), 12 / (panels[0].weights.shape[1] * len(panels)))
    wide, tall = (pictures[0].shape[at] / edge * small for at in (1, 0))
    step_x, height = max(wide, 1.6) + 1.15, tall + head + 0.5
    with mpl.rc_context(_settings(families_for([title])[0])):
        figure = Figure(figsize=(max(step_x * len(panels) + 0.1, 5.2), height), dpi=DPI, facecolor="white")
        figure.text(0.14 / figure.get_figwidth(), 1 - 0.3 / height, title, fontsize=11, weight="bold", va="center")
        for number, (panel, picture) in enumerate(zip(panels, pictures, strict=True)):
            at = (step_x * number + 0.5, 0.45, wide, tall)
            place = figure.add_axes(_share(figure, at))
            image = place.imshow(
                picture, cmap=_map(panel, "white"), norm=_norm(panel), interpolation="none", aspect="auto"
            )
            for axis, names in ((place.yaxis, layers), (place.xaxis, heads or [])):
                every = _every(len(names), small, 0.2 if axis is place.xaxis else LABEL_IN)
                axis.set_ticks([(i + 0.5) * edge - 1 for i in range(0, len(names), every)], list(names)[::every])
            _plain(place, 7)
            place.set_ylabel("layer", fontsize=8, color="#5c6470")
            place.set_xlabel("head" if heads else "", fontsize=8, color="#5c6470", labelpad=3)
            x = (step_x * number + 0.14) / figure.get_figwidth()
            figure.text(x, 1 - 0.62 / height, panel.title, fontsize=9.5, color="#5c6470", va="center")
            _key(figure, image, (at[0] + wide + 0.1, 0.45, 0.08, min(tall, 1.6)))
        return _save(figure, stem, ("png", "svg"))


def tile(weights_LHQT: Matrix) -> Matrix:
    """Put small maps into one picture, with a blank line between them."""
    layers, heads = weights_LHQT.shape[:2]
    tall, wide = weights_LHQT.shape[2:]
    picture: Matrix = np.full((layers * (tall + 2), heads * (wide + 2)), np.nan, dtype=np.float32)
    for i in range(layers):
        for k in range(heads):
            y, x = i * (tall + 2), k * (wide + 2)
            picture[y : y + tall, x : x + wide] = weights_LHQT[i, k]
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


def blank_unseen(weights_QT: Matrix) -> Matrix:
    """Return masked attention with what a row cannot see as no number, which is drawn as blank."""
    blank: Matrix = weights_QT.copy()
    blank[np.triu_indices_from(blank, 1)] = np.nan
    return blank


def _settings(families: Sequence[str]) -> Any:
    return {
        "font.family": list(families),
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "llmtune",
        "axes.unicode_minus": True,
        "text.parse_math": False,
    }


def _share(figure: Figure, inches: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Return left, bottom, width, height as shares of the figure."""
    wide, tall = figure.get_size_inches()
    return inches[0] / wide, inches[1] / tall, inches[2] / wide, inches[3] / tall


def _norm(panel: Panel) -> Normalize:
    most = max(float(np.nanmax(np.abs(panel.weights))), 1e-6)
    if panel.difference:
        return FuncNorm((lambda x: np.sign(x) * np.abs(x) ** GAMMA, lambda y: y * np.abs(y)), -most, most)
    return PowerNorm(GAMMA, 0, most)


def _map(panel: Panel, unseen: str = UNSEEN) -> Colormap:
    return difference_map(unseen) if panel.difference else weight_map(unseen)


def _name(
    place: Axes, row_labels: Sequence[str], column_labels: Sequence[str], lines: tuple[Line, Line], cell: float
) -> None:
    """Write the words beside the map; special tokens are slanted and grey."""
    every = _every(max(map(len, lines)), cell, LABEL_IN)
    place.xaxis.tick_top()
    for axis, names, line in ((place.yaxis, row_labels, lines[0]), (place.xaxis, column_labels, lines[1])):
        shown = range(0, len(names), every)
        axis.set_ticks(list(shown), [names[i] for i in shown])
        for tick, at in zip(axis.get_ticklabels(), shown, strict=True):
            if axis is place.xaxis:
                tick.set(rotation=90, va="bottom", ha="center")
            if line.tokens[at].special:
                tick.set(color="#8a5a00", fontstyle="italic")
    _plain(place, min(9.0, max(5.5, 72 * every * cell * 0.62)))


def _plain(place: Axes, size: float) -> None:
    place.tick_params(length=0, labelsize=size, pad=3)
    for spine in place.spines.values():
        spine.set_visible(False)


def _every(count: int, cell: float, needed: float) -> int:
    return max(1, math.ceil(needed / cell)) if count > 1 else 1


def _key(figure: Figure, image: Any, inches: tuple[float, float, float, float]) -> None:
    bar = figure.colorbar(image, cax=figure.add_axes(_share(figure, inches)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=7)
    low, high = image.norm.vmin, image.norm.vmax
    ticks = [low, 0, high] if low < 0 else [0, high / 4, high]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.ax.minorticks_off()


def _width(text: str) -> float:
    """Return how wide a label is, in letters: ideographs count twice."""
    return sum(1.75 if ord(letter) >= 0x1100 else 1 for letter in text)


def _save(figure: Figure, stem: Path, endings: Sequence[str]) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for ending in endings:
        path = stem.with_name(f"{stem.name}.{ending}")
        temporary = path.with_name(f".{path.name}.tmp")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # said once, by who called
            unsaid = ("Date", "Creator", "Format", "Type") if ending == "svg" else ("Software",)
            figure.savefig(temporary, format=ending, metadata=dict.fromkeys(unsaid))
        temporary.replace(path)
        written.append(path)
    return written
