"""The five steps in order: prepare, select, adapt, train, evaluate, and what comes after them. Read this first.

Each step is skipped when nothing that it depends on changed, and says which of the two it did. What a step finds out is
kept as facts in the manifest, so that the report can be written from the run folder alone.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from llmtune import __version__
from llmtune.adapter.injection import adapter_inputs, adapter_settings, describe
from llmtune.adapter.load import find_adapter
from llmtune.data.data_report import describe_examples
from llmtune.data.examples import encode_rows, examples_inputs, load_examples, row_lengths
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import load_rows
from llmtune.deploy.gguf_export import check_gguf
from llmtune.deploy.products import make_products
from llmtune.dry_run import dry_run
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.cache_keys import evaluation_inputs
from llmtune.evaluate.champion import check_champion, note_look
from llmtune.evaluate.eval_inputs import warn_of_cuts
from llmtune.evaluate.evaluation_file import load_evaluation, print_scores, print_verdict
from llmtune.evaluate.gates import check_gates, require_gates
from llmtune.evaluate.lm_eval import load_benchmarks
from llmtune.evaluate.run_report import make_report
from llmtune.evaluate.suite_registry import check_inputs
from llmtune.model.catalogue import candidate_names
from llmtune.model.device import pick_device
from llmtune.model.kernels import check_kernels
from llmtune.model.memory_plan import check_context, check_memory, plan_training
from llmtune.model.model_selection import Candidate, read_ranking
from llmtune.model.model_trials import (
    known_or_ranked,
    note_ranking,
    successive_halving,
    trial_folder,
    validation_bits,
    with_candidate,
)
from llmtune.recipe.loader import LoadedRecipe
from llmtune.records import Examples, Json, MemoryPlan, ModelRef, Rows, read_model_ref
from llmtune.report.render_terminal import print_blocks
from llmtune.report.report_page import report_json, write_report
from llmtune.report.report_record import Report
from llmtune.report.score_sections import seed_table
from llmtune.scoring import score_models
from llmtune.session import Options, RunContext, locate_pinned, lock_run, open_finished, trained_name
from llmtune.store.atomic_files import hash_value, plain, staged, write_text
from llmtune.store.process_environment import refuse_network
from llmtune.store.processes import layout, once, rank
from llmtune.store.run_folder import Manifest, RunFolder, default_path, open_run, peek_run
from llmtune.store.run_lock import hash_keys, note_trained, own_pins, read_pins
from llmtune.store.seed_runs import UNTIL, is_done, seed_folder, share_rows, with_seed
from llmtune.tasks.base import next_steps
from llmtune.train.metrics_log import log_results
from llmtune.train.setup import train_inputs

KEPT = ("micro_batch_tokens", "gradient_checkpointing")
"""Findings of a run that its further seeds and its reproduction keep."""


def run_pipeline(loaded: LoadedRecipe, options: Options, console: Console) -> Json:
    """Run the steps of a recipe up to `options.until`; returns what report.json holds, in rank 0.

    Of several processes all run this; rank 0 alone does what is done `once`.

    Raises:
        LlmtuneError: one of its kinds, for everything that a user can meet; `GateFailed` after the report is written.
    """
    recipe = loaded.recipe
    path = options.out or default_path(recipe.name, loaded.fingerprint)
    refuse_network(recipe, offline=options.offline)
    check_kernels(recipe, pick_device())
    check_inputs(recipe)
    held = options.pins or (read_pins(options.lock) if options.lock else None)
    if recipe.adapter.start_from is not None:
        find_adapter(Path(recipe.adapter.start_from))
    open_context = partial(
        RunContext,
        recipe,
        console=console,
        offline=options.offline,
        held=held is not None,
        layout=options.layout or layout(),
    )
    if options.dry_run:
        if rank():
            return {}
        seen = peek_run(path, loaded.fingerprint, resume=options.resume, fresh=options.fresh)
        context = open_context(folder=seen, pins=held)
        if options.device is not None:
            context.device = options.device
            seen.findings.pop("gradient_checkpointing", None)  # which is of what computes here
        return dry_run(context, loaded)
    with ExitStack() as stack:
        manifest = once(lambda: _begin(stack, path, loaded, options, console))
        if not path.is_dir():
            fix = "Give --out a folder on a disk that all machines share, at the same path."
            raise EnvironmentProblem.of("this machine does not see the run folder", str(path), fix)
        pins = held or own_pins(path)
        context = open_context(RunFolder(path, manifest), pins=pins, findings=options.findings, base=options.base)
        run_steps(context, loaded, options)
        if recipe.train.seeds and options.until in UNTIL:
            context.once(lambda: write_report(current_report(context), path))  # a further seed may be stopped
            run_seeds(context, loaded, options)
        return conclude_once(context, gated=options.until in {"run", "evaluate"})


def _begin(stack: ExitStack, path: Path, loaded: LoadedRecipe, options: Options, console: Console) -> Manifest:
    folder = stack.enter_context(open_run(path, loaded.fingerprint, resume=options.resume, fresh=options.fresh))
    console.print(f"[bold]llmtune {__version__}[/] {escape(loaded.recipe.name)} -> {escape(str(path))}")
    write_text(path / "recipe.yaml", loaded.to_yaml())
    folder.findings.update(options.findings)
    return folder.manifest


def current_report(context: RunContext) -> Report:
    """Make the report of what the run folder holds."""
    return make_report(context.folder, context.recipe, context.device, context.skipped)


def conclude_once(context: RunContext, *, gated: bool) -> Json:
    """Conclude in rank 0, which has the report; the other processes have a part of it at most."""
    report: Json = {}
    context.once(lambda: report.update(conclude(context, gated=gated)))
    return report


def conclude(context: RunContext, *, gated: bool) -> Json:
    """Write the report and return it; print the verdict, send it to trackers, and raise a gate that failed."""
    path, console = context.folder.path, context.console
    report = current_report(context)
    write_report(report, path)
    if report.seeds:
        print_blocks([seed_table(report.seeds)], console)
        console.print(report.seeds.told, highlight=False)
    if gated:
        if not context.skipped.get("evaluate", True):
            log_results(report, context.recipe.train.report_to, path, context.device, offline=context.offline)
        print_verdict(report.verdict, report.gates, console)
        context.folder.note(next_steps=next_steps(path, context.task))
        console.print(context.folder.findings["next_steps"], highlight=False, markup=False, soft_wrap=True)
        require_gates(report.gates, report_json(report))
    return report_json(report)


def run_steps(context: RunContext, loaded: LoadedRecipe, options: Options) -> None:
    """Run one step after the other, up to the last that is asked for."""
    rows = prepare(context)
    if options.until == "prepare" and not context.recipe.model.name:
        return
    model_ref = select_model(context, rows, loaded)
    context.infer_labels(model_ref, rows)
    loaded = context.resolve_training(loaded, model_ref, rows)
    context.once(lambda: write_text(context.folder.path / "recipe.yaml", loaded.to_yaml()))
    processor = context.read_processor(model_ref)
    if options.until == "run" and "gguf" in context.recipe.deploy:
        check_gguf(context, model_ref)  # before training, not after it
    examples = encode(context, rows, model_ref, processor)
    if options.until == "prepare":
        return
    tokens = context.once(lambda: select(context, model_ref, examples).tokens)
    if options.until == "select":
        return
    if options.until == "adapt":
        inputs = adapter_inputs(context.recipe, model_ref, examples)
        context.once(lambda: adapt(context, model_ref, processor, examples, inputs))
        return
    if options.until != "train" and not context.folder.is_done("train"):  # what they refuse: before hours of training
        context.once(lambda: check_champion(loaded.recipe, context.folder, rows, examples, context.console))
        context.once(lambda: load_benchmarks(context.recipe, context.console) and None)
    train(context, loaded, model_ref, examples, tokens)
    if options.until == "train":
        return
    evaluate(context, model_ref, processor, rows, examples)
    if options.until == "run" and context.recipe.deploy:
        context.once(lambda: make_products(context, model_ref))


def run_seeds(context: RunContext, loaded: LoadedRecipe, options: Options) -> None:
    """Run the recipe once for each further seed, as far as the run itself went.

    Each is skipped where it is valid, and goes on where it was stopped. Rows, model and micro-batches are held to those
    of the run.
    """
    path, findings = context.folder.path, context.folder.findings
    kept = {name: findings[name] for name in KEPT if name in findings}
    own = replace(options, resume=False, fresh=False, lock=None, pins=own_pins(path), findings=kept)
    for seed in loaded.recipe.train.seeds:
        further, out = with_seed(loaded, seed), seed_folder(path, seed)
        context.console.rule(f"seed {seed}", align="left")
        context.once(partial(share_rows, context.folder, out, further.fingerprint))
        run_pipeline(
            further, replace(own, out=out, until=UNTIL[options.until], base=path / "evaluation"), context.console
        )


def evaluate_run(loaded: LoadedRecipe, run: Path, console: Console, *, offline: bool, base: Path | None = None) -> Json:
    """Score a finished run again, with the settings of `loaded`; nothing of it is read, encoded or trained anew.

    `base` is as in `Options`. Further seeds that are trained are scored again too.
    """
    with ExitStack() as stack:
        manifest = once(lambda: stack.enter_context(open_run(run, loaded.fingerprint)).manifest)
        context, model_ref = open_finished(run, console, offline, loaded.recipe)
        context.folder, context.base = RunFolder(run, manifest), base
        context.once(lambda: write_text(run / "recipe.yaml", loaded.to_yaml()))
        console.print(f"These settings stay with the run: {escape(str(run / 'recipe.yaml'))}")
        for step in ("prepare", "encode", "select", "adapt", "train"):
            context.begin(step, skipped=True)
        rows, examples = load_rows(run / "data" / "rows"), load_examples(run / "data" / "examples")
        context.once(lambda: check_champion(loaded.recipe, context.folder, rows, examples, console))
        evaluate(context, model_ref, context.read_processor(model_ref), rows, examples)
        for seed in (one for one in loaded.recipe.train.seeds if is_done(seed_folder(run, one), "train")):
            evaluate_run(
                with_seed(loaded, seed), seed_folder(run, seed), console, offline=offline, base=run / "evaluation"
            )
        return conclude_once(context, gated=True)


def prepare(context: RunContext) -> Rows:
    """Step 1, first half: read, check, deduplicate and split the rows."""
    target = context.folder.path / "data" / "rows"
    context.once(lambda: _prepare(context, target))
    return load_rows(target)


def _prepare(context: RunContext, target: Path) -> None:
    inputs = context.rows_inputs
    with context.step("prepare", inputs, ["data/rows"]) as step:
        if not step.skipped:
            with staged(target) as folder:
                made = prepare_rows(context.recipe, folder, context.console, inputs)
            step.facts.update(rows_in=made.rows_in, kept=made.counts, dropped=made.dropped)


def select_model(context: RunContext, rows: Rows, loaded: LoadedRecipe) -> ModelRef:
    """Step 2, first half: find the named model, or rank the candidates on the user's own rows and take the best."""
    name = context.recipe.model.name
    if not name and context.held and context.pins is not None and context.pins.model in candidate_names(context.recipe):
        name = context.pins.model
    chosen = name or choose_candidate(context, rows, loaded)
    return read_model_ref(context.once(lambda: plain(locate_pinned(context, chosen))))


def choose_candidate(context: RunContext, rows: Rows, loaded: LoadedRecipe) -> str:
    """Return the name of the best candidate: the one that is known, or else by ranking and trials."""
    recipe, run, console = context.recipe, context.folder, context.console
    rank_all = partial(known_or_ranked, recipe, context.choose_variant, rows, console, run)
    known = context.once(lambda: rank_all(context.device, context.offline))
    if known["chosen"]:
        return str(known["chosen"])
    ranking = read_ranking(known["ranking"])
    if recipe.model.trials:
        tune = partial(tune_candidate, context, loaded)
        ranking = successive_halving(ranking, recipe.model.trials, tune, console)
    context.once(lambda: note_ranking(ranking, known["inputs"], run, console))
    return ranking.chosen.name


def tune_candidate(context: RunContext, loaded: LoadedRecipe, candidate: Candidate, steps: int) -> float:
    """Train a candidate for some steps in a run folder of its own; return bits per byte of the validation rows."""
    trial, out = with_candidate(loaded, candidate, steps), trial_folder(context.folder.path, candidate.name, steps)
    context.once(lambda: share_rows(context.folder, out, trial.fingerprint))
    run_pipeline(trial, Options(out=out, offline=context.offline, until="train"), context.console)
    return validation_bits(out)


def encode(context: RunContext, rows: Rows, model_ref: ModelRef, processor: PreTrainedTokenizerBase) -> Examples:
    """Step 1, second half: token ids and masks, which depend on the model's tokenizer and template."""
    target = context.folder.path / "data" / "examples"
    context.once(lambda: _encode(context, rows, model_ref, processor, target))
    return load_examples(target)


def _encode(
    context: RunContext, rows: Rows, model_ref: ModelRef, processor: PreTrainedTokenizerBase, target: Path
) -> None:
    inputs = examples_inputs(context.recipe, rows, model_ref, processor)
    with context.step("encode", inputs, ["data/examples"]) as step:
        if not step.skipped:
            with staged(target) as folder:
                made = encode_rows(rows, context.task, processor, context.recipe, folder, context.console)
                described = describe_examples(rows, made, processor, context.console, context.task, context.recipe)
            step.facts.update(described)
    warn_of_cuts(rows, load_examples(target), context.task, processor, context.recipe, context.console)


def select(context: RunContext, model_ref: ModelRef, examples: Examples) -> MemoryPlan:
    """Step 2, second half: does it fit? The context of the model, then the memory of the device.

    Raises:
        DataError: a row is longer than the model's context.
        EnvironmentProblem: the model cannot be trained in this memory.
    """
    longest = max(examples.longest.values())
    check_context(model_ref, context.recipe, context.task, max(examples.reach.values()))
    context.resolve_checkpointing(model_ref, longest)
    recipe = context.resolved_recipe
    lengths = row_lengths(examples)
    plan = plan_training(model_ref, recipe, context.task, longest, context.device, lengths, context.layout)
    settings = [recipe.model.model_dump(mode="json"), adapter_settings(recipe), recipe.train.optim, asdict(plan)]
    inputs = hash_value([__version__, model_ref.content_hash, settings])
    with context.step("select", inputs) as step:
        if not step.skipped:
            check_memory(plan, recipe, context.console)
            step.facts.update(
                name=model_ref.name,
                revision=model_ref.revision,
                sha256=model_ref.content_hash,
                ranking=context.folder.findings.get("ranking", {}).get("ranking"),
                plan={**asdict(plan), "total": plan.total},
                gradient_checkpointing=recipe.train.gradient_checkpointing,
            )
    return plan


def adapt(
    context: RunContext, model_ref: ModelRef, processor: PreTrainedTokenizerBase, examples: Examples, inputs: str
) -> None:
    """Step 3 alone: put the adapter in, prove it and say what it is; training makes it again from the same seed."""
    with context.step("adapt", inputs) as step:
        if not step.skipped:
            step.facts.update(describe(context.make_adapted(model_ref, processor, examples)))


def train(context: RunContext, loaded: LoadedRecipe, model_ref: ModelRef, examples: Examples, tokens: int) -> None:
    """Steps 3 and 4 in all processes: adapt and train, from the last checkpoint if the inputs are the same.

    `tokens` is the budget of a micro-batch to begin with.
    """
    adapt_inputs = adapter_inputs(context.recipe, model_ref, examples)
    inputs = train_inputs(context.recipe, adapt_inputs)
    if context.once(lambda: _begin_training(context, loaded, model_ref, inputs, tokens)):
        context.train_here(model_ref, examples, adapt_inputs, inputs)
    context.once(lambda: _lock_trained(context))


def _begin_training(context: RunContext, loaded: LoadedRecipe, model_ref: ModelRef, inputs: str, tokens: int) -> bool:
    """Put aside what another training left and write the lock; False if this training is done already."""
    manifest = context.folder.manifest
    if context.folder.is_valid("train", inputs):
        context.begin("adapt", skipped=True)
        context.begin("train", skipped=True)
        return False
    for step in ("evaluate", "deploy"):
        manifest["steps"].pop(step, None)  # of another training
    context.folder.take_budget()
    if "train" not in manifest["steps"] or manifest["steps"]["train"]["inputs"] != inputs:
        context.folder.findings["micro_batch_tokens"] = context.findings.get("micro_batch_tokens", tokens)
        shutil.rmtree(context.folder.path / "explain", ignore_errors=True)  # of another training too
    context.folder.findings["start_from"] = adapter_settings(context.recipe)[-1]
    manifest.pop("lock", None)
    context.folder.write()
    lock_run(context, model_ref, loaded.fingerprint)
    return True


def _lock_trained(context: RunContext) -> None:
    manifest = context.folder.manifest
    if "lock" not in manifest:  # here, as a run may be killed just before it
        manifest["lock"] = note_trained(context.folder.path, trained_name(context.recipe))
        context.folder.write()


def evaluate(
    context: RunContext, model_ref: ModelRef, processor: PreTrainedTokenizerBase, rows: Rows, examples: Examples
) -> None:
    """Step 5 in all processes: base and tuned model on the same held-out rows; gates are read anew each time."""
    recipe, target = context.recipe, context.folder.path / "evaluation"
    trained = context.once(lambda: context.trained_hash)
    inputs = evaluation_inputs(recipe, trained, model_ref, rows, examples)
    context.once(lambda: note_look(context.folder, context.console))
    if context.base is None and context.folder.is_whole("evaluate"):
        context.base = target  # what the base answered before
    unchanged = context.once(lambda: context.folder.is_valid("evaluate", inputs))
    with context.step("evaluate", inputs, ["evaluation"], always=not unchanged) as step:
        if step.skipped:
            if evaluation := load_evaluation(target):
                print_scores(replace(evaluation, gates=check_gates(recipe.evaluate, evaluation)), context.console)
            return
        with staged(target) if rank() == 0 else nullcontext() as folder:
            score_models(context, model_ref, processor, rows, examples, folder)
        judged = hash_keys(context.folder.path / "recipe.yaml", judging=True)
        step.facts.update(trained=trained, recipe=judged)
