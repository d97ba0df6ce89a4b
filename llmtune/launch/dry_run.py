"""`--dry-run`: list the steps that a recipe would run and the memory they need, without running them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape

from llmtune.data.examples import encode_rows, examples_inputs, row_lengths
from llmtune.data.preparation import prepare_rows
from llmtune.display.number_format import duration
from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.evaluate.champion import check_champion
from llmtune.evaluate.decision import print_need
from llmtune.evaluate.eval_inputs import warn_of_cuts
from llmtune.evaluate.teacher import LEARNED, count_predictions, plan_bytes
from llmtune.model.config import build_skeleton, find_class
from llmtune.model.device import CARDS, EFFICIENCY, check_card
from llmtune.model.memory_plan import check_memory, plan_training
from llmtune.model.model_selection import peek_model, plan_candidates
from llmtune.model.teacher_files import find_teacher, plan_teacher, teacher_run
from llmtune.plan import (
    Plan,
    RunContext,
    check_first,
    choose_settings,
    decide_checkpointing,
    decide_rest,
    evaluation_hash,
    find_variant,
    finish_plan,
    locate_pinned,
    make_plan,
    open_finished,
    rows_hash,
)
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import Recipe
from llmtune.records import Examples, Json, MemoryPlan, ModelRef, Rows
from llmtune.report.terminal import print_power
from llmtune.store.process_environment import is_remote_model
from llmtune.store.processes import layout
from llmtune.store.run_folder import peek_run
from llmtune.store.run_listing import find_start, pin_start
from llmtune.store.run_lock import read_pins
from llmtune.store.run_request import RunRequest
from llmtune.store.seed_runs import control_folder, seed_folder

STEPS = ("prepare", "encode", "train", "evaluate")
"""The steps that a dry run names; the others take seconds."""
TRIED_BYTES = 2**22
"""A dry run prepares and encodes files up to this size, which takes seconds."""


def dry_run(loaded: LoadedRecipe, request: RunRequest, console: Console) -> Json:
    """Run the cheap checks and print the steps that would run and the memory they need; change and download nothing."""
    path = request.folder
    loaded = pin_start(loaded, find_start(loaded.recipe, path))
    recipe = loaded.recipe
    check_first(loaded, request)
    folder = peek_run(path, loaded.fingerprint, resume=request.resume, fresh=request.fresh)
    context = RunContext(folder, console, replace(request, pins=read_pins(request.lock) if request.lock else None))
    if request.device is not None:
        check_card(request.device)
        folder.findings.pop("gradient_checkpointing", None)  # it was decided for the local device
    valid = {"prepare": folder.is_valid("prepare", rows_hash(context, recipe))}
    if recipe.model.name:
        memory = _plan_named(context, loaded, recipe.model.name, valid)
        plans = {} if memory is None else {recipe.model.name: memory}
    else:
        choose, longest = partial(find_variant, recipe), _longest_row(context, recipe)
        plans = plan_candidates(recipe, choose, longest, context.device, console, request.offline)
    if (control := recipe.control_run) and control.on:
        place = control_folder(path, control)
        console.print(f"control run {control.name} would be trained and scored in {place}", markup=False)
    for seed in recipe.train.seeds:
        console.print(f"seed {seed} would follow in {seed_folder(path, seed)}", markup=False)
    power = print_power(recipe, folder, console, prepared=valid["prepare"])
    steps = STEPS[: {"train": 3, "evaluate": 4, "run": 4}.get(request.until, 2)]
    would_run = [step for step in steps if not valid.get(step)]
    totals = {name: {**asdict(memory), "total": memory.total} for name, memory in plans.items()}
    return {"folder": str(path), "steps": steps, "would_run": would_run, "plans": totals, "power": power}


def _plan_named(context: RunContext, loaded: LoadedRecipe, name: str, valid: dict[str, bool]) -> MemoryPlan | None:
    """Plan the named model of a recipe, and record its valid steps in `valid`; None if nothing is known of it yet."""
    recipe, console, folder, request = loaded.recipe, context.console, context.folder, context.request
    with _scratch_folder() as scratch:
        try:
            offline = replace(context, request=replace(request, offline=True))
            model_ref = locate_pinned(offline, recipe.model, name)
        except EnvironmentProblem:
            described = peek_model(name, recipe, console, Path(scratch), request.offline)
            console.print(f"{escape(name)} would be downloaded first")
            if described is None:
                return None
            model_ref = described
        rows = _find_rows(context, recipe, model_ref, valid, Path(scratch))
        if rows is None:
            draft, examples = make_plan(recipe, model_ref, context.device, request.layout or layout()), None
        else:
            shown = context if valid["prepare"] else replace(context, console=Console(quiet=True))
            draft, _ = choose_settings(loaded, shown, model_ref, rows)
            examples = _find_examples(context, draft, rows, valid, Path(scratch))
        longest, lengths = _longest_row(context, recipe), None
        if examples is not None:
            longest, lengths = max(examples.longest.values()), row_lengths(examples)
        if rows is not None and examples is not None and _has_teacher(context, draft, examples):
            plan = finish_plan(draft, decide_rest(offline, draft, rows, examples))
        else:
            checkpointing = decide_checkpointing(context, draft, longest)
            plan = finish_plan(draft, {"checkpointing": checkpointing, "inputs": {}})
        memory = plan_training(model_ref, plan.recipe, plan.task, longest, plan.device, lengths, plan.layout)
    check_memory(memory, plan.recipe, console)
    if rows is not None:
        print_need(plan.recipe, rows, console)
    if valid.get("encode") and rows is not None and examples is not None:
        warn_of_cuts(rows, examples, plan.task, plan.processor, plan.recipe, console)
        check_champion(recipe, folder, rows, examples, console)
    if valid.get("encode") and plan.inputs:
        context.resolved = plan
        valid["train"] = folder.is_valid("train", plan.inputs["train"])
        valid["evaluate"] = folder.is_valid("evaluate", evaluation_hash(context))
    return memory


def _has_teacher(context: RunContext, draft: Plan, examples: Examples) -> bool:
    """Print what the teacher's predictions will take; return False if the teacher is not on this machine yet."""
    section, console = draft.recipe.distil, context.console
    if section is None:
        return True
    if section.answers:
        count = sum(examples.counts.get(split, 0) for split in LEARNED)
        console.print(f"answer: {count:,} rows would be answered by {section.teacher}", markup=False, highlight=False)
    size, teacher, seconds = plan_bytes(draft.task, draft.recipe, examples), section.teacher, None
    try:
        find_teacher(draft.recipe, console, offline=True)
        seconds = _recording_seconds(context, draft, examples)
    except EnvironmentProblem:
        if context.request.offline or not is_remote_model(teacher):
            raise
        console.print(f"{escape(teacher)} would be downloaded first")
        return False
    finally:
        if section.weight:
            message = f"teach: {count_predictions(examples):,} predictions of {teacher} would take {size / 1e6:,.1f} MB"
            message += f" and {duration(seconds)} of {context.device}" if seconds else ""
            console.print(message, markup=False, highlight=False)
    return True


def _recording_seconds(context: RunContext, draft: Plan, examples: Examples) -> float | None:
    """Estimate the time that the teacher needs for the rows; None if the speed of the device is not known."""
    if context.device not in CARDS:
        return None
    recipe, model_ref = plan_teacher(draft.recipe, Console(quiet=True), offline=True)
    if run := teacher_run(draft.recipe):
        model_ref = open_finished(run, Console(quiet=True), offline=True).plan.model_ref
    skeleton = build_skeleton(*find_class(model_ref, recipe, draft.task), recipe)
    tokens = sum(examples.tokens.get(split, 0) for split in LEARNED)
    operations: int = 2 * tokens * skeleton.num_parameters()
    return operations / (CARDS[context.device][1] * EFFICIENCY)


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """Yield a folder that is removed afterwards; errors from the block do not name its files."""
    with TemporaryDirectory() as scratch:
        try:
            yield scratch
        except LlmtuneError as error:
            mention = re.compile(rf" ?[^.]*: {re.escape(scratch)}\S*")
            problems = [
                replace(
                    one,
                    where=None if one.where and one.where.startswith(scratch) else one.where,
                    fix=one.fix and mention.sub("", one.fix).strip(),
                )
                for one in error.problems
            ]
            raise type(error)(*problems) from error


def _longest_row(context: RunContext, recipe: Recipe) -> int:
    """Return the tokens of the longest example that the run has encoded, or `data.max_length` if there is none."""
    lengths = context.folder.facts("encode").get("longest")
    return max(lengths.values()) if lengths else recipe.data.max_length


def _find_rows(
    context: RunContext, recipe: Recipe, model_ref: ModelRef, valid: dict[str, bool], scratch: Path
) -> Rows | None:
    """Return the run's prepared rows, or prepare small files; None for large files or a model that is not local."""
    if not model_ref.content_hash:
        return None
    if valid["prepare"]:
        return context.rows
    return prepare_rows(recipe, scratch / "rows", Console(quiet=True)) if _is_small(recipe) else None


def _find_examples(
    context: RunContext, draft: Plan, rows: Rows, valid: dict[str, bool], scratch: Path
) -> Examples | None:
    """Return the run's encoded rows, or encode small files as the run would; None for large files."""
    kind = draft.task.example_type
    inputs = examples_inputs(draft.recipe, rows, draft.model_ref, draft.processor, kind)
    if valid["prepare"]:
        valid["encode"] = context.folder.is_valid("encode", inputs)
    if valid.get("encode"):
        return context.examples
    if not _is_small(draft.recipe):
        return None
    return encode_rows(rows, draft.task, draft.processor, draft.recipe, scratch / "examples", Console(quiet=True))


def _is_small(recipe: Recipe) -> bool:
    files = [Path(source.path) for _, _, source in recipe.data.named_sources()]
    return all(file.is_file() and file.stat().st_size <= TRIED_BYTES for file in files)
