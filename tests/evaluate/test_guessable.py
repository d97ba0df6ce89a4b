"""Metrics in which guessing by class frequency beats a trivial baseline, found on the given rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support import families
from support.classifying import colour_rows, recipe_for, run

from llmtune.evaluate.evaluator import find_guessable
from llmtune.recipe.schema import Recipe
from llmtune.tasks.registry import get_task

pytestmark = pytest.mark.slow

METRICS = ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews", "auroc")


def guessable(shares: dict[str, int], kind: str = "single", **section: Any) -> set[str]:
    labels = [label for label, count in shares.items() for _ in range(count)]
    random.Random(1).shuffle(labels)
    classify = {"kind": kind, **({"labels": list(shares)} if kind == "single" else {}), **section}
    values = {"recipe_version": 1, "name": "r", "task": "classify", "classify": classify}
    values |= {"data": {"train": "rows.jsonl"}, "model": {"name": "m"}}
    recipe = Recipe.model_validate(values)
    references = labels if kind == "single" else [float(label) for label in labels]
    return set(find_guessable(get_task("classify"), recipe, references, [{}] * len(labels), METRICS))


def test_with_even_classes_guessing_wins_only_in_mean_f1() -> None:
    assert guessable(dict.fromkeys("abcd", 15)) == {"f1_macro", "f1_weighted"}


def test_with_one_large_class_the_weighted_mean_is_usable() -> None:
    assert guessable({"a": 90, "b": 10}) == {"f1_macro"}


def test_numbers_have_no_classes_to_guess() -> None:
    assert guessable({"1.0": 20, "2.0": 20}, kind="regression") == set()


@pytest.mark.parametrize("seed", range(8))
def test_accuracy_is_never_excluded_by_chance(seed: int) -> None:
    sizes = random.Random(seed).choices(range(3, 12), k=5)
    assert "accuracy" not in guessable(dict(zip("abcde", sizes, strict=True)))


def test_a_classifier_after_four_steps_is_not_called_better_for_its_macro_f1(tmp_path: Path) -> None:
    model = families.build_bert(tmp_path / "bert")
    train = {"max_steps": 4, "num_train_epochs": None, "learning_rate": 1e-6}
    evaluate = {"metrics": ["accuracy", "f1_macro"]}
    rows = colour_rows(240)
    report, _ = run(recipe_for(tmp_path / "r.yaml", model, rows, train=train, evaluate=evaluate))
    assert report["evaluation"]["guessable"] == ["f1_macro"]
    assert "F1 macro does not count" in report["verdict"]["reason"]
    assert "etter in f1 macro" not in report["verdict"]["reason"]
