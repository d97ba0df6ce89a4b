"""Two runs row by row: whether they were measured alike, the paired differences, and which of them is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from llmtune.compare.run_scores import OpenedRun
from llmtune.errors import DataError, Problem, RecipeError
from llmtune.evaluate.metric import Measure, compare, ratio
from llmtune.evaluate.per_row_scores import reorder
from llmtune.recipe import TASK_FACTS
from llmtune.recipe.task_facts import PREDICTED
from llmtune.records import Difference, Evaluation
from llmtune.report.report_record import Verdict
from llmtune.report.verdict import verdict

WORDS = {"helped": "better", "harmed": "worse", "mixed": "mixed"}
UNKNOWN = "can't tell"
LEARNED = ("data.train", "data.validation", "data.test")
"""Where rows come from: not compared where the rows themselves are the same."""
JUDGING = ("evaluate.", "generation.")
CHANCE = ("seed", "train.seeds")
TOLD = ("train.logging_steps", "train.report_to", "train.save_total_limit")
"""Keys that leave what is trained as it is."""
OTHER_UNITS = "counted in other units by row, such as tokens of another tokenizer"


@dataclass(frozen=True)
class Pair:
    """Two runs on the same rows: paired differences, second minus first."""

    first: str
    second: str
    difference: Mapping[str, Difference]
    left_out: Mapping[str, str]
    """By metric, why it could not be compared."""
    verdict: Verdict
    """better, worse, mixed or can't tell: of the second run."""


def check_alike(runs: Sequence[OpenedRun]) -> None:
    """Refuse runs that were not measured on the same rows in the same way, with all that differs.

    Raises:
        RecipeError: other tasks, or other settings of measurement.
        DataError: other test rows.
    """
    first, *others = runs
    RecipeError.collect(
        Problem(
            f"task {one.recipe.task}, and {first.name} has task {first.recipe.task}",
            one.name,
            "Compare like with like.",
        )
        for one in others
        if one.recipe.task != first.recipe.task
    )
    DataError.collect(problem for one in others if (problem := other_rows(first, one)))
    RecipeError.collect(problem for one in others for problem in other_settings(first, one))


def other_rows(first: OpenedRun, second: OpenedRun) -> Problem | None:
    """Say how many test rows either run has alone."""
    left, right = set(first.measures.rows), set(second.measures.rows)
    if left == right:
        return None
    alone = f"{len(left - right)} are in {first.name} alone, {len(right - left)} in {second.name} alone"
    what = f"not measured on the same rows: of {len(left | right)} test rows {len(left & right)} are in both, {alone}"
    return Problem(what, second.name, "Run both on the same data, with the same data.test and data.split_by.")


def other_settings(first: OpenedRun, second: OpenedRun) -> Iterator[Problem]:
    """Yield settings of measurement that differ."""
    fix = "Measure one of them again with the other's: llmtune evaluate RUN --set KEY=VALUE"
    task, shared = first.recipe.task, shared_metrics(first, second)
    keys = [f"{section}." for section in (TASK_FACTS[task].section,) if section]
    keys += ["generation."] if PREDICTED & set(shared) and TASK_FACTS[task].generates else []
    keys += ["data.train_on"]
    if any(run.recipe.data.on_overlong in ("truncate", "split") for run in (first, second)):
        keys += ["data.max_length", "data.on_overlong"]
    for key, (one, other) in differing(first, second).items():
        if key.startswith(tuple(keys)):
            yield Problem(f"measured with {key}: {other}, and {first.name} with {one}", second.name, fix)
    for metric in shared:
        before, after = first.measures.tuned[metric], second.measures.tuned[metric]
        if before.signature != after.signature:
            yield Problem(
                f"{metric} is '{after.signature}', and in {first.name} '{before.signature}'", second.name, fix
            )
        elif rows_of(first, before) != rows_of(second, after):
            counts = f"{len(after.at)} rows, and in {first.name} on {len(before.at)}"
            what = f"{metric} was measured on {counts}, which are not the same ones"
            yield Problem(what, second.name, f"{fix} (evaluate.limit, evaluate.choices)")
        elif choices(first, metric) != choices(second, metric):
            yield Problem(
                f"{metric} is among other choices than in {first.name}", second.name, f"{fix} (evaluate.choices)"
            )
    if not shared:
        own, others = (", ".join(run.measures.tuned) for run in (second, first))
        what = f"no metric in common: {own}, and {first.name} has {others}"
        yield Problem(what, second.name, fix)


def choices(run: OpenedRun, metric: str) -> list[str]:
    """What is said of the answers that a metric chooses among, in any order."""
    return sorted(run.evaluation.signatures.get(f"{metric}.choices", "").replace(",", " ").split())


def shared_metrics(first: OpenedRun, second: OpenedRun) -> list[str]:
    """Return the metrics that both runs have."""
    return [metric for metric in first.measures.tuned if metric in second.measures.tuned]


def rows_of(run: OpenedRun, found: Measure) -> set[str]:
    """Return the rows of a metric by what they are known by."""
    return {run.measures.rows[at] for at in found.at}


def differing(first: OpenedRun, second: OpenedRun) -> dict[str, tuple[object, object]]:
    """Return the keys whose values differ between two recipes, with both values."""
    keys = dict.fromkeys([*first.settings, *second.settings])
    pairs = {key: (first.settings.get(key), second.settings.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def compare_pairs(runs: Sequence[OpenedRun]) -> list[Pair]:
    """Compare each two runs; the later one minus the earlier one."""
    return [compare_pair(first, second) for first, second in combinations(runs, 2)]


def compare_pair(first: OpenedRun, second: OpenedRun) -> Pair:
    """Return paired differences, second minus first, with the verdict and what had to be left out."""
    difference: dict[str, Difference] = {}
    left_out = {}
    for metric in dict.fromkeys([*first.measures.tuned, *second.measures.tuned]):
        alone = [run.name for run in (first, second) if metric in run.measures.tuned]
        if len(alone) == 1:
            left_out[metric] = f"measured in {alone[0]} alone"
            continue
        before, after = joined(first, metric), joined(second, metric)
        if before.sums_NK.shape[1] != after.sums_NK.shape[1]:
            left_out[metric] = "measured with other classes"
        elif counted_otherwise(before, after):
            left_out[metric] = OTHER_UNITS
        else:
            difference[metric] = compare(before, after, first.recipe.seed)
    return Pair(first.name, second.name, difference, left_out, judge(first, second, difference))


def joined(run: OpenedRun, metric: str) -> Measure:
    """Return a metric with its rows in the order of what they are known by, the same for every run."""
    found = run.measures.tuned[metric]
    order = sorted(range(len(found.at)), key=lambda n: run.measures.rows[found.at[n]])
    return reorder(found, order, tuple(range(len(order))))


def counted_otherwise(before: Measure, after: Measure) -> bool:
    """Whether two ratios have other denominators on the same rows."""
    same = before.formula is ratio and before.sums_NK.shape[1] == 2
    return same and not np.array_equal(before.sums_NK[:, 1], after.sums_NK[:, 1])


def judge(first: OpenedRun, second: OpenedRun, difference: dict[str, Difference]) -> Verdict:
    """Return one word (better, worse, mixed, can't tell: of the second run) and the reason.

    The same tuned model twice, and two trainings of one recipe on the same rows, cannot be better or worse, whatever
    rounding, seed or the order of rows make of their scores.
    """
    if first.identity == second.identity and first.identity[0]:
        return Verdict(UNKNOWN, "Both are one and the same model, byte for byte.")
    found = verdict(Evaluation({}, second.evaluation.tuned, difference, (), (), 0))
    word = WORDS.get(found.word, UNKNOWN)
    if is_repetition(first, second):
        reason = (
            "These are two trainings of one recipe on the same rows, which differ in their seed or in the order of rows"
        )
        moved = "" if word == UNKNOWN else f" Between these two: {found.reason[0].lower()}{found.reason[1:]}"
        return Verdict(UNKNOWN, f"{reason}: what lies between them is the chance of training.{moved}")
    return Verdict(word, found.reason)


def is_repetition(first: OpenedRun, second: OpenedRun) -> bool:
    """Whether two runs trained the same on the same rows, but for the seed, the order of rows, and places of files."""
    if first.learned_rows is None or first.learned_rows != second.learned_rows:
        return False
    if first.identity[1] != second.identity[1]:
        return False
    keys = set(differing(first, second)) - {*CHANCE, *TOLD, "model.name"}
    return not [key for key in keys if not key.startswith((*LEARNED, *JUDGING))]
