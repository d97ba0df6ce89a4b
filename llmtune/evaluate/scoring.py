"""Evaluate a run: wrap `evaluate` with the champion, the contamination check and the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llmtune.data.contamination import Overlap, find_overlap
from llmtune.data.examples import encode_rows
from llmtune.data.inherited_rows import find_inheritance, find_learned
from llmtune.data.row_kind import compared_text, names_in, prompt_row, rename_row
from llmtune.data.row_store import iterate_ids, iterate_rows, iterate_texts, load_rows, pick_rows, read_rows
from llmtune.display.console import spinner
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.calibration import run_temperature
from llmtune.evaluate.class_alignment import ClassMap, map_classes, rename_prediction
from llmtune.evaluate.decision import save_rules
from llmtune.evaluate.eval_inputs import SCHEMAS_NOTE, SPLIT, EvalContext, EvalInputs, make_inputs, resolve_choices
from llmtune.evaluate.evaluated_task import EvaluatedTask, LoadedModel
from llmtune.evaluate.evaluation_file import save_evaluation
from llmtune.evaluate.evaluator import ModelLoaders, Scored, evaluate, predict_baseline
from llmtune.evaluate.inference import Answers, compute_metrics, inference_on, measure_one, predict, predict_rows
from llmtune.evaluate.metric import Measure, PairedMeasures
from llmtune.evaluate.new_rows import NONE_ASKED, Asked
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows, save_measures
from llmtune.evaluate.results import TUNED, BaseAnswers, save_base, save_predictions
from llmtune.evaluate.simple_baseline import SimpleScores
from llmtune.evaluate.slices import one_line, score_slice
from llmtune.evaluate.suites.suite_registry import make_suites
from llmtune.evaluate.text_metrics import TOKEN_METRICS
from llmtune.model.device import release_memory
from llmtune.recipe.evaluate_section import OWN_METRIC_KEYS, EvaluateSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import CALIBRATION
from llmtune.recipe.training_rule import compared_checkpoints
from llmtune.records import Row, Rows
from llmtune.store.atomic_files import hash_folder
from llmtune.store.json_shapes import read_curve
from llmtune.store.release_store import find_source
from llmtune.store.run_folder import read_run
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


@dataclass(frozen=True)
class ChampionModel:
    """A champion whose model can answer further rows."""

    recipe: Recipe
    task: EvaluatedTask
    processor: PreTrainedTokenizerBase
    device: str
    models: ModelLoaders
    classes: ClassMap | None = None
    """The places of its classes in a list with those of another run."""


LoadChampion = Callable[[Path], ChampionModel]
"""Opens the run in a folder."""
Challenge = Callable[[Evaluation, PerRowScores], Champion | None]
"""Compares with the champion, if any."""


def score_run(
    models: ModelLoaders,
    context: EvalContext,
    rows: Rows,
    *,
    headless: str = "",
    known: BaseAnswers | None = None,
    known_tuned: BaseAnswers | None = None,
    simply: Callable[[Mapping[str, Measure]], SimpleScores | None] = lambda measures: None,
    challenge: Challenge = lambda evaluation, scores: None,
    trained: Path | None = None,
) -> Scored:
    """Evaluate a run: measure both models, compare test with training rows and the model with the champion.

    `headless` is the reason if the base model cannot answer: the task's trivial baseline replaces it. With `known`, the
    base model's answers are saved for later evaluations, and reused if already saved; with `known_tuned` the tuned
    model's, for recipes with metrics of the user's own. `simply` scores a simple baseline. The context's folder gets
    `predictions.jsonl` (every row's prompt, reference and both answers), `measures.npz` (each row's contribution to
    each score), `evaluation.json`, and what `save_rules` writes, with the hash of the run's `trained` folder.

    Raises DataError if no reference answer is in `evaluate.choices`, or if a column of `evaluate.slices` was not kept;
    EnvironmentProblem if a single row does not fit in memory.
    """
    if trained is not None:
        compared = compared_checkpoints(context.recipe, read_curve(trained.parent))
        context = replace(context, checkpoints=compared)
    inputs, console, folder = context.inputs, context.console, context.folder
    if inputs is None:
        console.print("evaluate: no test rows (data.test), so nothing is measured on rows")
    elif unmeasured := inputs.notes.get(SCHEMAS_NOTE):
        console.print(f"tool_call_valid is {unmeasured}", style="yellow", highlight=False, markup=False)
    suites, stand_in, base = make_suites(context), None, None
    if inputs is not None and headless:
        stand_in, base = predict_baseline(context, inputs, rows)
        console.print(f"base: {headless}, so {stand_in} replaces its answers", highlight=False, markup=False)
    elif inputs is not None and known is not None and known.answers is not None:
        base = known.answers
        console.print("base: reusing its answers to these rows from an earlier evaluation")
    tuned = known_tuned.answers if known_tuned is not None else None
    if tuned is not None:
        console.print("tuned: reusing its answers to these rows from an earlier evaluation")
    scored = evaluate(models, context, suites, base, tuned, stand_in=stand_in, headless=bool(headless))
    evaluation, answers, measures = scored.evaluation, scored.answers, scored.measures
    if inputs is not None:
        names = name_test_rows(rows, inputs.rows)
        per_row = PerRowScores(measures.base, measures.tuned, names, inputs.clusters)
        if folder is not None:
            if (simple := simply(measures.tuned)) is not None:
                evaluation, per_row = simple.add_to(evaluation, per_row)
            save_measures(folder, per_row)
            own = context.recipe.evaluate.own_metrics
            save_answers(folder, inputs, answers, None if stand_in else known, known_tuned if own else None)
        evaluation = replace(evaluation, contamination=find_contamination(rows, context, measures))
        evaluation = replace(evaluation, baseline_reason=headless, champion=challenge(evaluation, per_row))
    if folder is not None:
        save_evaluation(evaluation, folder)
        save_rules(evaluation, folder, hash_folder(trained) if trained else None)
    return Scored(evaluation, answers, measures)


def save_answers(
    folder: Path,
    inputs: EvalInputs,
    answers: Mapping[str, Answers],
    base: BaseAnswers | None,
    tuned: BaseAnswers | None,
) -> None:
    """Write `predictions.jsonl`, and the answers that later evaluations with the inputs of `base` or `tuned` reuse."""
    save_predictions(folder, inputs, answers["base"], answers["tuned"])
    if base is not None:
        save_base(folder, answers["base"], base.inputs)
    if tuned is not None:
        save_base(folder, answers["tuned"], tuned.inputs, TUNED)


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


def ask_champion(
    load: LoadChampion, context: EvalContext, rows: Rows, folder: Path, run: Path, places: Sequence[int]
) -> Asked:
    """Let the model of the run in folder `run` answer test rows, scored as its own evaluation did.

    Rows nearly equal to one of its training rows are skipped, as `data.deduplicate: near` would do; so are rows that
    its recipe cannot encode. `places` are positions among the test rows that have an example; intermediate files go
    to `folder`.
    """
    assert context.inputs is not None
    numbers = context.inputs.rows
    names = name_test_rows(rows, numbers)
    with TemporaryDirectory(dir=folder, prefix=".champion-") as name:
        scratch, known = Path(name), load_champion_rows(run, context.console)
        picked = pick_rows(rows, SPLIT, [numbers[at] for at in places], scratch)
        if known is not None:
            files, counts = known.files | picked.files, known.counts | picked.counts
            found = find_overlap(replace(picked, files=files, counts=counts), near=True)
            places = [at for place, at in enumerate(places) if place not in {*found.equal, *found.near}]
        if not places:
            return NONE_ASKED
        picked = pick_rows(rows, SPLIT, [numbers[at] for at in places], scratch)
        context.console.print(f"champion: its model answers {len(places)} test rows", highlight=False)
        try:
            temperature = run_temperature(read_run(run))
            about = known, picked, scratch / "examples", context.console
            champion = name_classes(load(run), context.recipe.renames, context.recipe.classes)
            measured, kept = measure_champion(champion, *about, temperature)
        except (DataError, RecipeError) as error:
            context.console.print(f"champion: it could not answer them: {error}", style="yellow", highlight=False)
            return Asked(tuple(places))
    return Asked(tuple(places), PerRowScores({}, measured, tuple(names[places[number]] for number in kept)))


def name_classes(champion: ChampionModel, renames: Mapping[str, str], own: Sequence[str] = ()) -> ChampionModel:
    """Return a champion whose classes have their current names, and with `own` classes the list for both.

    Without that list it cannot be measured on rows of other classes.
    """
    if not champion.recipe.classes:
        return champion
    _, classes = map_classes(own, champion.recipe.classes, renames)
    return replace(champion, recipe=champion.recipe.with_classes(classes.outputs), classes=classes if own else None)


def load_champion_rows(run: Path, console: Console) -> Rows | None:
    """Return the rows of the champion's run; None for a release whose run is gone, which knows their hashes only."""
    try:
        return load_rows(find_source(run) / "data" / "rows")
    except EnvironmentProblem:
        text = "champion: its run is gone, so test rows that nearly equal its training rows are compared too"
        console.print(text, style="yellow", highlight=False)
        return None


def measure_champion(
    champion: ChampionModel, known: Rows | None, picked: Rows, folder: Path, console: Console, temperature: float = 1.0
) -> tuple[dict[str, Measure], tuple[int, ...]]:
    """Return the champion's metrics on `picked` rows, and the numbers of those that could be encoded.

    `known` are its own rows, unless its recipe states the choices; `temperature` is that of its probabilities.
    Raises DataError if none can be encoded.
    """
    recipe, task, processor = champion.recipe, champion.task, champion.processor
    choices: tuple[str, ...] = recipe.evaluate.choices if isinstance(recipe.evaluate.choices, tuple) else ()
    if known is not None:
        references = [task.split_answer(row)[1] for _, row in iterate_rows(known, SPLIT)]
        choices = resolve_choices(known, task, recipe, references, SPLIT)
    expected = {task.split_answer(row)[1] for _, row in iterate_rows(picked, SPLIT)}
    given = {key: getattr(recipe.evaluate, key) for key in ("metrics", *OWN_METRIC_KEYS)}
    asked = EvaluateSection(choices=choices if expected & {*choices} else None, **given)
    data = recipe.data.model_copy(update={"max_dropped": 1.0})
    recipe = recipe.model_copy(update={"evaluate": asked, "data": data})
    parts = [part for part in split_unknown(picked, recipe.classes) if champion.classes or not part[1]]
    if not parts:
        raise DataError.of("all of these rows have classes that it does not have")
    scores, kept = PerRowScores(), list[int]()
    with champion.models.tuned() as model:
        for numbers, unknown in parts:
            place = folder.with_name(f"{folder.name}-{len(kept)}")
            place.mkdir()
            part = pick_rows(picked, SPLIT, numbers, place)
            encodable = recipe.with_classes((*recipe.classes, *unknown))  # the head has no outputs for unknown classes
            encoded = encode_rows(part, task, processor, encodable, place / "examples", Console(quiet=True))
            inputs = make_inputs(part, encoded, task, processor, recipe)
            lossless = tuple(name for name in inputs.metrics if name not in TOKEN_METRICS)
            asked_inputs = replace(inputs, metrics=lossless) if unknown else inputs
            context = EvalContext(recipe, task, processor, asked_inputs, champion.device, console)
            answers = replace(predict(model, "champion", context, champion.models.packs()), temperature=temperature)
            measured = measure_in_classes(replace(context, inputs=inputs), answers, champion.classes)
            found = PerRowScores({}, measured, tuple(map(str, inputs.rows)))
            scores = scores.with_rows(found) if kept else found
            kept += [numbers[row] for row in inputs.rows]
    del model
    release_memory()
    return dict(scores.tuned), tuple(kept)


def split_unknown(picked: Rows, classes: Sequence[str]) -> list[tuple[list[int], tuple[str, ...]]]:
    """Return the numbers of rows whose classes are all known, and of others with the unknown classes, if any."""
    parts: dict[bool, list[int]] = {}
    unknown: dict[str, None] = {}
    for number, (_, row) in enumerate(iterate_rows(picked, SPLIT)):
        missing = [name for name in names_in(row) if name not in classes] if classes else []
        unknown |= dict.fromkeys(missing)
        parts.setdefault(bool(missing), []).append(number)
    return [(numbers, tuple(unknown) if is_unknown else ()) for is_unknown, numbers in sorted(parts.items())]


def measure_in_classes(context: EvalContext, answers: Answers, classes: ClassMap | None) -> dict[str, Measure]:
    """Return the metrics of a model's answers in the classes of two runs; calibration in the model's own classes."""
    inputs = context.inputs
    assert inputs is not None
    if classes is None:
        return compute_metrics(context, answers, answers)
    calibrated = {
        metric: measured.in_clusters(inputs.clusters)
        for metric in inputs.metrics
        if metric in CALIBRATION and (measured := measure_one(metric, context, inputs, answers, answers)) is not None
    }
    renamed = {i: rename_prediction(one, classes) for i, one in answers.predictions.items()}
    others = replace(inputs, metrics=tuple(metric for metric in inputs.metrics if metric not in CALIBRATION))
    joined = replace(context, inputs=others, recipe=context.recipe.with_classes(classes.labels))
    named = replace(answers, predictions=renamed)
    return calibrated | compute_metrics(joined, named, named)


def ask_classes(
    load: LoadChampion, console: Console, renames: Mapping[str, str], run: Path, rows: Sequence[Row]
) -> list[list[str]]:
    """Return the classes that the model of the run in folder `run` answers, in their current names."""
    champion = load(run)
    task, device = champion.task, champion.device
    context = EvalContext(champion.recipe, task, champion.processor, None, device, console)
    prompts = [task.split_answer(row)[0] for row in rows]
    with champion.models.tuned() as model, inference_on(model, context):
        loaded = LoadedModel(model, champion.processor, champion.recipe, device)
        answers, *_ = predict_rows(task, prompts, loaded)
    del model
    release_memory()
    named: list[Row] = [
        {"tags": one} if isinstance(one, list) else {"label": cast(Row, one)["label"]} for one in answers
    ]
    return [names_in(rename_row(row, renames)) for row in named]
