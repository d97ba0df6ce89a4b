"""The teacher that a recipe names: a trained run, or another model; its files, and whether its tokenizer fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llmtune import __version__
from llmtune.data.row_store import iterate_texts
from llmtune.errors import LlmtuneError, RecipeError
from llmtune.model.resolve import resolve_model
from llmtune.recipe.adapter_section import AdapterSection
from llmtune.recipe.schema import Recipe
from llmtune.records import Examples, ModelRef, Rows
from llmtune.store.atomic_files import hash_folder, hash_value
from llmtune.store.run_folder import MANIFEST, read_run, recipe_of_run, trained_name
from llmtune.store.run_lock import LOCK, Pins, check_pin, read_pins

KEY = "distil.teacher"
PROBED_ROWS = 64
SHOWN_LABELS = 10


def teacher_run(recipe: Recipe) -> Path | None:
    """Return the run folder that is a recipe's teacher; None for another model, or without a teacher."""
    folder = None if recipe.distil is None else Path(recipe.distil.teacher)
    return folder if folder and (folder / MANIFEST).is_file() else None


def find_teacher(recipe: Recipe, console: Console, offline: bool, pins: Pins | None = None) -> ModelRef | None:
    """Return the teacher of a recipe, by its files; None without one.

    Raises RecipeError or EnvironmentProblem if it is missing, not trained, cannot be downloaded, or differs from
    `pins`.
    """
    if recipe.distil is None:
        return None
    teacher = _find_files(recipe.distil.teacher, recipe, console, offline)
    if pins is not None and pins.teacher_hash is not None:
        check_pin("the teacher's content", pins.teacher_hash, teacher.content_hash)
    return teacher


def _find_files(name: str, recipe: Recipe, console: Console, offline: bool) -> ModelRef:
    if run := teacher_run(recipe):
        teacher = read_run(run)
        teacher.require_trained()
        trained = teacher.path / trained_name(recipe_of_run(teacher).recipe)
        content = hash_value([read_pins(teacher.path / LOCK).model_hash, hash_folder(trained)])
        return ModelRef(name, trained, None, content)
    if (folder := Path(name).expanduser()).joinpath("adapter_config.json").is_file():
        run = folder.resolve().parent
        fix = (
            f"Name its run: {run}."
            if (run / MANIFEST).is_file()
            else "Name the folder of a model that it is merged in."
        )
        raise RecipeError.of(f"{name} is an adapter without its model", KEY, fix)
    try:
        return resolve_model(name, recipe.model.model_copy(update={"revision": "main"}), console, offline)
    except LlmtuneError as error:
        problems = (replace(one, where=KEY if one.where == "model.name" else one.where) for one in error.problems)
        raise type(error)(*problems) from error


def plan_teacher(recipe: Recipe, console: Console, offline: bool) -> tuple[Recipe, ModelRef]:
    """Return a teacher that is no run, with the recipe by which it reads the student's rows: without an adapter."""
    model_ref = find_teacher(recipe, console, offline)
    assert model_ref is not None, "the recipe has a teacher"
    model = recipe.model.model_copy(update={"name": model_ref.name, "revision": "main"})
    return recipe.model_copy(update={"model": model, "adapter": AdapterSection()}), model_ref


def other_classes(name: str, theirs: Sequence[str], ours: Sequence[str]) -> LlmtuneError:
    """Return the error of a teacher whose classes are not the student's."""
    shown = " and ".join(", ".join(names[:SHOWN_LABELS]) for names in (theirs, ours))
    what = f"{name} has other classes than the student, or another order: {shown}"
    return RecipeError.of(what, KEY, "Train the teacher on the same classes, or list them in its order.")


def teacher_inputs(recipe: Recipe, examples: Examples, teacher: ModelRef | None) -> str | None:
    """Hash what the recorded predictions depend on; None without a teacher."""
    if recipe.distil is None or teacher is None or not recipe.distil.weight:
        return None
    settings = [recipe.distil.top_k, recipe.distil.temperature, recipe.model.dtype, recipe.model.attn_implementation]
    return hash_value([__version__, "hashed blocks", examples.content_hash, teacher.content_hash, settings])


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, rows: Rows, name: str) -> None:
    """Raise RecipeError if the tokenizers differ, in their vocabularies or on the first rows."""
    ours, theirs = ({token: text for text, token in one.get_vocab().items()} for one in (student, teacher))
    fix = "Name a teacher of the same family, with the same tokenizer."
    different = next(
        (token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)), None
    )
    if different is not None:
        what = f"{name} has another tokenizer: id {different} is {theirs.get(different)!r}, and {ours.get(different)!r}"
        raise RecipeError.of(f"{what} in the student's", KEY, fix)
    for origin, text in islice(iterate_texts(rows, "train"), PROBED_ROWS):
        if student(text)["input_ids"] != teacher(text)["input_ids"]:
            raise RecipeError.of(f"{name} has another tokenizer: it cuts the row {origin} differently", KEY, fix)
