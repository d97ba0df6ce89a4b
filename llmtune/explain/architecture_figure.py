"""The architecture as a figure: words enter at the bottom, scores leave at the top, and equal blocks are drawn once.

Lengths are in points of the saved figure; y grows upwards.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from llmtune.explain.architecture import PART_TITLES, Architecture, Blocks, ModelPart, Stack
from llmtune.explain.figures import BLUE, GREY, INK, MUTED, figure_settings, save_figure
from llmtune.explain.trained_modules import TrainedModules, short_module_name

BOX, HEAD, LINE, GAP = 276.0, 25.0, 16.0, 20.0
"""Width of a box, height of its title and of a line, and the space between boxes."""
RAIL, BESIDE, BETWEEN = 40.0, 96.0, 24.0
"""Space left of boxes for the residual path, right of a block for its count, and between stacks."""
LETTERS = 46
"""Font size of a line in a box."""
POINTS = 96.0
"""Points per inch."""
LILAC = "#a88be0"
COLOURS = {
    "attention": ("#dce8fd", "#6d9ae8"),
    "cross-attention": ("#ece4fb", LILAC),
    "feed-forward": ("#dff2e4", "#6fb585"),
    "experts": ("#dff2e4", "#6fb585"),
    "norm": ("#fdf1d6", "#d9b25a"),
    "embedding": ("#fbe4e1", "#dd8f87"),
    "positions": ("#fbe4e1", "#dd8f87"),
}
PLAIN = ("#eef0f4", "#b3bac6")


def draw_architecture(stem: Path, architecture: Architecture, trained: TrainedModules | None) -> list[Path]:
    """Draw the model into `stem`.svg."""
    with figure_settings([], stem.name):
        figure = Figure()
        axes = figure.add_axes((0, 0, 1, 1))
        columns: list[_Column] = []
        for number, stack in enumerate(architecture.stacks):
            columns.append(_Column(axes, number * (RAIL + BOX + BESIDE + BETWEEN), trained))
            columns[-1].draw(stack, ordered=architecture.untraced is None)
        for before, after in pairwise(columns):
            x, up = after.left - RAIL - BETWEEN / 2, before.y + 14
            for y in after.doors:  # the encoder's output goes to each cross-attention of the decoder
                way = ((before.middle, before.y), (before.middle, up), (x, up), (x, y), (after.left - 1, y))
                after.line(*way, colour=LILAC, width=1.8, arrow=True)
        width = max((column.left + BOX + BESIDE for column in columns), default=10.0)
        top = max((column.y for column in columns), default=0.0) + 18
        axes.set(xlim=(-6, width), ylim=(-14, top))
        axes.axis("off")
        figure.set_size_inches((width + 6) / POINTS, (top + 14) / POINTS)
        return save_figure(figure, stem, ("svg",))


class _Column:
    """One stack, drawn upwards; `y` is the current height."""

    def __init__(self, axes: Axes, x: float, trained: TrainedModules | None) -> None:
        self.axes, self.trained = axes, trained
        self.left = x + RAIL
        self.middle = self.left + BOX / 2
        self.y = 0.0
        self.doors: list[float] = []
        """y of the cross-attention boxes."""

    def draw(self, stack: Stack, *, ordered: bool) -> None:
        """Draw the stack; without a known order it gets no residual path."""
        self.text(self.middle, self.y, stack.reads, anchor="center", color=MUTED)
        self.y += 10
        for part in stack.before:
            self.piece(part)
        for blocks in stack.blocks:
            self.blocks(blocks, ordered=ordered)
        for part in stack.behind:
            self.piece(part)
        if stack.gives:
            self.arrow()
            self.text(self.middle, self.y + 9, stack.gives, anchor="center", color=MUTED)
            self.y += 18

    def text(self, x: float, y: float, words: str, *, size: float = 9, anchor: str = "left", **style: object) -> None:
        """Write text vertically centred at y."""
        self.axes.text(x, y, words, fontsize=size, ha=anchor, va="center", **style)  # type: ignore[arg-type]

    def line(self, *points: tuple[float, float], colour: str = INK, width: float = 1.0, arrow: bool = False) -> None:
        """Draw a line through points, with an arrowhead at its end."""
        if arrow:
            style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
            self.axes.annotate("", points[-1], points[-2], arrowprops=style)
        self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, solid_joinstyle="round")

    def arrow(self, tall: float = GAP) -> None:
        """Draw an arrow up to the next box."""
        self.line((self.middle, self.y), (self.middle, self.y + tall - 1), arrow=True)
        self.y += tall

    def sum(self) -> None:
        """Draw a sum above y."""
        self.y += 8
        self.axes.add_patch(Circle((self.middle, self.y), 9, facecolor="white", edgecolor=INK, linewidth=1, zorder=3))
        self.text(self.middle, self.y, "+", size=12, anchor="center", color=INK)
        self.y += 9

    def frame(self, x: float, wide: float, tall: float, colours: tuple[str, str], style: str = "-") -> None:
        """Draw a rounded rectangle whose bottom is at y."""
        box = FancyBboxPatch((x, self.y), wide, tall, boxstyle="round,pad=0,rounding_size=7", linewidth=1, zorder=2)
        box.set(facecolor=colours[0], edgecolor=colours[1], linestyle=style)
        self.axes.add_patch(box)

    def box(self, part: ModelPart, names: Callable[[str], Sequence[str]]) -> None:
        """Draw a part: title, description, and its modules with the trained ones marked."""
        lines = [line for words in part.about.split("; ") for line in textwrap.wrap(words, LETTERS)]
        inside = part.names
        marks = [self.trained.mark(names(name)) if self.trained else "" for name in inside]
        rows = list(zip(part.weights, marks, strict=True)) if part.kind in PART_TITLES or any(marks) else []
        tall = HEAD + LINE * (len(lines) + len(rows)) + (6 if lines or rows else 0)
        self.frame(self.left, BOX, tall, COLOURS.get(part.kind, PLAIN))
        y, right = self.y + tall - HEAD / 2, self.left + BOX - 11
        self.text(self.left + 11, y, part.title, weight="bold", color=INK)
        self.text(right, y, brief_size(part.parameters), anchor="right", color=MUTED)
        y -= 3
        for line in lines:
            y -= LINE
            self.text(self.left + 11, y, line, size=8.5, color=MUTED)
        for weights, mark in rows:
            y -= LINE
            self.text(self.left + 11, y, short_module_name(weights.name, inside), size=8, color=INK)
            if mark:
                badge = {"boxstyle": "round,pad=0.25", "facecolor": BLUE, "edgecolor": "none"}
                self.text(right, y, mark, size=7.5, anchor="right", color="white", bbox=badge)
            x = right - 6.3 * len(mark) - (10 if mark else 0)
            self.text(x, y, weights.shape if part.kind in PART_TITLES else "", size=8, anchor="right", color=INK)
        self.y += tall

    def piece(self, part: ModelPart) -> None:
        """Draw a part outside the blocks; a part added to the path is right of a sum."""
        if not part.added:
            self.arrow()
            self.box(part, lambda name: [name])
            return
        tall = HEAD + LINE + 4
        self.arrow(tall / 2 + 8)
        x, wide, middle = self.middle + 34, BOX / 2 + BESIDE - 40, self.y + 9
        self.y = middle - tall / 2
        self.frame(x, wide, tall, COLOURS[part.kind])
        self.text(x + 10, middle + 9, part.title, weight="bold", color=INK)
        size = f" · {brief_size(part.parameters)}" if part.parameters else ""
        self.text(x + 10, middle - 9, f"{part.about}{size}", size=8.5, color=MUTED)
        self.line((x, middle), (self.middle + 10, middle), arrow=True)
        self.y = middle - 8
        self.sum()

    def blocks(self, blocks: Blocks, *, ordered: bool) -> None:
        """Draw a framed block with its count, and the residual path left of its parts."""
        self.arrow()
        bottom = start = self.y
        for part in blocks.parts:
            if part.place == "branch":
                start = self.y + 8
                self.line((self.middle, self.y), (self.middle, self.y + 14))
                self.y += 14
            if part.place == "beside":
                words = "in parallel, from the same place"
                self.text(self.middle, self.y + GAP / 2, words, anchor="center", color=MUTED)
                self.y += GAP
            else:
                self.arrow()
            self.box(part, blocks.names)
            if part.kind == "cross-attention":
                self.doors.append(self.y - 12)
            if part.added and ordered:
                self.arrow()
                rail, y = self.left - RAIL + 20, self.y + 8
                way = ((self.middle, start), (rail, start), (rail, y), (self.middle - 10, y))
                self.line(*way, colour=GREY, width=1.5, arrow=True)
                self.sum()
        self.line((self.middle, self.y), (self.middle, self.y + 30))
        top, self.y = self.y + 30, bottom
        self.frame(self.left - RAIL + 4, BOX + RAIL + 10, top - bottom, ("none", PLAIN[1]), "--")
        self.y = top
        self.text(self.left - RAIL + 18, top - 15, blocks.title, size=8.5, color=MUTED)
        right, y = self.left + BOX + 22, (top + bottom) / 2
        self.text(right, y, f"× {len(blocks.numbers) * blocks.runs}", size=16, weight="bold", color=INK)
        each = f"{brief_size(blocks.typical)}{' each' if len(blocks.numbers) > 1 else ''}"
        self.text(right, y - 22, "same weights" if blocks.runs > 1 else each, size=8.5, color=MUTED)


def briefly(number: float) -> str:
    """Write a number in three digits, such as 135 M for 134,515,008."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number:g}"


def brief_size(number: float) -> str:
    """Write a number of parameters in three digits (B for billions); return "" for 0."""
    return briefly(number).replace("G", "B") if number else ""
