"""The scores of an evaluation on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from llmtune.records import Evaluation
from llmtune.report.render_terminal import print_sections
from llmtune.report.score_sections import score_sections


def print_scores(evaluation: Evaluation, console: Console) -> None:
    """Print base (or what stands for it, by name), tuned and the difference with its interval, and the gates."""
    if not evaluation.tuned and not evaluation.studies:
        console.print("evaluate: none of the metrics could be measured")
    print_sections(score_sections(evaluation, None), console)
    for gate in evaluation.gates:
        word = "[green]passed[/]" if gate.passed else "[red]failed[/]"
        console.print(
            f"gate {word}  {escape(gate.name)}  [dim](wanted {escape(gate.wanted)}, got {escape(gate.got)})[/]"
        )
