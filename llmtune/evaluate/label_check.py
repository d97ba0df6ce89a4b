"""Before training: source files whose labels differ from the champion's predictions far more than its test rows do."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from llmtune.data.inherited_rows import find_learned
from llmtune.data.row_store import gather_rows, iterate_ids, iterate_texts
from llmtune.display.number_format import duration
from llmtune.errors import DataError, Problem, RecipeError, read_origin
from llmtune.evaluate.champion import find_champion_run, open_champion
from llmtune.evaluate.champion_answers import LoadChampion, measure_champion, name_classes
from llmtune.evaluate.class_alignment import follow_rows
from llmtune.evaluate.opened_runs import ScoredRun, name_sources
from llmtune.evaluate.source_labels import ACCEPTED, FEWEST_LABELS, compare_sources, describe_disagreement
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import SPLITS, Rows
from llmtune.store.report_record import SourceLabels
from llmtune.store.run_folder import RunFolder

METRIC = "accuracy"
MOST_ROWS = 200
"""Rows of a source file that are compared: enough to tell 50 % from 30 %."""
MOST_OF_TRAINING = 0.1
"""Compared rows per row that training reads. A prediction costs about a third of a training step."""
Places = dict[str, list[tuple[str, int]]]
"""By source file: split and number of each row."""


def check_labels(load: LoadChampion, recipe: Recipe, run: RunFolder, rows: Rows, console: Console) -> None:
    """Compare labels that the champion never saw with its predictions, print which files stand out, and note it.

    The champion's own test rows are the reference. Rows that it cannot encode, such as those of new classes, count
    apart; renamed classes have their new names. Does nothing without a champion or without its run folder, or if the
    rows have no labels.

    Raises:
        DataError: in a source file more labels differ than `evaluate.max_disagreement` allows.
    """
    run.findings.pop("label_check", None)
    champion = open_champion(recipe, run.path) if TASK_FACTS[recipe.task].answer_kind in ("labels", "tags") else None
    if champion is None or METRIC not in champion.measures.tuned:
        return
    champion = follow_rows(champion, rows, recipe.renames)
    folder = find_champion_run(recipe, run.path)
    if folder is None:
        text = "champion: its run folder is gone, so labels of new rows are not compared with its predictions"
        console.print(text, style="dim", highlight=False)
        return
    places = sample_places(recipe, rows, find_unseen(champion, folder, rows))
    if not places:
        return
    began = time.perf_counter()
    count = sum(map(len, places.values()))
    where = f"{len(places)} source file{'s' if len(places) > 1 else ''}"
    console.print(f"champion: its model predicts {count} labels of {where} that it never saw", highlight=False)
    try:
        sources, unknown = compare_labels(
            lambda run: name_classes(load(run), recipe.renames), folder, champion, rows, places, run.path, console
        )
    except (DataError, RecipeError) as error:
        console.print(f"champion: it could not predict them: {error}", style="yellow", highlight=False)
        return
    text = describe_disagreement(sources, reference := count_reference(champion), unknown)
    style = "yellow" if any(one.stands_out for one in sources) else ""
    console.print(
        f"labels: {text} ({duration(time.perf_counter() - began)})", style=style, highlight=False, markup=False
    )
    run.note(label_check={"sources": [asdict(one) for one in sources], "reference": reference, "unknown": unknown})
    refuse_disagreement(recipe, sources)


def refuse_disagreement(recipe: Recipe, sources: list[SourceLabels]) -> None:
    """Raise DataError for source files with more disagreement than the recipe allows."""
    limit = recipe.evaluate.max_disagreement
    fix = f"Correct the labels, remove the file from data, or raise {ACCEPTED} if the labels are right."
    DataError.collect(
        Problem(
            f"{one.doubtful} of {one.labels} labels differ from the champion's predictions ({ACCEPTED}: {limit:g})",
            one.file,
            fix,
        )
        for one in sources
        if limit is not None and one.labels >= FEWEST_LABELS and one.rate > limit
    )


def count_reference(champion: ScoredRun) -> tuple[int, int]:
    """Return the number of rows in the champion's own test, and of those with a wrong label."""
    sums_NK = champion.measures.tuned[METRIC].sums_NK
    return len(sums_NK), int((sums_NK[:, 0] < sums_NK[:, 1]).sum())


def find_unseen(champion: ScoredRun, folder: Path, rows: Rows) -> Places:
    """Return the rows of all splits whose input the champion neither learned nor was tested on, by source file."""
    tested = {name.rpartition("-")[0] for name in champion.measures.rows}
    unseen = defaultdict[str, list[tuple[str, int]]](list)
    for split in SPLITS:
        seen = tested | find_learned(rows, [folder], split)
        pairs = zip(iterate_ids(rows, split), iterate_texts(rows, split), strict=True)
        for number, (row, (origin, _)) in enumerate(pairs):
            if row not in seen:
                unseen[read_origin(origin)[0]].append((split, number))
    return unseen


def sample_places(recipe: Recipe, rows: Rows, unseen: Places) -> Places:
    """Return at most `MOST_ROWS` rows of each source file, spread evenly, within `MOST_OF_TRAINING`."""
    unseen = {file: places for file, places in unseen.items() if len(places) >= FEWEST_LABELS}
    train = recipe.train
    read = (
        train.max_steps * train.batch_size if train.max_steps else rows.counts["train"] * (train.num_train_epochs or 1)
    )
    most = min(MOST_ROWS, math.floor(MOST_OF_TRAINING * read / max(1, len(unseen))))
    if most < FEWEST_LABELS:
        return {}
    return {file: [places[at] for at in cut_evenly(len(places), most)] for file, places in unseen.items()}


def compare_labels(
    load: LoadChampion, folder: Path, champion: ScoredRun, rows: Rows, places: Places, scratch: Path, console: Console
) -> tuple[list[SourceLabels], dict[str, int]]:
    """Return each file's labels that differ from the champion's predictions, and its rows that it cannot encode."""
    names = dict(zip(places, name_sources(places), strict=True))
    order = sorted(
        (SPLITS.index(split), number, names[file])
        for file, file_places in places.items()
        for split, number in file_places
    )
    numbers = {split: [number for at, number, _ in order if SPLITS[at] == split] for split in SPLITS}
    model = load(folder)
    evaluate = model.recipe.evaluate.model_copy(update={"metrics": (METRIC,)})
    model = replace(model, recipe=model.recipe.model_copy(update={"evaluate": evaluate}))
    with TemporaryDirectory(dir=scratch, prefix=".labels-") as name:
        gathered = gather_rows(rows, numbers, Path(name), "test")
        examples = Path(name) / "examples"
        measured, row_numbers = measure_champion(model, None, gathered, examples, console)
    measure = measured[METRIC]
    wrong = np.asarray(measure.at)[measure.sums_NK[:, 0] < measure.sums_NK[:, 1]]
    files = [order[number][2] for number in row_numbers]
    labels, doubtful = Counter(files[at] for at in measure.at), Counter(files[at] for at in wrong.tolist())
    unknown = Counter(file for *_, file in order)
    unknown.subtract(files)
    return compare_sources(labels, doubtful, count_reference(champion)), count_rest(unknown)


def count_rest(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts above zero."""
    return {name: number for name, number in counts.items() if number}
