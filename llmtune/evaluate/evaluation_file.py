"""The evaluation as a run keeps and shows it: `evaluation.json`, and the scores on the terminal; without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape

from llmtune.records import Evaluation, GateResult
from llmtune.report.render_terminal import print_sections
from llmtune.report.report_record import Verdict
from llmtune.report.score_sections import count_gates, score_sections
from llmtune.report.verdict import INCONCLUSIVE
from llmtune.store.atomic_files import explained, read_json, write_json

EVALUATION = "evaluation.json"
WORDS = {True: "[green]passed[/]", False: "[red]failed[/]", None: f"[yellow]{INCONCLUSIVE}[/]"}
"""What a gate comes to."""
SCORES = ("base", "tuned", "difference", "scores")
"""Keys of `evaluation.json` below which null is a score that is no number."""


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, in one step."""
    with explained(folder):
        write_json(folder / EVALUATION, asdict(evaluation))


def load_evaluation(folder: Path) -> Evaluation | None:
    """Read `evaluation.json`; None if there is none or it was damaged."""
    saved = read_json(folder / EVALUATION)
    if saved is None:
        return None
    try:
        return TypeAdapter(Evaluation).validate_python(restore_nan(saved))
    except ValidationError:
        return None


def restore_nan(value: object, numeric: bool = False) -> object:
    """Put NaN back where JSON has null for a score; what a task shows in `details` stays as it is."""
    if isinstance(value, dict):
        return {
            key: part if key == "details" else restore_nan(part, numeric or key in SCORES)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [restore_nan(part, numeric) for part in value]
    return math.nan if value is None and numeric else value


def print_scores(evaluation: Evaluation, console: Console) -> None:
    """Print base (or what stands for it, by name), tuned and the difference with its interval."""
    if not evaluation.tuned and not evaluation.studies:
        console.print("evaluate: none of the metrics could be measured")
    print_sections(score_sections(evaluation, None), console)


def print_verdict(verdict: Verdict, gates: Sequence[GateResult], console: Console) -> None:
    """Print the gates, and on one line the verdict and how many of them passed or did not."""
    for gate in gates:
        word = WORDS[gate.passed]
        note = f"; {gate.note}" if gate.note else ""
        told = f"wanted {gate.wanted}, got {gate.got}{note}"
        console.print(f"gate {word}  {escape(gate.name)}  [dim]({escape(told)})[/]")
    counted = f" {count_gates(gates)}." if gates else ""
    console.print(f"[bold]{verdict.word}[/]: {escape(verdict.reason)}{counted}", highlight=False)
