"""Step 5: base and tuned model on the same held-out rows, one after the other, and what the difference is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llmtune.data.contamination import Overlap, compared_text, find_overlap, prompt_row
from llmtune.data.row_store import iterate_rows, iterate_texts, read_rows
from llmtune.evaluate.eval_inputs import SCHEMAS_NOTE, SPLIT, EvalContext, EvalInputs, make_inputs
from llmtune.evaluate.evaluated_task import EvalPrediction, EvaluatedTask
from llmtune.evaluate.evaluation_file import print_scores
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.inference import Answers, TokenSums, compute_metrics, predict
from llmtune.evaluate.metric import Measure, PairedMeasures
from llmtune.evaluate.paired_statistics import METHOD
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows, save_measures
from llmtune.evaluate.results import BaseAnswers, find_flips, pick_samples, save_base, save_predictions
from llmtune.evaluate.slices import one_line, score_slice, score_slices
from llmtune.evaluate.suite_registry import Suite, compare_suites, make_suites
from llmtune.model.device import release_memory
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Champion, Contamination, Evaluation, Examples, Row, Rows, Slice
from llmtune.report.metric_info import better_side

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
PIECES = "loss.pieces"
"""Name of the note on the base model's losses by piece of a text."""
PIECES_APART = 0.5
"""Nats per token by which later pieces may be worse."""
GUESSED_ROWS = 400_000
"""Rows that are guessed in all, so that many test rows cost seconds."""


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


ModelLoaders: TypeAlias = "Mapping[str, Callable[[], AbstractContextManager[torch.nn.Module]]]"
"""Contexts that load the "base" and "tuned" model."""


def evaluate(
    models: ModelLoaders,
    processor: PreTrainedTokenizerBase,
    rows: Rows,
    examples: Examples,
    task: EvaluatedTask,
    recipe: Recipe,
    console: Console,
    *,
    device: str,
    folder: Path | None = None,
    headless: bool = False,
    packs: Callable[[], bool | None] = lambda: None,
    known: BaseAnswers | None = None,
    challenge: Callable[[Evaluation, PerRowScores], Champion] | None = None,
) -> Evaluation:
    """Score `models["base"]` and `models["tuned"]` on the test rows; each is entered once, base first.

    With `headless` the base model has no trained head: the task's trivial baseline stands in its place, and it is not
    entered. `packs` says of the model that was entered last whether rows stand end to end while its losses are taken;
    None leaves that to the recipe. With a `folder`, every row's prompt, reference and both answers go to
    `predictions.jsonl` in it, and its part in each score to `measures.npz`. With `known`, what the base model answered
    is kept there, and it does not run again where that is known already. `challenge` compares with a champion. Without
    test rows the evaluation holds what the suites measured, and no model is entered where the recipe names none.

    Raises DataError for `evaluate.choices` that no reference answer is among and for `evaluate.slices` by columns that
    were not kept, EnvironmentProblem where a single row does not fit in memory.
    """
    inputs = make_inputs(rows, examples, task, processor, recipe) if examples.counts.get(SPLIT) else None
    _print_gaps(inputs, console)
    context = EvalContext(recipe, task, processor, inputs, device, console, folder)
    suites = make_suites(context)
    stand_in, answers = None, dict[str, Answers]()
    if inputs is not None and headless:
        stand_in, answers["base"] = predict_baseline(context, inputs, rows)
        console.print(f"base: the model has no trained head for this, so {stand_in} stands in its place")
    elif inputs is not None and known is not None and known.answers is not None:
        answers["base"] = known.answers
        console.print("base: what it answered to these rows is known from an evaluation before")
    run_models(models, context, [suite for _, suite in suites], answers, headless, packs)
    evaluation, measures = Evaluation({}, {}, {}, (), (), 0), PairedMeasures()
    if inputs is not None:
        save = None if stand_in is not None or known is None else known.inputs
        scores = score_rows(context, inputs, answers, rows, save)
        measures = PairedMeasures(scores.base, scores.tuned)
        base, tuned = answers["base"], answers["tuned"]
        evaluation = compare_answers(context, inputs, base, tuned, measures, headless=stand_in is not None)
        evaluation = replace(evaluation, contamination=find_contamination(rows, context, measures))
        if challenge is not None:
            evaluation = replace(evaluation, champion=challenge(evaluation, scores))
    evaluation = replace(evaluation, baseline=stand_in, studies=compare_suites(suites, measures))
    evaluation = replace(evaluation, gates=check_gates(recipe.evaluate, evaluation))
    print_scores(evaluation, console)
    print_cautions(evaluation, answers, recipe, console)
    return evaluation


def score_rows(
    context: EvalContext, inputs: EvalInputs, answers: Mapping[str, Answers], rows: Rows, base_inputs: str | None
) -> PerRowScores:
    """Measure both models' answers row by row, and save them if the context has a folder.

    With `base_inputs`, the hash of what the base's answers depend on, those are saved for later evaluations too.
    """
    base, tuned = answers["base"], answers["tuned"]
    names = name_test_rows(rows, inputs.rows)
    scores = PerRowScores(
        compute_metrics(context, base, base), compute_metrics(context, tuned, base), names, inputs.clusters
    )
    if context.folder is not None:
        save_predictions(context.folder, inputs, base, tuned)
        save_measures(context.folder, scores)
        if base_inputs is not None:
            save_base(context.folder, base, base_inputs)
    return scores


def _print_gaps(inputs: EvalInputs | None, console: Console) -> None:
    """Print what cannot be measured on these rows."""
    if inputs is None:
        console.print("evaluate: there are no test rows (data.test), so nothing is measured on rows")
    elif unmeasured := inputs.notes.get(SCHEMAS_NOTE):
        console.print(f"tool_call_valid is {unmeasured}", style="yellow", highlight=False, markup=False)


def print_cautions(evaluation: Evaluation, answers: Mapping[str, Answers], recipe: Recipe, console: Console) -> None:
    """Print how many answers `generation.max_new_tokens` ended, and the warning of `compare_pieces`, if any."""
    if PIECES in evaluation.signatures:
        console.print(f"[yellow]{evaluation.signatures[PIECES]}[/]", highlight=False)
    counts = {name: sum(share > 0 for share in one.cut.values()) for name, one in answers.items()}
    told = [f"{name} {count} of {len(answers[name].cut)}" for name, count in counts.items() if count]
    if told:
        new = recipe.generation.max_new_tokens
        console.print(f"answers cut at generation.max_new_tokens ({new}): {', '.join(told)}", highlight=False)


def compare_pieces(base: TokenSums | None, recipe: Recipe) -> dict[str, str]:
    """Return a warning where the base is much worse on later pieces of split texts than on first pieces; else nothing.

    Training then teaches the model to read pieces, and the gain in loss is no gain on complete texts.
    """
    if base is None or recipe.data.on_overlong != "split" or TASK_FACTS[recipe.task].has_turns:
        return {}
    split = base.tokens > base.first_tokens
    if not split.any():
        return {}
    first = float(base.first_nats[split].sum() / base.first_tokens[split].sum())
    later = float((base.nats - base.first_nats).sum() / (base.tokens - base.first_tokens).sum())
    if later - first <= PIECES_APART:
        return {}
    what = f"The base model's loss is {later:.2f} on later pieces of split texts and {first:.2f} on their first pieces."
    why = "Part of the gain may come from learning to read pieces."
    fix = "Check that the tokenizer adds the start token that the model needs, or raise data.max_length."
    return {PIECES: f"{what} {why} {fix}"}


def run_models(
    models: ModelLoaders,
    context: EvalContext,
    suites: Sequence[Suite],
    answers: dict[str, Answers],
    headless: bool,
    packs: Callable[[], bool | None],
) -> None:
    """Run the rows and the suites on base and tuned model; `answers` that are known stay, others are added."""
    for name in ("base", "tuned"):
        predicts = context.inputs is not None and name not in answers
        running = () if name == "base" and headless else suites
        if not predicts and not running:
            continue
        with models[name]() as model:
            if predicts:
                answers[name] = predict(model, name, context, packs())
            for suite in running:
                suite.run(name, model)
        del model  # else the base's weights stay while the tuned ones are loaded
        release_memory()


def predict_baseline(context: EvalContext, inputs: EvalInputs, rows: Rows) -> tuple[str, Answers]:
    """Return the name of what stands for a base model without a head, and its predictions."""
    task = context.task
    references = [task.reference(row) for _, row in iterate_rows(rows, "train")]
    name, values = task.baseline(references, [inputs.questions[i] for i in inputs.answered], context.recipe)
    predictions = dict(zip(inputs.answered, values, strict=True))
    return name, Answers(None, {i: task.format_prediction(value) for i, value in predictions.items()}, {}, predictions)


def find_guessable(
    task: EvaluatedTask, recipe: Recipe, references: Sequence[Any], prompts: Sequence[Row], metrics: Iterable[str]
) -> tuple[str, ...]:
    """Return the metrics in which guessing by class frequency beats the task's trivial baseline on these rows.

    A guess shuffles the references. It and the baseline know the class frequencies of these very rows, so neither is
    luckier. Guessing beats the baseline if its mean over the shuffles is better by three standard errors.
    """
    right = [task.as_prediction(reference, recipe) for reference in references]
    if not right or None in right:
        return ()
    _, constant = task.baseline(references, prompts, recipe)
    generator, shuffles = np.random.default_rng(recipe.seed), max(50, min(400, GUESSED_ROWS // len(right)))
    orders = [generator.permutation(len(right)) for _ in range(shuffles)]

    def value(metric: str, predictions: Sequence[object]) -> float:
        measured = task.compute_metric(metric, EvalPrediction(predictions, references), recipe)
        return measured.value * better_side(metric) if measured else math.nan

    def beats(metric: str) -> bool:
        guesses_R = np.array([value(metric, [right[i] for i in order]) for order in orders])
        error = float(guesses_R.std()) / math.sqrt(shuffles)
        return float(guesses_R.mean()) - value(metric, constant) > 3 * error + 1e-9

    return tuple(metric for metric in metrics if beats(metric))


def compare_answers(
    context: EvalContext,
    inputs: EvalInputs,
    base: Answers,
    tuned: Answers,
    measures: PairedMeasures,
    *,
    headless: bool,
) -> Evaluation:
    """Turn the answers of both models into scores, differences, samples, flips and slices."""
    task, recipe = context.task, context.recipe
    samples, seed = recipe.evaluate.samples, recipe.seed
    base_scores, tuned_scores = measures.scores()
    references, prompts = [inputs.targets[i] for i in inputs.answered], [inputs.questions[i] for i in inputs.answered]
    details = {}
    for name, answers in (("base", base), ("tuned", tuned)):
        found = EvalPrediction([*answers.predictions.values()], [inputs.targets[i] for i in answers.predictions])
        table = task.class_table(found, recipe) if answers.predictions else None
        if table is not None:
            details[name] = table
    return Evaluation(
        base=base_scores,
        tuned=tuned_scores,
        difference=measures.differences(seed),
        gates=(),
        samples=pick_samples(inputs, base, tuned, samples),
        rows=len(inputs.rows),
        signatures=signatures(measures.tuned, inputs, tuned, recipe) | compare_pieces(base.sums, recipe),
        details=details,
        guessable=find_guessable(task, recipe, references, prompts, measures.tuned) if headless else (),
        flips=find_flips(measures, inputs, base, tuned, samples),
        slices=score_slices(inputs.slices, measures, seed),
    )


def signatures(measures: Mapping[str, Measure], inputs: EvalInputs, answers: Answers, recipe: Recipe) -> dict[str, str]:
    """Describe how each metric was computed, and what was left out."""
    by_metric = dict.fromkeys(inputs.metrics, "not measured: these rows do not have what it is made of")
    by_metric |= {metric: one.signature for metric, one in measures.items()} | {"intervals": METHOD} | inputs.notes
    if recipe.data.split_by is not None and not inputs.clusters:
        by_metric["intervals.groups"] = "no two test rows have the same data.split_by value: rows are drawn one by one"
    if answers.texts and TASK_FACTS[recipe.task].generates:
        settings = recipe.generation.model_dump(exclude_none=True)
        by_metric["generation"] = ", ".join(f"{key} {value}" for key, value in settings.items())
    if inputs.turns:
        answered = sum(map(len, inputs.turns.values()))
        by_metric["generated.turns"] = f"{answered} answers to {len(inputs.turns)} rows with tools, each of its turns"
    if outside := max(0, len(inputs.prompt_ids) - len(answers.texts)):
        by_metric["generated.outside"] = f"{outside} prompts and their answers exceed the model's context; left out"
    return by_metric
