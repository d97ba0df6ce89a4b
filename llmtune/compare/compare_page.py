"""A comparison as a page: what it says, what each run costs and scores, each pair, and what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmtune.compare.comparison import Comparison, RunSummary
from llmtune.compare.run_pairs import Pair
from llmtune.report.blocks import (
    Block,
    Bullets,
    Cell,
    Column,
    Compared,
    Meter,
    Page,
    Rows,
    Section,
    Table,
    Text,
    difference_table,
)
from llmtune.report.metric_info import better_side, rank_metrics
from llmtune.report.number_format import DASH, count, duration, missing, size
from llmtune.report.score_sections import full_note, passed_cell, words

COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("train_seconds", "training", duration),
    ("run_seconds", "whole run", duration),
    ("peak_bytes", "peak memory in training", size),
    ("trainable", "trained parameters", count),
    ("share", "of all parameters", lambda part: DASH if part is None else f"{100 * part:.2f} %"),
    ("disk_bytes", "weights on disk", size),
)
"""What a run costs: its name in `compare.json`, for people, and how it is written."""
RATIOS = {
    "train_seconds": "training time",
    "peak_bytes": "peak memory",
    "trainable": "trained parameters",
    "disk_bytes": "size on disk",
}
WORDS = {
    "better": "{second} is better than {first}.",
    "worse": "{second} is worse than {first}.",
    "mixed": "{second} is better than {first} here and worse there.",
}
UNKNOWN = "Between {first} and {second} one can’t tell."
METHOD = (
    "All differences are paired: both models answered the same rows, joined by their content, whatever their order. "
    "The intervals are 95 %, from a bootstrap over rows; “better” and “worse” also ask that the change holds among all "
    "metrics that were looked at.",
    "The intervals are about other rows of this kind. Another seed may give other scores: `train.seeds` says how far "
    "they lie apart.",
    "Seconds and memory are of one training on one machine.",
)
LONGEST = 60


def make_page(made: Comparison) -> Page:
    """Return the page of a comparison."""
    runs = made.runs
    metrics = rank_metrics(dict.fromkeys(name for run in runs for name in run.tuned))
    models = ", ".join(dict.fromkeys(run.model for run in runs if run.model))
    chips = [("task", made.task), ("model", models), ("test rows", count(made.rows))]
    sentences = [*map(describe_pair, made.pairs), *describe_costs(runs)]
    names = [run.name for run in runs]
    gates: Rows = [
        [run.name, Cell(gate.name, code=True), gate.got, passed_cell(gate)] for run in runs for gate in run.gates or ()
    ]
    settings: Rows = [[Cell(one.key, code=True), *map(shorten, one.values)] for one in made.settings]
    folders = [f"{run.name}: `{run.folder}`" for run in runs]
    sections = [
        Section("Costs", [cost_table(runs)]),
        Section("Scores", [score_table(metric, made) for metric in metrics]),
        *(pair_section(pair, metrics, made.task) for pair in made.pairs),
        Section("Gates", [Table(["run", "gate", "got", "result"], gates)] if gates else []),
        Section("What it says", [Bullets([*sentences, *made.notes])]),
        Section("What differs", [Table(["key", *names], settings, scroll=True)] if settings else [], brief=False),
        Section("Method and limits", [Bullets([*METHOD, *folders], soft=True)], anchor="method", brief=False),
    ]
    footer = f"Made by llmtune {made.llmtune}. `compare.html` is whole in itself and asks nothing of the network."
    return Page(f"{made.name}, compared", sections, [chip for chip in chips if chip[1]], footer=footer)


def cost_table(runs: Sequence[RunSummary]) -> Table:
    """A row a cost, and a column a run with a bar beside that of the largest."""
    rows: Rows = []
    for name, title, written in COSTS:
        values: list[float | None] = [getattr(run, name) for run in runs]
        largest = max((value for value in values if value is not None), default=0) or 1
        rows.append([title, *(Cell(written(value), picture=Meter((value or 0) / largest)) for value in values)])
    return Table(["", *(Column(run.name, "number") for run in runs)], rows)


def score_table(metric: str, made: Comparison) -> Table:
    """Each run's score by one metric, and what it gained over its own base."""
    rows = [
        Compared(run.name, run.base.get(metric), run.tuned.get(metric), run.difference.get(metric), better_side(metric))
        for run in made.runs
    ]
    note = full_note(metric, made.task)
    title = f"{words([metric])}: {note}" if note else words([metric])
    return difference_table(rows, title=title, heading="run", difference="gain over base")


def pair_section(pair: Pair, metrics: Sequence[str], task: str) -> Section:
    """Two runs: the verdict, and a row a metric."""
    rows = [
        Compared(metric, None, None, pair.difference[metric], better_side(metric), full_note(metric, task))
        for metric in metrics
        if metric in pair.difference
    ]
    blocks: list[Block] = [Text(pair.verdict.reason)]
    blocks += [difference_table(rows, base=None)] if rows else []
    blocks += [Text(f"{metric} is left out: {why}.") for metric, why in sorted(pair.left_out.items())]
    return Section(f"{pair.second} minus {pair.first}: {pair.verdict.word}", blocks)


def describe_pair(pair: Pair) -> str:
    """Say which of two runs is better, in one line."""
    text = WORDS.get(pair.verdict.word, UNKNOWN).format(first=pair.first, second=pair.second)
    return f"{text} {pair.verdict.reason}"


def describe_costs(runs: Sequence[RunSummary]) -> list[str]:
    """Say what each run of another method than the first costs beside it, in parts of it."""
    first, *others = runs
    sentences = []
    for run in (one for one in others if one.method != first.method):
        pairs = [(title, getattr(run, name), getattr(first, name)) for name, title in RATIOS.items()]
        parts = [f"{ratio_text(part / whole)} {title}" for title, part, whole in pairs if whole and not missing(part)]
        if parts:
            sentences.append(f"Beside {first.name}, {run.name} takes {', '.join(parts)}.")
    return sentences


def ratio_text(ratio: float) -> str:
    """A part of a whole: times where it is more, percent where it is less."""
    if ratio >= 1.95:
        return f"{ratio:.1f} times the"
    return f"{100 * ratio:.{2 if ratio < 0.01 else 1 if ratio < 0.1 else 0}f} % of the"


def shorten(value: object) -> str:
    """A value of a recipe, short enough for a table."""
    text = "none" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
