"""What attention looks at, as tables for the terminal: a row a layer, with its strongest pairs of words."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtune.report.number_format import signed

Facts = Mapping[str, Any]
ISOLATE, POP = "\u2068", "\u2069"
"""Around words that may be written from right to left, so that they leave what is beside them in its place."""


def print_attention(told: Facts, console: Console) -> None:
    """Print a table for each kind of attention."""
    counted = ", ".join(f"{name} {len(tokens)}" for name, tokens in told["tokens"].items())
    console.print(Text(f"rows of a picture: {counted}; the numbers are means over heads", style="dim"))
    for name, kind in told["attention"].items():
        console.print(table_of(name, kind, several=len(told["sides"]) > 1))
        shown = kind["shown"]
        head = shown["head"] if isinstance(shown["head"], str) else f"head {shown['head']}"
        console.print(Text(f"drawn: {name}, layer {shown['layer']}, {head}", style="dim"))


def table_of(name: str, kind: Facts, *, several: bool) -> Table:
    """Return a row a layer: the strongest pairs of words, how much goes elsewhere, and of a run what moved most."""
    title = Text(f"{kind['title']} ({kind['layers']} layers, {kind['heads']} heads)", style="bold")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("strongest between words")
    table.add_column("words", justify="right")
    crosses = name == "cross"
    if not crosses:
        table.add_column("itself", justify="right")
        table.add_column("first", justify="right")
    if several:
        table.add_column("moved", justify="right")
        table.add_column("most")
    for layer in kind["by_layer"]:
        row = [str(layer["layer"]), pairs(layer["strongest"][: 1 if several else 2]), share(layer["among_words"])]
        if not crosses:
            row += [share(layer["itself"]), share(layer["first"])]
        if several:
            moved = layer["changed_most"]
            row += [share(layer["mean_change"]), pairs(moved, change=True)]
        table.add_row(*map(Text, row), style="bold" if layer["layer"] == kind["shown"]["layer"] else "")
    return table


def pairs(found: list[Facts], *, change: bool = False) -> str:
    """Write pairs of words with their weights."""
    return ", ".join(
        f"{isolated(pair['from'])} → {isolated(pair['to'])} "
        f"{signed(pair['weight']) if change else format(pair['weight'], '.2f')}"
        for pair in found
    )


def isolated(word: str) -> str:
    """Put marks around a word that is written from right to left; terminals that know none may show them."""
    turned = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in word)
    return f"{ISOLATE}{word}{POP}" if turned else word


def share(part: float) -> str:
    """Write a share in percent."""
    return f"{100 * part:.0f} %" if part >= 0.01 or part == 0 else f"{100 * part:.2g} %"
