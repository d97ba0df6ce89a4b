"""A run: its five steps in order, then products, seeds and the report. Read this first.

    prepare    read, check, deduplicate and split the rows, and encode them for the model
    select     choose the model, or take the named one, and plan its memory
    adapt      add an adapter to the model and prove that it takes effect
    train      train the adapter, with checkpoints
    evaluate   score base and tuned model on the same held-out rows

`plan_run` prepares the rows, chooses the model and makes the plan, which never changes. The table `STEPS` is the rest:
a step reads `run.plan`, and is skipped if neither its inputs nor its outputs changed. It stores facts in run.json, and
the report is written from the run folder. All processes run this file; the table names the steps of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from llmtune import __version__, run_models, vllm_models
from llmtune.adapter.injection import describe_adapter
from llmtune.data.data_report import describe_examples
from llmtune.data.examples import ExampleReader, encode_rows, examples_inputs
from llmtune.data.preparation import has_rows, prepare_rows
from llmtune.data.row_store import iterate_full_rows, load_rows
from llmtune.deploy.products import check_products, make_products, reporting
from llmtune.deploy.release_folder import conclude_release, release_kept
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.cache_keys import evaluation_inputs, lock_trained, note_own_metrics
from llmtune.evaluate.champion import check_champion, note_look
from llmtune.evaluate.control_runs import find_control_scores
from llmtune.evaluate.decision import refresh_rules
from llmtune.evaluate.eval_inputs import warn_of_cuts
from llmtune.evaluate.evaluation_file import list_failed, load_evaluation
from llmtune.evaluate.gates import note_gates, require_gates
from llmtune.evaluate.suites.suite_registry import try_inputs
from llmtune.inner_runs import run_control, run_seeds
from llmtune.mining import mine_step, survey_step
from llmtune.model.catalogue import candidate_names
from llmtune.model.device import release_memory
from llmtune.model.model_trials import choose_candidate, known_or_ranked
from llmtune.plan import (
    Plan,
    RunContext,
    begin_training,
    check_first,
    find_variant,
    locate_pinned,
    open_finished,
    resolve,
    rows_hash,
    select_step,
)
from llmtune.recipe.extras import find_missing_extras
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import Recipe
from llmtune.records import UNTIL, Json, ModelRef, Until, read_model_ref
from llmtune.report.report_page import report_json, write_report
from llmtune.report.run_report import list_remedies, make_report
from llmtune.report.terminal import print_scored, print_scores, print_seeds, print_verdict
from llmtune.store.atomic_files import hash_folder, plain, staged
from llmtune.store.processes import once, rank, world_size
from llmtune.store.report_record import Report
from llmtune.store.run_folder import Manifest, RunFolder, open_run, trained_name
from llmtune.store.run_listing import find_start, pin_start
from llmtune.store.run_lock import hash_keys, read_pins
from llmtune.store.run_origin import is_own, save_recipe
from llmtune.store.run_request import RunRequest
from llmtune.store.seed_runs import SEEDS_UNTIL, control_folder, is_done, scored_as, seed_folder, share_rows, with_seed
from llmtune.tasks import base, registry
from llmtune.tasks.reward_rules import check_rewarded_rows
from llmtune.train.loop import train
from llmtune.train.metrics_log import log_results
from llmtune.train.row_losses import list_hardest


@dataclass(frozen=True)
class Step:
    """A part of a run, which reads `run.plan`."""

    until: Until
    """The value of `RunRequest.until` that ends the run after the steps that have it."""
    work: Callable[[RunContext], None]
    processes: Literal["rank 0", "all"]
    """Who runs it; the others wait for rank 0."""


def run_pipeline(loaded: LoadedRecipe, request: RunRequest, console: Console) -> Json:
    """Run a recipe as far as `request.until`; return the content of report.json in rank 0.

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
        run = RunContext(RunFolder(path, manifest), console, request)
        run.resolved = plan_run(run, loaded)
        last = UNTIL.index(request.until) + 1
        run_steps(run, UNTIL[: min(last, SCORING)])
        run_control(run, loaded, run_pipeline)
        run_steps(run, UNTIL[SCORING:last])
        recipe = run.resolved.recipe if run.resolved else loaded.recipe
        if loaded.recipe.train.seeds and request.until in SEEDS_UNTIL:
            run.once(lambda: _write_report(run, recipe))  # in case a further seed is stopped
            run_seeds(run, loaded, run_pipeline)
        return conclude_run(run, recipe)


def _begin(stack: ExitStack, path: Path, loaded: LoadedRecipe, request: RunRequest, console: Console) -> Manifest:
    folder = stack.enter_context(open_run(path, loaded.fingerprint, resume=request.resume, fresh=request.fresh))
    console.print(f"[bold]llmtune {__version__}[/] {escape(loaded.recipe.name)} -> {escape(request.place)}")
    save_recipe(path, loaded.to_yaml())
    folder.findings.update(request.findings)
    return folder.manifest


def run_steps(run: RunContext, until: Sequence[Until]) -> None:
    """Run the steps of the table that have one of these values of `until`, in all processes."""
    for step in STEPS:
        if step.until in until and step.processes == "rank 0":
            run.once(partial(step.work, run))
        elif step.until in until:
            step.work(run)


# The plan: rows, then the model, then everything that the recipe left open


def plan_run(run: RunContext, loaded: LoadedRecipe) -> Plan | None:
    """Prepare the rows, choose the model, mine negatives, and resolve the recipe; in all processes.

    Returns None if the run ends with the rows, and no model is chosen for them yet.
    """
    run.once(lambda: prepare_step(run, loaded.recipe))
    if loaded.recipe.model.name is None and run.request.until == "prepare":
        return None
    name = loaded.recipe.model.name or best_candidate(run, loaded)
    model_ref = read_model_ref(run.once(lambda: plain(_find_model(run, loaded.recipe, name))))
    return resolve(loaded, run, model_ref, encode_step)


def _find_model(run: RunContext, recipe: Recipe, name: str) -> ModelRef:
    """Find the files of the chosen model, and mine negatives with it, after which the rows are complete."""
    model_ref = locate_pinned(run, recipe.model, name)
    mine_step(run, recipe, model_ref)
    return model_ref


def prepare_step(run: RunContext, recipe: Recipe) -> None:
    """Read, check, deduplicate and split the rows, in rank 0."""
    inputs, target = rows_hash(run, recipe), run.folder.path / "data" / "rows"
    with run.step("prepare", inputs, ["data/rows"]) as step:
        if not step.skipped:
            with staged(target) as folder:
                made = prepare_rows(recipe, folder, run.console, inputs)
                if not has_rows(target, made.content_hash):
                    run.folder.refuse_released()
                    run_models.drop_answers(run.folder.path)
            step.facts.update(made.as_facts())
    if recipe.variant.rewards:
        rows = load_rows(target)
        check_rewarded_rows(recipe, (pair for split in rows.files for pair in iterate_full_rows(rows, split)))


def best_candidate(run: RunContext, loaded: LoadedRecipe) -> str:
    """Return the name of the best candidate, from the lock or an earlier ranking, else by ranking and trials."""
    recipe, request, console = loaded.recipe, run.request, run.console
    if request.pins is not None and request.pins.model in candidate_names(recipe):
        return request.pins.model

    def run_trial(trial: LoadedRecipe, out: Path) -> None:
        run.once(lambda: share_rows(run.folder, out, trial.fingerprint))
        run_pipeline(trial, RunRequest(out=out, until="train", offline=request.offline), console)

    recipe = registry.get_task(recipe.task).infer_section(recipe, rows := load_rows(run.folder.path / "data" / "rows"))
    choose = partial(find_variant, recipe)
    ranked = run.once(lambda: known_or_ranked(recipe, choose, rows, console, run.folder, run.device, request.offline))
    return ranked["chosen"] or choose_candidate(loaded, ranked, run.folder, console, run_trial, run.once)


def encode_step(run: RunContext, plan: Plan) -> None:
    """Encode, mask and pack the rows for the model, in rank 0."""
    if run.request.until == "run":
        check_products(plan)  # before training, not after it
    run_models.answer_step(replace(run, resolved=plan))
    rows, processor, recipe, task = run.rows, plan.processor, plan.recipe, plan.task
    inputs = examples_inputs(recipe, rows, plan.model_ref, processor, task.example_type)
    with run.step("encode", inputs, ["data/examples"]) as step:
        if not step.skipped:
            with staged(run.folder.path / "data" / "examples") as folder:
                made = encode_rows(rows, task, processor, recipe, folder, run.console)
                described = describe_examples(rows, made, processor, run.console, task, recipe)
            step.facts.update(described)
    warn_of_cuts(rows, run.examples, task, processor, recipe, run.console)


# The steps of the table


def adapt_step(run: RunContext) -> None:
    """Add the adapter, for `llmtune adapt`. A longer run adapts in `train_step`, from the same seed."""
    if run.request.until != "adapt":
        return
    with run.step("adapt", run.plan.inputs["adapt"]) as step:
        if not step.skipped:
            step.facts.update(describe_adapter(run_models.make_adapted(run)))


def check_step(run: RunContext) -> None:
    """Check before hours of training that the run can be evaluated, and its new labels against the champion's."""
    if run.request.until != "train" and not run.folder.is_done("train"):
        run.once(lambda: _check_evaluation(run))
        run_models.check_new_labels(run)


def _check_evaluation(run: RunContext) -> None:
    ask = partial(run_models.ask_champion_classes, run)
    check_champion(run.plan.stated, run.folder, run.rows, run.examples, run.console, ask)
    try_inputs(run.plan.recipe, run.plan.task, run.rows, run.console)


def train_step(run: RunContext) -> None:
    """Adapt and train; resume from the last checkpoint if the inputs are the same."""
    if run.once(lambda: begin_training(run)):
        adapt_and_train(run)


def adapt_and_train(run: RunContext) -> None:
    """Add the adapter and train it, as two steps, in all processes."""
    plan, folder = run.plan, run.folder
    with run.step("adapt", plan.inputs["adapt"], always=True) as step:
        adapted = run_models.make_adapted(run)
        step.facts.update(describe_adapter(adapted))
    with run.step("train", plan.inputs["train"], [trained_name(plan.recipe)], always=True) as step:
        trained = train(
            *(adapted, run.examples, plan.task, plan.recipe, folder.path, run.console),
            budget=folder.findings["micro_batch_tokens"],
            on_budget=folder.note_budget if rank() == 0 or run.shards else lambda tokens: None,
            inputs=plan.inputs["train"],
            sharded=run.shards,
        )
        hardest = run.once(lambda: list_hardest(folder.path, run.rows, run.examples, plan.task))
        step.facts.update(trained.as_facts(), hardest_rows=hardest)
        step.facts.update(processes=world_size(), strategy="fsdp" if run.shards else "ddp")
    del adapted
    release_memory()  # evaluation loads its own model


def lock_step(run: RunContext) -> None:
    """Write the hashes of the trained files to the lock."""
    lock_trained(run.folder, trained_name(run.plan.recipe))


def evaluate_step(run: RunContext) -> None:
    """Score base and tuned model on the same held-out rows."""
    target = run.folder.path / "evaluation"
    earlier = target if run.folder.is_whole("evaluate") else None  # with answers of the base
    begun = run.once(lambda: _begin_evaluation(run))
    with run.step("evaluate", begun["inputs"], ["evaluation"], always=not begun["unchanged"]) as step:
        if step.skipped:
            if evaluation := load_evaluation(target):
                print_scores(evaluation, run.console, run.plan.recipe.task)
            return
        with staged(target) if rank() == 0 else nullcontext() as folder:
            folders = run.request.base, earlier, find_control_scores(run.plan.recipe, run.folder.path)
            scored = run_models.score_models(run, folder, folders)
            print_scored(scored, run.plan.recipe, run.console)
            run_models.save_label_errors(run, folder)
        judged = hash_keys(run.folder.path / "recipe.yaml", judging=True)
        step.facts.update(trained=run.once(lambda: hash_folder(run.trained_folder)), recipe=judged)


def _begin_evaluation(run: RunContext) -> Json:
    """Count the look at the scores; return the hash of their inputs, and whether scores of these inputs are there."""
    inputs = vllm_models.hash_scores(run)
    note_look(run.plan.stated, run.folder, run.console)
    unchanged = run.folder.is_valid("evaluate", inputs) and not list_failed(run.folder.path / "evaluation")
    if not unchanged:
        run.folder.note(gates=None)
    return {"inputs": inputs, "unchanged": unchanged}


def rules_step(run: RunContext) -> None:
    """Note what new scores depend on, and copy the rules of decision that they gave to the model."""
    if "evaluate" in run.folder.ran:
        note_own_metrics(run.folder, run.plan.recipe)
        refresh_rules(run.folder, run.trained_folder, run.console)


def deploy_step(run: RunContext) -> None:
    """Make the products that the recipe names, each verified against the trained model."""
    if run.plan.recipe.exports:
        begun, stopped = (partial(_write_report, run, run.plan.recipe, stopped=one) for one in (False, True))
        reporting(stopped, lambda: release_kept(partial(make_products, on_begin=begun), run))


STEPS = (
    Step("select", select_step, "rank 0"),
    Step("select", survey_step, "rank 0"),
    Step("adapt", adapt_step, "rank 0"),
    Step("train", check_step, "all"),
    Step("train", run_models.record_step, "all"),
    Step("train", train_step, "all"),
    Step("train", lock_step, "rank 0"),
    Step("evaluate", evaluate_step, "all"),
    Step("evaluate", rules_step, "rank 0"),
    Step("run", deploy_step, "rank 0"),
)
"""The steps of a run once its plan is made."""
SCORING = UNTIL.index("evaluate")
"""Where the steps begin that need the scores of a control run."""


# A finished run


def evaluate_run(
    loaded: LoadedRecipe, path: Path, console: Console, *, offline: bool, base: Path | None = None, engine: str = "own"
) -> Json:
    """Score a finished run again, with the settings of `loaded`; nothing is read, encoded or trained again.

    `base` and `engine` are those of `RunRequest`. Trained control runs and runs of further seeds are scored again too.
    """
    EnvironmentProblem.collect(find_missing_extras(loaded.recipe))
    with ExitStack() as stack:
        folder = RunFolder(path, once(lambda: stack.enter_context(open_run(path, loaded.fingerprint)).manifest))
        request = RunRequest(out=path, until="evaluate", offline=offline, base=base, engine=engine)
        run = replace(open_finished(path, console, offline, loaded.recipe), folder=folder, request=request)
        plan, rows, examples = run.plan, run.rows, run.examples
        if examples.counts.get("test"):
            ExampleReader(examples, "test")  # raises before the folder changes
        vllm_models.check_engine(run, scores=True)
        run.once(lambda: _check_evaluation(run))
        is_same = path.joinpath("recipe.yaml").read_text(encoding="utf-8") == loaded.to_yaml()
        run.once(lambda: save_recipe(path, loaded.to_yaml(), mark=is_own(path)))
        if not is_same:
            console.print(f"Saved these settings with the run: {escape(str(path / 'recipe.yaml'))}")
        for step in ("prepare", "encode", "select", "adapt", "train"):
            run.begin(step, skipped=True)
        inputs = {"evaluate": evaluation_inputs(plan.recipe, plan.model_ref, rows, examples, path)}
        run.resolved = replace(plan, inputs=inputs)
        again = partial(evaluate_run, console=console, offline=offline, base=base or path / "evaluation", engine=engine)
        control = loaded.recipe.control_run
        if control and control.on and is_done(further := control_folder(path, control), "train"):
            again(scored_as(further, loaded), further)
        run_steps(run, ["evaluate"])
        for seed in loaded.recipe.train.seeds:
            if is_done(further := seed_folder(path, seed), "train"):
                again(with_seed(loaded, seed), further)
        return conclude_run(run, plan.recipe)


# The report


def _write_report(run: RunContext, recipe: Recipe, *, stopped: bool = False) -> Report:
    report = make_report(run.folder, recipe, run.device)
    run.folder.note_reports(write_report(report, run.folder.path))
    if stopped:  # products are missing, so gates that passed do not decide
        print_verdict(report.verdict, report.gates, run.console)
    if stopped and not all(gate.passed for gate in report.gates):
        note_gates(run.folder, recipe, report.gates)
    return report


def conclude_run(run: RunContext, recipe: Recipe) -> Json:
    """Write the report, print the verdict, log it to trackers; raise GateFailed or return the report, in rank 0."""
    report: Json = {}
    run.once(lambda: report.update(_conclude(run, recipe)))
    return report


def _conclude(run: RunContext, recipe: Recipe) -> Json:
    path, console, request = run.folder.path, run.console, run.request
    report = _write_report(run, recipe)
    print_seeds(report.seeds, console)
    if request.until in SEEDS_UNTIL:
        note_gates(run.folder, recipe, report.gates)
    if request.until in {"run", "evaluate"}:
        if "evaluate" in run.folder.ran:
            log_results(report, recipe.train.report_to, path, run.device, offline=request.offline)
        print_verdict(report.verdict, report.gates, console)
        run.folder.note(next_steps=base.next_steps(path, run.plan.task, run.rows, list_remedies(report, recipe, path)))
        console.print(run.folder.findings["next_steps"], highlight=False, markup=False, soft_wrap=True)
        conclude_release(run, report.gates)
        report = _write_report(run, recipe) if report.release != run.folder.findings.get("release") else report
        require_gates(report.gates, report_json(report), list_failed(path / "evaluation"))
    return report_json(report)
