"""Prints scores, gates, the verdict and the power of the test rows on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from llmtune.display.console import print_blocks, print_sections
from llmtune.evaluate.evaluation_file import OUTSIDE, PIECES
from llmtune.evaluate.gates import plan_power
from llmtune.evaluate.significance import INCONCLUSIVE, NOT_APPLICABLE, outcome
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Json
from llmtune.report.evaluation_sections import count_gates, power_section, score_sections
from llmtune.report.score_sections import seed_table
from llmtune.store.atomic_files import plain
from llmtune.store.report_record import Seeds, Verdict
from llmtune.store.run_folder import RunFolder
from llmtune.store.score_records import Evaluation, GateResult

if TYPE_CHECKING:
    from llmtune.evaluate.evaluator import Scored

WORDS = {True: "[green]passed[/]", False: "[red]failed[/]", None: f"[yellow]{INCONCLUSIVE}[/]"}
"""Printed results of a gate."""
UNKNOWN_POWER = "The power of the test rows is not known yet: no evaluated run and no champion found."


def print_scores(evaluation: Evaluation, console: Console, task: str) -> None:
    """Print base (or the baseline's name), tuned and the difference with its interval."""
    if not evaluation.tuned and not evaluation.studies:
        console.print("evaluate: none of the metrics could be measured")
    print_sections(score_sections(evaluation, None, section=TASK_FACTS[task].section), console)


def print_verdict(verdict: Verdict, gates: Sequence[GateResult], console: Console) -> None:
    """Print the gates, then one line with the verdict and how many gates passed."""
    for gate in gates:
        word = WORDS[gate.passed] if gate.applies else f"[yellow]{NOT_APPLICABLE}[/]"
        detail = f"wanted {outcome(gate)}" if gate.applies else gate.note
        console.print(f"gate {word}  {escape(gate.name)}  [dim]({escape(detail)})[/]")
    counted = f" {count_gates(gates)}." if gates else ""
    console.print(f"[bold]{verdict.word}[/]: {escape(verdict.reason)}{counted}", highlight=False)


def print_scored(scored: Scored, recipe: Recipe, console: Console) -> None:
    """Print scores, warnings about how they were measured, and the number of truncated answers."""
    evaluation, answers = scored.evaluation, scored.answers
    print_scores(evaluation, console, recipe.task)
    for note in (PIECES, OUTSIDE):
        if note in evaluation.signatures:
            console.print(f"[yellow]{evaluation.signatures[note]}[/]", highlight=False)
    counts = {name: sum(share > 0 for share in one.cut.values()) for name, one in answers.items()}
    shown = [f"{name} {count} of {len(answers[name].cut)}" for name, count in counts.items() if count]
    if shown:
        new = recipe.generation.max_new_tokens
        console.print(f"answers truncated at generation.max_new_tokens ({new}): {', '.join(shown)}", highlight=False)


def print_seeds(seeds: Seeds | None, console: Console) -> None:
    """Print the scores of several seeds, and how the gain compares with their spread."""
    if seeds:
        print_blocks([seed_table(seeds)], console)
        console.print(seeds.told, highlight=False)


def print_power(recipe: Recipe, run: RunFolder, console: Console, *, prepared: bool) -> Json:
    """Print what the test rows will be able to show (`plan_power`), and return it."""
    power, source = plan_power(recipe, run, prepared=prepared)
    if power:
        print_sections([replace(power_section(power), brief=True)], console)
        console.print(f"Planned by how far {source}.", highlight=False)
    elif any(parse_gate(text).part for text in recipe.evaluate.gates):
        console.print(UNKNOWN_POWER, highlight=False)
    return {"source": source if power else None, "rows": [plain(one) for one in power]}
