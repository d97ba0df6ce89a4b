"""`--dry-run`: what a recipe would do and what it would take, without doing it."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape

from llmtune.adapter.injection import adapter_inputs
from llmtune.data.examples import encode_rows, examples_inputs, load_examples, row_lengths
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import load_rows
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.cache_keys import evaluation_inputs
from llmtune.evaluate.champion import check_champion
from llmtune.evaluate.eval_inputs import warn_of_cuts
from llmtune.evaluate.gates import print_plan
from llmtune.model.memory_plan import check_memory, plan_training
from llmtune.model.model_selection import peek_model, plan_candidates
from llmtune.recipe.loader import LoadedRecipe
from llmtune.records import SPLITS, Json, MemoryPlan, ModelRef
from llmtune.session import RunContext, locate_pinned
from llmtune.store.seed_runs import seed_folder
from llmtune.train.setup import train_inputs

TRIED_BYTES = 2**22
"""Files of less are encoded in a dry run: that takes seconds."""


def _longest_row(context: RunContext) -> int:
    """Return the tokens of the longest example that the run has encoded before; without one, what a row may have."""
    known = context.folder.facts("encode").get("longest")
    return max(known.values()) if known else context.recipe.data.max_length


def _try_rows(
    context: RunContext, loaded: LoadedRecipe, model_ref: ModelRef
) -> tuple[int, npt.NDArray[np.int32] | None]:
    """Return the tokens of the longest row, and those of each training row, of small files; else what a row may have.

    They are prepared and encoded as the run does it, so that both plan the same memory. Raises as that does.
    """
    recipe, longest = context.recipe, _longest_row(context)
    files = [Path(source.path) for split in SPLITS for source in recipe.data.sources(split)]
    if not model_ref.content_hash or not all(file.is_file() and file.stat().st_size <= TRIED_BYTES for file in files):
        return longest, None
    quiet = Console(quiet=True)
    tried = replace(context, console=quiet)
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare_rows(recipe, Path(folder) / "rows", quiet)
        tried.infer_labels(model_ref, rows)
        tried.resolve_training(loaded, model_ref, rows)
        processor = tried.read_processor(model_ref)
        examples = encode_rows(rows, tried.task, processor, tried.recipe, Path(folder) / "examples", quiet)
        context.recipe = recipe.model_copy(update={"train": tried.recipe.train})
        return max(examples.longest.values()), row_lengths(examples)


def dry_run(context: RunContext, loaded: LoadedRecipe) -> Json:
    """`--dry-run`: check what is cheap, say which steps would run, change nothing and download no weights."""
    recipe, console, folder = context.recipe, context.console, context.folder
    valid = {"prepare": folder.is_valid("prepare", context.rows_inputs)}
    if recipe.model.name:
        plan = _plan_named(context, recipe.model.name, valid, loaded)
        plans = {} if plan is None else {recipe.model.name: plan}
    else:
        choose, longest = context.choose_variant, _longest_row(context)
        plans = plan_candidates(recipe, choose, longest, context.device, console, context.offline)
    for seed in recipe.train.seeds:
        console.print(f"seed {seed} would follow in {seed_folder(folder.path, seed)}", markup=False)
    power = print_plan(recipe, folder, console, prepared=valid["prepare"])
    would_run = [step for step in ("prepare", "encode", "train", "evaluate") if not valid.get(step)]
    totals = {name: {**asdict(plan), "total": plan.total} for name, plan in plans.items()}
    return {"folder": str(folder.path), "would_run": would_run, "plans": totals, "power": power}


def _plan_named(context: RunContext, name: str, valid: dict[str, bool], loaded: LoadedRecipe) -> MemoryPlan | None:
    """Plan the one model of a recipe, and add to `valid` which of its steps are; None where it is not known yet."""
    console, folder = context.console, context.folder
    with tempfile.TemporaryDirectory() as shape:
        try:
            model_ref = locate_pinned(replace(context, offline=True), name)
        except EnvironmentProblem:
            described = peek_model(name, context.recipe, console, Path(shape), context.offline)
            console.print(f"{escape(name)} would be downloaded first")
            if described is None:
                return None
            model_ref = described
        context.variant = context.choose_variant(model_ref)
        known = folder.path / "data" / "examples"
        is_encoded = bool(folder.facts("encode")) and known.is_dir()
        encoded = (_longest_row(context), row_lengths(load_examples(known))) if is_encoded else None
        longest, lengths = encoded or _try_rows(context, loaded, model_ref)
        context.resolve_checkpointing(model_ref, longest)
        resolved, layout = context.resolved_recipe, context.layout
        plan = plan_training(model_ref, resolved, context.task, longest, context.device, lengths, layout)
    check_memory(plan, context.resolved_recipe, console)
    if not model_ref.content_hash:
        return plan
    processor = context.read_processor(model_ref)
    if valid["prepare"]:
        rows = load_rows(folder.path / "data" / "rows")
        context.infer_labels(model_ref, rows)
        context.resolve_training(loaded, model_ref, rows)
        valid["encode"] = folder.is_valid("encode", examples_inputs(context.recipe, rows, model_ref, processor))
    if valid.get("encode"):
        examples = load_examples(folder.path / "data" / "examples")
        warn_of_cuts(rows, examples, context.task, processor, context.recipe, console)
        check_champion(loaded.recipe, folder, rows, examples, console)
        trained = train_inputs(context.recipe, adapter_inputs(context.recipe, model_ref, examples))
        evaluated = evaluation_inputs(context.recipe, context.trained_hash, model_ref, rows, examples)
        valid |= {"train": folder.is_valid("train", trained), "evaluate": folder.is_valid("evaluate", evaluated)}
    return plan
