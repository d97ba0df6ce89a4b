"""`llmtune compare RUN RUN...`: compare runs, as a page, a picture and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from llmtune.compare.comparison_pictures import COSTS, EXPORT_AXES, RATIOS, draw_comparison, draw_pareto, shown_metrics
from llmtune.compare.run_comparison import Comparison, RunPair, RunSummary, make_comparison
from llmtune.display.blocks import (
    Block,
    Bullets,
    Cell,
    Column,
    Compared,
    Page,
    Section,
    Table,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.charts import draw_meter
from llmtune.display.console import print_page, spinner
from llmtune.display.number_format import count, missing
from llmtune.errors import RecipeError
from llmtune.evaluate.metric_info import better_side, full_note, rank_metrics
from llmtune.evaluate.opened_runs import check_alike, open_runs
from llmtune.evaluate.verdict import BETTER, MIXED, WORSE
from llmtune.recipe.secrets import redact_all
from llmtune.records import Json
from llmtune.report.evaluation_sections import passed_cell
from llmtune.report.render_html import write_page
from llmtune.report.render_markdown import to_markdown
from llmtune.report.score_sections import spell_metrics
from llmtune.store.atomic_files import explained, hash_value, plain, write_json, write_text

CLEAR = (BETTER, WORSE, MIXED)
METHOD = (
    "All differences are paired: both models answered the same rows, matched by content in any order. "
    "The intervals are 95 %, from a bootstrap over rows; “better” and “worse” also require that the change holds among "
    "all metrics considered.",
    "The intervals apply to other rows of this kind. Another seed may give other scores: `train.seeds` shows how much "
    "they vary.",
    "Seconds and memory are from one training on one machine.",
)
UNASKED = ("forgotten", "served_bytes", "row_seconds")
"""Costs that only some recipes or exports have."""
FEW = 6
"""Up to this many pairs (four runs) are all shown and described."""
LONGEST = 60


def compare_runs(paths: Sequence[Path], out: Path | None, console: Console) -> Json:
    """Compare runs, write the comparison into `out` (default: `runs/compare-<hash>`) and return it as JSON.

    Raises:
        RecipeError: fewer than two runs, one is not a run or has no scores, or tasks or measurement settings differ.
        DataError: they were not measured on the same rows.
        EnvironmentProblem: scores are damaged, or `out` cannot be written.
    """
    if len(paths) < 2:
        fix = "Name two or more run folders, or a recipe with --methods full,lora,qlora."
        raise RecipeError.of("a single run cannot be compared", str(paths[0]) if paths else None, fix)
    runs = open_runs(paths)
    check_alike(runs)
    with spinner(console, "comparing the runs"):
        comparison = make_comparison(runs, "runs", " and ".join(run.name for run in runs))
    target = out or Path("runs") / f"compare-{hash_value([str(path.absolute()) for path in paths])[:8]}"
    return finish(comparison, target, console)


def finish(comparison: Comparison, out: Path, console: Console) -> Json:
    """Print a comparison, write compare.json, .md, .html, .svg and .png into `out`, and return it as JSON.

    Three or more methods, and exports, also get `pareto.svg` and .png.
    """
    comparison = redact_all(replace(comparison, folder=str(out)))
    page = make_comparison_page(comparison)
    content: Json = plain(comparison)
    for run in content["runs"]:  # runs have rates and gates only if methods are compared
        for key in [key for key in ("rate", "gates") if run[key] is None]:
            del run[key]
    print_page(page, console)
    with explained(out):
        write_page(out / "compare.html", page)
        write_text(out / "compare.md", to_markdown(page))
        write_json(out / "compare.json", content)
        draw_comparison(out / "compare", comparison.runs)
        if any(run.row_seconds for run in comparison.runs) and (metrics := shown_metrics(comparison.runs)):
            draw_pareto(out / "pareto", comparison.runs, comparison.pairs, metrics[0], EXPORT_AXES)
        elif comparison.kind == "methods" and len(comparison.runs) > 2 and (metrics := shown_metrics(comparison.runs)):
            draw_pareto(out / "pareto", comparison.runs, comparison.pairs, metrics[0])
    console.print(f"comparison: {escape(str(out / 'compare.html'))}")
    return content


# The page


def make_comparison_page(made: Comparison) -> Page:
    """Return the page of a comparison."""
    runs = made.runs
    metrics = rank_metrics(dict.fromkeys(name for run in runs for name in run.tuned))
    models = ", ".join(dict.fromkeys(run.model for run in runs if run.model))
    chips = [("task", made.task), ("model", models), ("test rows", count(made.rows))]
    sentences = [*describe_pairs(made.pairs), *describe_costs(runs)]
    names = [run.name for run in runs]
    gates: TableRows = [
        [run.name, Cell(gate.name, code=True), gate.got, passed_cell(gate)] for run in runs for gate in run.gates or ()
    ]
    settings: TableRows = [[Cell(one.key, code=True), *map(shorten_value, one.values)] for one in made.settings]
    folders = [f"{run.name}: `{run.folder}`" for run in runs]
    few = len(made.pairs) <= FEW
    shown = [pair for pair in made.pairs if few or pair.first == made.pairs[0].first or pair.verdict.word in CLEAR]
    sections = [
        Section("Costs", [cost_table(runs)]),
        Section("Scores", [score_table(metric, made) for metric in metrics]),
        *(pair_section(pair, metrics, made.task) for pair in shown),
        Section("Gates", [Table(["run", "gate", "got", "result"], gates)] if gates else []),
        Section("What it says", [Bullets([*sentences, *made.notes])]),
        Section("What differs", [Table(["key", *names], settings, scroll=True)] if settings else [], brief=False),
        Section("Method and limits", [Bullets([*METHOD, *folders], soft=True)], anchor="method", brief=False),
    ]
    footer = f"Made by llmtune {made.llmtune}. `compare.html` is self-contained and loads nothing from the network."
    return Page(f"{made.name}, compared", sections, [chip for chip in chips if chip[1]], footer=footer)


def cost_table(runs: Sequence[RunSummary]) -> Table:
    """Return a row per cost, and a column per run, with a bar relative to the largest."""
    rows: TableRows = []
    for name, (title, written) in COSTS.items():
        values: list[float | None] = [getattr(run, name) for run in runs]
        if name in UNASKED and all(value is None for value in values):
            continue
        largest = max((value for value in values if value is not None), default=0) or 1
        rows.append([title, *(Cell(written(value), picture=draw_meter((value or 0) / largest)) for value in values)])
    return Table(["", *(Column(run.name, "number") for run in runs)], rows)


def score_table(metric: str, made: Comparison) -> Table:
    """Return each run's score by one metric, and its gain over its own base."""
    rows = [
        Compared(run.name, run.base.get(metric), run.tuned.get(metric), run.difference.get(metric), better_side(metric))
        for run in made.runs
    ]
    simple = {
        (one.name, one.scores[metric])
        for run in made.runs
        for one in run.simple_baselines.values()
        if metric in one.scores
    }
    rows += [Compared(name, None, value, None, better_side(metric)) for name, value in sorted(simple)]
    note = full_note(metric, made.task)
    title = f"{spell_metrics([metric])}: {note}" if note else spell_metrics([metric])
    return difference_table(rows, title=title, heading="run", difference="gain over base")


def pair_section(pair: RunPair, metrics: Sequence[str], task: str) -> Section:
    """Return the verdict on two runs, and a row per metric."""
    rows = [
        Compared(metric, None, None, pair.difference[metric], better_side(metric), full_note(metric, task))
        for metric in metrics
        if metric in pair.difference
    ]
    blocks: list[Block] = [Text(pair.verdict.reason)]
    blocks += [difference_table(rows, base=None)] if rows else []
    blocks += [Text(f"{metric} is omitted: {why}.") for metric, why in sorted(pair.left_out.items())]
    reason = pair.verdict.reason.partition(". ")[0].removesuffix(".")
    basis = f"{reason[0].lower()}{reason[1:]}" if pair.verdict.word in CLEAR else pair.verdict.word
    return Section(f"{pair.second} minus {pair.first}: {basis}", blocks)


def describe_pairs(pairs: Sequence[RunPair]) -> list[str]:
    """Say which run of each pair is better; if there are many, unclear pairs are counted in one line."""
    clear = [pair for pair in pairs if pair.verdict.word in CLEAR or len(pairs) <= FEW]
    others = len(pairs) - len(clear)
    text = (
        f"In {'the other ' if clear else ''}{others} pairs there is no clear difference: more held-out rows would tell."
    )
    return [*map(describe_pair, clear), *([text] if others else [])]


def describe_pair(pair: RunPair) -> str:
    """Say which of two runs is better, in one line."""
    return f"{pair.second} against {pair.first}: {pair.verdict.reason}"


def describe_costs(runs: Sequence[RunSummary]) -> list[str]:
    """Describe each run's costs relative to the first, if the method differs."""
    first, *others = runs
    sentences = []
    for run in (one for one in others if one.method != first.method):
        pairs = [(title, getattr(run, name), getattr(first, name)) for name, title in RATIOS.items()]
        parts = [f"{ratio_text(part / whole)} {title}" for title, part, whole in pairs if whole and not missing(part)]
        if parts:
            sentences.append(f"Compared with {first.name}, {run.name} takes {', '.join(parts)}.")
    return sentences


def ratio_text(ratio: float) -> str:
    """Write a ratio as a multiple, or as a percentage if it is below 1."""
    if ratio >= 1.95:
        return f"{ratio:.1f} times the"
    return f"{100 * ratio:.{2 if ratio < 0.01 else 1 if ratio < 0.1 else 0}f} % of the"


def shorten_value(value: object) -> str:
    """Shorten a recipe's value for a table."""
    text = "none" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
