"""The architecture as a picture: words come in below, scores come out above, and equal blocks are drawn once.

SVG whose colours are CSS variables: on a page they are the page's, and a file of its own brings them along.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from llmtune.explain.adapter_weights import Carriers
from llmtune.explain.architecture import Architecture, Blocks, Piece, Stack
from llmtune.explain.block_structure import Branch, Norm, Sublayer
from llmtune.explain.labels import (
    Row,
    brief_size,
    describe_branch,
    describe_piece,
    mark,
    number_blocks,
    rows_of,
    tell_extras,
    tell_inputs,
    tell_outputs,
    title_branch,
    title_piece,
)

BOX, HEAD, LINE, ROW, GAP = 276, 25, 16, 18, 20
"""Width of a box, heights of its title, a line and a row in it, and space between boxes."""
RAIL, BESIDE = 40, 96
"""Space left of the boxes for the residual path, and right of a block for how often it comes."""
BETWEEN, APART = 44, 16
"""Space between two stacks, and between boxes side by side."""
TIP = Markup(
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="9" markerHeight="9" '
    'markerUnits="userSpaceOnUse" orient="auto">'
    '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
)
LETTER = 6.3
"""Width of a letter of a row, on the mean."""


def draw_architecture(architecture: Architecture, carriers: Carriers | None) -> Markup:
    """Return the picture as one `svg` element of the class `arch`."""
    columns: list[_Column] = []
    x = 0.0
    for stack in architecture.stacks:
        columns.append(_Column(x, architecture, stack, carriers))
        x += columns[-1].width + BETWEEN
    parts = [part for column in columns for part in column.draw()]
    for before, after in pairwise(columns):
        if architecture.family == "encoder-decoder":
            parts += _join(before, after)
    width = max(x - BETWEEN, 10)
    top = min((column.y for column in columns), default=0) - 8
    name = f"Architecture of {architecture.model_class}"
    return Markup('<svg class="arch" viewBox="0 {:.0f} {:.0f} {:.0f}" role="img" aria-label="{}">{}{}</svg>').format(
        top, width, 12 - top, name, TIP, Markup("").join(parts)
    )


class _Column:
    """One stack, drawn from below: `y` is how far it has come, and grows smaller."""

    def __init__(self, x: float, architecture: Architecture, stack: Stack, carriers: Carriers | None) -> None:
        self.architecture, self.stack, self.carriers = architecture, stack, carriers
        self.wide = max(
            (len(s.branches) for g in stack.blocks for s in (g.wiring.sublayers if g.wiring else ())), default=1
        )
        self.inner = self.wide * BOX + (self.wide - 1) * APART
        self.left = x + RAIL
        self.middle = self.left + self.inner / 2
        self.width = RAIL + self.inner + BESIDE
        self.y = 0.0
        self.parts: list[Markup] = []
        self.doors: list[tuple[float, float]] = []
        """Left edges of the boxes of cross-attention."""

    def draw(self) -> list[Markup]:
        """Draw all of it."""
        self.label(tell_inputs(self.architecture, self.stack))
        first = True
        for piece in self.stack.before:
            if self._is_beside(piece, first):
                self._add_beside(piece)
            elif not (piece.kind == "positions" and not piece.shape[0]):  # rotary: told at the attention
                self.arrow()
                self.piece(piece)
                first = False
        for group in self.stack.blocks:
            self.arrow()
            self.blocks(group)
        for piece in self.stack.behind:
            self.arrow()
            self.piece(piece)
        told = tell_outputs(self.architecture, self.stack)
        if told:
            self.arrow()
            self.label(told)
        return self.parts

    def _is_beside(self, piece: Piece, first: bool) -> bool:
        last = piece.name.rpartition(".")[2]
        table = piece.kind == "positions" and len(piece.shape) >= 2
        table |= piece.kind == "positions" and "sinus" in piece.about.lower()
        return not first and (table or (piece.kind == "embedding" and "type" in last) or "pos_conv" in piece.name)

    def _add_beside(self, piece: Piece) -> None:
        """Add a part to what comes from below: positions, token types."""
        x, wide = self.middle + 34, self.inner / 2 + BESIDE - 40
        tall = HEAD + LINE + 4
        self.arrow(tall=tall - 18)
        self.y -= 11
        self.plus(self.middle, self.y)
        self.parts.append(_rect(_kind(piece), x, self.y - tall / 2, wide, tall))
        self.parts.append(_text(x + 10, self.y - 5, title_piece(piece), "title"))
        size = f" · {brief_size(piece.parameters)}" if piece.parameters else ""
        self.parts.append(_text(x + 10, self.y + 12, f"{describe_piece(piece) or 'computed'}{size}", "line"))
        self.parts.append(_path(f"M{x:.1f} {self.y:.1f}H{self.middle + 12:.1f}", "flow"))
        self.y -= 10

    def label(self, words: str) -> None:
        """Write what comes in or goes out."""
        self.parts.append(_text(self.middle, self.y - 4, words, "end", "middle"))
        self.y -= 20

    def arrow(self, x: float | None = None, tall: float = GAP) -> None:
        """Go up to the next box."""
        x = self.middle if x is None else x
        self.parts.append(_path(f"M{x:.1f} {self.y:.1f}V{self.y - tall + 2:.1f}", "flow"))
        self.y -= tall

    def plus(self, x: float, y: float) -> None:
        """Draw a sum."""
        self.parts.append(Markup('<circle class="sum" cx="{:.1f}" cy="{:.1f}" r="10"/>').format(x, y))
        self.parts.append(_path(f"M{x - 5:.1f} {y:.1f}h10M{x:.1f} {y - 5:.1f}v10", "cross"))

    def box(
        self, kind: str, title: str, size: int, lines: Sequence[str] = (), rows: Sequence[Row] = (), *, x: float = 0
    ) -> None:
        """Draw a box with its bottom at `y`, in the middle or at `x`."""
        left = (x or self.middle) - BOX / 2
        tall = HEAD + LINE * len(lines) + ROW * len(rows) + (8 if rows else 4 if lines else 0)
        self.y -= tall
        self.parts.append(_rect(kind, left, self.y, BOX, tall))
        self.parts.append(_text(left + 11, self.y + 17, title, "title"))
        self.parts.append(_text(left + BOX - 11, self.y + 17, brief_size(size) if size else "", "size", "end"))
        y = self.y + HEAD + 9
        for line in lines:
            self.parts.append(_text(left + 11, y, _cut(line, BOX - 20), "line"))
            y += LINE
        for row in rows:
            self._row(left, y + 4, row)
            y += ROW

    def _row(self, left: float, y: float, row: Row) -> None:
        right = left + BOX - 11
        if row.mark:
            wide = LETTER * len(row.mark) + 12
            self.parts.append(_rect("mark", right - wide + 4, y - 12, wide, 16, 8))
            self.parts.append(_text(right - wide / 2 + 4, y, row.mark, "marked", "middle"))
            right -= wide + 2
        self.parts.append(_text(right, y, row.shape, "row", "end"))
        self.parts.append(_text(left + 11, y, _cut(row.name, right - left - 20 - LETTER * len(row.shape)), "row"))

    def piece(self, piece: Piece) -> None:
        """Draw a part beside the blocks."""
        told = mark([piece.name], self.carriers)
        detail = describe_piece(piece)
        if piece.kind == "norm":
            self.box("norm", piece.about, piece.parameters)
        elif told:
            self.box(_kind(piece), title_piece(piece), piece.parameters, [], [Row(detail, "", 0, told)])
        else:
            self.box(_kind(piece), title_piece(piece), piece.parameters, [detail] if detail else [])

    def norms(self, norms: Sequence[Norm], sizes: dict[str, int], x: float) -> None:
        """Draw norms, each with the way to it from below."""
        for norm in norms:
            self.arrow(x)
            self.box("norm", norm.kind, sizes.get(norm.module, 0), x=x)

    def blocks(self, group: Blocks) -> None:
        """Draw a block in its frame, with how often it comes."""
        at, bottom = len(self.parts), self.y
        self.y -= 6
        if group.wiring is None:
            self._unknown(group)
        else:
            self.norms(group.wiring.entry, group.sizes, self.middle)
            for sublayer in group.wiring.sublayers:
                self.sublayer(sublayer, group)
        self.parts.append(_path(f"M{self.middle:.1f} {self.y:.1f}v-30", "way"))
        self.y -= 30
        frame = _rect("frame", self.left - RAIL + 4, self.y, self.inner + RAIL + 10, bottom - self.y, 12)
        self.parts.insert(at, frame)
        self.parts.append(_text(self.left - RAIL + 18, self.y + 20, number_blocks(group), "line"))
        extras = _cut(tell_extras(group), self.inner / 2)
        self.parts.append(_text(self.left + self.inner, self.y + 20, extras, "line", "end"))
        right, y = self.left + self.inner + 22, (self.y + bottom) / 2
        times = len(group.numbers) * max(group.runs, 1)
        self.parts.append(_text(right, y, f"× {times}", "times"))
        each = f"{brief_size(group.typical)} each" if len(group.numbers) > 1 else brief_size(group.typical)
        self.parts.append(_text(right, y + 19, "same weights" if group.runs > 1 else each, "line"))

    def _unknown(self, group: Blocks) -> None:
        rows = rows_of([name for name, size in group.sizes.items() if size], group, self.carriers)
        self.y -= GAP
        self.box("norm", "Order of parts not known", group.typical, [group.unknown or ""], rows)
        self.y -= GAP

    def sublayer(self, sublayer: Sublayer, group: Blocks) -> None:
        """Draw what leaves the residual path and joins it again, and the path itself at its left."""
        start = self.y - 8
        self.parts.append(_path(f"M{self.middle:.1f} {self.y:.1f}v-14", "way"))
        self.y -= 14
        shared = sublayer.shared
        if len(sublayer.branches) > 1 and shared:
            self.norms(shared, group.sizes, self.middle)
            self.parts.append(_path(f"M{self.middle:.1f} {self.y:.1f}v-10", "way"))
            self.y -= 10
        bottom, tops = self.y, []
        for i, branch in enumerate(sublayer.branches):
            x = self.left + BOX / 2 + i * (BOX + APART) if len(sublayer.branches) > 1 else self.middle
            self.y = bottom
            if x != self.middle:
                self.parts.append(_path(f"M{self.middle:.1f} {bottom:.1f}H{x:.1f}", "way"))
            self.branch(branch, group, x, with_norms=len(sublayer.branches) == 1 or not shared)
            tops.append((x, self.y))
        self.y = min(y for _, y in tops)
        if len(tops) > 1:
            self.y -= 10
            for x, y in tops:
                self.parts.append(_path(f"M{x:.1f} {y:.1f}V{self.y:.1f}H{self.middle:.1f}", "way"))
        self.arrow()
        self.y -= 10
        rail = self.left - RAIL + 20
        way = f"M{self.middle:.1f} {start:.1f}H{rail + 8:.1f}q-8 0 -8 -8V{self.y + 8:.1f}q0 -8 8 -8"
        self.parts.append(_path(f"{way}H{self.middle - 12:.1f}", "flow rail"))
        self.plus(self.middle, self.y)
        self.y -= 10
        self.norms(sublayer.behind, group.sizes, self.middle)

    def branch(self, branch: Branch, group: Blocks, x: float, with_norms: bool) -> None:
        """Draw norms and the part with weights of one branch."""
        self.norms(branch.before if with_norms else (), group.sizes, x)
        self.arrow(x)
        size = sum(group.sizes.get(name, 0) for name in branch.modules)
        rows = rows_of(branch.modules, group, self.carriers)
        title = title_branch(branch, self.stack)
        self.box(branch.kind, title, size, describe_branch(branch, group, self.stack), rows, x=x)
        if branch.kind == "cross-attention":
            self.doors.append((x - BOX / 2, self.y + 12))
        self.norms(branch.after, group.sizes, x)


def _join(encoder: _Column, decoder: _Column) -> list[Markup]:
    """Lead what the encoder gives to each cross-attention of the decoder."""
    x, up = decoder.left - RAIL - BETWEEN / 2 + 4, encoder.y - 14
    parts = []
    for door, y in decoder.doors:
        turn = 8 if y > up else -8
        way = f"M{encoder.middle:.1f} {encoder.y:.1f}V{up + 8:.1f}q0 -8 8 -8H{x - 8:.1f}q8 0 8 {turn}"
        parts.append(_path(f"{way}V{y - turn:.1f}q0 {turn} 8 {turn}H{door - 2:.1f}", "flow over"))
    return parts


def _kind(piece: Piece) -> str:
    return {"linear": "head", "convolutions": "convolution", "other": "head"}.get(piece.kind, piece.kind)


def _cut(words: str, width: float) -> str:
    most = max(4, int(width / LETTER))
    return words if len(words) <= most else words[: most - 1] + "…"


def _rect(kind: str, x: float, y: float, wide: float, tall: float, round_: float = 7) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="{}"/>').format(
        kind, x, y, wide, tall, round_
    )


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)


def _path(way: str, kind: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, way)
