"""What the test rows can show: the smallest difference of each metric, and the rows that each gate needs as written."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.console import Console

from llmtune.evaluate.champion import open_champion
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.gates import margin, opponent, plan_rows
from llmtune.evaluate.paired_statistics import row_deviation, smallest_difference
from llmtune.recipe.evaluate_section import ERROR, EvaluateSection
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.recipe.schema import Recipe
from llmtune.records import Champion, Difference, Evaluation, Json
from llmtune.report.render_terminal import print_sections
from llmtune.report.report_record import Power
from llmtune.report.score_sections import power_section
from llmtune.store.atomic_files import plain
from llmtune.store.run_folder import RunFolder

OF_RUN = "the tuned model and the base differed row by row in this run's last evaluation"
OF_CHAMPION = "the champion and its own base differ row by row"
UNKNOWN = "What the test rows can show is not known yet: no run was evaluated here, and there is no champion."


def list_power(section: EvaluateSection, evaluation: Evaluation, rows: int | None = None) -> list[Power]:
    """Return what the test rows can show, gates on intervals first, then the metrics that no such gate is about.

    `rows` is how many test rows there are now, where that is another number than the evaluation had. Where no row
    differed at all, nothing is known.
    """
    found = []
    for gate in map(parse_gate, section.gates):
        scores, differences = opponent(gate, evaluation)
        change = differences.get(gate.metric)
        if gate.part and change and gate.metric in scores and has_spread(change):
            assumed, needed = plan_rows(gate.op, change, margin(gate, scores[gate.metric]), section.alpha)
            one = measure_power(gate.metric, gate.against or "", change, evaluation, rows, section.alpha)
            found.append(replace(one, gate=gate.text, assumed=assumed, rows_needed=needed))
    gated = {(one.metric, one.against) for one in found}
    champion = evaluation.champion.difference if evaluation.champion else {}
    for against, differences in (("base", evaluation.difference), ("champion", champion)):
        for metric, change in differences.items():
            if (metric, against) not in gated and has_spread(change):
                found.append(measure_power(metric, against, change, evaluation, rows))
    return found


def has_spread(change: Difference) -> bool:
    """Whether an interval says how much rows differ."""
    return math.isfinite(change.low) and change.high > change.low


def measure_power(
    metric: str, against: str, change: Difference, evaluation: Evaluation, rows: int | None, alpha: float = ERROR
) -> Power:
    """Return the smallest difference that the rows of one metric show."""
    rows = rows if rows is not None and change.n == evaluation.rows else change.n
    return Power(metric, against, rows, smallest_difference(row_deviation(change), rows, alpha))


def print_plan(recipe: Recipe, run: RunFolder, console: Console, *, prepared: bool) -> Json:
    """Print what the test rows will be able to show, by an evaluation that is there, and return it.

    It is that of the run itself, else that of the champion, whose difference from its base stands for the tuned model's
    from base and champion. The number of test rows is that of the run where they are `prepared`.
    """
    rows = run.facts("prepare")["kept"].get("test") if prepared else None
    own = load_evaluation(run.path / "evaluation") if run.is_done("evaluate") else None
    champion = open_champion(recipe, run.path)
    seen, source = (own, OF_RUN) if own else (champion.evaluation if champion else None, OF_CHAMPION)
    if seen is not None and champion is not None and (own is None or own.champion is None):
        like = champion.evaluation
        seen = replace(seen, champion=Champion(recipe.evaluate.champion or "", like.tuned, like.difference, {}))
    power = list_power(recipe.evaluate, seen, rows) if seen else []
    if power:
        print_sections([replace(power_section(power), brief=True)], console)
        console.print(f"Planned by how far {source}.", highlight=False)
    elif any(parse_gate(text).part for text in recipe.evaluate.gates):
        console.print(UNKNOWN, highlight=False)
    return {"source": source if power else None, "rows": [plain(one) for one in power]}
