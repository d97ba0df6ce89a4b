"""Answers of a champion's model to rows that its own evaluation did not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llmtune.data.contamination import find_overlap
from llmtune.data.examples import encode_rows
from llmtune.data.row_kind import names_in, rename_row
from llmtune.data.row_store import iterate_rows, load_rows, pick_rows
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.calibration import run_temperature
from llmtune.evaluate.champion import NONE_ASKED, Asked
from llmtune.evaluate.class_alignment import ClassMap, map_classes, rename_prediction
from llmtune.evaluate.eval_inputs import SPLIT, EvalContext, make_inputs, resolve_choices
from llmtune.evaluate.evaluated_task import EvaluatedTask, LoadedModel
from llmtune.evaluate.evaluator import ModelLoaders
from llmtune.evaluate.inference import Answers, compute_metrics, inference_on, measure_one, predict, predict_rows
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows
from llmtune.evaluate.text_metrics import TOKEN_METRICS
from llmtune.model.device import release_memory
from llmtune.recipe.evaluate_section import OWN_METRIC_KEYS, EvaluateSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import CALIBRATION
from llmtune.records import Row, Rows
from llmtune.store.release_store import find_source
from llmtune.store.run_folder import read_run


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
        scratch, champion_rows = Path(name), load_champion_rows(run, context.console)
        picked = pick_rows(rows, SPLIT, [numbers[at] for at in places], scratch)
        if champion_rows is not None:
            files, counts = champion_rows.files | picked.files, champion_rows.counts | picked.counts
            overlap = find_overlap(replace(picked, files=files, counts=counts), near=True)
            places = [at for place, at in enumerate(places) if place not in {*overlap.equal, *overlap.near}]
        if not places:
            return NONE_ASKED
        picked = pick_rows(rows, SPLIT, [numbers[at] for at in places], scratch)
        context.console.print(f"champion: its model answers {len(places)} test rows", highlight=False)
        try:
            temperature = run_temperature(read_run(run))
            champion = name_classes(load(run), context.recipe.renames, context.recipe.classes)
            examples = scratch / "examples"
            measured, row_numbers = measure_champion(
                champion, champion_rows, picked, examples, context.console, temperature
            )
        except (DataError, RecipeError) as error:
            context.console.print(f"champion: it could not answer them: {error}", style="yellow", highlight=False)
            return Asked(tuple(places))
    return Asked(tuple(places), PerRowScores({}, measured, tuple(names[places[number]] for number in row_numbers)))


def name_classes(champion: ChampionModel, renames: Mapping[str, str], run_classes: Sequence[str] = ()) -> ChampionModel:
    """Return a champion whose classes have their current names, and with `run_classes` the list for both.

    Without that list it cannot be measured on rows of other classes.
    """
    if not champion.recipe.classes:
        return champion
    _, classes = map_classes(run_classes, champion.recipe.classes, renames)
    return replace(
        champion, recipe=champion.recipe.with_classes(classes.outputs), classes=classes if run_classes else None
    )


def load_champion_rows(run: Path, console: Console) -> Rows | None:
    """Return the rows of the champion's run; None for a release whose run is gone, which knows their hashes only."""
    try:
        return load_rows(find_source(run) / "data" / "rows")
    except EnvironmentProblem:
        text = "champion: its run is gone, so test rows that nearly equal its training rows are compared too"
        console.print(text, style="yellow", highlight=False)
        return None


def measure_champion(
    champion: ChampionModel,
    champion_rows: Rows | None,
    picked: Rows,
    folder: Path,
    console: Console,
    temperature: float = 1.0,
) -> tuple[dict[str, Measure], tuple[int, ...]]:
    """Return the champion's metrics on `picked` rows, and the numbers of those that could be encoded.

    `champion_rows` are its own rows, unless its recipe states the choices; `temperature` is that of its probabilities.
    Raises DataError if none can be encoded.
    """
    recipe, task, processor = champion.recipe, champion.task, champion.processor
    choices: tuple[str, ...] = recipe.evaluate.choices if isinstance(recipe.evaluate.choices, tuple) else ()
    if champion_rows is not None:
        references = [task.split_answer(row)[1] for _, row in iterate_rows(champion_rows, SPLIT)]
        choices = resolve_choices(champion_rows, task, recipe, references, SPLIT)
    expected = {task.split_answer(row)[1] for _, row in iterate_rows(picked, SPLIT)}
    given = {key: getattr(recipe.evaluate, key) for key in ("metrics", *OWN_METRIC_KEYS)}
    evaluate_section = EvaluateSection(choices=choices if expected & {*choices} else None, **given)
    data = recipe.data.model_copy(update={"max_dropped": 1.0})
    recipe = recipe.model_copy(update={"evaluate": evaluate_section, "data": data})
    parts = [part for part in split_unknown(picked, recipe.classes) if champion.classes or not part[1]]
    if not parts:
        raise DataError.of("all of these rows have classes that it does not have")
    scores, row_numbers = PerRowScores(), list[int]()
    with champion.models.tuned() as model:
        for numbers, unknown in parts:
            place = folder.with_name(f"{folder.name}-{len(row_numbers)}")
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
            part_scores = PerRowScores({}, measured, tuple(map(str, inputs.rows)))
            scores = scores.with_rows(part_scores) if row_numbers else part_scores
            row_numbers += [numbers[row] for row in inputs.rows]
    del model
    release_memory()
    return dict(scores.tuned), tuple(row_numbers)


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
