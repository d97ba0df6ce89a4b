"""Step 5: base and tuned model on the same held-out rows, one after the other, and what the difference is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmtune.data import iterate_ids, iterate_rows
from llmtune.evaluate.changed_predictions import find_flips
from llmtune.evaluate.contaminated_scores import find_contamination
from llmtune.evaluate.eval_inputs import SIDE, Plan, make_plan
from llmtune.evaluate.eval_suites import make_inquiries
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.inference import Answers, answer, measure
from llmtune.evaluate.metrics import Measure, compare
from llmtune.evaluate.paired_statistics import METHOD
from llmtune.evaluate.per_row_scores import name_rows, save_measures
from llmtune.evaluate.results import BaseAnswers, save_base, save_predictions
from llmtune.evaluate.sample_rows import pick_samples
from llmtune.evaluate.score_table import print_scores
from llmtune.evaluate.slices import score_slices
from llmtune.evaluate.suite_runner import Scored, Setting
from llmtune.evaluate.token_batches import release_memory
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Evaluation, Examples, Rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

MODELS = ("base", "tuned")


def evaluate(
    models: Mapping[str, Callable[[], AbstractContextManager[torch.nn.Module]]],
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
) -> Evaluation:
    """Score `models["base"]` and `models["tuned"]` on the test rows; each is entered once, base first.

    With `headless` the base model has no trained head: the task's trivial baseline stands in its place, and it is not
    entered. `packs` says of the model that was entered last whether rows stand end to end while its losses are taken;
    None leaves that to the recipe. With a `folder`, every row's prompt, reference and both answers go to
    `predictions.jsonl` in it, and its part in each score to `measures.npz`. With `known`, what the base model said is
    kept there, and it is not asked again where that is known already. Without test rows the evaluation holds what the
    studies found, and no model is entered where the recipe asks for none.

    Raises DataError for `evaluate.choices` that no reference answer is among and for `evaluate.slices` by columns that
    were not kept, EnvironmentProblem where a single row does not fit in memory.
    """
    plan = None
    if examples.counts.get(SIDE):
        plan = make_plan(rows, examples, task, processor, recipe)
    else:
        console.print("evaluate: there are no test rows (data.test), so nothing is measured on rows")
    setting = Setting(recipe, task, processor, plan, device, console, folder)
    inquiries = make_inquiries(setting)
    stands_in, answers = None, dict[str, Answers]()
    if plan is not None and headless:
        stands_in, answers["base"] = baseline(plan, rows, task, recipe)
        console.print(f"base: the model has no trained head for this, so {stands_in} stands in its place")
    elif plan is not None and known is not None and known.answers is not None:
        answers["base"] = known.answers
        console.print("base: what it said to these rows is known from this run's first seed")
    said = dict[str, dict[str, Any]]()
    for name in MODELS:
        wanted = plan if name not in answers else None
        asking = () if name == "base" and headless else inquiries
        if wanted is None and not asking:
            continue
        with models[name]() as model:
            if wanted is not None:
                answers[name] = answer(model, name, wanted, task, processor, recipe, console, device, packs())
            said[name] = {inquiry.name: inquiry.ask(name, model) for inquiry in asking}
        del model  # else the base's weights stay while the tuned ones are loaded
        release_memory()
    scored = Scored() if plan is None else score_answers(plan, answers["base"], answers["tuned"], recipe, task)
    if folder is not None and plan is not None:
        keep(folder, plan, rows, answers, scored)
        if known is not None and stands_in is None:
            save_base(folder, answers["base"], known.inputs)
    evaluation = Evaluation({}, {}, {}, (), (), 0)
    if plan is not None:
        evaluation = compare_answers(plan, answers["base"], answers["tuned"], recipe, task, scored)
        evaluation = replace(evaluation, contamination=find_contamination(rows, plan, scored, recipe, console))
    told = said.get("base", {})
    studies = {one.name: one.compare(told.get(one.name), said["tuned"][one.name], scored) for one in inquiries}
    evaluation = with_gates(replace(evaluation, baseline=stands_in, studies=studies), recipe)
    print_scores(evaluation, console)
    return evaluation


def keep(folder: Path, plan: Plan, rows: Rows, answers: Mapping[str, Answers], scored: Scored) -> None:
    """Write what either model said to each row, and each row's part in the scores."""
    save_predictions(folder, plan, answers["base"], answers["tuned"])
    ids = list(iterate_ids(rows, SIDE))
    save_measures(folder, name_rows([ids[row] for row in plan.rows]), scored.base, scored.tuned)


def baseline(plan: Plan, rows: Rows, task: EvaluatedTask, recipe: Recipe) -> tuple[str, Answers]:
    """Return the name of what stands for a base model without a head, and what it says."""
    learned = [task.reference(row) for _, row in iterate_rows(rows, "train")]
    name, said = task.baseline(learned, [plan.questions[i] for i in plan.asked], recipe)
    predictions = dict(zip(plan.asked, said, strict=True))
    return name, Answers(None, {i: task.format_prediction(value) for i, value in predictions.items()}, {}, predictions)


def score_answers(plan: Plan, base: Answers, tuned: Answers, recipe: Recipe, task: EvaluatedTask) -> Scored:
    """Measure the answers of both models."""
    return Scored(*(measure(plan, said, task, recipe, base) for said in (base, tuned)))


def compare_answers(
    plan: Plan, base: Answers, tuned: Answers, recipe: Recipe, task: EvaluatedTask, scored: Scored
) -> Evaluation:
    """Turn the answers of both models into scores, differences, samples, flips and slices."""
    base_measures, tuned_measures = scored.base, scored.tuned
    scores = [{metric: found.value for metric, found in side.items()} for side in (base_measures, tuned_measures)]
    difference = {
        metric: compare(base_measures[metric], found, recipe.seed)
        for metric, found in tuned_measures.items()
        if metric in base_measures
    }
    return Evaluation(
        base=scores[0],
        tuned=scores[1],
        difference=difference,
        gates=(),
        samples=pick_samples(plan, base, tuned, recipe.evaluate.samples),
        rows=len(plan.rows),
        signatures=sign(tuned_measures, plan, tuned, recipe),
        details=describe(plan, base, tuned, task, recipe),
        flips=find_flips(base_measures, tuned_measures, plan, base, tuned, recipe.evaluate.samples),
        slices=score_slices(plan.slices, base_measures, tuned_measures, recipe.seed),
    )


def describe(plan: Plan, base: Answers, tuned: Answers, task: EvaluatedTask, recipe: Recipe) -> dict[str, Any]:
    """Return what the task shows beside the scores, of both models."""
    tables = {}
    for name, said in (("base", base), ("tuned", tuned)):
        references = [plan.targets[i] for i in said.predictions]
        table = task.class_table(list(said.predictions.values()), references, recipe) if references else None
        if table is not None:
            tables[name] = table
    return tables


def with_gates(evaluation: Evaluation, recipe: Recipe) -> Evaluation:
    """Check the recipe's gates."""
    return replace(evaluation, gates=check_gates(recipe.evaluate.gates, evaluation))


def sign(measures: Mapping[str, Measure], plan: Plan, answers: Answers, recipe: Recipe) -> dict[str, str]:
    """Say how each metric was computed, and what was left out."""
    signatures = dict.fromkeys(plan.metrics, "not measured: these rows do not have what it is made of")
    signatures |= {metric: found.signature for metric, found in measures.items()} | {"intervals": METHOD} | plan.notes
    if answers.texts and TASK_FACTS[recipe.task].generates:
        settings = recipe.generation.model_dump(exclude_none=True)
        signatures["generation"] = ", ".join(f"{key} {value}" for key, value in settings.items())
    if outside := max(0, len(plan.prompt_ids) - len(answers.texts)):
        signatures["generated.outside"] = f"{outside} prompts and their answers exceed the model's context; left out"
    return signatures
