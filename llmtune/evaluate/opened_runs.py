"""Open runs and releases for comparison: scores by row, a check that both were measured the same way, and pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from llmtune.errors import DataError, EnvironmentProblem, LlmtuneError, Problem, RecipeError
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.metric import BY_VLLM, Measure, PairedMeasures, ratio
from llmtune.evaluate.per_row_scores import PerRowScores, load_measures
from llmtune.recipe.evaluate_section import GATE_KEYS
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import walk
from llmtune.recipe.task_facts import CHOICE_METRICS, CUT_METRIC, DECISIONS, TASK_FACTS
from llmtune.records import Json
from llmtune.store.atomic_files import read_json
from llmtune.store.run_folder import CERTIFICATE, MANIFEST, RunFolder, read_run, recipe_of_run
from llmtune.store.score_records import Evaluation

DECIDES_NOTHING = ("name", "deploy", *(f"evaluate.{key}" for key in GATE_KEYS))
"""Keys that affect neither training nor measurement."""
UNLISTED = r"; \d+ references are not among them and count as wrong$"
"""The end of the note on choices, which depends on the rows."""
ROWS_FIX = "Run both on the same data, with the same data.test and data.split_by."


@dataclass(frozen=True)
class ScoredRun:
    """A run's recipe and scores."""

    name: str
    recipe: Recipe
    evaluation: Evaluation
    measures: PerRowScores

    @cached_property
    def settings(self) -> Json:
        """Return every value of the recipe by dotted key, without keys irrelevant to the comparison."""
        return {key: value for key, value in walk(self.recipe) if key not in DECIDES_NOTHING}

    def row_names(self, metric: str) -> list[str]:
        """Return the names of a metric's rows; rows of two runs are the same if their names are."""
        measure = self.measures.tuned[metric]
        return [*measure.names] or [self.measures.rows[at] for at in measure.at]

    def name_inputs(self, metric: str) -> str:
        """Return what a metric's rows depend on, besides their content: candidates or columns; else `rows`."""
        if not self.measures.tuned[metric].names:
            return "rows"
        return "columns" if metric in self.recipe.evaluate.own_metrics else "candidates"


@dataclass(frozen=True)
class OpenedRun(ScoredRun):
    """A run with its scores, opened from its folder."""

    folder: RunFolder
    export: Json | None = None
    """The certificate of an export of this run, if that is what the scores belong to."""


def open_runs(paths: Sequence[Path]) -> list[OpenedRun]:
    """Open runs for comparison, each under a unique name.

    Raises:
        RecipeError: a folder is not a run, or the run has no scores yet.
        EnvironmentProblem: its scores are damaged, or were changed after the run.
    """
    opened, refused = [], []
    for path, name in zip(paths, name_runs(paths), strict=True):
        try:
            opened.append(open_run_scores(path, name))
        except LlmtuneError as error:
            refused.append(error)
    for kind in (RecipeError, DataError, EnvironmentProblem):
        kind.collect(problem for error in refused if isinstance(error, kind) for problem in error.problems)
    return opened


def open_run_scores(path: Path, name: str) -> OpenedRun:
    """Open one run, or one of its exports; raises as `open_runs` does."""
    if (certificate := read_json(path / CERTIFICATE)) is not None:
        return open_export_scores(path, certificate, name)
    run = read_run(path)
    run.require_trained()
    if not run.is_done("evaluate"):
        raise RecipeError.of("this run has no scores yet", str(path), f"Score it first: llmtune evaluate {path}")
    folder = path / "evaluation"
    evaluation = load_evaluation(folder) if run.is_whole("evaluate") else None
    if evaluation is None:
        what = "damaged: the scores changed after the run"
        raise EnvironmentProblem.of(what, str(folder), f"Score it again: llmtune evaluate {path}")
    if not evaluation.tuned:
        fix = "Give data.test a share of the rows and run it again."
        raise RecipeError.of("nothing was measured in this run: it has no test rows", str(path), fix)
    recipe = recipe_of_run(run).recipe
    return OpenedRun(name, recipe, evaluation, keep_asked(load_measures(folder), recipe), run)


def open_export_scores(path: Path, certificate: Json, name: str) -> OpenedRun:
    """Open the scores of an export in its run folder, compared with the run's base; raises as `open_runs` does."""
    fix = "Export it again with `llmtune deploy`."
    whole = next((parent for parent in path.absolute().parents if (parent / MANIFEST).exists()), None)
    if whole is None:
        raise RecipeError.of("this export is not in its run folder", str(path), "Name an export as RUN/onnx.")
    if "export" not in certificate.get("score", {}):
        raise RecipeError.of("this export has no scores", str(path), fix)
    run = open_run_scores(whole, name)
    if not run.folder.certifies(certificate):
        raise EnvironmentProblem.of("this export was made from an earlier training of its run", str(path), fix)
    measures = replace(run.measures, tuned=keep_asked(load_measures(path), run.recipe).tuned)
    if load_measures(path).rows != run.measures.rows:
        raise DataError.of("this export was scored on other test rows than its run", str(path), fix)
    same = {metric for metric, one in measures.tuned.items() if (old := measures.base.get(metric)) and old.at == one.at}
    pairs = PairedMeasures(
        {metric: measures.base[metric] for metric in same}, {metric: measures.tuned[metric] for metric in same}
    )
    scores = {metric: one.value for metric, one in measures.tuned.items()}
    difference = pairs.differences(run.recipe.seed)
    evaluation = replace(run.evaluation, tuned=scores, difference=difference, simple_baselines={})
    return OpenedRun(name, run.recipe, evaluation, measures, run.folder, certificate)


def keep_asked(measures: PerRowScores, recipe: Recipe) -> PerRowScores:
    """Drop the truncation metric unless the recipe asks for it: it also counts rows that are only shown."""
    unasked = {CUT_METRIC} - {*recipe.evaluate.metrics}
    return replace(measures, tuned={name: one for name, one in measures.tuned.items() if name not in unasked})


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct suffixes of the paths; a folder named twice gets a number."""
    whole = [path.absolute().parts for path in paths]
    for size in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-size:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    seen = Counter[str]()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def check_alike(runs: Sequence[ScoredRun]) -> None:
    """Refuse runs that were not measured on the same rows in the same way, listing all differences.

    Raises:
        RecipeError: the runs have different tasks or measurement settings.
        DataError: the test rows differ.
    """
    first, *others = runs
    task, rows = first.recipe.task, set(first.measures.rows)
    RecipeError.collect(
        Problem(f"task {one.recipe.task}, but {first.name} has task {task}", one.name, "Compare runs of one task.")
        for one in others
        if one.recipe.task != task
    )
    problems = []
    for one in others:
        if (other := set(one.measures.rows)) != rows:
            what = f"not measured on the same rows: of {len(rows | other)} test rows {len(rows & other)} are in both, "
            what += f"{len(rows - other)} are only in {first.name}, {len(other - rows)} only in {one.name}"
            problems.append(Problem(what, one.name, ROWS_FIX))
    DataError.collect(problems)
    fix = "Rescore one of them with the other's settings: llmtune evaluate RUN --set KEY=VALUE"
    RecipeError.collect(
        Problem(what, one.name, fix + keys) for one in others for what, keys in find_other_settings(first, one)
    )


def find_other_settings(first: ScoredRun, second: ScoredRun) -> Iterator[tuple[str, str]]:
    """Yield differences in how two runs were measured, with the deciding keys if the text does not name them."""
    before, after, name = first.measures.tuned, second.measures.tuned, first.name
    shared = [metric for metric in before if metric in after]
    yield from ((what, "") for what in find_other_keys(first, second, shared))
    for metric in shared:
        if (other := find_other_measure(first, second, metric)) is not None:
            yield other
        elif set(first.row_names(metric)) != set(second.row_names(metric)):
            counts = f"{len(after[metric].at)} rows, but in {name} on {len(before[metric].at)}"
            yield (
                f"{metric} was measured on {counts}, and the {second.name_inputs(metric)} differ",
                " (evaluate.limit, evaluate.choices, deploy.limit)",
            )
    if not shared:
        yield f"no metric in common: {', '.join(after)}, but {name} has {', '.join(before)}", ""


def find_other_measure(first: ScoredRun, second: ScoredRun, metric: str) -> tuple[str, str] | None:
    """Return how a metric of both runs differs, and the keys that decide it; None if it is the same."""
    signatures = [run.measures.tuned[metric].signature for run in (first, second)]
    if signatures[0] != signatures[1]:
        key = " (--engine vllm)" if answered_by_others(*signatures) else ""
        return f"{metric} is '{signatures[1]}', but in {first.name} '{signatures[0]}'", key
    if choices_of(first, metric) != choices_of(second, metric):
        return f"{metric} chooses among other answers than in {first.name}", " (evaluate.choices)"
    return None


def find_other_keys(first: ScoredRun, second: ScoredRun, metrics: Collection[str]) -> Iterator[str]:
    """Yield the keys of two recipes that change how some metrics are measured, with both values."""
    facts = TASK_FACTS[first.recipe.task]
    keys = ["data.train_on", *([f"{facts.section}."] if facts.section and facts.section_measures else [])]
    keys += ["generation."] if first.recipe.evaluate.predicted & set(metrics) and facts.generates else []
    if any(run.recipe.data.on_overlong in ("truncate", "split") for run in (first, second)):
        keys += ["data.max_length", "data.on_overlong"]
    section = getattr(first.recipe, facts.section) if facts.section else None
    names = ("labels", "rename", "control", *(section.training_keys if section else ()))  # classes are aligned
    left_out = [f"{facts.section}.{name}" for name in names]
    for key, (one, other) in find_differing(first, second).items():
        if key.startswith(tuple(keys)) and key not in left_out and "auto" not in (one, other):
            yield f"measured with {key}: {other}, but {first.name} with {one}"


def answered_by_others(before: str, after: str) -> bool:
    """Return whether one of two signatures is of vLLM's answers, and the other of our own loop's."""
    return before.endswith(BY_VLLM) != after.endswith(BY_VLLM)


def choices_of(run: ScoredRun, metric: str) -> list[str]:
    """Return the words of the answers that a metric chooses among, sorted; empty if it does not choose."""
    if metric not in (*CHOICE_METRICS, *chain.from_iterable(DECISIONS.values())):
        return []
    note = run.evaluation.signatures.get(f"{CHOICE_METRICS[0]}.choices", "")
    return sorted(re.sub(UNLISTED, "", note.partition(" rows: ")[2]).replace(",", " ").split())


def find_differing(first: ScoredRun, second: ScoredRun) -> dict[str, tuple[object, object]]:
    """Return the keys whose values differ between two recipes, with both values."""
    keys = dict.fromkeys([*first.settings, *second.settings])
    pairs = {key: (first.settings.get(key), second.settings.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def pair_measures(first: ScoredRun, second: ScoredRun) -> tuple[dict[str, tuple[Measure, Measure]], dict[str, str]]:
    """Return each metric of both runs on their common rows in one order, and the reason for each metric left out."""
    pairs: dict[str, tuple[Measure, Measure]] = {}
    left_out = {}
    for metric in dict.fromkeys([*first.measures.tuned, *second.measures.tuned]):
        having = [run for run in (first, second) if metric in run.measures.tuned]
        if len(having) == 1:
            left_out[metric] = f"measured only in {having[0].name}"
            continue
        shared = set(first.row_names(metric)) & set(second.row_names(metric))
        before, after = (select_common(run, metric, shared) for run in having)
        if not shared:
            names = second.name_inputs(metric)
            left_out[metric] = "no row in common" + (f" with the same {names}" if names != "rows" else "")
        elif answered_by_others(before.signature, after.signature):
            left_out[metric] = "vLLM generated the answers of only one of them"
        elif metric in first.recipe.evaluate.own_metrics and before.signature != after.signature:
            left_out[metric] = f"measured with another file: {after.signature}, before {before.signature}"
        elif before.sums_NK.shape[1] != after.sums_NK.shape[1]:
            left_out[metric] = "measured with other classes"
        elif before.formula is ratio and not np.array_equal(before.sums_NK[:, 1], after.sums_NK[:, 1]):
            left_out[metric] = "counted in other units per row, such as tokens of another tokenizer"
        else:
            pairs[metric] = before, after
    return pairs, left_out


def select_common(run: ScoredRun, metric: str, shared: Collection[str]) -> Measure:
    """Return a metric on the rows with these names, in the order of the names, which is the same for every run."""
    names, measure = run.row_names(metric), run.measures.tuned[metric]
    order = sorted((at for at, name in enumerate(names) if name in shared), key=names.__getitem__)
    return replace(measure.take(order), at=tuple(range(len(order))))


def name_sources(files: Collection[str]) -> list[str]:
    """Return the shortest distinct ends of the files' paths."""
    return name_runs([Path(file) for file in files]) if files else []
