"""Figures as PNG and SVG, by matplotlib: heatmaps side by side, fonts and colours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, FuncNorm, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from llmtune.store.atomic_files import atomic_file

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

DPI = 150
INK, MUTED, LINE, BLUE, ORANGE, GREY, WARN = "#1b1f26", "#5c6470", "#c9ced6", "#2563c9", "#c9621a", "#7d8593", "#8a5a00"
WEIGHT_COLOURS = ("#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf")
"""Colours from 0 to the maximum: matplotlib's magma (van der Walt and Smith), in equal steps."""
DIFFERENCE_COLOURS = ("#b9e3ff", "#5fb0f5", "#2b6fc2", "#163a68", "#101216", "#6b3410", "#c9621a", "#f79a4b", "#ffdcae")
"""Colours from stronger in the base, over equal, to stronger in the tuned model."""
UNSEEN = "#e9ebef"
"""Colour of masked cells."""
LETTER_IN, LABEL_IN = 0.085, 0.105
"""Width of a label's letter and height of a label, in inches."""
UNFIT_FONTS = ("Emoji", "Last Resort")
"""Name parts of unusable fonts: those with colour bitmaps, or with a box for every letter."""
FIRST_FONT = "DejaVu Sans"
"""Ships with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic."""
SHAPED = {"\u200c", "\u200d", "\ufe0f"}
"""Characters without a glyph that change their neighbours."""
Values = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Panel:
    """One of several heatmaps side by side."""

    title: str
    values: Values
    """[R, C]; NaN cells stay blank."""
    difference: bool = False
    """Whether the values are differences, possibly negative."""
    gamma: float = 0.5
    """Exponent from value to colour; 0.5 makes small values visible."""
    written: str = ""
    """Format of the numbers in cells; empty for no numbers."""


@dataclass(frozen=True)
class Ticks:
    """The labels of an axis."""

    name: str
    labels: Sequence[str]
    special: Sequence[bool] = ()
    """Whether each label is slanted and grey."""


@contextmanager
def figure_settings(texts: Iterable[str], salt: str) -> Iterator[str]:
    """Set fonts for the letters of `texts`, and write files without dates; yield letters that no font has."""
    families, missing = fonts_for(texts)
    settings: dict[RcKeyType, object] = {
        "font.family": families,
        "font.size": 9,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": salt,
        "axes.edgecolor": LINE,
        "text.parse_math": False,
        "text.color": INK,
        "figure.facecolor": "white",
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # reported once, by the caller
        yield missing


def fonts_for(texts: Iterable[str]) -> tuple[list[str], str]:
    """Return font families in order of preference, and the characters that none of them has."""
    missing = {letter for text in texts for letter in text if not letter.isspace()} - SHAPED
    families = [FIRST_FONT]
    for entry in sorted(font_manager.fontManager.ttflist, key=_font_rank):
        if missing and not any(word in entry.name for word in UNFIT_FONTS):
            letters = missing & {chr(code) for code in font_manager.get_font(entry.fname).get_charmap()}
            families += [entry.name] if letters and entry.name not in families else []
            missing -= letters
    return families, "".join(sorted(missing))


def _font_rank(entry: font_manager.FontEntry) -> tuple[bool, bool, bool, str]:
    upright = str(entry.weight) in {"400", "normal", "regular"} and entry.style == "normal"
    plain = "Sans" in entry.name and "Mono" not in entry.name
    return entry.name != FIRST_FONT, not upright, not plain, entry.name


def save_figure(figure: Figure, stem: Path, endings: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write a figure to `stem` with each ending, atomically; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for ending in endings:
        path = stem.with_name(f"{stem.name}.{ending}")
        omitted = ("Date", "Creator", "Format", "Type") if ending == "svg" else ("Software",)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=ending, dpi=DPI, metadata=dict.fromkeys(omitted))
        written.append(path)
    return written


def label_width(labels: Iterable[str]) -> float:
    """Return the width of the widest label in inches; ideographs count nearly twice."""
    widths = (sum(1.75 if ord(letter) >= 0x1100 else 1 for letter in label) for label in labels)
    return LETTER_IN * max(widths, default=0)


def draw_heatmaps(
    stem: Path, panels: Sequence[Panel], rows: Ticks, columns: Ticks, *, title: str, cell: tuple[float, float]
) -> tuple[list[Path], str]:
    """Draw heatmaps side by side into `stem`.png and `stem`.svg; cell sizes are in inches.

    Returns:
        The files, and the characters that no font on this machine has.
    """
    wide, tall = (size * edge for size, edge in zip(cell, panels[0].values.shape[::-1], strict=True))
    width = (label_width(rows.labels) + wide + 1.2) * len(panels)
    height = label_width(columns.labels) + tall + 1.0 + (0.25 if any(panel.title for panel in panels) else 0)
    with figure_settings([*rows.labels, *columns.labels, title], stem.name) as missing:
        figure = Figure(figsize=(max(width, 1.25 * label_width([title]), 4.5), height), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            draw_heatmap(figure, axes, panel, rows, columns, cell)
        return save_figure(figure, stem), missing


def draw_heatmap(
    figure: Figure, axes: Axes, panel: Panel, rows: Ticks, columns: Ticks, cell: tuple[float, float]
) -> None:
    """Draw one heatmap with labels and colour bar."""
    colours = DIFFERENCE_COLOURS if panel.difference else WEIGHT_COLOURS
    colour_map = LinearSegmentedColormap.from_list("values", list(colours)).with_extremes(bad=UNSEEN)
    norm, most = _norm(panel)
    image = axes.imshow(panel.values, cmap=colour_map, norm=norm, interpolation="none", aspect=cell[1] / cell[0])
    axes.set_title(panel.title, fontsize=9.5, color=MUTED, loc="left")
    axes.xaxis.tick_top()
    for axis, ticks, edge in ((axes.yaxis, rows, cell[1]), (axes.xaxis, columns, cell[0])):
        every = max(1, math.ceil(LABEL_IN / edge))
        axis.set_ticks(list(range(0, len(ticks.labels), every)), list(ticks.labels)[::every])
        for tick, special in zip(axis.get_ticklabels(), list(ticks.special)[::every], strict=False):
            if special:
                tick.set(color=WARN, fontstyle="italic")
    turned = label_width(columns.labels) > max(cell[0] * panel.values.shape[1] / max(len(columns.labels), 1), 0.2)
    axes.tick_params(axis="x", rotation=90 if turned else 0)
    axes.tick_params(length=0, labelsize=min(9.0, max(5.5, 72 * max(cell[1], LABEL_IN) * 0.62)), pad=3)
    axes.set_ylabel(rows.name, fontsize=8, color=MUTED)
    axes.set_xlabel(columns.name, fontsize=8, color=MUTED, labelpad=3)
    axes.spines[:].set_visible(False)
    if panel.written:
        _write_numbers(axes, panel, colour_map, norm)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=18, shrink=0.9)
    ticks_shown = [-most, 0, most] if panel.difference else [0, most * panel.gamma**2, most]
    bar.set_ticks(ticks_shown, labels=[f"{tick:.2g}" for tick in ticks_shown])
    bar.minorticks_off()
    bar.ax.tick_params(length=2, labelsize=7)
    bar.outline.set_visible(False)


def _norm(panel: Panel) -> tuple[Normalize, float]:
    most = max(float(np.nanmax(np.abs(panel.values))), 1e-6)
    forward, inverse = (
        lambda x, power=power: np.sign(x) * np.abs(x) ** power for power in (panel.gamma, 1 / panel.gamma)
    )
    return FuncNorm((forward, inverse), -most if panel.difference else 0, most), most


def _write_numbers(axes: Axes, panel: Panel, colour_map: Colormap, norm: Normalize) -> None:
    for row, column in np.argwhere(~np.isnan(panel.values)):
        value = float(panel.values[row, column])
        light = sum(colour_map(float(norm(value)))[:3]) > 1.6
        text, ink = f"{value:z{panel.written}}", "black" if light else "white"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=6.5)
