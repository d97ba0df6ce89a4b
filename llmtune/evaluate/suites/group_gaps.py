"""Gaps between groups: how far apart the best and worst served slices of a column are, by any metric.

Shapes: N rows, G groups, R resamples, M rows of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmtune.evaluate.intervals import CHUNK_CELLS, Floats
from llmtune.evaluate.metric import Measure, PairedMeasures
from llmtune.evaluate.metric_info import rank_metrics
from llmtune.evaluate.paired_statistics import draw_counts, interval
from llmtune.evaluate.slices import MISSING, OTHER, Parts
from llmtune.evaluate.suites.eval_suite import EvalSuite
from llmtune.records import FEWEST_ROWS, Difference
from llmtune.store.score_records import Study, StudyTable

RESAMPLES = 2000
PERMUTATIONS = 2000
OF_RANKS = 300
"""Resamples and permutations of rank metrics, each of which needs a sort."""
METHOD = (
    f"largest minus smallest of the groups with at least {FEWEST_ROWS} rows; intervals by {RESAMPLES} resamples of "
    "rows within each group; by chance: mean and p of shuffled group labels"
)
LIMITS = (
    "A gap is the largest difference, so chance alone puts it above zero, more so with more groups and fewer "
    "rows. It shows that groups are served differently, not why: their rows may be harder."
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
        gaps = find_gaps(columns, rows, self.context.recipe.seed)
        without = [column for column in columns if column not in {gap.column for gap in gaps}]
        few = f"no two groups of {' or '.join(without)} have {FEWEST_ROWS} rows" if without else ""
        if not gaps:
            self.unmeasured = f"not measured: {few}" if few else ""
            return self.study({}, {}, {}, {})
        largest = [gap for gap in gaps if gap.metric == gaps[0].metric]
        score = score_gap(largest)
        by_chance = (
            f"random groups of these sizes have a gap of {score.chance:.3g} on average, "
            f"and one as large as the tuned model's in {100 * score.p:.2g} of 100 draws"
        )
        what = f"{gaps[0].metric} by {', '.join(gap.column for gap in largest)}"
        signature = "; ".join(part for part in (what, METHOD, by_chance, few) if part)
        scores = {"gap": score.base}, {"gap": score.tuned}, {"gap": score.difference}
        return self.study(*scores, {"gap": signature}, f"{LIMITS} Here {by_chance}.", gap_tables(gaps))


@dataclass(frozen=True)
class GroupGap:
    """The scores of one metric by the groups of one column."""

    column: str
    metric: str
    groups: Mapping[str, Ints]
    """[G] by name, the numbers of the metric's rows in the group."""
    few: Mapping[str, int]
    """Slices that are not compared, with their sizes."""
    base_G: Floats  # noqa: N815
    tuned_G: Floats  # noqa: N815
    base_R: Floats  # noqa: N815
    """Gaps of the base model with rows resampled within each group."""
    tuned_R: Floats  # noqa: N815
    """Those of the tuned model with the same draws."""
    chance_R: Floats  # noqa: N815
    """Gaps of the tuned model between random groups."""


@dataclass(frozen=True)
class GapScore:
    """The largest gap over some columns."""

    base: float
    tuned: float
    difference: Difference
    chance: float
    """Mean gap of the tuned model with random groups."""
    p: float
    """Share of random gaps as large as the tuned model's, at least 1 / (R + 1)."""


def find_gaps(columns: Mapping[str, Parts], measures: PairedMeasures, seed: int) -> list[GroupGap]:
    """Measure the gap of every metric between the groups of every column with at least two."""
    gaps = []
    for column, parts in columns.items():
        for metric in rank_metrics([name for name in measures.tuned if name in measures.base]):
            base, tuned = measures.base[metric], measures.tuned[metric]
            assert base.at == tuned.at, "both models answered the same rows"
            groups, few = group_rows(parts, tuned)
            if len(groups) < 2:
                continue
            rows = list(groups.values())
            base_G, tuned_G = (np.array([one.take(group).value for group in rows]) for one in (base, tuned))
            base_R, tuned_R = (np.ptp(resample_groups(one, rows, seed), axis=1) for one in (base, tuned))
            chance_R = shuffle_groups(tuned, rows, seed)
            gaps.append(GroupGap(column, metric, groups, few, base_G, tuned_G, base_R, tuned_R, chance_R))
    return gaps


def group_rows(parts: Parts, measure: Measure) -> tuple[dict[str, Ints], dict[str, int]]:
    """Return the metric's row numbers by group, and the sizes of slices that are too small or not a group."""
    slices = {name: np.flatnonzero(np.isin(measure.at, list(rows))) for name, rows in parts.items()}
    groups = {name: rows for name, rows in slices.items() if name not in NO_GROUP and len(rows) >= FEWEST_ROWS}
    others = {name: len(rows) for name, rows in slices.items() if name not in groups}
    return groups, {name: size for name, size in others.items() if size or name not in NO_GROUP}


def score_gap(gaps: Sequence[GroupGap]) -> GapScore:
    """Return the largest gap over columns, each of which is resampled and shuffled on its own."""
    base = float(max(np.ptp(gap.base_G) for gap in gaps))
    tuned = float(max(np.ptp(gap.tuned_G) for gap in gaps))
    base_R = np.max([gap.base_R for gap in gaps], axis=0)
    tuned_R = np.max([gap.tuned_R for gap in gaps], axis=0)
    chance_R = np.max([gap.chance_R for gap in gaps], axis=0)
    rows = max(sum(map(len, gap.groups.values())) for gap in gaps)
    finite_R = chance_R[np.isfinite(chance_R)]
    p = (int((finite_R >= tuned - 1e-12).sum()) + 1) / (len(finite_R) + 1) if np.isfinite(tuned) else 1.0
    mean = float(finite_R.mean()) if len(finite_R) else float("nan")
    return GapScore(base, tuned, interval(tuned - base, tuned_R - base_R, rows), mean, p)


def resample_groups(measure: Measure, groups: Sequence[Ints], seed: int) -> Floats:
    """Return the metric [R, G] of groups with resampled rows; all metrics and models use the same draws."""
    resamples = RESAMPLES if measure.ranking is None else OF_RANKS
    values = []
    for number, rows in enumerate(groups):
        group = measure.take(rows)
        counts = draw_counts(len(rows), seed + number, resamples)
        values.append(np.concatenate([group.resampled(counts_RM) for counts_RM in counts]))
    return np.stack(values, axis=1)


def shuffle_groups(measure: Measure, groups: Sequence[Ints], seed: int) -> Floats:
    """Return the gap [R] between random groups of the same sizes."""
    every, ends = np.concatenate(groups), np.cumsum([0, *map(len, groups)])
    count, generator = PERMUTATIONS if measure.ranking is None else OF_RANKS, np.random.default_rng(seed)
    chunk = max(1, min(count, CHUNK_CELLS // len(every)))
    gaps = []
    for start in range(0, count, chunk):
        shuffled_RN = generator.permuted(np.tile(every, (min(chunk, count - start), 1)), axis=1)
        values = [value_of_rows(measure, shuffled_RN[:, a:b]) for a, b in pairwise(ends)]
        gaps.append(np.ptp(np.stack(values, axis=1), axis=1))
    return np.concatenate(gaps)


def value_of_rows(measure: Measure, rows_RM: Ints) -> Floats:
    """Return the metric [R] of M rows each."""
    if measure.formula is not None:
        return measure.formula(measure.sums_NK[rows_RM].sum(1))
    counts_RN = np.zeros((len(rows_RM), len(measure.sums_NK)))
    np.put_along_axis(counts_RN, rows_RM, 1.0, axis=1)
    return measure.resampled(counts_RN)


def gap_tables(gaps: Sequence[GroupGap]) -> Iterator[StudyTable]:
    """Show the gaps, one row per column and metric, and each group's scores by the most informative metric."""
    first_heads = ("column", "metric", "lowest", "highest", "base", "tuned", "change", "95 % interval")
    heads = (*first_heads, "by chance", "p of the gap")
    if gaps:
        yield StudyTable("Gaps between groups", heads, tuple(map(gap_row, gaps)))
    first = {gap.column: gap for gap in reversed(gaps)}
    for column in dict.fromkeys(gap.column for gap in gaps):
        gap = first[column]
        rows = [
            (name, str(len(rows)), f"{base:.3g}", f"{tuned:.3g}")
            for (name, rows), base, tuned in zip(gap.groups.items(), gap.base_G, gap.tuned_G, strict=True)
        ]
        rows += [(name, str(size), NO_GROUP.get(name, "too few rows"), "") for name, size in gap.few.items()]
        yield StudyTable(f"{gap.metric} by {column}", (column, "rows", "base", "tuned"), tuple(rows))


def gap_row(gap: GroupGap) -> tuple[str, ...]:
    """Show one gap, the groups at its ends, and its chance level."""
    names, low, high = list(gap.groups), int(np.argmin(gap.tuned_G)), int(np.argmax(gap.tuned_G))
    ends = [f"{names[at]} {gap.tuned_G[at]:.3g}" for at in (low, high)] if low != high else ["none", "none"]
    score = score_gap([gap])
    change = score.difference
    between = "" if np.isnan(change.low) else f"{change.low:+.3g} to {change.high:+.3g}"
    numbers = (f"{score.base:.3g}", f"{score.tuned:.3g}", f"{change.value:+.3g}", between)
    return (gap.column, gap.metric, *ends, *numbers, f"{score.chance:.3g}", f"{score.p:.2g}")
