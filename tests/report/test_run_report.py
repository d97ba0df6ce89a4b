"""What a run proposes at its end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmtune.recipe.schema import Recipe
from llmtune.report.run_report import list_remedies
from llmtune.store.report_record import Report, Verdict

VALUES = {"recipe_version": 1, "name": "x", "task": "chat", "data": {"train": "a"}, "model": {"name": "m"}}
RECIPE = Recipe.model_validate(VALUES)


def test_a_run_that_failed_gets_what_would_help_and_one_that_passed_gets_nothing(report: Report) -> None:
    passed, failed = report.gates
    (remedy,) = list_remedies(report, RECIPE, Path("runs/x"))
    assert remedy == "Read the rows that it gets wrong in report.html. Then correct rows, training or gate."
    assert list_remedies(replace(report, gates=(passed,)), RECIPE, Path("runs/x")) == []
    unsure = replace(failed, passed=None, note="inconclusive: 8 rows are too few")
    assert list_remedies(replace(report, gates=(unsure,)), RECIPE, Path("runs/x"))[0].startswith(
        "Add rows to data.test"
    )
    worse = replace(report, gates=(), verdict=Verdict("worse", "Worse in loss; no metric got better."))
    assert list_remedies(worse, RECIPE, Path("runs/x"))[0].endswith(
        "Then correct the rows or lower train.learning_rate."
    )
