"""Test that every metric of a recipe has an explanation and a direction."""

import pytest

from llmtune.evaluate.metric_info import (
    METRIC_NOTES,
    NEAREST_TO_ONE,
    better_side,
    direction,
    metric_note,
)
from llmtune.recipe.gate_grammar import LOWER_IS_BETTER
from llmtune.recipe.task_facts import DECISIONS, TASK_FACTS
from llmtune.records import Difference

EVERY = [(task, metric) for task, facts in TASK_FACTS.items() for metric in facts.metrics]
HIGHER = {
    *("accuracy", "exact_match", "f1", "f1_macro", "f1_micro", "f1_weighted", "precision", "recall", "matthews"),
    *("auroc", "pearson", "spearman", "rouge1", "rouge2", "rougeL", "rougeLsum", "chrf", "bleu", "margin"),
    *("choice_accuracy", "likelihood_accuracy", "tool_call_valid", "tool_name", "tool_arguments"),
    *("tool_arguments_f1", "no_call", "ndcg@10", "mrr@10", "recall@1", "recall@5", "recall@10", "map"),
    *("effective_rank", "reward", "greedy_reward", "pass@1", "pass@8", "pass@10"),
}
"""Repeated here on purpose: a person has to decide the direction of each new metric."""


@pytest.mark.parametrize(("task", "metric"), EVERY)
def test_every_metric_of_every_task_has_a_note_and_a_direction(task, metric):
    assert metric_note(metric, task)
    assert [metric in side for side in (HIGHER, LOWER_IS_BETTER, NEAREST_TO_ONE)].count(True) == 1
    assert better_side(metric) == (metric in HIGHER) - (metric in LOWER_IS_BETTER)


def test_every_explained_metric_belongs_to_a_task():
    known = {metric for _, metric in EVERY}
    decisions = {metric for metrics in DECISIONS.values() for metric in metrics}
    assert set(METRIC_NOTES) == known | decisions
    assert all((task, metric) in EVERY for task, facts in TASK_FACTS.items() for metric in facts.metric_notes)
    assert known | decisions >= LOWER_IS_BETTER | NEAREST_TO_ONE


def test_a_name_that_two_tasks_share_is_explained_for_each():
    assert (
        metric_note("accuracy", "classify") != metric_note("accuracy", "preference") != metric_note("accuracy", "chat")
    )


@pytest.mark.parametrize(("metric", "sign"), [("wer", -1), ("bleu", 1), ("length_ratio", 0)])
def test_an_interval_above_zero_is_good_bad_or_neither(metric, sign):
    assert direction(metric, Difference(0.15, 0.1, 0.2, 0.01, 50)) == sign
    assert direction(metric, Difference(0.05, -0.1, 0.2, 0.5, 50)) == 0
