"""Labels by source file: a file with far more doubtful labels than the others stands out, and nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import fisher_exact  # type: ignore[import-untyped]

from llmtune.errors import GateUnsure
from llmtune.evaluate.gates import require_gates
from llmtune.evaluate.source_labels import compare_sources, describe_outliers, gate_labels
from llmtune.evaluate.verdict import verdict
from llmtune.recipe.schema import Recipe
from llmtune.records import Difference
from llmtune.report.row_sections import suspect_section
from llmtune.store.score_records import Evaluation

LABELS = {"week1.csv": 1000, "week2.csv": 200, "week3.csv": 141}


def outliers(labels: dict[str, int], doubtful: dict[str, int], reference: tuple[int, int] = (0, 0)) -> list[str]:
    return [one.file for one in compare_sources(labels, doubtful, reference) if one.stands_out]


def test_the_file_with_far_more_suspects_than_the_others_is_named() -> None:
    doubtful = {"week1.csv": 90, "week2.csv": 29, "week3.csv": 94}
    assert outliers(LABELS, doubtful) == ["week3.csv"]
    text = describe_outliers(compare_sources(LABELS, doubtful))
    assert text == "94 of 213 suspects are in week3.csv: 67 % of its 141 labels, 10 % elsewhere. Check them."


@pytest.mark.parametrize(
    "doubtful",
    [
        {"week1.csv": 90, "week2.csv": 18, "week3.csv": 13},
        {"week1.csv": 90, "week2.csv": 18, "week3.csv": 22},
        {"week1.csv": 500, "week2.csv": 100, "week3.csv": 100},
        {},
    ],
)
def test_equal_shares_and_shares_below_twice_the_others_are_not_named(doubtful: dict[str, int]) -> None:
    assert outliers(LABELS, doubtful) == []
    assert describe_outliers(compare_sources(LABELS, doubtful)) == ""


def test_one_file_alone_stands_out_only_from_known_labels() -> None:
    assert outliers({"all.csv": 141}, {"all.csv": 129}) == []
    assert outliers({"all.csv": 141}, {"all.csv": 129}, (148, 44)) == ["all.csv"]
    assert outliers({"all.csv": 9}, {"all.csv": 9}, (148, 44)) == [], "too few labels"


def test_the_test_is_that_of_fisher() -> None:
    """Among twice the share of the others, the last count that is not named has a p above the corrected level."""
    for number in range(4, 20):
        p = fisher_exact([[number, 40 - number], [20, 980]], alternative="greater").pvalue
        named = outliers({"a": 40, "b": 1000}, {"a": number, "b": 20}) == ["a"]
        assert named == (p * 2 < 0.01)


def test_without_a_bad_file_one_in_a_hundred_sets_of_files_has_a_name_at_most() -> None:
    draw = np.random.default_rng(0)
    sizes = {f"{i}.csv": int(size) for i, size in enumerate(draw.integers(20, 300, 12))}
    named = sum(
        bool(outliers(sizes, {name: int(draw.binomial(size, 0.08)) for name, size in sizes.items()}))
        for _ in range(500)
    )
    assert named <= 10


@pytest.mark.parametrize(
    ("sections", "accepts"),
    [
        ({"evaluate": {"champion": "release:x"}}, "evaluate.max_disagreement=1"),
        ({"evaluate": {"gates": ["loss < 1"], "suspects": True}}, "evaluate.suspects=false"),
        ({"deploy": ["release"]}, "evaluate.suspects=false"),
        ({}, ""),
    ],
)
def test_a_bad_file_makes_every_decision_inconclusive_and_the_gate_names_what_accepts_it(
    sections: dict[str, Any], accepts: str
) -> None:
    values = {"recipe_version": 1, "name": "x", "task": "classify", "data": {"train": "a"}, "model": {"name": "m"}}
    recipe = Recipe.model_validate(values | sections)
    gates = gate_labels(["94 labels differ. Check them."], recipe)
    assert gate_labels([], recipe) == ()
    assert [(gate.passed, gate.got, gate.note.endswith(f"add --set {accepts}")) for gate in gates] == (
        [(None, "94 labels differ.", True)] if accepts else []
    )
    if accepts:
        with pytest.raises(GateUnsure, match="Correct the labels, or remove the file from data"):
            require_gates(gates, {})


def test_a_bad_file_prevents_a_good_verdict_and_is_in_the_section_on_suspects() -> None:
    sources = compare_sources(LABELS, {"week1.csv": 90, "week2.csv": 29, "week3.csv": 94})
    change = {"accuracy": Difference(0.2, 0.1, 0.3, 1e-6, 300)}
    evaluation = Evaluation({}, {}, change, (), 300)
    assert verdict(evaluation).word == "better"
    found = verdict(evaluation, doubts=[describe_outliers(sources)])
    assert found.word == "inconclusive"
    assert "94 of 213 suspects are in week3.csv" in found.reason
    section = suspect_section({"found": {"train": 213}, "listed": [], "unchecked": {}, "sources": sources})
    table = section.blocks[1]
    assert next([cell.text for cell in row] for row in table.cells) == ["week3.csv", "141", "94", "66.7 %"]  # type: ignore[attr-defined]
