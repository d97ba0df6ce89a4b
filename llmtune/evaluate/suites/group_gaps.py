"""Gaps between groups: how far apart the best and worst served slices of a column are, by any metric.

Shapes: N rows, G groups, P ordered pairs of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmtune.display.number_format import score, signed
from llmtune.evaluate.intervals import Floats, Interval
from llmtune.evaluate.metric import Measure, PairedMeasures, own_interval, paired_difference
from llmtune.evaluate.metric_info import rank_metrics
from llmtune.evaluate.paired_statistics import conclude_interval, widen
from llmtune.evaluate.slices import MISSING, OTHER, Parts
from llmtune.evaluate.suites.eval_suite import EvalSuite
from llmtune.recipe.evaluate_section import ERROR
from llmtune.records import FEWEST_ROWS, Difference
from llmtune.store.score_records import Study, StudyTable

METHOD = (
    f"largest minus smallest of the groups with at least {FEWEST_ROWS} rows; intervals hold for all groups together "
    "(Bonferroni); the interval of a gap's change allows for any group at either end"
)
LIMITS = (
    "A gap is the largest difference, so chance alone puts it above zero, more so with more groups and fewer "
    "rows. Groups are shown to differ where their intervals do not overlap. That does not show why: their rows may be "
    "harder."
)
NO_GROUP = {OTHER: "several values", MISSING: "no value"}
"""Slices that are not a group, with the reason."""
Ints = NDArray[np.int64]


class GroupGapSuite(EvalSuite[None]):
    """Gaps between groups of the test rows, computed from existing scores."""

    key, part = "fairness", "groups"
    runs_models = False
    metrics: ClassVar = {"gap": ("between best and worst served group", -1)}

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Do nothing: the test rows' scores suffice."""

    def compare(self, rows: PairedMeasures) -> Study:
        """Return the largest gap of the most informative metric."""
        columns = self.context.inputs.groups if self.context.inputs else {}
        gaps = find_gaps(columns, rows)
        without = [column for column in columns if column not in {gap.column for gap in gaps}]
        few = f"no two groups of {' or '.join(without)} have {FEWEST_ROWS} rows" if without else ""
        if not gaps:
            self.unmeasured = f"not measured: {few}" if few else ""
            return self.study({}, {}, {}, {})
        largest = [gap for gap in gaps if gap.metric == gaps[0].metric]
        judged = judge_gaps(largest, self.context.recipe.seed)
        base, tuned, change = judged[0].base, judged[0].tuned, judged[0].change
        for other in judged[1:]:  # the largest gap of several columns changes by no more than one of them
            base, tuned = max(base, other.base), max(tuned, other.tuned)
            change = replace(change, low=min(change.low, other.change.low), high=max(change.high, other.change.high))
        what = f"{gaps[0].metric} by {', '.join(gap.column for gap in largest)}"
        signature = "; ".join(part for part in (what, METHOD, few) if part)
        change = conclude_interval(tuned - base, Interval(change.low, change.high), change.n)
        scores = {"gap": base}, {"gap": tuned}, {"gap": change}
        return self.study(*scores, {"gap": signature}, LIMITS, gap_tables(gaps, judged))


@dataclass(frozen=True)
class GroupGap:
    """The scores of one metric by the groups of one column."""

    column: str
    metric: str
    groups: Mapping[str, Ints]
    """[G] by name, the numbers of the metric's rows in the group."""
    few: Mapping[str, int]
    """Slices that are not compared, with their sizes."""
    base_G: list[Measure]  # noqa: N815
    """The base's metric on each group."""
    tuned_G: list[Measure]  # noqa: N815


@dataclass(frozen=True)
class JudgedGap:
    """The gap between the groups of a column, with intervals that all hold together in 95 of 100 samples."""

    base: float
    tuned: float
    change: Difference
    tuned_G: list[Difference]  # noqa: N815
    """Scores of the tuned model."""
    change_G: list[Difference]  # noqa: N815
    """Tuned minus base."""


def find_gaps(columns: Mapping[str, Parts], measures: PairedMeasures) -> list[GroupGap]:
    """Split every metric by the groups of every column with at least two."""
    gaps = []
    for column, parts in columns.items():
        for metric in rank_metrics([name for name in measures.tuned if name in measures.base]):
            base, tuned = measures.base[metric], measures.tuned[metric]
            assert base.at == tuned.at, "both models answered the same rows"
            groups, few = group_rows(parts, tuned)
            if len(groups) > 1:
                base_G, tuned_G = ([one.take(rows) for rows in groups.values()] for one in (base, tuned))
                gaps.append(GroupGap(column, metric, groups, few, base_G, tuned_G))
    return gaps


def group_rows(parts: Parts, measure: Measure) -> tuple[dict[str, Ints], dict[str, int]]:
    """Return the metric's row numbers by group, and the sizes of slices that are too small or not a group."""
    slices = {name: np.flatnonzero(np.isin(measure.at, list(rows))) for name, rows in parts.items()}
    groups = {name: rows for name, rows in slices.items() if name not in NO_GROUP and len(rows) >= FEWEST_ROWS}
    others = {name: len(rows) for name, rows in slices.items() if name not in groups}
    return groups, {name: size for name, size in others.items() if size or name not in NO_GROUP}


def judge_gaps(gaps: Sequence[GroupGap], seed: int) -> list[JudgedGap]:
    """Return the change of one metric's gap by column, and the intervals of its groups.

    A maximum of resampled scores would be biased: noise alone makes a gap larger than the true one. An end of the
    interval of `bound_change` errs only if an ordered pair of groups errs against one fixed pair, so these share the
    error.
    """
    alpha = ERROR / sum(len(gap.groups) * (len(gap.groups) - 1) for gap in gaps)
    judged = []
    for gap in gaps:
        own = [[own_interval(one, seed) for one in part] for part in (gap.base_G, gap.tuned_G)]
        paired = [paired_difference(*both, seed) for both in zip(gap.base_G, gap.tuned_G, strict=True)]
        base_G, tuned_G, change_G = ([widen(one, alpha) for one in part] for part in (*own, paired))
        clusters = [{*(tuned.clusters or base.clusters)} for base, tuned in zip(gap.base_G, gap.tuned_G, strict=True)]
        apart = len(set[int]().union(*clusters)) == sum(map(len, clusters))
        base, tuned = (float(np.ptp([one.value for one in part])) for part in own)
        ends = bound_change(base_G, tuned_G, change_G, apart=apart)
        change = conclude_interval(tuned - base, ends, sum(map(len, gap.groups.values())))
        judged.append(JudgedGap(base, tuned, change, tuned_G, change_G))
    return judged


def bound_change(
    base_G: Sequence[Difference], tuned_G: Sequence[Difference], change_G: Sequence[Difference], *, apart: bool
) -> Interval:
    """Return the interval of a gap's change from simultaneous intervals of the groups' scores and changes.

    With t_p and b_p the differences between the two groups of an ordered pair p, by the tuned model and by the base,
    the change is the maximum over p of the minimum over q of t_p - b_q, in any order of both. Each t_p - b_q has the
    interval of Zou and Donner ("Construction of confidence limits about effect measures: A general approach", 2008),
    paired in groups that p and q have on the same side. The errors of groups that are not `apart`, as they share
    clusters, may add up.
    """
    ends_P2 = np.array([*permutations(range(len(base_G)), 2)])
    sign_PG = np.eye(len(base_G))[ends_P2[:, 0]] - np.eye(len(base_G))[ends_P2[:, 1]]
    tuned_P1G, base_1PG = sign_PG[:, None], -sign_PG[None]
    (base, tuned) = (sign_PG @ np.array([one.value for one in part]) for part in (base_G, tuned_G))

    def reach(side: int) -> Floats:
        """Return how far each t_p - b_q [P, P] may be beyond its value, on one side."""
        paired, of_tuned = (distances(part, tuned_P1G * side) for part in (change_G, tuned_G))
        parts_PPG = np.where(tuned_P1G == -base_1PG, paired, of_tuned + distances(base_G, base_1PG * side))
        return np.asarray(np.sqrt((parts_PPG**2).sum(-1)) if apart else parts_PPG.sum(-1))

    value_PP = tuned[:, None] - base[None]
    low, high = np.nan_to_num(value_PP - reach(-1), nan=-np.inf), np.nan_to_num(value_PP + reach(1), nan=np.inf)
    ends = float(low.max(0).min()), float(high.min(1).max())
    return Interval(*ends) if np.isfinite(ends).all() else Interval()


def distances(scores_G: Sequence[Difference], sign: Floats) -> Floats:
    """Return how far each score [..., G] may be above its value (sign 1) or below (-1); 0 for sign 0."""
    up_G, down_G = (
        np.array([abs(end - one.value) for one, end in ends])
        for ends in ([(one, one.high) for one in scores_G], [(one, one.low) for one in scores_G])
    )
    return np.where(sign > 0, up_G, np.where(sign < 0, down_G, 0.0))


def gap_tables(gaps: Sequence[GroupGap], judged: Sequence[JudgedGap]) -> Iterator[StudyTable]:
    """Show the gaps, one row per column and metric, and each group's scores by the most informative metric."""
    heads = ("column", "metric", "lowest", "highest", "base", "tuned", "change")
    yield StudyTable("Gaps between groups", heads, tuple(map(gap_row, gaps)))
    first = [gap for gap in gaps if gap.metric == gaps[0].metric]
    for gap, found in zip(first, judged, strict=True):
        rows: list[tuple[str, ...]] = [
            (
                name,
                str(len(rows)),
                score(base.value),
                score(tuned.value),
                write_bounds(tuned),
                signed(change.value),
                write_bounds(change, signed),
            )
            for (name, rows), base, tuned, change in zip(
                gap.groups.items(), gap.base_G, found.tuned_G, found.change_G, strict=True
            )
        ]
        rows += [(name, str(size), NO_GROUP.get(name, "too few rows"), *[""] * 4) for name, size in gap.few.items()]
        heads = (gap.column, "rows", "base", "tuned", "its interval", "change", "its interval")
        yield StudyTable(f"{gap.metric} by {gap.column}", heads, tuple(rows))


def write_bounds(found: Difference, write: Callable[[float], str] = score) -> str:
    """Write an interval; empty without one."""
    return "" if np.isnan(found.low) else f"{write(found.low)} to {write(found.high)}"


def gap_row(gap: GroupGap) -> tuple[str, ...]:
    """Show one gap and the groups at its ends."""
    names, base_G, tuned_G = (
        list(gap.groups),
        *(np.array([one.value for one in part]) for part in (gap.base_G, gap.tuned_G)),
    )
    low, high, base, tuned = int(np.argmin(tuned_G)), int(np.argmax(tuned_G)), np.ptp(base_G), np.ptp(tuned_G)
    ends = [f"{names[at]} {score(tuned_G[at])}" for at in (low, high)] if low != high else ["none", "none"]
    return (gap.column, gap.metric, *ends, score(base), score(tuned), signed(tuned - base))
