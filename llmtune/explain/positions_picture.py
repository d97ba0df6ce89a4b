"""Positions as PNG and SVG: a heatmap of each table, and how alike positions are by how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.explain.position_encodings import Scheme, similarity_by_distance

NAMED = 40
"""Words that are written beside the rows; there is no room for more."""
WIDTH, HEIGHT, DPI = 11.0, 4.2, 130
MUTED = "#5c6470"


def draw_schemes(schemes: Sequence[Scheme], length: int, words: Sequence[str], path: Path) -> list[Path]:
    """Draw all of them, one below the other, into `path` with .png and .svg; returns both."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {"font.size": 9, "axes.edgecolor": "#c9ced6", "svg.hashsalt": "positions", "svg.fonttype": "path"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(schemes)), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for row, scheme in enumerate(schemes):
            if scheme.kind in ("bias", "slopes"):
                draw_lines(figure.add_subplot(len(schemes), 1, row + 1), scheme, length)
            else:
                draw_table(figure.add_subplot(len(schemes), 2, 2 * row + 1), scheme, length, words)
                draw_alike(figure.add_subplot(len(schemes), 2, 2 * row + 2), scheme, length)
        paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=DPI, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def draw_table(axes: Any, scheme: Scheme, length: int, words: Sequence[str]) -> None:
    """Draw a row a position and a column a dimension (of rotations: a pair of them)."""
    table = scheme.table(length)
    limit = float(np.quantile(np.abs(table), 0.995)) if scheme.kind == "learned" else 1.0
    image = axes.imshow(
        table, aspect="auto", cmap="RdBu_r", vmin=-limit or -1, vmax=limit or 1, interpolation="nearest"
    )
    axes.set_title(scheme.title, fontsize=10, loc="left")
    axes.set_xlabel("pair of dimensions (cosine of its angle)" if scheme.kind == "rotary" else "dimension")
    axes.set_ylabel("position")
    if words and len(words) <= NAMED:
        axes.set_yticks(range(len(words)), [f"{word}  {at}" for at, word in enumerate(words)])
    if table.shape[1] <= 16:
        axes.set_xticks(range(table.shape[1]))
        if len(table) <= 12:
            write_numbers(axes, table, limit)
    axes.figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)


def write_numbers(axes: Any, table: Any, limit: float) -> None:
    """Write the numbers of a small table into its cells."""
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", color=colour, fontsize=8)


def draw_alike(axes: Any, scheme: Scheme, length: int) -> None:
    """Draw how alike positions are by how far they are apart."""
    found = similarity_by_distance(scheme, length)
    axes.plot(found, color="#2563c9", linewidth=1.4, marker="o" if len(found) <= 16 else None, markersize=4)
    axes.axhline(0, color="#c9ced6", linewidth=1, zorder=0)
    axes.set_title("How alike two positions are", fontsize=10, loc="left")
    axes.set_xlabel("positions apart")
    axes.set_ylabel("mean cosine")
    axes.set_ylim(min(-0.1, float(found.min()) - 0.05), 1.05)
    if len(found) <= 16:
        axes.set_xticks(range(len(found)))
    axes.spines[["top", "right"]].set_visible(False)


def draw_lines(axes: Any, scheme: Scheme, length: int) -> None:
    """Draw a line a head: what is added to its scores by distance."""
    from matplotlib import colormaps

    distances, values = bias_lines(scheme, length)
    style = "steps-mid" if scheme.kind == "bias" else "default"
    for head, line in enumerate(values):
        colour = colormaps["viridis"](0.9 * head / max(1, len(values) - 1))
        axes.plot(distances, line, color=colour, linewidth=1.2, drawstyle=style, label=f"head {head}")
    axes.axvline(0, color="#c9ced6", linewidth=1, zorder=0)
    axes.set_title(scheme.title, fontsize=10, loc="left")
    axes.set_xlabel("distance of the word that is looked at (left: behind)")
    axes.set_ylabel("added to the score")
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) <= 16:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), labelcolor=MUTED)


def bias_lines(scheme: Scheme, length: int) -> tuple[list[int], Any]:
    """Return distances and, for each head, what is added to its scores there, [H, N]."""
    if scheme.kind == "bias":
        return list(scheme.distances), scheme.values
    distances = list(range(-min(length, 128), 1))
    return distances, scheme.values[:, None] * np.array(distances)
