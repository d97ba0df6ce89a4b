"""The scores as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmtune.records import Evaluation, Slice, Study
from llmtune.report.contamination_section import sentence
from llmtune.report.metric_info import direction
from llmtune.report.number_format import DASH, chance, count, score, signed
from llmtune.report.slice_tables import ranked
from llmtune.report.verdict import FEWEST_ROWS


def print_scores(evaluation: Evaluation, console: Console) -> None:
    """Print base (or what stands for it, by name), tuned and the difference with its interval, and the gates."""
    if not evaluation.tuned and not evaluation.studies:
        console.print("evaluate: none of the metrics could be measured")
    elif evaluation.tuned:
        console.print(score_table(evaluation))
        for column, parts in evaluation.slices.items():
            if found := slice_table(column, parts, beside(evaluation)):
                console.print(found)
        for metric, flips in evaluation.flips.items():
            console.print(
                f"{metric}: {flips.gained} rows became right, {flips.lost} became wrong, of {flips.rows}",
                highlight=False,
            )
        if evaluation.baseline:
            console.print(f"baseline: {evaluation.baseline}; no model (the base has no trained head)", markup=False)
    if evaluation.contamination is not None:
        print_overlap(evaluation, console)
    for name, study in evaluation.studies.items():
        if study.tuned:
            console.print(study_table(name, study))
    for gate in evaluation.gates:
        word = "[green]passed[/]" if gate.passed else "[red]failed[/]"
        console.print(
            f"gate {word}  {escape(gate.name)}  [dim](wanted {escape(gate.wanted)}, got {escape(gate.got)})[/]"
        )


def print_overlap(evaluation: Evaluation, console: Console) -> None:
    """Print how many test rows stand in the training rows and, if there are some, the scores without them."""
    assert evaluation.contamination is not None
    number = evaluation.contamination.overlapping
    console.print(
        sentence(asdict(evaluation.contamination)), style="yellow" if number else None, markup=False, highlight=False
    )
    if evaluation.contamination.scores:
        whole = Slice("all rows", evaluation.rows, evaluation.base, evaluation.tuned, evaluation.difference)
        parts = (whole, *evaluation.contamination.scores)
        if found := slice_table("overlap with training data", parts, beside(evaluation)):
            console.print(found)


def beside(evaluation: Evaluation) -> str:
    """What stands beside the tuned model, by name."""
    return "baseline" if evaluation.baseline else "base"


def slice_table(column: str, parts: Sequence[Slice], base: str) -> Table | None:
    """Return a row a slice, by the metric that says most; None where both models have none."""
    metrics = ranked(list(dict.fromkeys(metric for part in parts for metric in part.difference)))
    if not metrics:
        return None
    metric = metrics[0]
    title = f"{metric} by {escape(column)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in (column, "rows", base, "tuned", "difference", "95 % interval"):
        table.add_column(escape(heading), justify="left" if heading == column else "right", overflow="ellipsis")
    for part in parts:
        if (change := part.difference.get(metric)) is None:
            continue
        few = change.n < FEWEST_ROWS
        table.add_row(
            escape(part.value),
            count(change.n),
            score(part.base[metric]),
            score(part.tuned[metric]),
            signed(change.value),
            "too few rows" if few else f"{signed(change.low)} to {signed(change.high)}",
            style={1: "green", -1: "red", 0: ""}[direction(metric, (change.low, change.high))],
        )
    return table


def study_table(name: str, study: Study) -> Table:
    """Return a row a metric of one study, by the names that gates use; colours as in `score_table`."""
    table = Table(title=escape(study.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("metric", "base", "tuned", "difference", "95 % interval", "n"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", overflow="fold")
    for metric, tuned in study.tuned.items():
        change = study.difference.get(metric)
        ends = (change.low, change.high) if change else (math.nan, math.nan)
        side = study.better.get(metric, 0) * (1 if ends[0] > 0 else -1 if ends[1] < 0 else 0)
        table.add_row(
            escape(f"{name}.{metric}"),
            score(study.base.get(metric)),
            score(tuned),
            signed(change.value) if change else DASH,
            f"{signed(ends[0])} to {signed(ends[1])}" if change else DASH,
            count(change.n) if change else DASH,
            style={1: "green", -1: "red", 0: ""}[side],
        )
    return table


def score_table(evaluation: Evaluation) -> Table:
    """Return a row a metric, green where the interval of the change is wholly for the better, red for the worse."""
    table = Table(title=f"{evaluation.rows} test rows", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("metric", beside(evaluation), "tuned", "difference", "95 % interval", "p"):
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
