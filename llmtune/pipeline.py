"""The five steps in order: prepare, select, adapt, train, evaluate, and what comes after them. Read this first.

Each step is skipped when nothing that it depends on changed, and says which of the two it did. What a step found out
is kept as facts in the manifest, so that the report can be written from the run folder alone.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from llmtune import __version__, seeds
from llmtune.adapter import describe, find_adapter, inject
from llmtune.adapter.injection import adapter_inputs, adapter_settings
from llmtune.data import hash_sources, load_rows, prepare_rows
from llmtune.data.data_report import describe_examples
from llmtune.data.examples import encode_rows, examples_inputs, load_examples
from llmtune.data.preparation import rows_inputs
from llmtune.deploy.gguf_export import DEFAULT_FORMAT, check_gguf, make_gguf
from llmtune.deploy.merged_model import merge
from llmtune.errors import EnvironmentProblem, GateFailed, Problem
from llmtune.evaluate import check_gates, evaluate, load_base, load_evaluation, save_evaluation
from llmtune.evaluate.eval_suites import check_inputs
from llmtune.evaluate.lm_eval import load_benchmarks
from llmtune.evaluate.score_table import print_scores
from llmtune.evaluate.step_inputs import base_inputs, evaluation_inputs
from llmtune.model import (
    check_context,
    check_kernels,
    check_memory,
    load_model,
    load_processor,
    micro_batch_tokens,
    pick_device,
    plan_memory,
    resolve_checkpointing,
    resolve_model,
)
from llmtune.model.heads import head_is_new
from llmtune.model.model_selection import rank_candidates
from llmtune.outcome import make_report
from llmtune.recipe import LoadedRecipe, Recipe
from llmtune.records import AdaptedModel, Examples, MemoryPlan, ModelRef, Rows
from llmtune.report import redact_all, write_report
from llmtune.report.assembly import report_json
from llmtune.session import Models, Options, RunContext, locate_pinned, lock_run, open_finished, trained_name
from llmtune.store.atomic_files import hash_file, hash_folder, hash_value, staged, write_text
from llmtune.store.process_environment import is_remote_model, refuse_network
from llmtune.store.run_folder import default_path, look_at_run, open_run
from llmtune.store.run_lock import check_pin, hash_keys, note_trained, own_pins, read_pins
from llmtune.train import train
from llmtune.train.setup import train_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Trainer = Callable[[RunContext, ModelRef, Examples, str, str], None]
"""Runs adapt and train and leaves both steps done in the manifest; it gets the hashes of their inputs last."""


def run_pipeline(
    loaded: LoadedRecipe, options: Options, console: Console, trainer: Trainer | None = None
) -> dict[str, Any]:
    """Run the steps of a recipe up to `options.until`; returns the report as a dictionary.

    Raises:
        LlmtuneError: one of its kinds, for everything that a user can meet; `GateFailed` after the report is written.
    """
    recipe = loaded.recipe
    path = options.out or default_path(recipe.name, loaded.fingerprint)
    refuse_network(recipe, offline=options.offline)
    check_kernels(recipe, pick_device())
    check_inputs(recipe)
    held = options.pins or (read_pins(options.lock) if options.lock else None)
    start = recipe.adapter.start_from
    if start is not None:
        find_adapter(Path(start))
    if options.dry_run:
        seen = look_at_run(path, loaded.fingerprint, resume=options.resume)
        return rehearse(RunContext(recipe, seen, console, options.offline, held, held=held is not None))
    with open_run(path, loaded.fingerprint, resume=options.resume, fresh=options.fresh) as folder:
        console.print(f"[bold]llmtune {__version__}[/] {escape(recipe.name)} -> {escape(str(path))}")
        write_text(path / "recipe.yaml", loaded.to_yaml())
        folder.findings.update(options.settled)
        pins = held or own_pins(path)
        context = RunContext(
            recipe, folder, console, options.offline, pins, held is not None, options.settled, options.base
        )
        _run_steps(context, loaded, options, trainer or train_here)
        if recipe.train.seeds and options.until in seeds.UNTIL:
            write_report(make_report(folder, recipe, context.skipped), path)  # a further seed may be stopped
            further = partial(run_pipeline, console=console, trainer=trainer)
            seeds.train_seeds(context, loaded, options, further)
        return conclude(context, gated=options.until in {"run", "evaluate"})


def _run_steps(context: RunContext, loaded: LoadedRecipe, options: Options, trainer: Trainer) -> None:
    rows = prepare(context)
    if options.until == "prepare" and not context.recipe.model.name:
        return
    place = choose(context, rows)
    context.infer_labels(place, rows)
    processor = context.read_processor(place)
    if options.until == "run" and "gguf" in context.recipe.deploy:
        check_gguf(context, place)  # before training, not after it
    examples = encode(context, rows, place, processor)
    if options.until == "prepare":
        return
    plan = select(context, place, examples)
    if options.until == "select":
        return
    if options.until == "adapt":
        adapt(context, place, processor, adapter_inputs(context.recipe, place, examples))
        return
    if options.until != "train" and not context.folder.is_done("train"):
        load_benchmarks(context.recipe, context.console)  # what it refuses, it refuses before hours of training
    fit(context, loaded, place, examples, plan, trainer)
    if options.until == "train":
        return
    score(context, place, processor, rows, examples)
    if options.until == "run" and context.recipe.deploy:
        deploy(context, place)


def evaluate_run(
    loaded: LoadedRecipe, run: Path, console: Console, *, offline: bool, base: Path | None = None
) -> dict[str, Any]:
    """Score a finished run again, with the settings of `loaded`; nothing of it is read, encoded or trained anew.

    `base` is as in `Options`.
    """
    with open_run(run, loaded.fingerprint) as folder:
        context, place = open_finished(run, console, offline, loaded.recipe)
        context.folder, context.base = folder, base
        write_text(run / "recipe.yaml", loaded.to_yaml())
        console.print(f"These settings stay with the run: {escape(str(run / 'recipe.yaml'))}")
        for step in ("prepare", "encode", "select", "adapt", "train"):
            context.begin(step, skipped=True)
        processor = load_processor(place, context.recipe.model)
        rows, examples = load_rows(run / "data" / "rows"), load_examples(run / "data" / "examples")
        score(context, place, processor, rows, examples)
        known = run / "evaluation"
        seeds.evaluate_seeds(loaded, run, partial(evaluate_run, console=console, offline=offline, base=known))
        return conclude(context, gated=True)


def conclude(context: RunContext, *, gated: bool) -> dict[str, Any]:
    """Write the report and return it; a gate that failed is raised after that."""
    path = context.folder.path
    report = redact_all(make_report(context.folder, context.recipe, context.skipped))
    write_report(report, path)
    seeds.print_spread(report, context.console)
    if gated:
        context.console.print(f"report: {escape(str(path / 'report.html'))}")
        failed = [gate for gate in report.gates if not gate.passed]
        GateFailed.collect(Problem(f"gate failed: wanted {gate.wanted}, got {gate.got}", gate.name) for gate in failed)
    return report_json(report)


def prepare_inputs(context: RunContext) -> str:
    """Hash what rows depend on; raises EnvironmentProblem where a lock named with --lock holds other data."""
    recipe = context.recipe
    if context.held and context.pins is not None:
        check_pin("the data's content", context.pins.data_hash, hash_sources(recipe.data, recipe.task))
    return rows_inputs(recipe)


def trained_hash(context: RunContext) -> str:
    """Hash what was trained, file by file."""
    return hash_folder(context.folder.path / trained_name(context.recipe))


def prepare(context: RunContext) -> Rows:
    """Step 1, first half: read, check, deduplicate and split the rows."""
    inputs = prepare_inputs(context)
    target = context.folder.path / "data" / "rows"
    with context.step("prepare", inputs, ["data/rows"]) as step:
        if not step.skipped:
            with staged(target) as folder:
                made = prepare_rows(context.recipe, folder, context.console)
            step.facts.update(rows_in=made.rows_in, kept=made.counts, dropped=made.dropped)
    return load_rows(target)


def choose(context: RunContext, rows: Rows) -> ModelRef:
    """Step 2, first half: find the named model, or rank the candidates on the user's own rows and take the best."""
    model = context.recipe.model
    if model.name:
        return locate_pinned(context, model.name)
    assert model.candidates, "a recipe names a model or candidates"
    if context.held and context.pins is not None and context.pins.model in model.candidates:
        return locate_pinned(context, context.pins.model)
    contents = [resolve_model(name, model, context.console, context.offline).content_hash for name in model.candidates]
    template = hash_file(Path(model.chat_template)) if model.chat_template else None
    settings = [model.model_dump(mode="json"), contents, template, context.recipe.data.max_length, context.device]
    inputs = hash_value([rows.content_hash, settings])
    known = context.folder.findings.get("ranking")
    if known is None or known["inputs"] != inputs:
        folder = context.folder.path / "model"
        ranking = rank_candidates(
            context.recipe, context.choose_variant, rows, context.console, folder, context.device, context.offline
        )
        known = {"inputs": inputs, "chosen": ranking.chosen.name, "ranking": ranking.to_dict()}
        context.folder.note(ranking=known)
    return locate_pinned(context, known["chosen"])


def encode(context: RunContext, rows: Rows, place: ModelRef, processor: PreTrainedTokenizerBase) -> Examples:
    """Step 1, second half: token ids and masks, which depend on the model's tokenizer and template."""
    inputs = examples_inputs(context.recipe, rows, place, processor)
    target = context.folder.path / "data" / "examples"
    with context.step("encode", inputs, ["data/examples"]) as step:
        if not step.skipped:
            with staged(target) as folder:
                made = encode_rows(rows, context.task, processor, context.recipe, folder, context.console)
                described = describe_examples(rows, made, processor, context.console, context.task, context.recipe)
            step.facts.update(described)
    return load_examples(target)


def select(context: RunContext, place: ModelRef, examples: Examples) -> MemoryPlan:
    """Step 2, second half: does it fit? The context of the model, then the memory of the device.

    Raises:
        DataError: a row is longer than the model's context.
        EnvironmentProblem: the model cannot be trained in this memory.
    """
    longest = max(examples.longest.values())
    check_context(place, context.recipe, context.task, max(examples.reach.values()))
    recipe = settle_recipe(context, place, longest)
    budget = micro_batch_tokens(plan_memory(place, recipe, context.task, longest, context.device), longest, longest)
    step_tokens = recipe.train.batch_tokens or longest * recipe.train.batch_size
    plan = replace(plan_memory(place, recipe, context.task, min(budget, step_tokens), context.device), tokens=budget)
    settings = [recipe.model.model_dump(mode="json"), adapter_settings(recipe), recipe.train.optim, asdict(plan)]
    inputs = hash_value([__version__, place.content_hash, settings])
    with context.step("select", inputs) as step:
        if not step.skipped:
            check_memory(plan, recipe, context.console)
            ranking = context.folder.findings.get("ranking", {}).get("ranking")
            step.facts.update(
                name=place.name,
                revision=place.revision,
                sha256=place.content_hash,
                ranking=ranking,
                plan={**asdict(plan), "total": plan.total},
                gradient_checkpointing=recipe.train.gradient_checkpointing,
            )
    return plan


def settle_recipe(context: RunContext, place: ModelRef, longest: int) -> Recipe:
    """Return the recipe with `gradient_checkpointing: auto` decided, and keep the decision for as long as it is asked.

    It stays what it was when the run goes on where there is more memory, or less: one run, one way.
    """
    recipe = context.recipe
    if recipe.train.gradient_checkpointing != "auto":
        return recipe
    inputs = hash_value([place.content_hash, longest, adapter_settings(recipe), recipe.train.optim])
    known = context.folder.findings.get("gradient_checkpointing")
    if known is None or known["inputs"] != inputs:
        on = resolve_checkpointing(place, recipe, context.task, longest, context.device)
        context.folder.findings["gradient_checkpointing"] = known = {"inputs": inputs, "on": on}
    if known["on"]:
        context.console.print(
            "train.gradient_checkpointing: auto computes activations again in the backward pass: the longest row "
            f"({longest:,} tokens) does not fit into the memory of {context.device} otherwise.",
            highlight=False,
        )
    return settled_recipe(context)


def settled_recipe(context: RunContext) -> Recipe:
    """Return the recipe with what `select` has decided."""
    known = context.folder.findings.get("gradient_checkpointing")
    if context.recipe.train.gradient_checkpointing != "auto" or known is None:
        return context.recipe
    decided = context.recipe.train.model_copy(update={"gradient_checkpointing": known["on"]})
    return context.recipe.model_copy(update={"train": decided})


def adapt(context: RunContext, place: ModelRef, processor: PreTrainedTokenizerBase, inputs: str) -> None:
    """Step 3 alone: put the adapter in, prove it and say what it is; training makes it again from the same seed."""
    with context.step("adapt", inputs) as step:
        if not step.skipped:
            step.facts.update(describe(make_adapted(context, place, processor)))


def make_adapted(context: RunContext, place: ModelRef, processor: PreTrainedTokenizerBase) -> AdaptedModel:
    """Load the model and put the adapter in, seeded; from here on `context.recipe` says what `select` has decided."""
    context.recipe = settled_recipe(context)
    with context.console.status("loading the model"):
        selected = load_model(place, context.recipe, context.task, processor, device=context.device, training=True)
    return inject(selected, context.recipe, context.console)


def fit(
    context: RunContext, loaded: LoadedRecipe, place: ModelRef, examples: Examples, plan: MemoryPlan, trainer: Trainer
) -> None:
    """Steps 3 and 4: adapt and train, going on from the last checkpoint if the inputs are the same."""
    adapt_inputs = adapter_inputs(context.recipe, place, examples)
    inputs = train_inputs(context.recipe, adapt_inputs)
    steps = context.folder.manifest["steps"]
    if context.folder.is_valid("train", inputs):
        context.begin("adapt", skipped=True)
        context.begin("train", skipped=True)
        return
    for step in ("evaluate", "deploy"):
        steps.pop(step, None)  # of another training
    if "train" not in steps or steps["train"]["inputs"] != inputs:
        context.folder.findings["micro_batch_tokens"] = context.settled.get("micro_batch_tokens", plan.tokens)
        shutil.rmtree(context.folder.path / "explain", ignore_errors=True)  # of another training too
    context.folder.findings["start_from"] = adapter_settings(context.recipe)[-1]
    context.folder.manifest.pop("lock", None)
    context.folder.write()
    lock_run(context, place, loaded.fingerprint)
    trainer(context, place, examples, adapt_inputs, inputs)
    context.folder.manifest["lock"] = note_trained(context.folder.path, trained_name(context.recipe))
    context.folder.write()


def train_here(context: RunContext, place: ModelRef, examples: Examples, adapt_inputs: str, inputs: str) -> None:
    """Adapt and train in this process."""
    processor = context.read_processor(place)
    with context.step("adapt", adapt_inputs, always=True) as step:
        adapted = make_adapted(context, place, processor)
        step.facts.update(describe(adapted))
    with context.step("train", inputs, [trained_name(context.recipe)], always=True) as step:
        trained = train(
            adapted,
            examples,
            context.task,
            context.recipe,
            context.folder.path,
            context.console,
            budget=context.folder.findings["micro_batch_tokens"],
            on_budget=lambda tokens: context.folder.note(micro_batch_tokens=tokens),
            inputs=inputs,
        )
        step.facts.update(trained.as_facts(), processes=1)
    del adapted
    gc.collect()  # the model is in reference cycles; evaluation loads its own


def score(
    context: RunContext, place: ModelRef, processor: PreTrainedTokenizerBase, rows: Rows, examples: Examples
) -> None:
    """Step 5: base and tuned model on the same held-out rows; gates are read anew each time."""
    inputs = evaluation_inputs(context.recipe, trained_hash(context), place, rows, examples)
    target = context.folder.path / "evaluation"
    with context.step("evaluate", inputs, ["evaluation"]) as step:
        if step.skipped:
            evaluation = load_evaluation(target)
            if evaluation is not None:
                print_scores(
                    replace(evaluation, gates=check_gates(context.recipe.evaluate.gates, evaluation)), context.console
                )
            return
        with staged(target) as folder:
            models = Models(context, place, processor)
            settings = adapter_settings(context.recipe)
            base = base_inputs(context.recipe, settings, place, rows, examples, context.device)
            contexts = {"base": models.before, "tuned": models.tuned}
            task, recipe, console = context.task, context.recipe, context.console
            evaluation = evaluate(
                contexts,
                processor,
                rows,
                examples,
                task,
                recipe,
                console,
                device=context.device,
                folder=folder,
                headless=head_is_new(place, recipe, task),
                packs=lambda: models.packs,
                known=load_base(context.base or folder, base),
            )
            save_evaluation(evaluation, folder)
        trained = hash_folder(context.folder.path / trained_name(recipe))
        step.facts.update(trained=trained, recipe=hash_keys(context.folder.path / "recipe.yaml", judging=True))


def deploy(context: RunContext, place: ModelRef) -> None:
    """What `run` makes at the end: the merged model and the GGUF file, each certified."""
    trained = hash_folder(context.folder.path / trained_name(context.recipe))
    settings = context.recipe.generation.model_dump(mode="json")
    products = context.recipe.deploy
    inputs = hash_value([__version__, trained, place.content_hash, settings, sorted(products)])
    made = {"merged": "merged", "gguf": f"gguf/{DEFAULT_FORMAT}"}
    with context.step("deploy", inputs, [made[name] for name in products]) as step:
        if not step.skipped:
            if "merged" in products:
                step.facts.update(merge(context, place, context.folder.path / "merged", onto=None, dtype="auto"))
            if "gguf" in products:
                written = make_gguf(context, place)
                step.facts.update(gguf=written, gguf_file=written["file"], gguf_read_by=written["reader"])


def rehearse(context: RunContext) -> dict[str, Any]:
    """`--dry-run`: check what is cheap, say which steps would run, change nothing and download no weights."""
    recipe, console, folder = context.recipe, context.console, context.folder
    valid = {"prepare": folder.is_valid("prepare", prepare_inputs(context))}
    plans = {}
    for name in [recipe.model.name] if recipe.model.name else list(recipe.model.candidates or ()):
        try:
            place = locate_pinned(replace(context, offline=True), name)
        except EnvironmentProblem:
            if context.offline or not is_remote_model(name):
                raise
            console.print(f"{escape(name)} would be downloaded first")
            continue
        context.variant = context.choose_variant(place)
        processor = load_processor(place, recipe.model)
        settled = settle_recipe(context, place, recipe.data.max_length)
        plan = plan_memory(place, settled, context.task, recipe.data.max_length, context.device)
        check_memory(plan, settled, console)
        plans[name] = {**asdict(plan), "total": plan.total}
        if valid["prepare"] and recipe.model.name:
            rows = load_rows(folder.path / "data" / "rows")
            context.infer_labels(place, rows)
            valid["encode"] = folder.is_valid("encode", examples_inputs(context.recipe, rows, place, processor))
        if valid.get("encode"):
            examples = load_examples(folder.path / "data" / "examples")
            valid["train"] = folder.is_valid(
                "train", train_inputs(context.recipe, adapter_inputs(context.recipe, place, examples))
            )
            valid["evaluate"] = folder.is_valid(
                "evaluate", evaluation_inputs(context.recipe, trained_hash(context), place, rows, examples)
            )
    for step in ("prepare", "encode", "train", "evaluate"):
        console.print(f"[bold cyan]{step}[/] {'unchanged, would be skipped' if valid.get(step) else 'would run'}")
    for seed in recipe.train.seeds:
        console.print(f"[bold cyan]seed {seed}[/] would follow in {escape(str(seeds.seed_folder(folder.path, seed)))}")
    console.print(f"good; the run folder is {escape(str(folder.path))}")
    would_run = [step for step in ("prepare", "encode", "train", "evaluate") if not valid.get(step)]
    return {"folder": str(folder.path), "would_run": would_run, "plans": plans}
