"""Hashes of everything an evaluation depends on; an evaluation with an unchanged hash is reused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.errors import DataError
from llmtune.evaluate.control_runs import find_control_scores
from llmtune.evaluate.per_row_scores import MEASURES
from llmtune.evaluate.release_records import locate_champion
from llmtune.evaluate.rewards import hash_reward_files, reward_files
from llmtune.evaluate.suites.lm_eval import list_task_files
from llmtune.recipe.eval_suites_section import is_task_file
from llmtune.recipe.evaluate_section import EXTRA_KEYS, GATE_KEYS
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import DECISIONS
from llmtune.records import Examples, ModelRef, Rows
from llmtune.store.atomic_files import hash_file, hash_folder, hash_value, write_json
from llmtune.store.run_folder import RunFolder
from llmtune.store.run_lock import LOCK, note_trained, package_versions, read_lock


def evaluation_inputs(recipe: Recipe, model: ModelRef, rows: Rows, examples: Examples, run: Path) -> str:
    """Hash the inputs of scores other than the trained weights: the rows, generation and measurement settings.

    `run` is the run folder: it decides which release is the champion.
    """
    settings: list[Any] = [
        recipe.evaluate.model_dump(mode="json", exclude={*GATE_KEYS}),
        recipe.generation.model_dump(mode="json"),
    ]
    settings.append(recipe.task_section() or {})
    settings += [recipe.data.split_by] if recipe.data.split_by is not None else []
    settings.append([hash_file(path) for path in evaluation_files(recipe, run)])
    contents = [model.content_hash, rows.content_hash, examples.content_hash, rows.columns_hash]
    contents += [rows.corpus_hash] if rows.corpus_hash else []
    versions = package_versions(("torch", "transformers", "peft", *(["lm-eval"] if recipe.evaluate.benchmarks else [])))
    return hash_value([__version__, versions, contents, settings, recipe.seed])


def hash_evaluation(inputs: str, trained: Path, recipe: Recipe) -> str:
    """Hash the inputs of the scores of a run: `evaluation_inputs`, its `trained` folder, and its control run."""
    scores, control = find_control_scores(recipe, trained.parent), recipe.control_run
    further = [[control.on, hash_folder(scores) if scores else None]] if control else []
    return hash_value([inputs, hash_folder(trained), *further])


def base_inputs(
    recipe: Recipe, adapter: list[Any], model: ModelRef, rows: Rows, examples: Examples, device: str
) -> str:
    """Hash the inputs of the base's answers: those of the scores without the trained weights, and how the base loads.

    `adapter` is the return value of `adapter_settings`.
    """
    sections = (recipe.generation, recipe.model)
    left_out = {*GATE_KEYS, *EXTRA_KEYS, "calibrate", *DECISIONS}
    settings: list[Any] = [recipe.evaluate.model_dump(mode="json", exclude=left_out), device]
    settings += [recipe.task_section(measuring=True), adapter, *(one.model_dump(mode="json") for one in sections)]
    contents = [model.content_hash, rows.content_hash, examples.content_hash]
    contents += [rows.corpus_hash] if rows.corpus_hash else []
    rewards = [*hash_reward_files(recipe.variant.rewards).values()]
    contents += [hash_value([recipe.seed, rewards])] if recipe.variant.rewards else []
    drawn = recipe.seed if recipe.generation.do_sample else None
    return hash_value([__version__, package_versions(("torch", "transformers")), contents, settings, drawn])


def simple_inputs(recipe: Recipe, rows: Rows, examples: Examples) -> str:
    """Hash the inputs of a simple baseline's answers: the rows that it learns from, and those that it answers."""
    settings = [recipe.evaluate.limit, recipe.evaluate.choices, recipe.task_section()]
    contents = [rows.content_hash, examples.content_hash, recipe.data.max_length]
    return hash_value([__version__, package_versions(("scikit-learn", "scipy")), contents, settings])


def own_metric_files(recipe: Recipe) -> list[str]:
    """Return the files of the user's own metrics and rewards."""
    return reward_files([*recipe.evaluate.own_metrics.values(), *recipe.variant.rewards])


def lock_trained(folder: RunFolder, trained: str) -> None:
    """Write the hashes of the trained files to the lock of a run, once."""
    if "lock" not in folder.manifest:  # not in the train step: a run may be killed in between
        folder.manifest["lock"] = note_trained(folder.path, trained)
        folder.write()


def note_own_metrics(folder: RunFolder, recipe: Recipe) -> None:
    """Write the hashes of the files of the user's own metrics to the lock of a run, if there are any."""
    if not (files := own_metric_files(recipe)):
        return
    lock = read_lock(folder.path / LOCK)
    lock["metrics"] = {file: hash_file(Path(file)) for file in files if Path(file).is_file()}
    write_json(folder.path / LOCK, lock)
    folder.manifest["lock"] = hash_file(folder.path / LOCK)
    folder.write()


def evaluation_files(recipe: Recipe, run: Path) -> list[Path]:
    """Return the files that the evaluation of `run` reads outside its folder.

    Missing files are skipped and reported elsewhere.
    """
    forgetting, fairness, champion = recipe.evaluate.forgetting, recipe.evaluate.fairness, locate_champion(recipe, run)
    named = [*(forgetting.texts + forgetting.questions if forgetting else ())]
    named += [str(champion), str(champion / "evaluation" / MEASURES)] if champion else []
    judge = recipe.evaluate.judge
    named += [*(fairness.swaps if fairness else ()), *own_metric_files(recipe)]
    named += [judge.labelled] if judge and judge.labelled else []
    read: set[Path] = set()
    for benchmark in recipe.evaluate.benchmarks:
        with suppress(DataError):
            read |= list_task_files(Path(benchmark.task)) if is_task_file(benchmark.task) else set()
    return [path for path in (*map(Path, named), *sorted(read)) if path.is_absolute() and path.is_file()]
