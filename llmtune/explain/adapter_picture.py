"""Where the tuning went, as a heatmap in PNG and SVG: layers down, kinds of modules across."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.explain.colours import weight_map

if TYPE_CHECKING:
    from llmtune.explain.adapter import Map
    from llmtune.explain.weight_delta import Move

CELL_IN, WIDE_IN, LETTER_IN, DPI = 0.21, 0.5, 0.075, 110
"""Height and width of a cell, and width of a letter, in inches."""
MOST_IN = 14.0
"""Of the map's height: deeper models get lower cells."""
WRITTEN = 0.17
"""Height of a cell from which its number is written into it."""
MUTED = "#5c6470"


def draw_moves(path: Path, found: Map) -> list[Path]:
    """Draw movement beside effective rank into `path` with .png and .svg; nothing where there are no layers."""
    if not found.rows:
        return []
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        ("Moved, % of the weights’ norm", grid(found, percent)),
        ("Effective rank of the change", grid(found, rank)),
    ]
    panels = [(title, values) for title, values in panels if not np.isnan(values).all()]
    cell = min(CELL_IN, MOST_IN / len(found.rows))
    left = LETTER_IN * max(map(len, found.rows)) + 0.5
    top = 0.82 * LETTER_IN * max(map(len, found.columns)) + 0.5
    wide, tall = WIDE_IN * len(found.columns), cell * len(found.rows)
    step, height = left + wide + 0.75, top + tall + 0.25
    settings: Any = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "adapter", "text.parse_math": False}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(step * len(panels), height), facecolor="white")
        FigureCanvasAgg(figure)
        for number, (title, values) in enumerate(panels):
            at = (
                (step * number + left) / (step * len(panels)),
                0.25 / height,
                wide / (step * len(panels)),
                tall / height,
            )
            axes = figure.add_axes(at)
            draw_panel(figure, axes, values, found, cell, title)
        paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=DPI, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def draw_panel(figure: Any, axes: Any, values: Any, found: Map, cell: float, title: str) -> None:
    """Draw one map with its names and its key."""
    shown = weight_map()
    most = float(np.nanmax(values)) or 1.0
    image = axes.imshow(values, cmap=shown, vmin=0, vmax=most, aspect="auto", interpolation="none")
    every = max(1, round(0.13 / cell))
    axes.set_yticks(range(0, len(found.rows), every), found.rows[::every])
    axes.set_xticks(range(len(found.columns)), found.columns, rotation=55, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=3)
    axes.set_ylabel("layer", color=MUTED)
    figure.text(axes.get_position().x0, 1 - 0.2 / figure.get_figheight(), title, weight="bold", fontsize=9, va="center")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if cell >= WRITTEN:
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            colour = "black" if value > 0.7 * most else "white"
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=6.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, shrink=min(1.0, 2.2 / (cell * len(found.rows))))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=7)


def grid(found: Map, measure: Any) -> Any:
    """Return a measure by layer and column, [rows, columns]; NaN where there is none."""
    values = np.full((len(found.rows), len(found.columns)), np.nan)
    for (row, column), move in found.cells.items():
        value = measure(move)
        if value is not None:
            values[found.rows.index(row), found.columns.index(column)] = value
    return values


def percent(move: Move) -> float | None:
    """The change as a percentage of the weights."""
    return None if move.relative is None else 100 * move.relative


def rank(move: Move) -> float | None:
    """The effective rank of the change."""
    return move.effective_rank
