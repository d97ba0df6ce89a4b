"""Step 5: run base and tuned model on the same held-out rows, one after the other, and measure the difference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmtune.data.row_store import iterate_rows
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.evaluate.calibration import Chosen, calibrate, describe_reliability
from llmtune.evaluate.control_runs import score_teacher
from llmtune.evaluate.controls import compare_controls, name_answers, shown_answers
from llmtune.evaluate.decision import conclude, fit_decision, measure_decisions
from llmtune.evaluate.eval_inputs import EvalContext, EvalInputs
from llmtune.evaluate.evaluated_task import Corpus, EvalPrediction, EvaluatedTask
from llmtune.evaluate.evaluation_file import OUTSIDE, PIECES
from llmtune.evaluate.inference import Answers, TokenSums, compute_metrics, predict, read_choices
from llmtune.evaluate.metric import Measure, PairedMeasures, own_interval
from llmtune.evaluate.metric_info import better_side
from llmtune.evaluate.paired_statistics import METHOD
from llmtune.evaluate.per_row_scores import PerRowScores
from llmtune.evaluate.results import find_flips, pick_samples
from llmtune.evaluate.slices import score_slices
from llmtune.evaluate.suites.eval_suite import EvalSuite
from llmtune.evaluate.suites.suite_registry import compare_suites
from llmtune.model.device import release_memory
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Row, Rows
from llmtune.store.control_scores import ModelCosts
from llmtune.store.score_records import Decided, Evaluation, Reliability

PIECES_APART = 0.5
"""Nats per token by which later pieces may be worse."""
GUESSED_ROWS = 400_000
"""Cap on guessed rows, which keeps large test splits fast."""


@dataclass(frozen=True)
class ModelLoaders:
    """Loads the models of a run; each is a context manager, entered once."""

    base: Callable[[], AbstractContextManager[torch.nn.Module]]
    tuned: Callable[[], AbstractContextManager[torch.nn.Module]]
    packs: Callable[[], bool | None] = lambda: None
    """Whether the model entered last supports losses of packed rows; None leaves the choice to the recipe."""
    teacher: Callable[[], AbstractContextManager[tuple[torch.nn.Module, bool]]] | None = None
    """Loads the tuned model's teacher, and tells whether it reads packed rows; None without a teacher."""


@dataclass(frozen=True)
class Scored:
    """An evaluation with the answers and measures behind it."""

    evaluation: Evaluation
    answers: dict[str, Answers]
    """By "base" and "tuned", and "validation": the tuned model's choices on the rows to calibrate on."""
    measures: PairedMeasures
    """Contribution of each test row to each score."""
    per_row: PerRowScores = field(default_factory=PerRowScores)
    """The same with the names of the rows, and with a simple baseline's."""


def evaluate(
    models: ModelLoaders,
    context: EvalContext,
    suites: Sequence[EvalSuite[Any]] = (),
    base: Answers | None = None,
    tuned: Answers | None = None,
    *,
    stand_in: str | None = None,
    headless: bool = False,
    on_base: Callable[[torch.nn.Module], None] | None = None,
) -> Scored:
    """Score base and tuned model on the test rows of `context` and by `suites`; write and print nothing.

    `base` and `tuned` hold known answers of a model, which is then not run on the rows. A base model without a trained
    head (`headless`) is not run: `stand_in` names the source of `base`. `on_base` gets the base before the tuned model
    is loaded. Without test rows the evaluation contains only the suites' results.

    Raises EnvironmentProblem if a single row does not fit in memory.
    """
    answers = {name: one for name, one in (("base", base), ("tuned", tuned)) if one is not None}
    costs = run_models(models, context, suites, answers, on_base if context.inputs else None, headless=headless)
    costs |= run_teacher(models, context, answers)
    evaluation, measures, reliability = Evaluation({}, {}, {}, (), 0), PairedMeasures(), None
    decided: Decided | None = None
    if context.recipe.evaluate.calibrate:
        reliability = calibrate_answers(context, answers)
    if context.inputs is not None:
        base, tuned, problems = answers["base"], answers["tuned"], dict[str, Problem]()
        both = [compute_metrics(context, one, base, problems) for one in (base, tuned)]
        measures = PairedMeasures(*({name: one[name] for name in one if name not in problems} for one in both))
        decided, added = decide_answers(context, answers)
        measures = replace(measures, tuned={**measures.tuned, **added})
        controls = compare_controls(context, answers, measures)
        evaluation = compare_answers(context, context.inputs, answers, measures, headless=stand_in is not None)
        notes = {name: f"not measured: {problem.what}" for name, problem in problems.items()}
        failed = {name: (one.what, one.where or "", one.fix or "") for name, one in problems.items()}
        evaluation = replace(evaluation, signatures=evaluation.signatures | notes, failed=failed)
        evaluation = replace(evaluation, controls=controls, pictured=len(context.inputs.pictured))
        if "teacher" in answers:
            teacher = compute_metrics(context, answers["teacher"], base, {})
            evaluation = replace(evaluation, teacher=score_teacher(measures, teacher, context.recipe.seed, costs))
    elif context.recipe.evaluate.decisions:
        decided, _ = decide_answers(context, answers)
    studies = {**evaluation.studies, **compare_suites(suites, measures, answers)}
    evaluation = replace(evaluation, baseline=stand_in, studies=studies, reliability=reliability, decided=decided)
    return Scored(evaluation, answers, measures)


def calibrate_answers(context: EvalContext, answers: dict[str, Answers]) -> Reliability | None:
    """Fit the temperature on the validation answers, set it in those of the tuned model; None if no row has choices."""
    test, validation = (choices_on(split, context, answers) for split in ("test", "validation"))
    if test is None and validation is None:
        return None
    record = calibrate(validation)
    if "tuned" in answers and not isinstance(record, str):
        answers["tuned"] = replace(answers["tuned"], temperature=record.temperature)
    clusters = context.inputs.clusters if context.inputs is not None else ()
    return describe_reliability(test, record, context.recipe.seed, clusters)


def decide_answers(context: EvalContext, answers: Mapping[str, Answers]) -> tuple[Decided | None, dict[str, Measure]]:
    """Fit the recipe's decisions on validation rows, and measure them on test rows; None without decisions.

    Of validation rows that belong together, one decides: the exact test needs independent rows.
    """
    if not context.recipe.evaluate.decisions:
        return None, {}
    validation, test = (choices_on(split, context, answers) for split in ("validation", "test"))
    if validation is not None and context.validation is not None:
        validation = validation.one_row_each(context.validation.clusters)
    record = fit_decision(context.recipe.evaluate, validation, context.checkpoints)
    if isinstance(record, str) or test is None or record.labels != test.labels:
        return conclude(record), {}
    measures, curve = measure_decisions(record, test)
    clusters = context.inputs.clusters if context.inputs is not None else ()
    return conclude(record, curve), {
        name: one.in_clusters(clusters) for name, one in measures.items() if not math.isnan(one.value)
    }


def choices_on(split: str, context: EvalContext, answers: Mapping[str, Answers]) -> Chosen | None:
    """Return the tuned model's choices on the rows of `test` or `validation`; `answers` are those of `Scored`.

    None without rows, if the task does not choose, or (validation) without `evaluate.calibrate`. Of the result,
    `probabilities(temperature)` [U, K] has the probability of each label for each choice (a row, or a word of it),
    `right_UK` the references, `rows` the index of each choice's row into the split's inputs: `context.inputs.rows` or
    `context.validation.rows` (the order of the references there). The temperature is that of the evaluation's
    `reliability.record`, or 1 if that is None.
    """
    inputs, name = (context.inputs, "tuned") if split == "test" else (context.validation, split)
    return read_choices(replace(context, inputs=inputs), answers[name]) if inputs is not None else None


def compare_pieces(base: TokenSums | None, recipe: Recipe) -> dict[str, str]:
    """Return a warning if the base is much worse on later pieces of split texts than on first pieces, else nothing.

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
    suites: Sequence[EvalSuite[Any]],
    answers: dict[str, Answers],
    on_base: Callable[[torch.nn.Module], None] | None,
    *,
    headless: bool,
) -> dict[str, ModelCosts]:
    """Run the rows and suites on base and tuned model; add answers that are missing from `answers`; return costs."""
    costs: dict[str, ModelCosts] = {}
    controls = {control: replace(context, inputs=inputs) for control, inputs in context.controls.items()}
    for name, load in (("base", models.base), ("tuned", models.tuned)):
        predicts = context.inputs is not None and name not in answers
        running = () if name == "base" and headless else suites
        validation = replace(context, inputs=context.validation) if name == "tuned" else context
        calibrates = name == "tuned" and context.validation is not None
        reads = on_base if name == "base" else None
        if not predicts and not running and not calibrates and not controls and not reads:
            continue
        with load() as model:
            if reads:
                reads(model)
            if predicts:
                answers[name], costs[name] = predict_timed(model, name, context, models.packs())
            if calibrates:
                answers["validation"] = predict(model, "validation", validation, models.packs())
            for control, other in controls.items():
                key = name_answers(name, control)
                answers[key] = predict(model, key, other, models.packs())
            for suite in running:
                suite.run(name, model)
        del model  # frees the base's weights before the tuned ones are loaded
        release_memory()
    return costs


def run_teacher(models: ModelLoaders, context: EvalContext, answers: dict[str, Answers]) -> dict[str, ModelCosts]:
    """Add the teacher's answers to the test rows, and return its costs.

    A teacher that cannot be loaded any more is skipped: the tuned model does not need it.
    """
    if models.teacher is None or context.inputs is None:
        return {}
    try:
        with models.teacher() as (model, packs):
            answers["teacher"], costs = predict_timed(model, "teacher", context, packs)
        del model
        release_memory()
    except (RecipeError, EnvironmentProblem) as error:
        text = f"teacher: not scored, because {error.problems[0].what}"
        context.console.print(text, style="yellow", highlight=False, markup=False)
        return {}
    return {"teacher": costs}


def predict_timed(
    model: torch.nn.Module, name: str, context: EvalContext, packs: bool | None
) -> tuple[Answers, ModelCosts]:
    """Return a model's answers to the test rows, and its size and speed."""
    assert context.inputs is not None
    weights, began = [*model.parameters()], time.monotonic()
    size = sum(one.numel() * one.element_size() for one in weights)
    # transformers counts a packed tensor of 4 bits as the weights in it
    parameters = model.num_parameters() if isinstance(model, PreTrainedModel) else sum(one.numel() for one in weights)
    answers = predict(model, name, context, packs)
    return answers, ModelCosts(parameters, size, len(context.inputs.rows) / (time.monotonic() - began))


def predict_baseline(context: EvalContext, inputs: EvalInputs, rows: Rows) -> tuple[str, Answers]:
    """Return name and predictions of the baseline that replaces a base model without a head."""
    task = context.task
    references = [task.reference(row) for _, row in iterate_rows(rows, "train")]
    name, values = task.baseline(references, [inputs.questions[i] for i in inputs.answered], context.recipe)
    predictions = dict(zip(inputs.answered, values, strict=True))
    return name, Answers(None, {i: task.format_prediction(value) for i, value in predictions.items()}, {}, predictions)


def find_guessable(
    task: EvaluatedTask, recipe: Recipe, references: Sequence[Any], prompts: Sequence[Row], metrics: Iterable[str]
) -> tuple[str, ...]:
    """Return the metrics in which guessing by class frequency beats the task's trivial baseline on these rows.

    A guess shuffles the references. Both the guess and the baseline know the class frequencies of these rows, so
    neither has an edge. Guessing wins if its mean over the shuffles is better by three standard errors.
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
    models: Mapping[str, Answers],
    measures: PairedMeasures,
    *,
    headless: bool,
) -> Evaluation:
    """Turn the answers of both models into scores, differences, samples, flips and slices."""
    task, recipe = context.task, context.recipe
    samples, seed = recipe.evaluate.samples, recipe.seed
    base, tuned, shown = models["base"], models["tuned"], shown_answers(models, context.controls)
    base_scores, tuned_scores = measures.scores()
    references, prompts = [inputs.targets[i] for i in inputs.answered], [inputs.questions[i] for i in inputs.answered]
    details = {}
    for name, answers in (("base", base), ("tuned", tuned)):
        corpus = Corpus(inputs.corpus, answers.corpus) if answers.corpus is not None else None
        targets = [inputs.targets[i] for i in answers.predictions]
        output = EvalPrediction([*answers.predictions.values()], targets, corpus=corpus)
        table = task.class_table(output, recipe) if answers.predictions else None
        if table is not None:
            details[name] = table
    return Evaluation(
        base=base_scores,
        tuned=tuned_scores,
        difference=measures.differences(seed),
        intervals={metric: own_interval(one, seed) for metric, one in measures.tuned.items()},
        samples=pick_samples(inputs, shown, samples),
        rows=len(inputs.rows),
        studies=task.study_answers(base.predictions, tuned.predictions, inputs.prompts, inputs.clusters, recipe),
        signatures=describe_metrics(measures.tuned, inputs, tuned, recipe)
        | compare_pieces(base.sums, recipe)
        | ({"engine": context.engine} if context.engine else {}),
        details=details,
        guessable=find_guessable(task, recipe, references, prompts, measures.tuned) if headless else (),
        flips=find_flips(measures, inputs, shown, samples),
        slices=score_slices(inputs.slices, measures, seed),
    )


def describe_metrics(
    measures: Mapping[str, Measure], inputs: EvalInputs, answers: Answers, recipe: Recipe
) -> dict[str, str]:
    """Describe how each metric was computed, and what was omitted."""
    by_metric = dict.fromkeys(inputs.metrics, "not measured: these rows lack its inputs")
    by_metric |= {metric: one.signature for metric, one in measures.items()} | {"intervals": METHOD} | inputs.notes
    if recipe.data.split_by not in (None, TASK_FACTS[recipe.task].split_by) and not inputs.clusters:
        by_metric["intervals.groups"] = "no two test rows have the same data.split_by value: rows are drawn one by one"
    if answers.texts and TASK_FACTS[recipe.task].generates:
        settings = recipe.generation.model_dump(exclude_none=True)
        by_metric["generation"] = ", ".join(f"{key} {value}" for key, value in settings.items())
    if inputs.turns:
        answered = sum(map(len, inputs.turns.values()))
        by_metric["generated.turns"] = f"{answered} answers to {len(inputs.turns)} rows with tools, one per turn"
    if outside := max(0, len(inputs.generation_prompts) - len(answers.texts)):
        by_metric[OUTSIDE] = (
            f"{outside} prompts skipped: with generation.max_new_tokens they exceed the model's context"
        )
    return by_metric
