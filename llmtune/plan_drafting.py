"""Check a recipe on this machine; resolve its open settings from rows and model, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmtune.adapter.injection import adapter_inputs, adapter_settings
from llmtune.adapter.load import find_adapter
from llmtune.errors import RecipeError
from llmtune.evaluate.cache_keys import evaluation_inputs
from llmtune.evaluate.suites.suite_registry import check_inputs
from llmtune.model.config import read_model_config
from llmtune.model.device import pick_device
from llmtune.model.kernels import check_kernels
from llmtune.model.memory_plan import context_length, resolve_checkpointing
from llmtune.model.model_files import check_model_folder
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import Recipe, find_idle_keys
from llmtune.recipe.training_rule import choose_training, few_steps, with_choices, with_length
from llmtune.records import Examples, Json, ModelRef, Rows
from llmtune.session import Plan, RunContext, find_variant
from llmtune.store.atomic_files import hash_value
from llmtune.store.process_environment import refuse_network
from llmtune.store.processes import layout
from llmtune.store.release_store import check_store
from llmtune.store.run_request import RunRequest
from llmtune.tasks.class_labels import AS_NUMBERS
from llmtune.train.setup import train_inputs


def check_first(loaded: LoadedRecipe, request: RunRequest) -> None:
    """Raise the problems of a recipe on this machine that can be found without its rows and without weights."""
    recipe = loaded.recipe
    check_store(recipe.evaluate.champion, loaded.file)
    refuse_network(recipe, offline=request.offline)
    check_kernels(recipe, pick_device())
    check_inputs(recipe)
    if recipe.adapter.start_from is not None:
        find_adapter(Path(recipe.adapter.start_from))
    check_local_model(recipe)


def check_local_model(recipe: Recipe) -> None:
    """Refuse a model in a local folder that the task does not support, without its rows and weights.

    Raises as `resolve_model` and `find_variant` do.
    """
    if recipe.model.name and (folder := Path(recipe.model.name).expanduser()).is_dir():
        check_model_folder(folder, recipe.model)
        find_variant(recipe, ModelRef(recipe.model.name, folder, None, ""))


def draft_plan(context: RunContext, loaded: LoadedRecipe, model_ref: ModelRef, rows: Rows) -> tuple[Plan, LoadedRecipe]:
    """Resolve the settings that depend on rows and model, and print them; return the draft and the resolved recipe.

    The recipe does not state class names and the like, which are inferred each time.

    Raises RecipeError or DataError if model, rows and recipe do not fit together.
    """
    console, task = context.console, find_variant(loaded.recipe, model_ref)
    config = read_model_config(model_ref, loaded.recipe.model)
    recipe = task.infer_labels(loaded.recipe, rows, config)
    RecipeError.collect(find_idle_keys(recipe, style=task.style, reads_template=task.model_kind.reads_template))
    stated, found = loaded.recipe.classify, recipe.classify
    if found is not None and found.kind == "regression" and (stated is None or stated.kind == "auto"):
        console.print(AS_NUMBERS, highlight=False)
    text, count = config.get_text_config(), rows.counts.get("train", 0)
    choices = choose_training(recipe, count, getattr(text, "hidden_size", None), task.model_kind.has_head)
    loaded = with_choices(loaded, choices)
    positions = context_length(text)
    reach = None if positions is None else positions - recipe.adapter.virtual_tokens
    if recipe.model.candidates and reach is not None and reach < recipe.data.max_length:
        loaded = with_length(loaded, reach, model_ref.name)
        console.print(f"data.max_length: {reach} (chosen: the context of {model_ref.name})", highlight=False)
    recipe = recipe.model_copy(update={"train": loaded.recipe.train, "data": loaded.recipe.data})
    for key, choice in choices.items():
        console.print(f"train.{key}: {choice.value:g} (chosen: {choice.why})", highlight=False)
    if warning := few_steps(recipe, count):
        console.print(warning, style="yellow", highlight=False)
    return Plan(recipe, task, model_ref, context.device, context.request.layout or layout()), loaded


def decide_rest(context: RunContext, draft: Plan, rows: Rows, examples: Examples) -> Json:
    """Resolve what depends on the encoded rows: checkpointing, and the input hash of each step."""
    adapted = adapter_inputs(draft.recipe, draft.model_ref, examples)
    evaluated = evaluation_inputs(draft.recipe, draft.model_ref, rows, examples, context.folder.path)
    inputs = {"adapt": adapted, "train": train_inputs(draft.recipe, adapted), "evaluate": evaluated}
    return {"checkpointing": decide_checkpointing(context, draft, max(examples.longest.values())), "inputs": inputs}


def finish_plan(draft: Plan, decided: Json) -> Plan:
    """Return the plan made of a draft and the result of `decide_rest`."""
    train = draft.recipe.train.model_copy(update={"gradient_checkpointing": decided["checkpointing"]})
    return replace(draft, recipe=draft.recipe.model_copy(update={"train": train}), inputs=decided["inputs"])


def decide_checkpointing(context: RunContext, draft: Plan, longest: int) -> bool:
    """Decide `gradient_checkpointing: auto`; `longest` is the longest row in tokens.

    The run's findings keep the decision as long as its inputs are the same. A run that resumes with more or less
    memory therefore continues as it began.
    """
    recipe, findings = draft.recipe, context.folder.findings
    if recipe.train.gradient_checkpointing != "auto":
        return recipe.train.gradient_checkpointing
    inputs = hash_value([draft.model_ref.content_hash, longest, adapter_settings(recipe), recipe.train.optim])
    known = findings.get("gradient_checkpointing")
    if known is None or known["inputs"] != inputs:
        on = resolve_checkpointing(draft.model_ref, recipe, draft.task, longest, draft.device, draft.layout)
        findings["gradient_checkpointing"] = known = {"inputs": inputs, "on": on}
    if known["on"]:
        why = f"because the longest row ({longest:,} tokens) does not fit into the memory of {draft.device} otherwise."
        what = "train.gradient_checkpointing: auto recomputes activations in the backward pass"
        context.console.print(f"{what}, {why}", highlight=False)
    return bool(known["on"])
