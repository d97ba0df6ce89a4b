"""Classes that appeared, stopped or were renamed since the champion: found before training, judged after it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llmtune.data.class_spelling import warn_of_idle_renames
from llmtune.data.row_kind import names_in
from llmtune.data.row_store import iterate_ids, iterate_rows, load_rows
from llmtune.errors import LlmtuneError
from llmtune.evaluate.class_alignment import CLASS_SUMS, classes_of
from llmtune.evaluate.class_sentences import list_class_changes
from llmtune.evaluate.classification_metrics import f1_macro_formula, split_sums
from llmtune.evaluate.intervals import exact_interval
from llmtune.evaluate.metric import Measure, columns, hit_bounds, measure_right, own_interval, paired_difference
from llmtune.evaluate.opened_runs import ScoredRun
from llmtune.recipe.class_names import tidy_name
from llmtune.recipe.evaluate_section import ERROR
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import FEWEST_ROWS, SPLITS, Difference, Row, Rows
from llmtune.store.release_store import find_source
from llmtune.store.run_folder import RunFolder
from llmtune.store.score_records import ClassChanges, Evaluation, NewClass, Slice

RECOGNISED = 0.5
"""Share of a class's rows from which it counts as learned: most of them get their own class."""
SAMPLED, FEWEST_SAMPLED = 50, 5
"""Most and fewest rows of a new class that the champion's model answers before training."""
MOSTLY = 0.5
"""Share of them that must get the class that stopped."""
UNLIKELY = 0.05
"""A class has stopped if new rows without it would be less likely than this."""
Hint = tuple[str, str, int, int]
AnswerRows = Callable[[Sequence[Row]], Sequence[Sequence[str]]]
"""Returns the classes that the champion's model answers, of each row."""


def count_classes(rows: Rows) -> dict[str, Counter[str]]:
    """Return the number of rows of each class by split."""
    counts: dict[str, Counter[str]] = {}
    for split in SPLITS:
        for _, row in iterate_rows(rows, split):
            for name in names_in(row):
                counts.setdefault(name, Counter())[split] += 1
    return counts


def find_changes_of_classes(champion: ScoredRun, rows: Rows, renames: Mapping[str, str]) -> ClassChanges | None:
    """Return the classes that the champion does not have, and those of it without rows; None if it has no classes."""
    names = [*map(tidy_name, classes_of(champion))]
    if not names:
        return None
    counts, current = count_classes(rows), {renames.get(name, name) for name in names}
    new = tuple(NewClass(name, count["test"], "") for name, count in sorted(counts.items()) if name not in current)
    lost = tuple(sorted(current - counts.keys()))
    return ClassChanges(new, lost, {name: renames[name] for name in names if name in renames})


def find_stopped(champion: ScoredRun, folder: Path | None, rows: Rows, changes: ClassChanges) -> list[str]:
    """Return the champion's classes that stopped: without rows at all, or among the rows that came since.

    The rows that came since are known if the champion's rows are in `folder`.
    """
    if folder is None:
        return [*changes.lost]
    try:
        earlier = load_rows(find_source(folder) / "data" / "rows")
    except LlmtuneError:
        return [*changes.lost]
    seen = {name for split in SPLITS for name in iterate_ids(earlier, split)}
    before, since, total = Counter[str](), Counter[str](), 0
    for split in SPLITS:
        before.update(name for _, row in iterate_rows(earlier, split) for name in names_in(row))
        for row_id, (_, row) in zip(iterate_ids(rows, split), iterate_rows(rows, split), strict=True):
            if row_id not in seen and before.keys() & {*names_in(row)}:  # a batch of one new class stops no other
                since.update(names_in(row))
                total += 1
    size = sum(earlier.counts.values())
    absent = {name for name, count in before.items() if not since[name] and (1 - count / size) ** total < UNLIKELY}
    return sorted({*changes.lost, *absent})


def suggest_renames(rows: Rows, new: Sequence[str], stopped: Sequence[str], answer: AnswerRows) -> Iterator[Hint]:
    """Yield each new class most of whose rows the champion's model answers with one class that stopped."""
    sampled: dict[str, list[Row]] = {name: [] for name in new}
    for split in SPLITS:
        for _, row in iterate_rows(rows, split):
            for name in names_in(row):
                if name in sampled and len(sampled[name]) < SAMPLED:
                    sampled[name].append(row)
    sampled = {name: some for name, some in sampled.items() if len(some) >= FEWEST_SAMPLED}
    if not sampled:
        return
    answers = iter(answer([row for some in sampled.values() for row in some]))
    for name, some in sampled.items():
        counts = Counter(old for classes in islice(answers, len(some)) for old in {*classes} if old in stopped)
        old, count = counts.most_common(1)[0] if counts else ("", 0)
        if count > MOSTLY * len(some):
            yield name, old, count, len(some)


def check_classes(
    champion: ScoredRun,
    run: RunFolder,
    folder: Path | None,
    rows: Rows,
    recipe: Recipe,
    answer: AnswerRows | None,
    console: Console,
) -> None:
    """Print which classes are new, lost or perhaps renamed since the champion, and store the last in the run.

    `answer` is None if the champion's model cannot answer now.
    """
    renames = recipe.renames
    changes = find_changes_of_classes(champion, rows, renames)
    if changes is None:
        return
    hints: list[Hint] = []
    if changes.new and folder is not None and answer is not None:
        stopped = [name for name in find_stopped(champion, folder, rows, changes) if name not in renames]
        new = [one.label for one in changes.new]
        hints = [*suggest_renames(rows, new, stopped, answer)] if stopped else []
    section = TASK_FACTS[recipe.task].section
    sentences = list_class_changes(replace(changes, hints=tuple(hints)), f"{section}.rename")
    sentences += warn_of_idle_renames(renames, rows.class_changes, classes_of(champion), count_classes(rows))
    for sentence in sentences:
        console.print(f"champion: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    stored = [[*hint] for hint in hints]
    if run.findings.get("class_hints", []) != stored:
        run.note(class_hints=stored)


def judge_classes(
    champion: ScoredRun,
    this_run: ScoredRun,
    rows: Rows,
    renames: Mapping[str, str],
    hints: Sequence[Sequence[Any]],
    pairs: Mapping[str, tuple[Measure, Measure]],
) -> ClassChanges | None:
    """Return the changes of classes with scores; `pairs` has the metrics of both on the rows that they share.

    None if no class is new, lost or renamed.
    """
    changes = find_changes_of_classes(champion, rows, renames)
    if changes is None or not (changes.new or changes.lost or changes.renamed):
        return None
    changes = score_new_classes(replace(changes, hints=tuple((str(n), str(o), c, t) for n, o, c, t in hints)), this_run)
    new = {one.label for one in changes.new}
    if not new:
        return changes
    tests = zip(iterate_ids(rows, "test"), iterate_rows(rows, "test"), strict=True)
    added = {row_id for row_id, (_, row) in tests if new.intersection(names_in(row))}
    return replace(changes, known=_compare_known(pairs, added, champion.recipe.seed))


def _compare_known(pairs: Mapping[str, tuple[Measure, Measure]], added: Collection[str], seed: int) -> Slice | None:
    """Return both models on the shared rows without the ids in `added`; None if that leaves none out, or no row."""
    kept = {
        metric: [n for n, name in enumerate(after.names) if name.rpartition("-")[0] not in added]
        for metric, (_, after) in pairs.items()
    }
    if all(len(kept[metric]) == len(after.names) for metric, (_, after) in pairs.items()):
        return None
    parts = {
        metric: (before.take(kept[metric]), after.take(kept[metric]))
        for metric, (before, after) in pairs.items()
        if kept[metric]
    }
    if not parts:
        return None
    base, tuned = ({metric: part[at].value for metric, part in parts.items()} for at in (0, 1))
    difference = {metric: paired_difference(before, after, seed) for metric, (before, after) in parts.items()}
    return Slice("classes of the champion", max(map(len, kept.values())), base, tuned, difference)


def score_new_classes(changes: ClassChanges, this_run: ScoredRun) -> ClassChanges:
    """Return the changes with the tuned model's scores on each new class, and whether it learned the class."""
    return replace(changes, new=tuple(_score_class(one, this_run) for one in changes.new))


def _score_class(one: NewClass, this_run: ScoredRun) -> NewClass:
    scores = _scores_by_row(one.label, this_run) or _scores_of_table(one.label, this_run.evaluation)
    rows = scores["recall"].n if "recall" in scores else one.rows
    return NewClass(one.label, rows, _judge(scores.get("recall"), rows), scores)


def _judge(recall: Difference | None, rows: int) -> str:
    if rows < FEWEST_ROWS or recall is None or math.isnan(recall.low):
        return "too few rows"
    if recall.low > RECOGNISED:
        return "learned"
    return "not learned" if recall.high < RECOGNISED else "inconclusive"


def _scores_by_row(label: str, this_run: ScoredRun) -> dict[str, Difference]:
    """Return recall, precision and F1 of a class from the sums of each row; empty if no metric has them."""
    measure = next(
        (this_run.measures.tuned[metric] for metric in CLASS_SUMS if metric in this_run.measures.tuned), None
    )
    labels = classes_of(this_run)
    if measure is None or label not in labels or measure.sums_NK.shape[1] != 3 * len(labels):
        return {}
    hits_N, predicted_N, true_N = (part[:, labels.index(label)] for part in split_sums(measure.sums_NK))
    scores = {}
    for name, counted_N in (("recall", true_N), ("precision", predicted_N)):
        some = np.flatnonzero(counted_N)
        clusters = tuple(measure.clusters[n] for n in some) if measure.clusters else ()
        right = replace(measure_right((hits_N[some] > 0).tolist(), name), clusters=clusters)
        if len(some):
            scores[name] = own_interval(right, this_run.recipe.seed)
    if true_N.any():
        sums = columns(hits_N, predicted_N, true_N)
        one = Measure("f1", sums, f1_macro_formula, bounds=hit_bounds, clusters=measure.clusters)
        scores["f1"] = own_interval(one, this_run.recipe.seed)
    return scores if "recall" in scores else {}


def _scores_of_table(label: str, evaluation: Evaluation) -> dict[str, Difference]:
    """Return the scores of a class from the table of classes; recall and precision with exact intervals."""
    lines = evaluation.details.get("tuned", {}).get("classes", ())
    scores = next((line for line in lines if line["label"] == label and line["support"]), None)
    if scores is None:
        return {}
    support, hits = scores["support"], round(scores["recall"] * scores["support"])
    low, high = exact_interval(hits, support, ERROR)
    unknown = Difference(scores["precision"], math.nan, math.nan, 1.0, support)
    return {
        "recall": Difference(scores["recall"], low, high, 1.0, support),
        "precision": unknown,
        "f1": replace(unknown, value=scores["f1"]),
    }
