"""Evaluate a run: wrap `evaluate` with the champion, the contamination check and the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llmtune.data.contamination import Overlap, find_overlap
from llmtune.data.inherited_rows import find_inheritance, find_learned
from llmtune.data.row_kind import compared_text, prompt_row
from llmtune.data.row_store import iterate_ids, iterate_texts, read_rows
from llmtune.display.console import spinner
from llmtune.evaluate.controls import shown_answers
from llmtune.evaluate.decision import save_rules
from llmtune.evaluate.eval_inputs import SCHEMAS_NOTE, SPLIT, EvalContext
from llmtune.evaluate.evaluation_file import save_evaluation
from llmtune.evaluate.evaluator import ModelLoaders, Scored, evaluate, predict_baseline
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows, save_measures
from llmtune.evaluate.results import TUNED, BaseAnswers, save_base, save_predictions, save_thumbnails
from llmtune.evaluate.simple_baseline import SimpleScorer
from llmtune.evaluate.slices import one_line, score_slice
from llmtune.evaluate.suites.suite_registry import make_suites
from llmtune.recipe.training_rule import compared_checkpoints
from llmtune.records import Rows
from llmtune.store.atomic_files import hash_folder
from llmtune.store.control_scores import ControlScores
from llmtune.store.json_shapes import read_curve
from llmtune.store.score_records import Champion, Contamination, Evaluation, Slice

CLEAN, OVERLAPPING = "clean rows", "overlapping rows"
KINDS = {
    "equal": "equal",
    "near": "nearly equal",
    "prompted": "the same prompt",
    "worded": "the same words",
    "shared": "13 words in a row",
}
"""Ways to overlap, the most obvious first, by their name in `Overlap`."""
SHOWN = 6
LONGEST_SHOWN = 200


Challenge = Callable[[Evaluation, PerRowScores], Champion | None]
"""Compares with the champion, if any."""


@dataclass(frozen=True)
class ScoreRequest:
    """What an evaluation measures, and what is known before it."""

    models: ModelLoaders
    context: EvalContext
    rows: Rows
    headless: str = ""
    """Why the base model cannot answer; the task's trivial baseline then replaces it."""
    base: BaseAnswers | None = None
    """The base model's answers of an earlier evaluation, if any; they are saved under its inputs."""
    tuned: BaseAnswers | None = None
    """The same of the tuned model, for recipes with metrics of the user's own."""
    simple: SimpleScorer | None = None
    """Scores the simple baselines, if any."""
    challenge: Challenge = lambda evaluation, scores: None
    compare_control: Callable[[PerRowScores], ControlScores | None] = lambda scores: None
    """Compares with the control run, if any."""
    trained: Path | None = None
    """The run's trained weights."""


def score_run(request: ScoreRequest) -> Scored:
    """Score both models on the rows and by suites, then add the further scores of `ROW_SCORES`, and save all.

    The context's folder gets `predictions.jsonl` (every row's prompt, reference and both answers), `measures.npz` (each
    row's contribution to each score), `evaluation.json`, and what `save_rules` writes, with the hash of the trained
    weights.

    Raises DataError if no reference answer is in `evaluate.choices`, or if a column of `evaluate.slices` was not kept;
    EnvironmentProblem if a single row does not fit in memory.
    """
    scored, folder = score_models_and_suites(request), request.context.folder
    if request.context.inputs is not None:
        for add_score in ROW_SCORES:
            scored = add_score(request, scored)
    if folder is not None:
        save_evaluation(scored.evaluation, folder)
        save_rules(scored.evaluation, folder, hash_folder(request.trained) if request.trained else None)
    return scored


def score_models_and_suites(request: ScoreRequest) -> Scored:
    """Score both models on the test rows, and by the recipe's suites."""
    context, inputs, console = request.context, request.context.inputs, request.context.console
    if request.trained is not None:
        compared = compared_checkpoints(context.recipe, read_curve(request.trained.parent))
        context = replace(context, checkpoints=compared)
    if inputs is None:
        console.print("evaluate: no test rows (data.test), so nothing is measured on rows")
    elif unmeasured := inputs.notes.get(SCHEMAS_NOTE):
        console.print(f"tool_call_valid is {unmeasured}", style="yellow", highlight=False, markup=False)
    suites, stand_in, base = make_suites(context), None, None
    if inputs is not None and request.headless:
        stand_in, base = predict_baseline(context, inputs, request.rows)
        console.print(f"base: {request.headless}, so {stand_in} replaces its answers", highlight=False, markup=False)
    elif inputs is not None and request.base is not None and request.base.answers is not None:
        base = request.base.answers
        console.print("base: reusing its answers to these rows from an earlier evaluation")
    tuned = request.tuned.answers if request.tuned is not None else None
    if tuned is not None:
        console.print("tuned: reusing its answers to these rows from an earlier evaluation")
    on_base = request.simple.read_base if request.simple and request.simple.needs_base else None
    scored = evaluate(
        request.models,
        context,
        suites,
        base,
        tuned,
        stand_in=stand_in,
        headless=bool(request.headless),
        on_base=on_base,
    )
    if inputs is None:
        return scored
    evaluation = replace(scored.evaluation, baseline_reason=request.headless)
    measures, names = scored.measures, name_test_rows(request.rows, inputs.rows)
    per_row = PerRowScores(measures.base, measures.tuned, names, inputs.clusters)
    return replace(scored, evaluation=evaluation, per_row=per_row)


def add_simple_baselines(request: ScoreRequest, scored: Scored) -> Scored:
    """Add the scores of baselines without fine-tuning, if the task has any."""
    evaluation, per_row = scored.evaluation, scored.per_row
    for simple in request.simple.score(scored.measures.tuned) if request.simple else ():
        evaluation, per_row = simple.add_to(evaluation, per_row)
    return replace(scored, evaluation=evaluation, per_row=per_row)


def save_row_files(request: ScoreRequest, scored: Scored) -> Scored:
    """Save answers and measures of each row, and the answers that later evaluations reuse."""
    context, answers = request.context, scored.answers
    if context.folder is not None and context.inputs is not None:
        save_measures(context.folder, scored.per_row)
        save_predictions(context.folder, context.inputs, shown_answers(answers, context.controls))
        save_thumbnails(context.folder, context.inputs, context.task, scored.evaluation)
        if request.base is not None and not request.headless:
            save_base(context.folder, answers["base"], request.base.inputs)
        if request.tuned is not None and context.recipe.evaluate.own_metrics:
            save_base(context.folder, answers["tuned"], request.tuned.inputs, TUNED)
    return scored


def add_contamination(request: ScoreRequest, scored: Scored) -> Scored:
    """Add the test rows that overlap with training rows, and the scores without them."""
    contamination = find_contamination(request.rows, request.context, scored.measures)
    return replace(scored, evaluation=replace(scored.evaluation, contamination=contamination))


def add_champion(request: ScoreRequest, scored: Scored) -> Scored:
    """Add the comparison with the champion, if the recipe names one."""
    champion = request.challenge(scored.evaluation, scored.per_row)
    return replace(scored, evaluation=replace(scored.evaluation, champion=champion))


def add_control_run(request: ScoreRequest, scored: Scored) -> Scored:
    """Add the comparison with the control run, if the recipe has one."""
    control = request.compare_control(scored.per_row)
    return replace(scored, evaluation=replace(scored.evaluation, control_run=control))


ROW_SCORES: tuple[Callable[[ScoreRequest, Scored], Scored], ...] = (
    add_simple_baselines,
    save_row_files,
    add_contamination,
    add_champion,
    add_control_run,
)
"""The steps after both models are scored, in order; each returns the scores with its own added."""


def find_contamination(rows: Rows, context: EvalContext, measures: PairedMeasures) -> Contamination:
    """Compare the test rows with the training rows, and score both models without overlapping ones.

    Looks for nearly equal rows unless preparation already did. Training rows of earlier runs that this one starts from
    count as well.
    """
    recipe = context.recipe
    with spinner(context.console, "comparing test rows with training rows"):
        overlap = find_overlap(rows, near=recipe.data.deduplicate != "near")
        inheritance = find_inheritance(recipe)
        learned = find_learned(rows, inheritance.runs)
    inherited = frozenset(number for number, name in enumerate(iterate_ids(rows, SPLIT)) if name in learned)
    overlap = replace(overlap, inherited=inherited)
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
        inherited=len(inherited),
        unknown=inheritance.unknown,
    )


def score_apart(overlap: Overlap, context: EvalContext, measures: PairedMeasures) -> tuple[Slice, ...]:
    """Score both models on overlapping and other rows separately; empty without overlap."""
    assert context.inputs is not None
    numbers = context.inputs.rows
    overlapping = {i for i, row in enumerate(numbers) if row in overlap.rows}
    if not overlapping:
        return ()
    parts = {CLEAN: set(range(len(numbers))) - overlapping, OVERLAPPING: overlapping}
    return tuple(score_slice(name, part, measures, context.recipe.seed) for name, part in parts.items() if part)


def show_examples(rows: Rows, overlap: Overlap) -> tuple[dict[str, str], ...]:
    """Return example overlapping rows of each kind: the origins of both rows, and their common text."""
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
    """Return the origins of rows by number; reads nothing if `numbers` is empty."""
    if not numbers:
        return {}
    return {number: origin for number, (origin, _) in enumerate(iterate_texts(rows, split)) if number in numbers}
