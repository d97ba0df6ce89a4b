"""A run: its five steps in order, then products, seeds and the report. Read this first.

    prepare    read, check, deduplicate and split the rows, and encode them for the model
    select     choose the model, or take the named one, and plan its memory
    adapt      add an adapter to the model and prove that it takes effect
    train      train the adapter, with checkpoints
    evaluate   score base and tuned model on the same held-out rows

Then come the products that the recipe names, further seeds, and the report. A step is skipped if neither its inputs nor
its outputs changed. Its results are stored as facts in run.json, and the report is written from the run folder.
`resolve_run` makes the plan, which is immutable. All processes run this file; only rank 0 does the work in `once`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.adapter.injection import adapter_settings, describe_adapter
from llmtune.data.data_report import describe_examples
from llmtune.data.examples import ExampleReader, encode_rows, examples_inputs, row_lengths
from llmtune.data.preparation import has_rows, prepare_rows
from llmtune.data.row_store import load_rows
from llmtune.deploy.products import check_products, make_products, reporting
from llmtune.deploy.release_folder import conclude_release, release_kept
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.cache_keys import evaluation_inputs, lock_trained, note_own_metrics
from llmtune.evaluate.champion import check_champion, note_look
from llmtune.evaluate.decision import refresh_rules
from llmtune.evaluate.eval_inputs import warn_of_cuts
from llmtune.evaluate.evaluation_file import list_failed, load_evaluation
from llmtune.evaluate.gates import note_gates, require_gates
from llmtune.evaluate.suites.lm_eval import load_benchmarks
from llmtune.evaluate.suites.suite_registry import try_inputs
from llmtune.model.catalogue import candidate_names
from llmtune.model.device import release_memory
from llmtune.model.memory_plan import check_context, check_memory, plan_training
from llmtune.model.model_trials import choose_candidate, known_or_ranked
from llmtune.plan_drafting import check_first, decide_rest, draft_plan, finish_plan
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import Recipe
from llmtune.records import Json, read_model_ref
from llmtune.report.report_page import report_json, write_report
from llmtune.report.run_report import make_report
from llmtune.report.terminal import print_scored, print_scores, print_seeds, print_verdict
from llmtune.session import (
    Plan,
    RunContext,
    ask_champion_classes,
    check_new_labels,
    evaluation_hash,
    find_suspects,
    find_variant,
    locate_pinned,
    lock_run,
    make_adapted,
    open_finished,
    rows_hash,
    score_models,
)
from llmtune.store.atomic_files import hash_folder, hash_value, plain, staged
from llmtune.store.processes import once, rank, world_size
from llmtune.store.report_record import Report
from llmtune.store.run_folder import Manifest, RunFolder, open_run, recipe_of_run, trained_name
from llmtune.store.run_listing import find_start, pin_start
from llmtune.store.run_lock import hash_keys, own_pins, read_pins
from llmtune.store.run_origin import is_own, save_recipe
from llmtune.store.run_request import RunRequest
from llmtune.store.seed_runs import UNTIL, is_done, kept_findings, seed_folder, share_rows, with_seed
from llmtune.tasks.base import next_steps
from llmtune.tasks.negatives import mine_step, survey_step
from llmtune.train.loop import train
from llmtune.train.metrics_log import log_results
from llmtune.train.row_losses import list_hardest


def run_pipeline(loaded: LoadedRecipe, request: RunRequest, console: Console) -> Json:
    """Run the steps of a recipe up to `request.until`; return the content of report.json in rank 0.

    Raises a subclass of LlmtuneError for every error a user can fix; `GateFailed` once the report is written.
    """
    path = request.folder
    loaded = pin_start(loaded, once(lambda: find_start(loaded.recipe, path)))
    check_first(loaded, request)
    request = replace(request, pins=request.pins or (read_pins(request.lock) if request.lock else None))
    with ExitStack() as stack:
        manifest = once(lambda: _begin(stack, path, loaded, request, console))
        if not path.is_dir():
            fix = "Give --out a folder on a disk that all machines share, at the same path."
            raise EnvironmentProblem.of("run folder not found on this machine", str(path), fix)
        context = RunContext(RunFolder(path, manifest), console, request)
        for name, step in STEPS.items():
            step(context, loaded)
            if name == request.until:
                break
        if loaded.recipe.train.seeds and request.until in UNTIL:
            context.once(lambda: _write_report(context, loaded))  # in case a further seed is stopped
            run_seeds(context, loaded)
        return conclude_run(context, loaded)


def _begin(stack: ExitStack, path: Path, loaded: LoadedRecipe, request: RunRequest, console: Console) -> Manifest:
    folder = stack.enter_context(open_run(path, loaded.fingerprint, resume=request.resume, fresh=request.fresh))
    console.print(f"[bold]llmtune {__version__}[/] {escape(loaded.recipe.name)} -> {escape(request.place)}")
    save_recipe(path, loaded.to_yaml())
    folder.findings.update(request.findings)
    return folder.manifest


def run_prepare(context: RunContext, loaded: LoadedRecipe) -> None:
    """Step 1: read, check, deduplicate and split the rows; encode them if the recipe names the model."""
    context.once(lambda: _prepare_rows(context, loaded))
    if loaded.recipe.model.name:
        resolve_run(context, loaded, loaded.recipe.model.name)


def _prepare_rows(context: RunContext, loaded: LoadedRecipe) -> None:
    inputs, target = rows_hash(context, loaded.recipe), context.folder.path / "data" / "rows"
    with context.step("prepare", inputs, ["data/rows"]) as step:
        if not step.skipped:
            with staged(target) as folder:
                made = prepare_rows(loaded.recipe, folder, context.console, inputs)
                if not has_rows(target, made.content_hash):
                    context.folder.refuse_released()
            step.facts.update(made.as_facts())


def resolve_run(context: RunContext, loaded: LoadedRecipe, name: str) -> None:
    """Find the model, resolve the recipe's open settings, encode the rows, and set `context.resolved`."""
    model_ref = read_model_ref(context.once(lambda: plain(locate_pinned(context, loaded.recipe.model, name))))
    about = loaded.recipe, model_ref, context.device, context.console, context.request.offline
    context.once(lambda: mine_step(context.step, context.folder.path / "data", *about))
    rows = context.rows
    draft, stated = draft_plan(context, loaded, model_ref, rows)
    context.once(lambda: save_recipe(context.folder.path, stated.to_yaml()))
    if context.request.until == "run":
        check_products(draft)  # before training, not after it
    context.once(lambda: _encode_rows(context, draft))
    context.resolved = draft
    if context.request.until != "prepare":  # otherwise no later step needs the rest
        decided = context.once(lambda: decide_rest(context, draft, rows, context.examples))
        context.resolved = finish_plan(draft, decided)


def _encode_rows(context: RunContext, draft: Plan) -> None:
    rows, processor, recipe, task = context.rows, draft.processor, draft.recipe, draft.task
    inputs = examples_inputs(recipe, rows, draft.model_ref, processor, task.example_type)
    with context.step("encode", inputs, ["data/examples"]) as step:
        if not step.skipped:
            with staged(context.folder.path / "data" / "examples") as folder:
                made = encode_rows(rows, task, processor, recipe, folder, context.console)
                described = describe_examples(rows, made, processor, context.console, task, recipe)
            step.facts.update(described)
    warn_of_cuts(rows, context.examples, task, processor, recipe, context.console)


def run_select(context: RunContext, loaded: LoadedRecipe) -> None:
    """Step 2: choose the model if the recipe names none; check its context length and the device's memory.

    Raises:
        DataError: a row is longer than the model's context.
        EnvironmentProblem: the model cannot be trained in this memory.
    """
    if context.resolved is None:
        resolve_run(context, loaded, best_candidate(context, loaded))
    context.once(lambda: _plan_memory(context))
    plan, found = context.plan, (context.rows, context.folder.facts("mine"))
    context.once(lambda: survey_step(context.step, *found, plan.recipe, plan.model_ref, plan.device, context.console))


def _plan_memory(context: RunContext) -> None:
    plan, examples = context.plan, context.examples
    recipe, model_ref, longest = plan.recipe, plan.model_ref, max(examples.longest.values())
    check_context(model_ref, recipe, plan.task, max(examples.reach.values()))
    memory = plan_training(model_ref, recipe, plan.task, longest, plan.device, row_lengths(examples), plan.layout)
    settings = [recipe.model.model_dump(mode="json"), adapter_settings(recipe), recipe.train.optim, asdict(memory)]
    with context.step("select", hash_value([__version__, model_ref.content_hash, settings])) as step:
        if not step.skipped:
            check_memory(memory, recipe, context.console)
            step.facts.update(
                name=model_ref.name,
                revision=model_ref.revision,
                sha256=model_ref.content_hash,
                ranking=context.folder.findings.get("ranking", {}).get("ranking"),
                plan={**asdict(memory), "total": memory.total},
                gradient_checkpointing=recipe.train.gradient_checkpointing,
            )


def best_candidate(context: RunContext, loaded: LoadedRecipe) -> str:
    """Return the name of the best candidate, from the lock or an earlier ranking, else by ranking and trials."""
    recipe, request, console = loaded.recipe, context.request, context.console
    if request.pins is not None and request.pins.model in candidate_names(recipe):
        return request.pins.model

    def run_trial(trial: LoadedRecipe, out: Path) -> None:
        context.once(lambda: share_rows(context.folder, out, trial.fingerprint))
        run_pipeline(trial, RunRequest(out, "train", offline=request.offline), console)

    prepared = load_rows(context.folder.path / "data" / "rows")
    about = recipe, partial(find_variant, recipe), prepared, console, context.folder, context.device
    known = context.once(lambda: known_or_ranked(*about, request.offline))
    return known["chosen"] or choose_candidate(loaded, known, context.folder, console, run_trial, context.once)


def run_adapt(context: RunContext, loaded: LoadedRecipe) -> None:
    """Step 3 alone, for `llmtune adapt`. A longer run adapts in `run_train`, from the same seed."""

    def adapt_alone() -> None:
        with context.step("adapt", context.plan.inputs["adapt"]) as step:
            if not step.skipped:
                step.facts.update(describe_adapter(make_adapted(context)))

    if context.request.until == "adapt":
        context.once(adapt_alone)


def run_train(context: RunContext, loaded: LoadedRecipe) -> None:
    """Steps 3 and 4 in all processes: adapt and train; resume from the last checkpoint if the inputs are the same."""
    if context.request.until != "train" and not context.folder.is_done("train"):  # before hours of training
        context.once(lambda: _check_evaluation(context, recipe_of_run(context.folder).recipe))
        check_new_labels(context)
    if context.once(lambda: _begin_training(context)):
        adapt_and_train(context)
    context.once(lambda: lock_trained(context.folder, trained_name(context.plan.recipe)))


def _check_evaluation(context: RunContext, recipe: Recipe) -> None:
    ask = partial(ask_champion_classes, context)
    check_champion(recipe, context.folder, context.rows, context.examples, context.console, ask)
    load_benchmarks(recipe, context.console)
    try_inputs(context.plan.recipe, context.plan.task, context.rows, context.console)


def _begin_training(context: RunContext) -> bool:
    """Discard the results of an earlier training and write the lock; return False if this training is already done."""
    folder, inputs = context.folder, context.plan.inputs["train"]
    if folder.is_valid("train", inputs):
        context.begin("adapt", skipped=True)
        context.begin("train", skipped=True)
        return False
    folder.begin_training()
    if (trained := folder.manifest["steps"].get("train")) is None or trained["inputs"] != inputs:
        tokens = folder.facts("select")["plan"]["tokens"]
        folder.findings["micro_batch_tokens"] = context.request.findings.get("micro_batch_tokens", tokens)
        shutil.rmtree(folder.path / "explain", ignore_errors=True)  # from an earlier training too
    folder.findings["start_from"] = adapter_settings(context.plan.recipe)[-1]
    folder.write()
    lock_run(context)
    return True


def adapt_and_train(context: RunContext) -> None:
    """Add the adapter and train it, as two steps, in all processes."""
    plan, folder = context.plan, context.folder
    with context.step("adapt", plan.inputs["adapt"], always=True) as step:
        adapted = make_adapted(context)
        step.facts.update(describe_adapter(adapted))
    with context.step("train", plan.inputs["train"], [trained_name(plan.recipe)], always=True) as step:
        trained = train(
            adapted,
            context.examples,
            plan.task,
            plan.recipe,
            folder.path,
            context.console,
            budget=folder.findings["micro_batch_tokens"],
            on_budget=folder.note_budget if rank() == 0 or context.shards else lambda tokens: None,
            inputs=plan.inputs["train"],
            sharded=context.shards,
        )
        hardest = context.once(lambda: list_hardest(folder.path, context.rows, context.examples, plan.task))
        step.facts.update(trained.as_facts(), hardest_rows=hardest)
        step.facts.update(processes=world_size(), strategy="fsdp" if context.shards else "ddp")
    del adapted
    release_memory()  # evaluation loads its own model


def run_evaluate(context: RunContext, loaded: LoadedRecipe) -> None:
    """Step 5 in all processes: score base and tuned model on the same held-out rows."""
    target = context.folder.path / "evaluation"
    inputs = context.once(lambda: evaluation_hash(context))
    context.once(lambda: note_look(context.folder, context.console))
    known = target if context.folder.is_whole("evaluate") else None  # earlier answers of the base
    unchanged = context.once(lambda: context.folder.is_valid("evaluate", inputs) and not list_failed(target))
    with context.step("evaluate", inputs, ["evaluation"], always=not unchanged) as step:
        if step.skipped:
            if evaluation := load_evaluation(target):
                print_scores(evaluation, context.console, loaded.recipe.task)
            return
        context.once(lambda: context.folder.note(gates=None))
        with staged(target) if rank() == 0 else nullcontext() as folder:
            scored = score_models(context, folder, context.request.base or known)
            print_scored(scored, context.plan.recipe, context.console)
            find_suspects(context, folder)
        judged = hash_keys(context.folder.path / "recipe.yaml", judging=True)
        step.facts.update(trained=context.once(lambda: hash_folder(context.trained_folder)), recipe=judged)
    context.once(lambda: note_own_metrics(context.folder, context.plan.recipe))
    context.once(lambda: refresh_rules(context.folder, context.trained_folder, context.console))


def run_deploy(context: RunContext, loaded: LoadedRecipe) -> None:
    """Make the products that the recipe names, each verified against the trained model."""
    if context.plan.recipe.exports:
        begun, stopped = (partial(_write_report, context, loaded, stopped=one) for one in (False, True))
        context.once(lambda: reporting(stopped, lambda: release_kept(partial(make_products, on_begin=begun), context)))


STEPS: dict[str, Callable[[RunContext, LoadedRecipe], None]] = {
    "prepare": run_prepare,
    "select": run_select,
    "adapt": run_adapt,
    "train": run_train,
    "evaluate": run_evaluate,
    "run": run_deploy,
}
"""The steps of a run, by the value of `until` that ends the run after the step."""


def run_seeds(context: RunContext, loaded: LoadedRecipe) -> None:
    """Run the recipe once for each further seed: as far as the run, but without gates and products.

    A valid seed run is skipped, and an interrupted one resumes. Rows, model and micro-batches are those of the run.
    """
    path, until, offline = context.folder.path, UNTIL[context.request.until], context.request.offline
    same = RunRequest(None, until, offline=offline, pins=own_pins(path), findings=kept_findings(context.folder))
    for seed in loaded.recipe.train.seeds:
        further, out = with_seed(loaded, seed), seed_folder(path, seed)
        context.console.rule(f"seed {seed}", align="left")
        context.once(partial(share_rows, context.folder, out, further.fingerprint))
        run_pipeline(further, replace(same, out=out, base=path / "evaluation"), context.console)


def evaluate_run(loaded: LoadedRecipe, run: Path, console: Console, *, offline: bool, base: Path | None = None) -> Json:
    """Score a finished run again, with the settings of `loaded`; nothing is read, encoded or trained again.

    `base` is as in `RunRequest`. Trained runs of further seeds are scored again too.
    """
    with ExitStack() as stack:
        folder = RunFolder(run, once(lambda: stack.enter_context(open_run(run, loaded.fingerprint)).manifest))
        request = RunRequest(run, "evaluate", offline=offline, base=base)
        context = replace(open_finished(run, console, offline, loaded.recipe), folder=folder, request=request)
        plan, rows, examples = context.plan, context.rows, context.examples
        if examples.counts.get("test"):
            ExampleReader(examples, "test")  # raises before the folder changes
        context.once(lambda: _check_evaluation(context, loaded.recipe))
        context.once(lambda: save_recipe(run, loaded.to_yaml(), own=is_own(run)))
        console.print(f"Saved these settings with the run: {escape(str(run / 'recipe.yaml'))}")
        for step in ("prepare", "encode", "select", "adapt", "train"):
            context.begin(step, skipped=True)
        inputs = {"evaluate": evaluation_inputs(plan.recipe, plan.model_ref, rows, examples, run)}
        context.resolved = replace(plan, inputs=inputs)
        run_evaluate(context, loaded)
        for seed in loaded.recipe.train.seeds:
            if is_done(further := seed_folder(run, seed), "train"):
                evaluate_run(with_seed(loaded, seed), further, console, offline=offline, base=run / "evaluation")
        return conclude_run(context, loaded)


def _write_report(context: RunContext, loaded: LoadedRecipe, *, stopped: bool = False) -> Report:
    report = make_report(context.folder, (context.resolved or loaded).recipe, context.device)
    context.folder.note_reports(write_report(report, context.folder.path))
    if stopped:  # products are missing, so gates that passed do not decide
        print_verdict(report.verdict, report.gates, context.console)
    if stopped and not all(gate.passed for gate in report.gates):
        note_gates(context.folder, context.plan.recipe, report.gates)
    return report


def conclude_run(context: RunContext, loaded: LoadedRecipe) -> Json:
    """Write the report, print the verdict, log it to trackers; raise GateFailed or return the report, in rank 0."""
    report: Json = {}
    context.once(lambda: report.update(_conclude(context, loaded)))
    return report


def _conclude(context: RunContext, loaded: LoadedRecipe) -> Json:
    path, console, request = context.folder.path, context.console, context.request
    report = _write_report(context, loaded)
    print_seeds(report.seeds, console)
    if request.until in UNTIL:
        note_gates(context.folder, context.plan.recipe, report.gates)
    if request.until in {"run", "evaluate"}:
        if "evaluate" in context.folder.ran:
            log_results(report, context.plan.recipe.train.report_to, path, context.device, offline=request.offline)
        print_verdict(report.verdict, report.gates, console)
        context.folder.note(next_steps=next_steps(path, context.plan.task, context.rows))
        console.print(context.folder.findings["next_steps"], highlight=False, markup=False, soft_wrap=True)
        conclude_release(context, report.gates)
        report = _write_report(context, loaded) if report.release != context.folder.findings.get("release") else report
        require_gates(report.gates, report_json(report), list_failed(path / "evaluation"))
    return report_json(report)
