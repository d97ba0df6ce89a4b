"""Compare a tuned model with its control run on the same test rows, and with a teacher; sentences for the verdict.

Shapes: N rows, U rows or groups of rows, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmtune.evaluate.intervals import RESAMPLES, Floats
from llmtune.evaluate.metric import Measure, PairedMeasures, paired_difference
from llmtune.evaluate.metric_info import direction
from llmtune.evaluate.opened_runs import ScoredRun, find_other_measure, keep_asked, open_run_scores, pair_measures
from llmtune.evaluate.paired_statistics import count_groups, draw_counts, interval
from llmtune.evaluate.per_row_scores import PerRowScores
from llmtune.recipe.schema import Recipe
from llmtune.records import FEWEST_ROWS, Difference
from llmtune.store.control_scores import ControlScores, ModelCosts, TeacherScores
from llmtune.store.run_folder import RunFolder
from llmtune.store.seed_runs import control_folder, is_done


def find_control_scores(recipe: Recipe, run: Path) -> Path | None:
    """Return the evaluation of the control run of a run folder; None without one, or if it is off or not scored."""
    control = recipe.control_run
    if control is None or not control.on:
        return None
    folder = control_folder(run, control)
    return folder / "evaluation" if is_done(folder, "evaluate") else None


def compare_control_run(recipe: Recipe, run: RunFolder, measures: PerRowScores) -> ControlScores | None:
    """Compare the tuned model's measures of a run with those of its control run; None if the recipe has none.

    Metrics that the two measure differently are left out. Raises EnvironmentProblem if its scores are damaged.
    """
    control = recipe.control_run
    if control is None:
        return None
    record = ControlScores(control.name, control.claim, control.meaning)
    if not control.on:
        return replace(record, why_none=f"{control.key} is false")
    if find_control_scores(recipe, run.path) is None:
        failure = run.findings.get("control_failure")
        why = f"the control run failed: {failure}" if failure else "the control run has no scores; run the recipe again"
        return replace(record, why_none=why)
    other = open_run_scores(control_folder(run.path, control), control.name)
    tuned = ScoredRun("the tuned model", recipe, other.evaluation, keep_asked(measures, recipe))
    pairs, left_out = pair_measures(other, tuned)
    for metric in [*pairs]:
        if (difference := find_other_measure(other, tuned, metric)) is not None:
            left_out[metric] = difference[0]
            del pairs[metric]
    return replace(
        record,
        scores={metric: before.value for metric, (before, _) in pairs.items()},
        tuned={metric: after.value for metric, (_, after) in pairs.items()},
        difference={metric: paired_difference(*pair, recipe.seed) for metric, pair in pairs.items()},
        left_out=left_out,
    )


def score_teacher(
    measures: PairedMeasures, teacher: Mapping[str, Measure], seed: int, costs: Mapping[str, ModelCosts]
) -> TeacherScores:
    """Compare base and tuned model with their teacher, in the metrics that all measure on the same rows."""
    shared = {
        name: one for name, one in teacher.items() if name in measures.tuned and measures.tuned[name].at == one.at
    }
    return TeacherScores(
        scores={name: one.value for name, one in shared.items()},
        difference=PairedMeasures(shared, measures.tuned).differences(seed),
        shares=gap_shares(measures, shared, seed),
        costs={name: costs[name] for name in ("tuned", "teacher") if name in costs},
    )


def gap_shares(measures: PairedMeasures, teacher: Mapping[str, Measure], seed: int) -> dict[str, Difference]:
    """Return the share of the gap from base to teacher that the tuned model closed, by metric.

    A metric counts only if the teacher is clearly better than the base: a share of no gap says nothing.
    """
    shares = {}
    for name, best in teacher.items():
        base, tuned = measures.base.get(name), measures.tuned.get(name)
        if base is None or tuned is None or not base.at == tuned.at == best.at:
            continue
        gap = paired_difference(base, best, seed)
        if gap.n >= FEWEST_ROWS and direction(name, gap) > 0:
            shares[name] = gap_share(base, tuned, best, seed)
    return shares


def gap_share(base: Measure, tuned: Measure, teacher: Measure, seed: int) -> Difference:
    """Return (tuned - base) / (teacher - base) on the same rows, with an interval from draws of the rows or groups."""
    rows = len(tuned.sums_NK)
    unit_N = np.unique(tuned.clusters or range(rows), return_inverse=True)[1]

    def shares(counts_RU: Floats) -> Floats:
        low_R, now_R, high_R = (one.resampled(counts_RU[:, unit_N]) for one in (base, tuned, teacher))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((now_R - low_R) / (high_R - low_R))

    units = int(unit_N.max()) + 1
    values_R = np.concatenate([shares(counts_RU) for counts_RU in draw_counts(units, seed, RESAMPLES)])
    effective = int(count_groups(unit_N.tolist())[1])
    return replace(interval(float(shares(np.ones((1, units)))[0]), values_R, effective), n=rows)
