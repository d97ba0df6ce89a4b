"""The five steps in order: prepare, select, adapt, train, evaluate, and what comes after them. Read this first.

Each step is skipped when nothing that it depends on changed, and says which of the two it did. What a step found out
is kept as facts in the manifest, so that the report can be written from the run folder alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.adapter import describe, inject
from llmtune.data import hash_sources, load_rows, prepare_rows
from llmtune.data.examples import encode_rows, load_examples
from llmtune.data.report import describe_examples
from llmtune.errors import GateFailed, Problem
from llmtune.evaluate import check_gates, evaluate, load_evaluation, save_evaluation
from llmtune.finished import Models, merge
from llmtune.model import check_memory, load_model, load_processor, locate, micro_batch_tokens, pick_device, plan_memory
from llmtune.model.rank import rank_candidates
from llmtune.recipe import LoadedRecipe, Recipe
from llmtune.records import AdaptedModel, Evaluation, Examples, MemoryPlan, ModelPlace, Rows, TrainedRun
from llmtune.report import write_report
from llmtune.report.assemble import assemble
from llmtune.run.files import hash_folder, hash_value, read_json, staged, write_text
from llmtune.run.folder import RunFolder, default_path, open_run
from llmtune.run.lock import Pins, check_pins, hardware, own_pins, package_versions, read_pins, write_lock
from llmtune.tasks import get_task
from llmtune.train import train
from llmtune.work import Options, Work, adapter_folder, locate_pinned, trained_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Trainer = Callable[[Work, ModelPlace, Examples, str], None]
"""Runs adapt and train and leaves both steps done in the manifest; the last argument is the hash of their inputs."""


def run_pipeline(
    loaded: LoadedRecipe, options: Options, console: Console, trainer: Trainer | None = None
) -> dict[str, Any]:
    """Run the steps of a recipe up to `options.until`; returns the report as a dictionary.

    Raises:
        LlmtuneError: one of its kinds, for everything that a user can meet; `GateFailed` after the report is written.
    """
    recipe = loaded.recipe
    path = options.out or default_path(recipe.name, loaded.fingerprint)
    if options.dry_run:
        return _dry_run(loaded, path, console, options.offline)
    with open_run(path, loaded.fingerprint, resume=options.resume, fresh=options.fresh) as folder:
        console.print(f"[bold]llmtune {__version__}[/] {escape(recipe.name)} -> {escape(str(path))}")
        write_text(path / "recipe.yaml", loaded.to_yaml())
        pins = read_pins(options.lock) if options.lock else own_pins(path)
        work = Work(recipe, folder, console, options.offline, pins, held=options.lock is not None)
        _run_steps(work, loaded, options, trainer or train_here)
        report = make_report(folder, recipe, work.skipped)
        write_report(report, path)
        if options.until in {"run", "evaluate"}:
            console.print(f"report: {escape(str(path / 'report.html'))}")
            _raise_failed_gates(folder)
        return report


def _run_steps(work: Work, loaded: LoadedRecipe, options: Options, trainer: Trainer) -> None:
    rows = prepare(work)
    if options.until == "prepare" and not work.recipe.model.name:
        return
    place = choose(work, rows)
    _lock(work, loaded, place, options.lock)
    processor = load_processor(place, work.recipe.model)
    examples = encode(work, rows, place, processor)
    if options.until == "prepare":
        return
    plan = select(work, place, examples)
    if options.until == "select":
        return
    inputs = hash_value([place.content_hash, examples.content_hash, work.recipe.seed, _adapter_inputs(work.recipe)])
    if options.until == "adapt":
        adapt(work, place, processor, inputs)
        return
    fit(work, place, examples, plan, inputs, trainer)
    if options.until == "train":
        return
    score(work, place, processor, rows, examples)
    if options.until == "run" and "merged" in work.recipe.deploy:
        deploy(work, place)


def prepare(work: Work) -> Rows:
    """Step 1, first half: read, check, deduplicate and split the rows."""
    data = work.recipe.data
    about_examples = {"max_length", "on_overlong", "packing", "train_on"}
    settings = data.model_dump(mode="json", exclude=about_examples)
    inputs = hash_value([__version__, work.recipe.task, work.recipe.seed, settings, hash_sources(data)])
    target = work.folder.path / "data" / "rows"
    if not work.skip("prepare", inputs):
        with work.folder.step("prepare", inputs, ["data/rows"]) as facts:
            with staged(target) as folder:
                made = prepare_rows(work.recipe, folder, work.console)
            facts |= {"rows_in": made.rows_in, "kept": made.counts, "dropped": made.dropped}
    return load_rows(target)


def choose(work: Work, rows: Rows) -> ModelPlace:
    """Step 2, first half: find the named model, or rank the candidates on the user's own rows and take the best."""
    model = work.recipe.model
    if model.name:
        return locate_pinned(work, model.name)
    assert model.candidates, "a recipe names a model or candidates"
    if work.held and work.pins is not None and work.pins.model in model.candidates:
        return locate_pinned(work, work.pins.model)
    places = [locate(name, model, work.console, work.offline) for name in model.candidates]
    contents = [place.content_hash for place in places]
    inputs = hash_value([rows.content_hash, model.model_dump(mode="json"), contents, work.recipe.data.max_length])
    pinned = work.folder.findings.get("ranking")
    if pinned is None or pinned["inputs"] != inputs:
        folder = work.folder.path / "model"
        ranking = rank_candidates(work.recipe, work.task, rows, work.console, folder, work.device, work.offline)
        pinned = {"inputs": inputs, "chosen": ranking.chosen.name, "ranking": ranking.to_dict()}
        work.folder.note(ranking=pinned)
    return locate_pinned(work, pinned["chosen"])


def encode(work: Work, rows: Rows, place: ModelPlace, processor: PreTrainedTokenizerBase) -> Examples:
    """Step 1, second half: token ids and masks, which depend on the model's tokenizer and template."""
    recipe = work.recipe
    about = recipe.model.model_dump(mode="json", include={"chat_template", "chat_template_kwargs", "add_tokens"})
    settings = recipe.data.model_dump(mode="json", include={"max_length", "on_overlong", "train_on", "max_dropped"})
    template = hash_value(processor.chat_template)
    inputs = hash_value([__version__, rows.content_hash, place.content_hash, about, settings, template, recipe.task])
    target = work.folder.path / "data" / "examples"
    if not work.skip("encode", inputs):
        with work.folder.step("encode", inputs, ["data/examples"]) as facts, staged(target) as folder:
            made = encode_rows(rows, work.task, processor, recipe, folder, work.console)
            facts |= describe_examples(rows, made, processor, work.console)
    return load_examples(target)


def select(work: Work, place: ModelPlace, examples: Examples) -> MemoryPlan:
    """Step 2, second half: the memory plan, before anything heavy."""
    recipe = work.recipe
    longest = max(examples.longest.values())
    settings = [recipe.model.model_dump(mode="json"), _adapter_inputs(recipe), recipe.train.optim, longest]
    inputs = hash_value([__version__, place.content_hash, settings, work.device])
    budget = micro_batch_tokens(plan_memory(place, recipe, work.task, longest, work.device), longest, longest)
    largest = min(budget, longest * (recipe.train.batch_size or budget))
    plan = replace(plan_memory(place, recipe, work.task, largest, work.device), tokens=budget)
    if not work.skip("select", inputs):
        with work.folder.step("select", inputs) as facts:
            check_memory(plan, recipe, work.console)
            ranking = work.folder.findings.get("ranking", {}).get("ranking")
            facts |= {"name": place.name, "revision": place.revision, "sha256": place.content_hash, "ranking": ranking}
            facts |= {"plan": {**asdict(plan), "total": plan.total}}
    return plan


def adapt(work: Work, place: ModelPlace, processor: PreTrainedTokenizerBase, inputs: str) -> AdaptedModel | None:
    """Step 3 alone: put the adapter in, prove it and say what it is; training makes it again from the same seed."""
    if work.skip("adapt", inputs):
        return None
    with work.folder.step("adapt", inputs) as facts:
        adapted = make_adapted(work, place, processor)
        facts |= describe(adapted)
    return adapted


def make_adapted(work: Work, place: ModelPlace, processor: PreTrainedTokenizerBase) -> AdaptedModel:
    """Load the model and put the adapter in, seeded."""
    with work.console.status("loading the model"):
        selected = load_model(place, work.recipe, work.task, processor, device=work.device, training=True)
    return inject(selected, work.recipe, work.console)


def fit(
    work: Work, place: ModelPlace, examples: Examples, plan: MemoryPlan, adapt_inputs: str, trainer: Trainer
) -> None:
    """Steps 3 and 4: adapt and train, going on from the last checkpoint if the inputs are the same."""
    inputs = hash_value(
        [__version__, adapt_inputs, work.recipe.train.model_dump(mode="json"), work.recipe.data.packing]
    )
    before = work.folder.manifest["steps"].get("train", {}).get("inputs")
    if work.folder.is_valid("train", inputs):
        work.begin("adapt", skipped=True)
        work.begin("train", skipped=True)
        return
    if before != inputs:
        _forget_training(work.folder)
    if "micro_batch_tokens" not in work.folder.findings:
        work.folder.note(micro_batch_tokens=plan.tokens)
    work.begin("adapt")
    trainer(work, place, examples, inputs)


def _forget_training(folder: RunFolder) -> None:
    for name in ("checkpoints", "adapter", "weights"):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    (folder.path / "metrics.jsonl").unlink(missing_ok=True)
    folder.findings.pop("micro_batch_tokens", None)


def train_here(work: Work, place: ModelPlace, examples: Examples, inputs: str) -> None:
    """Adapt and train in this process."""
    processor = load_processor(place, work.recipe.model)
    with work.folder.step("adapt", inputs) as facts:
        adapted = make_adapted(work, place, processor)
        facts |= describe(adapted)
    work.begin("train")
    with work.folder.step("train", inputs, [trained_name(work.recipe)]) as facts:
        trained = train(
            adapted,
            examples,
            work.task,
            work.recipe,
            work.folder.path,
            work.console,
            budget=work.folder.findings["micro_batch_tokens"],
            on_budget=lambda tokens: work.folder.note(micro_batch_tokens=tokens),
        )
        facts |= _as_facts(trained)


def _as_facts(trained: TrainedRun) -> dict[str, Any]:
    return {**asdict(trained), "adapter": trained.adapter.name}


def _adapter_inputs(recipe: Recipe) -> list[Any]:
    start = recipe.adapter.start_from
    return [recipe.adapter.model_dump(mode="json"), hash_folder(adapter_folder(Path(start))) if start else None]


def score(work: Work, place: ModelPlace, processor: PreTrainedTokenizerBase, rows: Rows, examples: Examples) -> None:
    """Step 5: base and tuned model on the same held-out rows; gates are read anew each time."""
    recipe = work.recipe
    trained = hash_folder(work.folder.path / trained_name(recipe))
    settings = [recipe.evaluate.model_dump(mode="json", exclude={"gates"}), recipe.generation.model_dump(mode="json")]
    inputs = hash_value([__version__, trained, place.content_hash, examples.content_hash, settings, recipe.seed])
    target = work.folder.path / "evaluation"
    if not work.skip("evaluate", inputs):
        with work.folder.step("evaluate", inputs, ["evaluation"]), staged(target) as folder:
            models = Models(work, place, processor)
            contexts = {"base": models.base, "tuned": models.tuned}
            evaluation = evaluate(
                contexts, processor, rows, examples, work.task, recipe, work.console, device=work.device, folder=folder
            )
            save_evaluation(evaluation, folder)


def deploy(work: Work, place: ModelPlace) -> None:
    """What `run` makes at the end: the merged model, certified."""
    inputs = hash_value([__version__, hash_folder(work.folder.path / trained_name(work.recipe)), place.content_hash])
    if work.skip("deploy", inputs):
        return
    with work.folder.step("deploy", inputs, ["merged"]) as facts:
        facts |= merge(work, place, work.folder.path / "merged", onto=None, dtype="auto")


def make_report(folder: RunFolder, recipe: Recipe, skipped: dict[str, bool]) -> dict[str, Any]:
    """Everything that a run found out, as one dictionary (design: report.json)."""
    curve = _curve(folder.path / "metrics.jsonl")
    evaluation = _evaluation(folder)
    gates = check_gates(recipe.evaluate.gates, evaluation) if evaluation else ()
    timings = folder.timings(skipped)
    return assemble(
        recipe,
        folder.manifest,
        recipe_yaml=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        timings=timings,
        curve=curve,
        evaluation=evaluation,
        gates=gates,
        hardware={**hardware(), "device": pick_device(), "packages": package_versions()},
    )


def _curve(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _evaluation(folder: RunFolder) -> Evaluation | None:
    done = folder.manifest["steps"].get("evaluate", {}).get("state") == "done"
    return load_evaluation(folder.path / "evaluation") if done else None


def _raise_failed_gates(folder: RunFolder) -> None:
    report = read_json(folder.path / "report.json")
    failed = [
        Problem(f"gate failed: wanted {gate['wanted']}, got {gate['got']}", gate["name"])
        for gate in report["gates"]
        if not gate["passed"]
    ]
    GateFailed.collect(failed)


def _lock(work: Work, loaded: LoadedRecipe, place: ModelPlace, held: Path | None) -> None:
    found = Pins(place.name, place.revision, place.content_hash, hash_sources(work.recipe.data))
    if held is not None:
        check_pins(read_pins(held), found, held)
    processor = load_processor(place, work.recipe.model)
    write_lock(
        work.folder.path,
        found,
        fingerprint=loaded.fingerprint,
        template_hash=hash_value(processor.chat_template),
        seed=work.recipe.seed,
        threads=torch.get_num_threads(),
    )


def _dry_run(loaded: LoadedRecipe, path: Path, console: Console, offline: bool) -> dict[str, Any]:
    recipe = loaded.recipe
    sources = hash_sources(recipe.data)
    names = [recipe.model.name] if recipe.model.name else list(recipe.model.candidates or ())
    task, device = get_task(recipe.task), pick_device()
    plans = {}
    for name in names:
        place = locate(name, recipe.model, console, offline)
        load_processor(place, recipe.model)
        plan = plan_memory(place, recipe, task, recipe.data.max_length, device)
        check_memory(plan, recipe, console)
        plans[name] = {**asdict(plan), "total": plan.total}
    console.print(f"good; it would run in {escape(str(path))}")
    return {"folder": str(path), "fingerprint": loaded.fingerprint, "data": sources, "models": plans}
