"""The scores as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmtune.records import Evaluation
from llmtune.report.meanings import direction
from llmtune.report.numbers import DASH, chance, score, signed


def print_scores(evaluation: Evaluation, console: Console) -> None:
    """Print base (or what stands for it, by name), tuned and the difference with its interval, and the gates."""
    if not evaluation.tuned:
        console.print("evaluate: none of the metrics could be measured")
    else:
        console.print(score_table(evaluation))
        if evaluation.baseline:
            console.print(f"baseline: {evaluation.baseline}; no model (the base has no trained head)", markup=False)
    for gate in evaluation.gates:
        word = "[green]passed[/]" if gate.passed else "[red]failed[/]"
        console.print(
            f"gate {word}  {escape(gate.name)}  [dim](wanted {escape(gate.wanted)}, got {escape(gate.got)})[/]"
        )


def score_table(evaluation: Evaluation) -> Table:
    """Return a row a metric, green where the interval of the change is wholly for the better, red for the worse."""
    table = Table(title=f"{evaluation.rows} test rows", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    beside = "baseline" if evaluation.baseline else "base"
    for heading in ("metric", beside, "tuned", "difference", "95 % interval", "p"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for metric, tuned in evaluation.tuned.items():
        change = evaluation.difference.get(metric)
        if change is None:
            table.add_row(metric, DASH, score(tuned), DASH, DASH, DASH)
            continue
        table.add_row(
            metric,
            score(evaluation.base[metric]),
            score(tuned),
            signed(change.value),
            f"{signed(change.low)} to {signed(change.high)}",
            chance(change.p),
            style={1: "green", -1: "red", 0: ""}[direction(metric, (change.low, change.high))],
        )
    return table
