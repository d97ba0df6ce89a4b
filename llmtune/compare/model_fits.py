"""What fits in memory: the catalogue's models by method and length, or one recipe by method and card.

The plan is that of `--dry-run` and `select` (`llmtune.model.memory_plan`), for the shapes in the catalogue.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from transformers import PreTrainedModel

from llmtune.compare.compare_methods import change
from llmtune.data.row_store import load_rows, rows_folder
from llmtune.data.run_naming import default_folder
from llmtune.data.task_interface import TaskInterface
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.model.catalogue import CatalogueModel
from llmtune.model.config import build_skeleton, find_class, read_model_config
from llmtune.model.device import CARDS, EFFICIENCY, device_memory
from llmtune.model.memory_plan import USABLE, context_length, plan_skeleton
from llmtune.model.model_selection import peek_model
from llmtune.model.sharded_plan import divide_plan
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.recipe.training_rule import choose_training
from llmtune.records import ALONE, Layout, MemoryPlan
from llmtune.store.run_folder import RunFolder, read_manifest
from llmtune.tasks.registry import choose_variant, get_task

METHODS = ("full", "lora", "qlora")
MILLION = 10**6
FLOPS = {"full": 6, "lora": 4, "qlora": 4}
"""Operations per parameter and token: forward 2, backward 4; 2 if weights are frozen."""


@dataclass(frozen=True)
class Fit:
    """One model with one method: its minimum needs, and what fits."""

    model: str
    method: str
    parameters: int
    lower_bound: int
    needed: int
    """Planned bytes for one row of the requested length, in the way that fits."""
    longest: int
    """Tokens of the longest row that fits, at most the model's context; 0 if none does."""
    rows: int
    """Rows of the requested length in one micro-batch."""
    checkpointing: bool
    """Whether a row of the requested length needs `train.gradient_checkpointing`."""
    seconds: float | None
    """Per million tokens, if the card is known."""
    card: str | None = None
    hours: float | None = None
    """Of the training, if its number of tokens is known."""
    cost: float | None = None
    """For those hours, or for a million tokens, if the card has a price."""


class DeviceMemory(NamedTuple):
    """Where a model is to fit: a card or this machine's main memory."""

    memory: float
    """Bytes."""
    kind: str
    """cuda, cpu, or the name of a card."""
    card: str | None = None
    """Its name, if it is a known card."""


def list_fits(
    models: Iterable[CatalogueModel], task: str, device: DeviceMemory, length: int, processes: int = 1
) -> Iterator[Fit]:
    """Yield what fits, one model and method at a time; with several `processes`, in a shard of each model (fsdp).

    Unbuildable models are skipped.
    """
    with tempfile.TemporaryDirectory() as name:
        for number, model in enumerate(models):
            model_ref = model.write_config(Path(name) / str(number))
            try:
                recipe = _recipe(task, "lora")
                variant = choose_variant(recipe, read_model_config(model_ref, recipe.model), model.name)
                skeleton = build_skeleton(*find_class(model_ref, recipe, variant), recipe)
            except (RecipeError, EnvironmentProblem):
                continue
            for method in METHODS:
                recipe, own_length = _recipe(task, method), min(length, model.context)
                fit = _fit(skeleton, recipe, variant, device, own_length, Layout(processes, sharded=processes > 1))
                yield replace(fit, model=model.name, longest=min(model.context, fit.longest))


def list_recipe_fits(
    recipe: str, sets: Sequence[str], prices: Mapping[str, float], console: Console
) -> tuple[list[Fit], dict[str, object]]:
    """Return a recipe's needs with each method on each card and on this machine's CPU, and the assumptions.

    Raises RecipeError if the recipe names no model, or one of unknown shape.
    """
    loaded = load_recipe(recipe, sets)
    name = loaded.recipe.model.name
    if name is None:
        fix = "Choose one: --set model.candidates=null --set model.name=NAME. `llmtune run --dry-run` shows all."
        raise RecipeError.of("the recipe names several models", "model.candidates", fix)
    fits: list[Fit] = []
    with tempfile.TemporaryDirectory() as folder:
        model_ref = peek_model(name, loaded.recipe, console, Path(folder), offline=False)
        if model_ref is None:
            fix = "Download it with `llmtune select`, or name a model from `llmtune models list`."
            raise RecipeError.of(f"the shape of {name} is not known without its files", "model.name", fix)
        variant = choose_variant(_infer_section(loaded), read_model_config(model_ref, loaded.recipe.model), name)
        shape = find_class(model_ref, loaded.recipe, variant)
        skeleton = build_skeleton(*shape, loaded.recipe, towers=variant.model_kind.takes_images)
        tokens, longest = _trained_tokens(loaded)
        length = min(longest, context_length(skeleton.config) or longest)
        for method in METHODS:
            try:
                changed = load_recipe(recipe, [*sets, *change(loaded, method)]).recipe
            except RecipeError:
                continue  # the task or another key excludes this method
            for card in (*CARDS, "cpu"):
                fit = _fit(skeleton, changed, variant, DeviceMemory(device_memory(card) or 0, card, card), length)
                timed = None if fit.seconds is None else fit.seconds * (tokens or MILLION) / 3600 / MILLION
                cost = timed * prices[card] if timed is not None and card in prices else None
                hours = timed if tokens else None
                fits.append(replace(fit, model=name, card=card, hours=hours, cost=cost))
    return fits, {
        "model": name,
        "length": length,
        "trained_tokens": tokens,
        "efficiency": EFFICIENCY,
        "prices": prices,
    }


def _infer_section(loaded: LoadedRecipe) -> Recipe:
    """Return the recipe with settings that the rows decide, once they are prepared."""
    rows = None
    with suppress(DataError, EnvironmentProblem):  # rows that are not prepared here
        rows = load_rows(rows_folder(default_folder(loaded)))
    return get_task(loaded.recipe.task).infer_section(loaded.recipe, rows)


def _trained_tokens(loaded: LoadedRecipe) -> tuple[int | None, int]:
    """Return the tokens of all steps (None before rows are prepared), and those of the longest row."""
    recipe, path = loaded.recipe, None
    with suppress(DataError, EnvironmentProblem):  # rows that cannot be read here
        path = default_folder(loaded)
    manifest = path and read_manifest(path)
    facts = RunFolder(path, manifest).facts("encode") if path and manifest else None
    if not facts:
        return None, recipe.data.max_length
    tokens, rows = facts["tokens"]["train"], facts["rows"]["train"]
    chosen = choose_training(recipe, rows, None, False)
    epochs = chosen["num_train_epochs"].value if "num_train_epochs" in chosen else recipe.train.num_train_epochs
    batch = chosen["batch_size"].value if "batch_size" in chosen else recipe.train.batch_size
    if recipe.train.max_steps is not None:
        step = recipe.train.batch_tokens or batch * tokens / max(1, rows)
        return int(recipe.train.max_steps * step), max(facts["longest"].values())
    return int(epochs * tokens), max(facts["longest"].values())


def cheapest(fits: Sequence[Fit]) -> Fit | None:
    """Return the cheapest fit; without prices, the fastest method on the card with the least memory."""
    fitting = [fit for fit in fits if fit.rows and fit.card in CARDS]
    priced = [fit for fit in fitting if fit.cost is not None]
    if priced:
        return min(priced, key=lambda fit: (fit.cost or 0, fit.needed))
    return min(fitting, key=lambda fit: (CARDS[fit.card or ""][0], fit.seconds or 0, fit.needed), default=None)


def _fit(
    skeleton: PreTrainedModel,
    recipe: Recipe,
    variant: TaskInterface,
    device: DeviceMemory,
    length: int,
    layout: Layout = ALONE,
) -> Fit:
    room = int(USABLE * device.memory)
    stated = recipe.train.gradient_checkpointing
    plans = [
        _plan(skeleton, _saving(recipe, one), variant, device, length, layout)
        for one in ((False, True) if stated == "auto" else (stated, stated))
    ]
    tokens = [_largest_batch(plan, length, room) for plan in plans]
    saving = tokens[0] < length
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    speed, method = CARDS[device.card][1] if device.card and device.card in CARDS else None, recipe.adapter.method
    return Fit(
        model="",
        method=method,
        parameters=parameters,
        lower_bound=plans[0].lower_bound,
        needed=plans[saving].total,
        longest=max(tokens),
        rows=tokens[saving] // length,
        checkpointing=saving if stated == "auto" else stated,
        seconds=speed and FLOPS[method] * parameters * MILLION / (speed * EFFICIENCY * layout.processes),
    )


def _plan(
    skeleton: PreTrainedModel, recipe: Recipe, variant: TaskInterface, device: DeviceMemory, length: int, layout: Layout
) -> MemoryPlan:
    plan = plan_skeleton(skeleton, recipe, variant, length, device.kind, int(device.memory))
    return plan if layout == ALONE else divide_plan(plan, skeleton, recipe, layout, length)


def _saving(recipe: Recipe, saving: bool) -> Recipe:
    train = recipe.train.model_copy(update={"gradient_checkpointing": saving})
    return recipe.model_copy(update={"train": train})


def _recipe(task: str, method: str) -> Recipe:
    return Recipe.model_validate(
        {
            "task": task,
            "data": {"train": "rows.jsonl"},
            "model": {"name": "model", "dtype": "bfloat16"},
            "adapter": {"method": method},
        }
    )


def _largest_batch(plan: MemoryPlan, length: int, room: int) -> int:
    """Return the tokens of the largest micro-batch that leaves room for all fixed needs."""
    growing = plan.parts["activations"] / length
    fixed = plan.total - plan.parts["activations"]
    return max(0, int((room - fixed) / growing))
