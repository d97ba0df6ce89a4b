"""The architecture as a figure: words come in below, scores come out above, and equal blocks are drawn once.

Lengths are in points at the size at which the figure is saved; y grows upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from llmtune.explain.architecture import Architecture, Blocks, Piece, Stack
from llmtune.explain.block_wiring import Branch, Norm, Sublayer
from llmtune.explain.figures import BLUE, GREY, INK, MUTED, figure_settings, save_figure
from llmtune.explain.labels import (
    Row,
    brief_size,
    describe_branch,
    describe_extras,
    describe_inputs,
    describe_outputs,
    describe_piece,
    mark,
    number_blocks,
    rows_of,
    title_branch,
    title_piece,
)
from llmtune.explain.trained_modules import TrainedModules

BOX, HEAD, LINE, ROW, GAP = 276.0, 25.0, 16.0, 18.0, 20.0
"""Width of a box, heights of its title, a line and a row in it, and space between boxes."""
RAIL, BESIDE, BETWEEN, APART = 40.0, 96.0, 24.0, 16.0
"""Space left of the boxes for the residual path, right of a block for how often it comes, between two stacks, and
between boxes side by side."""
POINTS = 96.0
"""Of an inch."""
LETTER = 6.3
"""Width of a letter of a row, on the mean."""
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
        x = 0.0
        for stack in architecture.stacks:
            columns.append(_Column(axes, x, architecture, stack, trained))
            columns[-1].draw()
            x += columns[-1].width + BETWEEN
        for before, after in pairwise(columns):
            if architecture.family == "encoder-decoder":
                _join(axes, before, after)
        width, top = max(x - BETWEEN, 10) + 12, max((column.y for column in columns), default=0) + 10
        axes.set(xlim=(-6, width), ylim=(-14, top))
        axes.axis("off")
        figure.set_size_inches((width + 6) / POINTS, (top + 14) / POINTS)
        return save_figure(figure, stem, ("svg",))


class _Column:
    """One stack, drawn from below: `y` is how far it has come."""

    def __init__(
        self, axes: Axes, x: float, architecture: Architecture, stack: Stack, trained: TrainedModules | None
    ) -> None:
        self.axes, self.architecture, self.stack, self.trained = axes, architecture, stack, trained
        sublayers = [s for group in stack.blocks if group.wiring for s in group.wiring.sublayers]
        wide = max((len(sublayer.branches) for sublayer in sublayers), default=1)
        self.inner = wide * BOX + (wide - 1) * APART
        self.left = x + RAIL
        self.middle = self.left + self.inner / 2
        self.width = RAIL + self.inner + BESIDE
        self.y = 0.0
        self.doors: list[tuple[float, float]] = []
        """Left edges of the boxes of cross-attention."""

    def draw(self) -> None:
        """Draw all of it."""
        self.end(describe_inputs(self.architecture, self.stack))
        first = True
        for piece in self.stack.before:
            if not first and _is_added(piece):
                self.added(piece)
            elif not (piece.kind == "positions" and not piece.shape[0]):  # rotary: named at the attention
                self.piece(piece)
                first = False
        for group in self.stack.blocks:
            self.blocks(group)
        for piece in self.stack.behind:
            self.piece(piece)
        words = describe_outputs(self.architecture, self.stack)
        if words:
            self.arrow(self.middle)
            self.y += 9
            self.end(words)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 9,
        anchor: str = "left",
        color: str = INK,
        weight: str = "normal",
    ) -> None:
        """Write in the middle of a line at y."""
        self.axes.text(x, y, words, fontsize=size, ha=anchor, va="center", color=color, weight=weight)

    def end(self, words: str) -> None:
        """Write what comes in or goes out."""
        self.text(self.middle, self.y, words, anchor="center", color=MUTED)
        self.y += 10

    def line(self, *points: tuple[float, float], colour: str = INK, width: float = 1.0, arrow: bool = False) -> None:
        """Draw a way through points, with an arrow's head at its end."""
        if arrow:
            style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
            self.axes.annotate("", points[-1], points[-2], arrowprops=style)
        self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, solid_joinstyle="round")

    def arrow(self, x: float, tall: float = GAP) -> None:
        """Go up to the next box."""
        self.line((x, self.y), (x, self.y + tall - 1), arrow=True)
        self.y += tall

    def sum(self, y: float) -> None:
        """Draw a sum."""
        self.axes.add_patch(Circle((self.middle, y), 9, facecolor="white", edgecolor=INK, linewidth=1, zorder=3))
        self.text(self.middle, y, "+", size=12, anchor="center")

    def frame(self, kind: str, x: float, wide: float, tall: float, *, dashed: bool = False) -> None:
        """Draw a rounded rectangle whose bottom is at y."""
        face, edge = ("none", PLAIN[1]) if dashed else COLOURS.get(kind, PLAIN)
        box = FancyBboxPatch((x, self.y), wide, tall, boxstyle="round,pad=0,rounding_size=7", linewidth=1, zorder=2)
        box.set(facecolor=face, edgecolor=edge, linestyle="--" if dashed else "-")
        self.axes.add_patch(box)

    def box(
        self, kind: str, title: str, size: int, lines: Sequence[str] = (), rows: Sequence[Row] = (), x: float = 0
    ) -> None:
        """Draw a box in the middle or at x, with a way to it from below."""
        self.arrow(x or self.middle)
        left = (x or self.middle) - BOX / 2
        tall = HEAD + LINE * len(lines) + ROW * len(rows) + (8 if rows else 4 if lines else 0)
        self.frame(kind, left, BOX, tall)
        y = self.y + tall - HEAD / 2
        self.text(left + 11, y, title, weight="bold")
        self.text(left + BOX - 11, y, brief_size(size) if size else "", anchor="right", color=MUTED)
        y -= 3
        for line in lines:
            y -= LINE
            self.text(left + 11, y, _cut(line, BOX - 20), size=8.5, color=MUTED)
        for row in rows:
            y -= ROW
            right = left + BOX - 11
            if row.mark:
                self.axes.text(
                    right,
                    y,
                    row.mark,
                    fontsize=7.5,
                    ha="right",
                    va="center",
                    color="white",
                    bbox={"boxstyle": "round,pad=0.25", "facecolor": BLUE, "edgecolor": "none"},
                )
                right -= LETTER * len(row.mark) + 10
            self.text(right, y, row.shape, size=8, anchor="right")
            self.text(left + 11, y, _cut(row.name, right - left - 20 - LETTER * len(row.shape)), size=8)
        self.y += tall

    def added(self, piece: Piece) -> None:
        """Draw a part that is added to what comes from below: positions, token types."""
        tall = HEAD + LINE + 4
        self.arrow(self.middle, tall / 2 + 8)
        x, wide, middle = self.middle + 34, self.inner / 2 + BESIDE - 40, self.y + 9
        self.y = middle - tall / 2
        self.frame(piece.kind, x, wide, tall)
        self.text(x + 10, middle + 9, title_piece(piece), weight="bold")
        size = f" · {brief_size(piece.parameters)}" if piece.parameters else ""
        self.text(x + 10, middle - 9, f"{describe_piece(piece) or 'computed'}{size}", size=8.5, color=MUTED)
        self.line((x, middle), (self.middle + 10, middle), arrow=True)
        self.sum(middle)
        self.y = middle + 9

    def piece(self, piece: Piece) -> None:
        """Draw a part beside the blocks."""
        trained, detail = mark([piece.name], self.trained), describe_piece(piece)
        rows = [Row(detail, "", 0, trained)] if trained and piece.kind != "norm" else []
        lines = [detail] if detail and not rows and piece.kind != "norm" else []
        self.box(piece.kind, title_piece(piece), piece.parameters, lines, rows)

    def norms(self, norms: Sequence[Norm], group: Blocks, x: float = 0) -> None:
        """Draw norms, one above the other."""
        for norm in norms:
            self.box("norm", norm.kind, group.sizes.get(norm.module, 0), x=x)

    def blocks(self, group: Blocks) -> None:
        """Draw a block in its frame, with how often it comes."""
        self.arrow(self.middle)
        bottom = self.y
        if group.wiring is None:
            rows = rows_of([name for name, size in group.sizes.items() if size], group, self.trained)
            self.box("norm", "Order of parts not known", group.typical, [group.unknown or ""], rows)
        else:
            self.norms(group.wiring.entry, group)
            for sublayer in group.wiring.sublayers:
                self.sublayer(sublayer, group)
        self.line((self.middle, self.y), (self.middle, self.y + 30))
        top, self.y = self.y + 30, bottom
        self.frame("", self.left - RAIL + 4, self.inner + RAIL + 10, top - bottom, dashed=True)
        self.y = top
        self.text(self.left - RAIL + 18, top - 15, number_blocks(group), size=8.5, color=MUTED)
        extras = _cut(describe_extras(group), self.inner / 2)
        self.text(self.left + self.inner, top - 15, extras, size=8.5, anchor="right", color=MUTED)
        right, y = self.left + self.inner + 22, (top + bottom) / 2
        self.text(right, y, f"× {len(group.numbers) * max(group.runs, 1)}", size=16, weight="bold")
        each = f"{brief_size(group.typical)}{' each' if len(group.numbers) > 1 else ''}"
        self.text(right, y - 22, "same weights" if group.runs > 1 else each, size=8.5, color=MUTED)

    def sublayer(self, sublayer: Sublayer, group: Blocks) -> None:
        """Draw what leaves the residual path and joins it again, and the path itself at its left."""
        self.line((self.middle, self.y), (self.middle, self.y + 14))
        start = self.y + 8
        self.y += 14
        branches = sublayer.branches
        shared = branches[0].before if all(branch.before == branches[0].before for branch in branches) else ()
        if len(branches) > 1:
            self.norms(shared, group)
        bottom, tops = self.y, []
        for i, branch in enumerate(branches):
            x = self.left + BOX / 2 + i * (BOX + APART) if len(branches) > 1 else self.middle
            self.y = bottom
            self.line((self.middle, bottom), (x, bottom))
            self.branch(branch, group, x, () if len(branches) > 1 and shared else branch.before)
            tops.append((x, self.y))
        self.y = max(y for _, y in tops) + (10 if len(tops) > 1 else 0)
        for x, y in tops:
            self.line((x, y), (x, self.y), (self.middle, self.y))
        self.arrow(self.middle, GAP)
        self.y += 8
        rail = self.left - RAIL + 20
        self.line(
            (self.middle, start),
            (rail, start),
            (rail, self.y),
            (self.middle - 10, self.y),
            colour=GREY,
            width=1.5,
            arrow=True,
        )
        self.sum(self.y)
        self.y += 9
        self.norms(sublayer.behind, group)

    def branch(self, branch: Branch, group: Blocks, x: float, before: Sequence[Norm]) -> None:
        """Draw norms and the part with weights of one branch."""
        self.norms(before, group, x)
        size = sum(group.sizes.get(name, 0) for name in branch.modules)
        rows = rows_of(branch.modules, group, self.trained)
        lines = describe_branch(branch, group, self.stack)
        self.box(branch.kind, title_branch(branch, self.stack), size, lines, rows, x)
        if branch.kind == "cross-attention":
            self.doors.append((x - BOX / 2, self.y - 12))
        self.norms(branch.after, group, x)


def _join(axes: Axes, encoder: _Column, decoder: _Column) -> None:
    """Lead what the encoder gives to each cross-attention of the decoder."""
    x, up = decoder.left - RAIL - BETWEEN / 2, encoder.y + 14
    for door, y in decoder.doors:
        points = ((encoder.middle, encoder.y), (encoder.middle, up), (x, up), (x, y), (door - 1, y))
        decoder.line(*points, colour=LILAC, width=1.8, arrow=True)


def _is_added(piece: Piece) -> bool:
    """Whether a part is added to what comes from below, as a table of positions is."""
    table = piece.kind == "positions" and (len(piece.shape) >= 2 or "sinus" in piece.about.lower())
    types = piece.kind == "embedding" and "type" in piece.name.rpartition(".")[2]
    return table or types or "pos_conv" in piece.name


def _cut(words: str, width: float) -> str:
    most = max(4, int(width / LETTER))
    return words if len(words) <= most else words[: most - 1] + "…"
