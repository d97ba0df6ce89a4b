"""A comparison as tables for the terminal: what each run cost and scored, and each pair of runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmtune.compare.compare_view import make_view

STYLES = {"better": "green", "worse": "red", "unsure": ""}


def print_comparison(made: Mapping[str, Any], console: Console) -> None:
    """Print costs, scores, pairs, and what they say."""
    view = make_view(made)
    console.print(cost_table(view))
    console.print(score_table(view))
    for found in view["pairs"]:
        console.print(pair_table(found))
        for metric, why in found["left_out"]:
            console.print(f"{metric} is left out: {why}", highlight=False, markup=False)
    for gate in (f"{name}: gate failed: {gate['name']}" for name, gate in view["gates"] if not gate["passed"]):
        console.print(gate, style="red", highlight=False, markup=False)
    for told in (*view["told"], *view["notes"]):
        console.print(told, highlight=False, markup=False)


def cost_table(view: Mapping[str, Any]) -> Table:
    """Return a row a cost and a column a run."""
    table = plain_table("what it costs")
    for name in view["runs"]:
        table.add_column(escape(name), justify="right")
    for row in view["costs"]:
        table.add_row(row["title"], *(cell["text"] for cell in row["cells"]))
    return table


def score_table(view: Mapping[str, Any]) -> Table:
    """Return a row for each metric of each run: its base, its score, and what it gained with its interval."""
    table = plain_table("metric")
    table.add_column("run", overflow="fold")
    for heading in ("base", "tuned", "gain", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in view["metrics"]:
        for number, cell in enumerate(row["cells"]):
            label = row["metric"] if number == 0 else ""
            cells = (cell["base"], cell["tuned"], cell["change"], cell["interval"])
            table.add_row(label, escape(cell["name"]), *cells, style=STYLES[cell["kind"]])
    return table


def pair_table(found: Mapping[str, Any]) -> Table:
    """Return a row a metric: second minus first, on the same rows."""
    table = plain_table("metric", f"{escape(found['second'])} minus {escape(found['first'])}: {found['word']}")
    for heading in ("difference", "95 % interval", "p", "rows"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found["rows"]:
        interval = "too few rows" if row["few"] else row["interval"]
        table.add_row(row["metric"], row["change"], interval, row["p"], row["n"], style=STYLES[row["kind"]])
    return table


def plain_table(first: str, title: str | None = None) -> Table:
    """Return an empty table with its first column."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    return table
