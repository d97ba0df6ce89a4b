"""Test rows that stand in the training rows after all: how many, a few of them to read, and the scores by slice."""

from __future__ import annotations

from llmtune.data.contamination import Overlap, compared_text, find_overlap, prompt_row
from llmtune.data.row_store import iterate_texts, read_rows
from llmtune.evaluate.eval_inputs import SPLIT, EvalContext
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.slices import one_line, score_slice
from llmtune.records import Contamination, Rows, Slice

CLEAN, OVERLAPPING = "clean rows", "overlapping rows"
KINDS = {
    "equal": "equal",
    "near": "nearly equal",
    "prompted": "the same prompt",
    "worded": "the same words",
    "shared": "13 words in a row",
}
"""Ways to overlap, the plainest first, by their name in `Overlap`."""
SHOWN = 6
LONGEST_SHOWN = 200


def find_contamination(rows: Rows, context: EvalContext, measures: PairedMeasures) -> Contamination:
    """Compare the test rows with the training rows, and score both models without those that overlap.

    Nearly equal rows are looked for where that was not done when rows were prepared.
    """
    recipe = context.recipe
    with context.console.status("comparing test rows with training rows"):
        overlap = find_overlap(rows, near=recipe.data.deduplicate != "near")
    return Contamination(
        rows=overlap.test_rows,
        train_rows=overlap.train_rows,
        equal=len(overlap.equal),
        near=len(overlap.near),
        prompted=len(overlap.prompted),
        short=len(overlap.short),
        worded=len(overlap.worded),
        shared=len(overlap.shared),
        overlapping=len(overlap.rows),
        common=overlap.common,
        dropped={reason: number for reason, number in rows.dropped.items() if reason.endswith(" a test row")},
        examples=show_examples(rows, overlap),
        scores=score_apart(overlap, context, measures),
    )


def score_apart(overlap: Overlap, context: EvalContext, measures: PairedMeasures) -> tuple[Slice, ...]:
    """Score both models on the rows that overlap and on those that do not; nothing where none does."""
    assert context.inputs is not None
    numbers = context.inputs.rows
    overlapping = {i for i, row in enumerate(numbers) if row in overlap.rows}
    if not overlapping:
        return ()
    parts = {CLEAN: set(range(len(numbers))) - overlapping, OVERLAPPING: overlapping}
    return tuple(score_slice(name, part, measures, context.recipe.seed) for name, part in parts.items() if part)


def show_examples(rows: Rows, overlap: Overlap) -> tuple[dict[str, str], ...]:
    """Return a few rows that overlap, of each kind some: where both stand, and what they have in common."""
    pairs: dict[int, tuple[str, int]] = {}
    for name in KINDS:
        new = [(test, train) for test, train in getattr(overlap, name).items() if test not in pairs]
        pairs |= {test: (name, train) for test, train in new[: max(1, SHOWN // 2)]}
    chosen = list(pairs)[:SHOWN]
    test_origins = origins(rows, SPLIT, set(chosen))
    train_origins = origins(rows, "train", {pairs[test][1] for test in chosen})
    alike = {
        test: compared_text((pairs[test][0] == "prompted" and prompt_row(row)) or row)
        for test, row in zip(chosen, read_rows(rows, SPLIT, chosen), strict=True)
    }
    return tuple(
        {
            "kind": KINDS[pairs[test][0]],
            "test": test_origins[test],
            "train": train_origins[pairs[test][1]],
            "words": one_line(overlap.runs[test] if pairs[test][0] == "shared" else alike[test], LONGEST_SHOWN),
        }
        for test in chosen
    )


def origins(rows: Rows, split: str, numbers: set[int]) -> dict[int, str]:
    """Return where rows come from, by number; nothing is read where none is asked for."""
    if not numbers:
        return {}
    return {number: origin for number, (origin, _) in enumerate(iterate_texts(rows, split)) if number in numbers}
