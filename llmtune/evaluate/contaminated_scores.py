"""Test rows that stand in the training rows after all: how many, a few of them to read, and the scores without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmtune.data import read_rows
from llmtune.data.contamination import Overlap, compared_text, find_overlap
from llmtune.data.preparation import iterate_texts
from llmtune.evaluate.eval_inputs import SIDE, Plan
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.slices import score_slice
from llmtune.records import Contamination, Rows, Slice

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.evaluate.suite_runner import Scored
    from llmtune.recipe import Recipe

CLEAN, OVERLAPPING = "clean rows", "overlapping rows"
KINDS = {"equal": "equal", "near": "nearly equal", "worded": "the same words", "shared": "13 words in a row"}
"""Ways to overlap, the plainest first, by their name in `Overlap`."""
SHOWN = 6
LONGEST_SHOWN = 200


def find_contamination(rows: Rows, plan: Plan, scored: Scored, recipe: Recipe, console: Console) -> Contamination:
    """Compare the test rows with the training rows, and score both models without those that overlap.

    Nearly equal rows are looked for where that was not done when rows were prepared.
    """
    with console.status("comparing test rows with training rows"):
        found = find_overlap(rows, near=recipe.data.deduplicate != "near")
    return Contamination(
        rows=found.test_rows,
        train_rows=found.train_rows,
        equal=len(found.equal),
        near=len(found.near),
        short=len(found.short),
        worded=len(found.worded),
        shared=len(found.shared),
        overlapping=len(found.rows),
        common=found.common,
        dropped={reason: number for reason, number in rows.dropped.items() if reason.endswith(" a test row")},
        examples=show_examples(rows, found),
        scores=score_apart(found, plan, scored.base, scored.tuned, recipe.seed),
    )


def score_apart(
    found: Overlap, plan: Plan, bases: Mapping[str, Measure], tunes: Mapping[str, Measure], seed: int
) -> tuple[Slice, ...]:
    """Score both models on the rows that overlap and on those that do not; nothing where none does."""
    overlapping = {i for i, row in enumerate(plan.rows) if row in found.rows}
    clean = set(range(len(plan.rows))) - overlapping
    if not overlapping:
        return ()
    parts = [(name, part) for name, part in ((CLEAN, clean), (OVERLAPPING, overlapping)) if part]
    return tuple(score_slice(name, part, bases, tunes, seed) for name, part in parts)


def show_examples(rows: Rows, found: Overlap) -> tuple[dict[str, str], ...]:
    """Return a few rows that overlap, of each kind some: where both stand, and what they have in common."""
    told: dict[int, tuple[str, int]] = {}
    for name in KINDS:
        new = [(test, train) for test, train in getattr(found, name).items() if test not in told]
        told |= {test: (name, train) for test, train in new[: max(1, SHOWN // 2)]}
    chosen = list(told)[:SHOWN]
    test_origins = _origins(rows, SIDE, set(chosen))
    train_origins = _origins(rows, "train", {told[test][1] for test in chosen})
    texts = dict(zip(chosen, map(compared_text, read_rows(rows, SIDE, chosen)), strict=True))
    return tuple(
        {
            "kind": KINDS[told[test][0]],
            "test": test_origins[test],
            "train": train_origins[told[test][1]],
            "words": _shorten(found.runs[test] if told[test][0] == "shared" else texts[test]),
        }
        for test in chosen
    )


def _origins(rows: Rows, side: str, wanted: set[int]) -> dict[int, str]:
    if not wanted:
        return {}
    return {number: origin for number, (origin, _) in enumerate(iterate_texts(rows, side)) if number in wanted}


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_SHOWN else line[: LONGEST_SHOWN - 1] + "…"
