"""Puts the classes of two runs into one list: scores then pair up where classes are new, renamed or lost.

Shapes: N rows, K classes of a run, J classes of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmtune.data.row_kind import earlier_forms, hash_row, rename_row
from llmtune.data.row_store import iterate_ids, iterate_rows
from llmtune.evaluate.classification_metrics import BINARY, MEAN_AREA, class_sums, mean_area, split_sums
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, columns, measure_right, paired_difference
from llmtune.evaluate.opened_runs import OpenedRun, ScoredRun, pair_measures
from llmtune.recipe.class_names import show_name, tidy_name
from llmtune.recipe.task_facts import CALIBRATION, TASK_FACTS
from llmtune.records import Difference, Rows

CLASS_SUMS = ("f1_macro", "f1_weighted", "matthews")
"""Metrics with hits, predictions and right rows of each class, [N, 3K]."""
OF_PROBABILITIES = ("loss", *CALIBRATION)
"""Metrics that need the probability of a class that two classes became."""


@dataclass(frozen=True)
class ClassMap:
    """The place of each class of one run in the list for both."""

    labels: tuple[str, ...]
    """[J] classes of both runs."""
    columns: tuple[int, ...]
    """[K] the number in `labels` of each class of the run."""
    renames: Mapping[str, str]

    @property
    def merged(self) -> dict[str, int]:
        """Return the classes that are several classes of the run, with their number."""
        counts = {self.labels[at]: self.columns.count(at) for at in self.columns}
        return {name: number for name, number in counts.items() if number > 1}

    @property
    def moves(self) -> bool:
        """Whether the run's classes are not the list itself."""
        return self.columns != tuple(range(len(self.labels)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return a different name for each output [K] of the run's model, in the names of the list if possible."""
        seen: dict[str, None] = {}
        for k, at in enumerate(self.columns):
            name = self.labels[at]
            seen[f"{name} ({k})" if name in seen else name] = None
        return tuple(seen)

    def widen(self, parts_NK: Floats) -> Floats:
        """Return [N, J]: the highest of the columns that become one, and 0 for classes that the run does not have."""
        parts_NJ = np.zeros((len(parts_NK), len(self.labels)))
        np.maximum.at(parts_NJ.T, np.array(self.columns, dtype=np.intp), parts_NK.T)
        return parts_NJ


def map_classes(
    run_classes: Sequence[str], other: Sequence[str], renames: Mapping[str, str]
) -> tuple[ClassMap, ClassMap]:
    """Return the classes of two runs in one list: those of the first run, then those that only the other has."""
    renamed = [renames.get(name, name) for name in map(tidy_name, other)]
    labels = tuple(dict.fromkeys([*run_classes, *renamed]))
    places = {name: at for at, name in enumerate(labels)}
    return tuple(ClassMap(labels, tuple(places[name] for name in names), renames) for names in (run_classes, renamed))  # type: ignore[return-value]


def classes_of(run: ScoredRun) -> tuple[str, ...]:
    """Return the classes of a run in the order of its model's outputs; of tags the entity types; empty if unknown."""
    listed = tuple(line["label"] for line in run.evaluation.details.get("tuned", {}).get("classes", ()))
    if TASK_FACTS[run.recipe.task].answer_kind == "labels" and listed:
        return listed
    counted = run.folder.facts("encode").get("classes") if isinstance(run, OpenedRun) else None
    return tuple(counted or ()) or run.recipe.classes or listed


def align_classes(
    other: ScoredRun, this_run: ScoredRun, renames: Mapping[str, str]
) -> tuple[ScoredRun, ScoredRun, dict[str, str]]:
    """Return both runs with scores over the classes of both, and a reason for each metric that cannot be compared.

    Runs whose classes are unknown or the same are returned as they are.
    """
    classes = classes_of(this_run), classes_of(other)
    if not all(classes):
        return other, this_run, {}
    own_map, other_map = map_classes(*classes, renames)
    left_out = {}
    if merged := other_map.merged:
        why = f"{', '.join(map(show_name, merged))} was {max(merged.values())} classes in {other.name}"
        left_out = {metric: why for metric in OF_PROBABILITIES if metric in other.measures.tuned}
        if not {*CLASS_SUMS} & other.measures.tuned.keys():
            cure = f"{why}, and it has no f1_macro to count them from: run once with f1_macro and without this gate"
            left_out |= {metric: cure for metric in ("accuracy", "f1_micro") if metric in other.measures.tuned}
    other, this_run = _widen_run(other, other_map, left_out), _widen_run(this_run, own_map, left_out)
    areas = [run.measures.tuned.get("auroc") for run in (other, this_run)]
    if areas[0] and areas[1] and areas[0].sums_NK.shape[1] == areas[1].sums_NK.shape[1]:
        same = replace(areas[0], ranking=areas[1].ranking, signature=areas[1].signature)
        other = replace(other, measures=replace(other.measures, tuned={**other.measures.tuned, "auroc": same}))
    return other, this_run, left_out


def pair_metrics(first: ScoredRun, second: ScoredRun) -> tuple[dict[str, Difference], dict[str, str]]:
    """Return paired differences by metric, second minus first, and the reason for each metric not compared."""
    first, second, merged = align_classes(first, second, second.recipe.renames)
    pairs, left_out = pair_measures(first, second)
    return {
        metric: paired_difference(before, after, first.recipe.seed) for metric, (before, after) in pairs.items()
    }, left_out | merged


def _widen_run(run: ScoredRun, classes: ClassMap, left_out: Mapping[str, str]) -> ScoredRun:
    tuned = {metric: one for metric, one in run.measures.tuned.items() if metric not in left_out}
    if classes.moves:
        tuned = {metric: widen_measure(one, classes) for metric, one in tuned.items()}
        tuned |= _count_merged(tuned) if classes.merged else {}
    return replace(run, measures=replace(run.measures, tuned=tuned))


def widen_measure(measure: Measure, classes: ClassMap) -> Measure:
    """Return a metric with the columns of the list for both runs; a metric without columns by class as it is."""
    size, sums_NK = len(classes.columns), measure.sums_NK
    if measure.metric in CLASS_SUMS and sums_NK.shape[1] == 3 * size:
        _, predicted_NJ, true_NJ = map(classes.widen, split_sums(sums_NK))
        return replace(measure, sums_NK=class_sums(predicted_NJ > 0, true_NJ > 0))
    if measure.metric == "auroc" and sums_NK.shape[1] == 2 * size:
        scores_NJ, true_NJ = map(classes.widen, np.split(sums_NK, 2, axis=1))
        several = measure.signature != BINARY or len(classes.labels) > 2
        kept = {"ranking": mean_area, "signature": MEAN_AREA} if several else {}
        return replace(measure, sums_NK=np.concatenate([scores_NJ, true_NJ], axis=1), **kept)  # type: ignore[arg-type]
    return measure


def _count_merged(tuned: Mapping[str, Measure]) -> dict[str, Measure]:
    """Return accuracy and micro F1 of merged classes, from the sums by class: confusing the two is no error now."""
    measure = next((tuned[metric] for metric in CLASS_SUMS if metric in tuned), None)
    if measure is None:
        return {}
    hits_NJ, predicted_NJ, true_NJ = split_sums(measure.sums_NK)
    counted = {}
    if one := tuned.get("accuracy"):
        right = (predicted_NJ == true_NJ).all(1).tolist()
        counted["accuracy"] = replace(
            measure_right(right, "accuracy", one.signature), at=measure.at, clusters=measure.clusters
        )
    if one := tuned.get("f1_micro"):
        sums = columns(*(part.sum(1) for part in (hits_NJ, predicted_NJ, true_NJ)))
        counted["f1_micro"] = replace(one, sums_NK=sums, at=measure.at, clusters=measure.clusters)
    return counted


def follow_rows(run: ScoredRun, rows: Rows, renames: Mapping[str, str]) -> ScoredRun:
    """Return an earlier run whose test rows have their names among `rows`, after the renames of their classes."""
    if not renames:
        return run
    ids = {name.rpartition("-")[0] for name in run.measures.rows}
    now: dict[str, str] = {}
    for name, (_, row) in zip(iterate_ids(rows, "test"), iterate_rows(rows, "test"), strict=True):
        now |= {old: name for form in earlier_forms(row, renames) if (old := hash_row(form).hex()) in ids}
    parts = (name.rpartition("-") for name in run.measures.rows)
    names = tuple(f"{old if now.get(old, old) in ids else now.get(old, old)}-{number}" for old, _, number in parts)
    return replace(run, measures=replace(run.measures, rows=names))


def rename_prediction(prediction: object, classes: ClassMap) -> object:
    """Return a prediction of the run's model in the classes of both: a label with scores [K], or tags."""
    if isinstance(prediction, list):
        return rename_row({"tags": prediction}, classes.renames)["tags"]
    if not isinstance(prediction, dict) or "scores" not in prediction:
        return prediction
    scores_J = classes.widen(np.array([prediction["scores"]]))[0].tolist()
    return {**prediction, **rename_row({"label": prediction["label"]}, classes.renames), "scores": scores_J}


def knows_all(other: ScoredRun, this_run: ScoredRun) -> bool:
    """Whether another run has every class of this one; a missing one is new or has another name."""
    return {*classes_of(this_run)} <= {
        this_run.recipe.renames.get(name, name) for name in map(tidy_name, classes_of(other))
    }


def shared_names(champion: ScoredRun, this_run: ScoredRun, metric: str) -> tuple[str, ...]:
    """Return the names of the rows of both runs in the order of `pair_measures`."""
    return tuple(sorted({*champion.row_names(metric)} & {*this_run.row_names(metric)}))


def find_partial(
    champion: ScoredRun, this_run: ScoredRun, pairs: Mapping[str, tuple[Measure, Measure]], rows: int
) -> Iterator[tuple[str, str]]:
    """Yield metrics that leave out some of the shared rows, with their number and the reason.

    The champion did not have their candidates or columns; or it has no probability of their class.
    """
    for metric, (_, after) in pairs.items():
        names = this_run.row_names(metric)
        if this_run.measures.tuned[metric].names and len(after.sums_NK) < len(names):
            fewer = f"{len(names) - len(after.sums_NK)} of {len(names)}"
            yield (
                metric,
                f"{fewer} rows are left out, because the champion did not have the same {this_run.name_inputs(metric)}",
            )
        elif metric in OF_PROBABILITIES and not knows_all(champion, this_run) and (left := rows - len(after.sums_NK)):
            yield metric, f"{left} of {rows} rows are left out, because the champion has no probability of their class"
