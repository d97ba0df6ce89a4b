"""The architecture as a tree for the terminal, and what a text costs as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from llmtune.explain.adapter_weights import Carriers
from llmtune.explain.architecture import Blocks, Piece, Stack
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
    title_branch,
    title_piece,
)
from llmtune.explain.model_page import costs, facts, tell_crossing, tell_times

if TYPE_CHECKING:
    from llmtune.explain.model import Portrait

COLOURS = {
    "attention": "blue",
    "cross-attention": "magenta",
    "feed-forward": "green",
    "experts": "green",
    "convolution": "cyan",
    "embedding": "red",
    "positions": "red",
    "norm": "yellow",
}


def print_model(portrait: Portrait, console: Console) -> None:
    """Print facts, the tree from the words upwards, and what texts of some lengths cost."""
    console.print(Text(portrait.name, style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, value in facts(portrait):
        grid.add_row(Text(name, style="dim"), value)
    console.print(grid)
    for stack in portrait.architecture.stacks:
        console.print()
        console.print(draw_tree(stack, portrait.carriers))
    if portrait.architecture.untraced:
        console.print(f"\nThe order of parts is not known: {portrait.architecture.untraced}", style="yellow")
    _print_cost(portrait, console)


def _print_cost(portrait: Portrait, console: Console) -> None:
    if portrait.cost is None:
        console.print(f"\nWhat a text costs could not be counted: {portrait.uncounted}.", style="yellow")
        return
    table = Table(box=box.SIMPLE_HEAD, title="What a text costs", title_justify="left", title_style="bold")
    for name in ("tokens", "a text", "a token", "of it attention"):
        table.add_column(name, justify="right")
    for row in costs(portrait):
        table.add_row(row["tokens"], row["total"], row["token"], row["attention"])
    console.print()
    console.print(table)
    for sentence in (*tell_crossing(portrait), *tell_times(portrait)):
        console.print(sentence)


def draw_tree(stack: Stack, carriers: Carriers | None) -> Tree:
    """Draw one stack, from what comes in down to what goes out."""
    tree = Tree(Text(stack.name, style="bold"), guide_style="dim")
    for piece in stack.before:
        tree.add(_piece(piece, carriers))
    for group in stack.blocks:
        times = len(group.numbers) * max(group.runs, 1)
        again = ", the same weights each time" if group.runs > 1 else ""
        head = Text.assemble((f"{times} × ", "bold"), f"block{again}  ", (number_blocks(group), "dim"), "  ")
        extras = f"; {tell_extras(group)}" if group.extras else ""
        branch = tree.add(head.append(f"{brief_size(group.typical)} each{extras}", style="dim"))
        if group.wiring is None:
            branch.add(Text(f"order of parts not known: {group.unknown}", style="yellow"))
            _add_rows(branch, rows_of([name for name, size in group.sizes.items() if size], group, carriers))
            continue
        for norm in group.wiring.entry:
            branch.add(_norm(norm))
        for sublayer in group.wiring.sublayers:
            _add_sublayer(branch, sublayer, group, stack, carriers)
    for piece in stack.behind:
        tree.add(_piece(piece, carriers))
    return tree


def _add_sublayer(tree: Tree, sublayer: Sublayer, group: Blocks, stack: Stack, carriers: Carriers | None) -> None:
    for number, branch in enumerate(sublayer.branches):
        line = Text("+ " if number == 0 else "  and at once ", style="bold")
        for word, style in _chain(branch, stack):
            line.append(word, style=style)
        told = "; ".join(describe_branch(branch, group, stack))
        node = tree.add(line.append(f"  {told}", style="dim"))
        _add_rows(node, rows_of(branch.modules, group, carriers))
    for norm in sublayer.behind:
        tree.add(Text.assemble((norm.kind, COLOURS["norm"]), ("  on the residual path", "dim")))


def _chain(branch: Branch, stack: Stack) -> Iterator[tuple[str, str]]:
    """Yield the parts of a branch in their order, with their styles."""
    for norm in branch.before:
        yield norm.kind, COLOURS["norm"]
        yield " → ", "dim"
    yield title_branch(branch, stack), f"bold {COLOURS[branch.kind]}"
    for norm in branch.after:
        yield " → ", "dim"
        yield norm.kind, COLOURS["norm"]


def _add_rows(tree: Tree, rows: Sequence[Row]) -> None:
    names, shapes = (max(len(getattr(row, part)) for row in rows) for part in ("name", "shape"))
    for row in rows:
        text = Text(f"{row.name:<{names}}  {row.shape:<{shapes}}  ")
        text.append(f"{brief_size(row.parameters):>6}", style="dim")
        tree.add(text.append(f"  {row.mark}", style="cyan") if row.mark else text)


def _norm(norm: Norm) -> Text:
    return Text.assemble((norm.kind, COLOURS["norm"]))


def _piece(piece: Piece, carriers: Carriers | None) -> Text:
    rotary = piece.kind == "positions" and not piece.parameters
    size = "no weights" if rotary else brief_size(piece.parameters) if piece.parameters else ""
    text = Text.assemble((title_piece(piece), COLOURS.get(piece.kind, "")), f"  {describe_piece(piece)}  ")
    text.append(size, style="dim").append(f"  {piece.name}", style="dim")
    told = mark([piece.name], carriers)
    return text.append(f"  {told}", style="cyan") if told else text
