"""Gaps between groups: how far apart the best and the worst served group are, by any metric.

Shapes: N rows, G groups, R resamples, K sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.metric import Measure
from llmtune.evaluate.paired_statistics import CHUNK_CELLS, Floats, draw_counts, interval
from llmtune.evaluate.slices import MISSING, OTHER, Parts
from llmtune.records import Difference, StudyTable
from llmtune.report.metric_info import HEADLINES
from llmtune.report.verdict import FEWEST_ROWS

RESAMPLES = 2000
PERMUTATIONS = 2000
OF_RANKS = 300
"""Resamples and permutations of metrics that no sums are enough for: each takes a sort."""
METHOD = (
    f"largest minus smallest of the groups with at least {FEWEST_ROWS} rows; intervals by {RESAMPLES} resamples of "
    "rows within each group; by chance: mean and p of shuffled group labels"
)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Grouped:
    """The rows of one metric by the groups of one column that have enough of them."""

    names: tuple[str, ...]
    rows: tuple[Ints, ...]
    """[G] numbers of the metric's rows."""
    few: tuple[tuple[str, int], ...]
    """Groups with too few rows, and how many those are."""


@dataclass(frozen=True)
class GroupGap:
    """The gap of one metric between the groups of one column."""

    column: str
    metric: str
    grouped: Grouped
    base_G: tuple[float, ...]  # noqa: N815
    tuned_G: tuple[float, ...]  # noqa: N815
    base_R: Floats  # noqa: N815
    """Gaps of the base model with rows drawn anew within each group."""
    tuned_R: Floats  # noqa: N815
    """Those of the tuned model with the same draws."""
    chance_R: Floats  # noqa: N815
    """Gaps of the tuned model between groups drawn by lot."""

    @property
    def rows(self) -> int:
        """How many rows are in a group that is compared."""
        return sum(map(len, self.grouped.rows))


@dataclass(frozen=True)
class GapScore:
    """The largest gap over some columns."""

    base: float
    tuned: float
    difference: Difference
    chance: float
    """The mean of it for the tuned model where groups are drawn by lot."""
    p: float
    """How often it is then as large as the tuned model's."""


def group_rows(parts: Parts, measure: Measure) -> Grouped:
    """Put the rows of a metric into the groups of a column; rows without a value, or with a rare one, are in none."""
    names = np.array([parts.by_row[row] for row in measure.at])
    places = {name: np.flatnonzero(names == name) for name in parts.names if name not in (MISSING, OTHER)}
    few = [(name, len(rows)) for name, rows in places.items() if len(rows) < FEWEST_ROWS]
    few += [(name, int((names == name).sum())) for name in (OTHER, MISSING) if (names == name).any()]
    enough = {name: rows for name, rows in places.items() if len(rows) >= FEWEST_ROWS}
    return Grouped(tuple(enough), tuple(enough.values()), tuple(few))


def find_gaps(
    columns: Mapping[str, Parts], bases: Mapping[str, Measure], tunes: Mapping[str, Measure], seed: int
) -> list[GroupGap]:
    """Measure the gap of every metric between the groups of every column that has two of them."""
    found = []
    for column, parts in columns.items():
        for metric in order_metrics(tunes):
            if metric in bases:
                grouped = group_rows(parts, tunes[metric])
                if len(grouped.names) > 1:
                    found.append(find_gap(column, grouped, bases[metric], tunes[metric], seed))
    return found


def order_metrics(metrics: Mapping[str, Measure]) -> list[str]:
    """Order metrics by how much they say to a person."""
    return sorted(metrics, key=lambda metric: HEADLINES.index(metric) if metric in HEADLINES else len(HEADLINES))


def find_gap(column: str, grouped: Grouped, base: Measure, tuned: Measure, seed: int) -> GroupGap:
    """Measure the gap of one metric between the groups of one column."""
    assert base.at == tuned.at, "both models answered the same rows"
    base_G, tuned_G = (tuple(group_values(measure, grouped).tolist()) for measure in (base, tuned))
    base_R, tuned_R = (spread(draw_groups(measure, grouped, seed)) for measure in (base, tuned))
    chance_R = shuffle_groups(tuned, grouped, seed)
    return GroupGap(column, tuned.metric, grouped, base_G, tuned_G, base_R, tuned_R, chance_R)


def score_gap(gaps: Sequence[GroupGap]) -> GapScore:
    """Return the largest gap over columns, which are drawn and shuffled one by one."""
    base, tuned = (float(max(spread(np.array(getattr(gap, side))) for gap in gaps)) for side in ("base_G", "tuned_G"))
    base_R, tuned_R, chance_R = (
        np.max([getattr(gap, name) for gap in gaps], axis=0) for name in ("base_R", "tuned_R", "chance_R")
    )
    known = chance_R[np.isfinite(chance_R)]
    return GapScore(
        base,
        tuned,
        interval(tuned - base, tuned_R - base_R, max(gap.rows for gap in gaps)),
        float(known.mean()) if len(known) else float("nan"),
        share_above(known, tuned),
    )


def spread(values_xG: Floats) -> Floats:
    """Return largest minus smallest over the groups."""
    return np.asarray(values_xG.max(-1) - values_xG.min(-1), dtype=np.float64)


def group_values(measure: Measure, grouped: Grouped) -> Floats:
    """Return the metric [G] of each group."""
    return np.array([part(measure, rows).value for rows in grouped.rows])


def part(measure: Measure, rows: Ints) -> Measure:
    """Return the metric of some of its rows."""
    return measure.of({measure.at[row] for row in rows})


def draw_groups(measure: Measure, grouped: Grouped, seed: int) -> Floats:
    """Return the metric [R, G] of groups whose rows are drawn anew; the same draws for every metric and model."""
    resamples = RESAMPLES if measure.weighted is None else OF_RANKS
    values = []
    for number, rows in enumerate(grouped.rows):
        own = part(measure, rows)
        counts = draw_counts(len(rows), seed + number, resamples)
        values.append(np.concatenate([own.drawn(counts_RN) for counts_RN in counts]))
    return np.stack(values, axis=1)


def shuffle_groups(measure: Measure, grouped: Grouped, seed: int) -> Floats:
    """Return the gap [R] between groups of the same sizes whose rows are drawn by lot from all of them."""
    every = np.concatenate(grouped.rows)
    ends = np.cumsum([0, *map(len, grouped.rows)])
    gaps = []
    for shuffled_RN in shuffles(every, seed, PERMUTATIONS if measure.weighted is None else OF_RANKS):
        values = [drawn_rows(measure, shuffled_RN[:, a:b]) for a, b in pairwise(ends)]
        gaps.append(spread(np.stack(values, axis=1)))
    return np.concatenate(gaps)


def shuffles(rows: Ints, seed: int, wanted: int) -> Iterator[Ints]:
    """Yield rows in random order [R, N], some shuffles at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(wanted, CHUNK_CELLS // len(rows)))
    for start in range(0, wanted, chunk):
        yield generator.permuted(np.tile(rows, (min(chunk, wanted - start), 1)), axis=1)


def drawn_rows(measure: Measure, rows_RM: Ints) -> Floats:
    """Return the metric [R] of M rows each time."""
    if measure.weighted is None:
        assert measure.formula is not None
        return measure.formula(measure.sums_NK[rows_RM].sum(1))
    counts_RN = np.zeros((len(rows_RM), len(measure.sums_NK)))
    np.put_along_axis(counts_RN, rows_RM, 1.0, axis=1)
    return measure.drawn(counts_RN)


def share_above(chance_R: Floats, gap: float) -> float:
    """Return how often chance makes a gap that is as large, never below 1 / (R + 1)."""
    return (int((chance_R >= gap - 1e-12).sum()) + 1) / (len(chance_R) + 1) if np.isfinite(gap) else 1.0


# What a person reads


def gap_tables(gaps: Sequence[GroupGap], columns: Mapping[str, Parts]) -> list[StudyTable]:
    """Show the gaps, a row a column and metric, and the scores of each group by the metric that says most."""
    heads = ("column", "metric", "lowest", "highest", "base", "tuned", "change", "95 % interval", "by chance", "p")
    rows = []
    for gap in gaps:
        low, high = int(np.argmin(gap.tuned_G)), int(np.argmax(gap.tuned_G))
        ends = [f"{gap.grouped.names[at]} {gap.tuned_G[at]:.3g}" for at in (low, high)]
        ends = ends if low != high else ["none", "none"]  # all are the same
        score = score_gap([gap])
        change = score.difference
        between = "" if np.isnan(change.low) else f"{change.low:+.3g} to {change.high:+.3g}"
        numbers = (f"{score.base:.3g}", f"{score.tuned:.3g}", f"{change.value:+.3g}", between)
        rows.append((gap.column, gap.metric, *ends, *numbers, f"{score.chance:.3g}", f"{score.p:.2g}"))
    tables = [StudyTable("Gaps between groups", heads, tuple(rows))] if rows else []
    return tables + [table for column in columns for table in group_table(column, gaps)]


def group_table(column: str, gaps: Sequence[GroupGap]) -> Iterator[StudyTable]:
    """Show the scores of one column's groups by the metric that says most."""
    gap = next((gap for gap in gaps if gap.column == column), None)
    if gap is None:
        return
    rows = [
        (name, str(len(places)), f"{before:.3g}", f"{after:.3g}")
        for name, places, before, after in zip(
            gap.grouped.names, gap.grouped.rows, gap.base_G, gap.tuned_G, strict=True
        )
    ]
    why = {OTHER: "several values", MISSING: "no value"}
    rows += [(name, str(number), why.get(name, "too few rows"), "") for name, number in gap.grouped.few]
    yield StudyTable(f"{gap.metric} by {column}", (column, "rows", "base", "tuned"), tuple(rows))
