"""Test rows that the champion never saw: scores of all models on them, and against the other test rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from llmtune.evaluate.metric import PairedMeasures, own_interval
from llmtune.evaluate.opened_runs import ScoredRun, pair_measures
from llmtune.evaluate.paired_statistics import subtract_intervals
from llmtune.evaluate.per_row_scores import PerRowScores
from llmtune.evaluate.slices import score_slice
from llmtune.recipe.gate_grammar import NEW
from llmtune.records import FEWEST_ROWS
from llmtune.store.score_records import NewRows


@dataclass(frozen=True)
class Asked:
    """Test rows that the champion never saw, and its answers to them."""

    places: tuple[int, ...] = ()
    """Positions of the rows among the test rows."""
    answers: PerRowScores = field(default_factory=PerRowScores)
    """Of the rows that its model could answer."""
    why_none: str = ""
    """Why there are no such rows."""


NONE_ASKED = Asked()


def split_answers(asked: Asked, names: Sequence[str], new: Collection[int]) -> tuple[PerRowScores, Asked]:
    """Split answers to all test rows, named by their position: those that are not new, and those to `new` ones."""
    ids = {name.rpartition("-")[0] for place, name in enumerate(names) if place in {*new}}
    others = {name.rpartition("-")[0] for name in asked.answers.rows} - ids
    answers = asked.answers.without_rows(others)
    return asked.answers.without_rows(ids), Asked(tuple(place for place in asked.places if place in {*new}), answers)


def score_new(champion: ScoredRun, own: ScoredRun, names: Collection[str], metrics: Collection[str]) -> NewRows:
    """Score all models on the test rows with these names; `champion` has its answers to them.

    Only `metrics` are compared with the champion.
    """
    measures, seed = own.measures, own.recipe.seed
    new = {place for place, name in enumerate(measures.rows) if name in names}
    apart = measures.subset(new), measures.subset({*range(len(measures.rows))} - new)
    intervals, old = ({metric: own_interval(one, seed) for metric, one in part.tuned.items()} for part in apart)
    from_old = {name: subtract_intervals(one, old[name]) for name, one in intervals.items() if name in old}
    pairs = {name: pair for name, pair in pair_measures(champion, own)[0].items() if name in metrics}
    answered = PairedMeasures(*({name: pair[at] for name, pair in pairs.items()} for at in (0, 1)))
    champion_scores, tuned_scores = answered.scores()
    return NewRows(
        scores=score_slice(NEW, new, measures, seed),
        intervals=intervals,
        from_old={name: change for name, change in from_old.items() if math.isfinite(change.low)},
        rows=len({*champion.measures.rows} & {*measures.rows}),
        before=champion_scores,
        tuned=tuned_scores,
        difference=answered.differences(seed, FEWEST_ROWS),
    )
