"""The plan of a run, made by `resolve` once rows and model are known; `open_finished` opens a finished run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llmtune import __version__
from llmtune.adapter.injection import adapter_inputs, adapter_settings
from llmtune.adapter.load import find_adapter
from llmtune.data.examples import load_examples, row_lengths
from llmtune.data.preparation import rows_inputs
from llmtune.data.row_store import load_rows, rows_folder
from llmtune.data.sources import hash_sources, list_sources
from llmtune.display.console import phase
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.cache_keys import evaluation_inputs, hash_evaluation
from llmtune.evaluate.rewards import hash_reward_files
from llmtune.evaluate.suites.judge_client import host
from llmtune.evaluate.suites.suite_registry import check_inputs, check_variant
from llmtune.model.config import read_model_config
from llmtune.model.device import describe_device, pick_device
from llmtune.model.kernels import check_kernels
from llmtune.model.memory_plan import check_context, check_memory, context_length, plan_training, resolve_checkpointing
from llmtune.model.model_files import check_model_folder
from llmtune.model.processor import load_processor
from llmtune.model.quantized_base import kept_quantization
from llmtune.model.resolve import resolve_model
from llmtune.model.teacher_files import find_teacher, teacher_inputs
from llmtune.recipe.extras import find_missing_extras
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import Recipe, find_idle_keys
from llmtune.recipe.training_rule import choose_training, few_steps, with_choices, with_length
from llmtune.recipe.user_files import read_text_file
from llmtune.records import ALONE, Examples, Json, Layout, ModelRef, Rows
from llmtune.store.atomic_files import hash_value
from llmtune.store.process_environment import refuse_network
from llmtune.store.processes import layout, once, world_size
from llmtune.store.release_store import SERVED_RECIPE, TEMPLATE, check_store, find_source, is_stored
from llmtune.store.run_folder import RunFolder, StepRun, read_run, recipe_of_run, trained_name
from llmtune.store.run_lock import LOCK, Pins, SourceRecord, check_pin, own_pins, read_pins, write_lock
from llmtune.store.run_origin import list_model_code, name_code, save_recipe
from llmtune.store.run_request import RunRequest
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import choose_variant, get_task
from llmtune.train.setup import train_inputs

T = TypeVar("T")
SHARDED = ("full", "lora", "qlora")
"""Methods whose finished runs are opened sharded under `--strategy fsdp`; others are opened completely."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run: made once, as soon as its rows and its model are known, and never changed."""

    recipe: Recipe
    """The recipe with all open settings resolved: class names, epochs, rate and batch, length, checkpointing."""
    stated: Recipe
    """The recipe as in recipe.yaml, without what is inferred from the rows. Runs are compared by it."""
    task: AnyTask
    model_ref: ModelRef
    device: str
    layout: Layout
    open_processor: Callable[[], PreTrainedTokenizerBase] = field(compare=False)
    """Returns the processor, which its first call loads."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hash of the inputs of each step; the evaluation also depends on the trained weights."""

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, configured by the recipe; all steps share it, so do not change it."""
        return self.open_processor()


@dataclass
class RunContext:
    """A run in progress: its folder, its console and its plan. The request says after which step it ends."""

    folder: RunFolder
    console: Console
    request: RunRequest
    resolved: Plan | None = None
    """None until rows and model are known."""

    @property
    def plan(self) -> Plan:
        """The plan of the run, once it is resolved."""
        assert self.resolved is not None, "rows and model are known by now"
        return self.resolved

    @property
    def rows(self) -> Rows:
        """The prepared rows; with mined negatives if the recipe mines some, and once they are known."""
        return load_rows(rows_folder(find_source(self.folder.path)))

    @property
    def examples(self) -> Examples:
        """The encoded rows."""
        return load_examples(find_source(self.folder.path) / "data" / "examples")

    @property
    def device(self) -> str:
        """The device: cuda, mps or cpu; in a dry run the card that it plans for."""
        return self.request.device or pick_device()

    @property
    def shards(self) -> bool:
        """Whether each process trains a shard of the model."""
        return world_size() > 1 and self.plan.layout.sharded

    @property
    def trained_folder(self) -> Path:
        """The subfolder with the trained adapter or weights."""
        return self.folder.path / trained_name(self.plan.recipe)

    @contextmanager
    def step(self, name: str, inputs: str, outputs: Sequence[str] = (), *, always: bool = False) -> Iterator[StepRun]:
        """Print a step's name, and skip the step if nothing changed; see `RunFolder.step`."""
        begin = partial(self.begin, name)
        with phase(self.console, name), self.folder.step(name, inputs, outputs, always=always, on_begin=begin) as step:
            yield step

    def begin(self, step: str, skipped: bool = False) -> None:
        """Print the name of a step, and whether it is skipped."""
        self.console.print(f"[bold cyan]{step}[/]{' [dim]unchanged, skipped[/]' if skipped else ''}")

    def once(self, work: Callable[[], T]) -> T:
        """Do `work` in rank 0 only; all processes get its result and the updated manifest."""
        value, self.folder.manifest = once(lambda: (work(), self.folder.manifest))
        return value


# Before rows and model are known


def check_first(loaded: LoadedRecipe, request: RunRequest) -> None:
    """Raise the problems of a recipe on this machine that can be found without its rows and without weights."""
    recipe = loaded.recipe
    EnvironmentProblem.collect(find_missing_extras(recipe))
    check_store(recipe.evaluate.champion, loaded.file)
    refuse_network(recipe, offline=request.offline)
    check_kernels(recipe, pick_device())
    check_inputs(recipe)
    if recipe.adapter.start_from is not None:
        find_adapter(Path(recipe.adapter.start_from))
    if recipe.model.name and (folder := Path(recipe.model.name).expanduser()).is_dir():
        check_model_folder(folder, recipe.model)
        find_variant(recipe, ModelRef(recipe.model.name, folder, None, ""))


def find_variant(recipe: Recipe, model_ref: ModelRef) -> AnyTask:
    """Return the variant of the task that a model supports; raises RecipeError if it supports none."""
    variant = choose_variant(recipe, read_model_config(model_ref, recipe.model), model_ref.name)
    check_variant(recipe, variant, model_ref.name)
    return variant


def rows_hash(run: RunContext, recipe: Recipe) -> str:
    """Hash the inputs of the rows; raises EnvironmentProblem if the request's lock names other data."""
    if run.request.pins is not None:
        check_pin("the data's content", run.request.pins.data_hash, hash_sources(recipe.data, recipe.task))
    return rows_inputs(recipe)


def locate_pinned(run: RunContext, model: ModelSection, name: str) -> ModelRef:
    """Find a model at the commit in a lock: that of the request, else the run's own.

    Raises EnvironmentProblem if the model is not found, or its content differs from the request's lock.
    """
    required, console, offline = run.request.pins, run.console, run.request.offline
    pins = required or (None if run.request.fresh else own_pins(run.folder.path))
    if pins is None or pins.model != name:
        return resolve_model(name, model, console, offline)
    if pins.revision:
        model = model.model_copy(update={"revision": pins.revision})
    model_ref = resolve_model(name, model, console, offline)
    if required is not None:
        check_pin("the model's content", pins.model_hash, model_ref.content_hash)
    return model_ref


# The plan


def make_plan(
    recipe: Recipe, model_ref: ModelRef, device: str, layout: Layout = ALONE, rows: Rows | None = None
) -> Plan:
    """Return the plan of a recipe whose settings are stated; `rows` give class names and the like.

    Raises RecipeError or DataError if model, rows and recipe do not fit together.
    """
    stated, recipe = recipe, get_task(recipe.task).infer_section(recipe, rows)
    task = find_variant(recipe, model_ref)
    if rows is not None:
        recipe = task.infer_labels(recipe, rows, read_model_config(model_ref, recipe.model))
    processor = cache(partial(load_processor, model_ref, recipe.model, recipe.data.system_prompt))
    return Plan(recipe, stated, task, model_ref, device, layout, processor)


def resolve(
    loaded: LoadedRecipe, run: RunContext, model_ref: ModelRef, encode: Callable[[RunContext, Plan], None]
) -> Plan:
    """Resolve everything that a recipe leaves open, now that rows and model are known; in all processes.

    Prints the choices and saves the recipe with them. `encode` encodes the rows by the plan so far, in rank 0.

    Raises RecipeError or DataError if model, rows and recipe do not fit together.
    """
    draft, settled = choose_settings(loaded, run, model_ref, run.rows)

    def save_and_encode() -> Json | None:
        save_recipe(run.folder.path, settled.to_yaml())
        encode(run, draft)  # no step after `prepare` needs the rest
        return None if run.request.until == "prepare" else decide_rest(run, draft, run.rows, run.examples)

    decided = run.once(save_and_encode)
    return finish_plan(draft, decided) if decided else draft


def choose_settings(
    loaded: LoadedRecipe, run: RunContext, model_ref: ModelRef, rows: Rows
) -> tuple[Plan, LoadedRecipe]:
    """Choose the settings that depend on rows and model, and print them; return the plan so far and the recipe.

    The recipe does not state class names and the like, which are inferred each time.
    """
    console = run.console
    plan = make_plan(loaded.recipe, model_ref, run.device, run.request.layout or layout(), rows)
    recipe, task = plan.recipe, plan.task
    RecipeError.collect(find_idle_keys(recipe, task.model_kind, task.style))
    if note := task.note_labels(loaded.recipe, recipe):
        console.print(note, highlight=False)
    text, count = read_model_config(model_ref, recipe.model).get_text_config(), rows.counts.get("train", 0)
    choices = choose_training(recipe, count, getattr(text, "hidden_size", None), task.model_kind.has_head)
    loaded = with_choices(loaded, choices)
    positions = context_length(text)
    reach = None if positions is None else positions - recipe.adapter.virtual_tokens
    if recipe.model.candidates and reach is not None and reach < recipe.data.max_length:
        loaded = with_length(loaded, reach, model_ref.name)
        console.print(f"data.max_length: {reach} (chosen: the context of {model_ref.name})", highlight=False)
    recipe = recipe.model_copy(update={"train": loaded.recipe.train, "data": loaded.recipe.data})
    for key, choice in choices.items():
        console.print(f"train.{key}: {choice}", highlight=False)
    if warning := few_steps(recipe, count):
        console.print(warning, style="yellow", highlight=False)
    return replace(plan, recipe=recipe, stated=loaded.recipe), loaded


def decide_rest(run: RunContext, draft: Plan, rows: Rows, examples: Examples) -> Json:
    """Resolve what depends on the encoded rows: checkpointing, and the input hash of each step."""
    adapted = adapter_inputs(draft.recipe, draft.model_ref, examples)
    evaluated = evaluation_inputs(draft.recipe, draft.model_ref, rows, examples, run.folder.path)
    teacher = find_teacher(draft.recipe, run.console, run.request.offline, run.request.pins)
    taught = teacher_inputs(draft.recipe, examples, teacher)
    inputs = {"adapt": adapted, "train": train_inputs(draft.recipe, rows, adapted, taught), "evaluate": evaluated}
    inputs |= {"teach": taught} if taught else {}
    return {"checkpointing": decide_checkpointing(run, draft, max(examples.longest.values())), "inputs": inputs}


def finish_plan(draft: Plan, decided: Json) -> Plan:
    """Return the plan made of a draft and the result of `decide_rest`."""
    train = draft.recipe.train.model_copy(update={"gradient_checkpointing": decided["checkpointing"]})
    return replace(draft, recipe=draft.recipe.model_copy(update={"train": train}), inputs=decided["inputs"])


def decide_checkpointing(run: RunContext, draft: Plan, longest: int) -> bool:
    """Decide `gradient_checkpointing: auto`; `longest` is the longest row in tokens.

    The run's findings keep the decision as long as its inputs are the same. A run that resumes with more or less
    memory therefore continues as it began.
    """
    recipe, findings = draft.recipe, run.folder.findings
    if recipe.train.gradient_checkpointing != "auto":
        return recipe.train.gradient_checkpointing
    inputs = hash_value([draft.model_ref.content_hash, longest, adapter_settings(recipe), recipe.train.optim])
    decision = findings.get("gradient_checkpointing")
    if decision is None or decision["inputs"] != inputs:
        on = resolve_checkpointing(draft.model_ref, recipe, draft.task, longest, draft.device, draft.layout)
        findings["gradient_checkpointing"] = decision = {"inputs": inputs, "on": on}
    if decision["on"]:
        why = f"because the longest row ({longest:,} tokens) does not fit into the memory of {draft.device} otherwise."
        what = "train.gradient_checkpointing: auto recomputes activations in the backward pass"
        run.console.print(f"{what}, {why}", highlight=False)
    return bool(decision["on"])


def evaluation_hash(run: RunContext) -> str:
    """Hash the inputs of the scores, including the trained weights and the scores of a control run."""
    return hash_evaluation(run.plan.inputs["evaluate"], run.trained_folder, run.plan.recipe)


def select_step(run: RunContext) -> None:
    """Check the model's context length and the device's memory.

    Raises DataError if a row is longer than the context, EnvironmentProblem if the memory cannot train the model.
    """
    plan, examples = run.plan, run.examples
    recipe, model_ref, longest = plan.recipe, plan.model_ref, max(examples.longest.values())
    check_context(model_ref, recipe, plan.task, max(examples.reach.values()))
    memory = plan_training(model_ref, recipe, plan.task, longest, plan.device, row_lengths(examples), plan.layout)
    settings = [recipe.model.model_dump(mode="json"), adapter_settings(recipe), recipe.train.optim, asdict(memory)]
    with run.step("select", hash_value([__version__, model_ref.content_hash, settings])) as step:
        if not step.skipped:
            check_memory(memory, recipe, run.console)
            step.facts.update(
                name=model_ref.name,
                revision=model_ref.revision,
                sha256=model_ref.content_hash,
                ranking=run.folder.findings.get("ranking", {}).get("ranking"),
                plan={**asdict(memory), "total": memory.total},
                gradient_checkpointing=recipe.train.gradient_checkpointing,
            )


def begin_training(run: RunContext) -> bool:
    """Discard the results of an earlier training and write the lock; return False if this training is already done."""
    folder, inputs = run.folder, run.plan.inputs["train"]
    if folder.is_valid("train", inputs):
        run.begin("adapt", skipped=True)
        run.begin("train", skipped=True)
        return False
    folder.begin_training()
    if (trained := folder.manifest["steps"].get("train")) is None or trained["inputs"] != inputs:
        tokens = folder.facts("select")["plan"]["tokens"]
        folder.findings["micro_batch_tokens"] = run.request.findings.get("micro_batch_tokens", tokens)
        shutil.rmtree(folder.path / "explain", ignore_errors=True)  # from an earlier training too
    folder.findings["start_from"] = adapter_settings(run.plan.recipe)[-1]
    folder.write()
    lock_run(run)
    return True


def lock_run(run: RunContext) -> None:
    """Write llmtune.lock with all inputs of training, file by file."""
    plan, recipe, model_ref = run.plan, run.plan.recipe, run.plan.model_ref
    miner = recipe.data.negatives and recipe.data.negatives.model
    data_hash, files = list_sources(recipe.data, recipe.task)
    write_lock(
        run.folder.path,
        Pins(model_ref.name, model_ref.revision, model_ref.content_hash, data_hash),
        fingerprint=run.folder.manifest["fingerprint"],
        template_hash=hash_value(plan.processor.chat_template),
        seed=recipe.seed,
        threads=torch.get_num_threads(),
        model=model_ref.path,
        sources=cast(list[SourceRecord], [one.record for one in files]),
        start_from=find_adapter(Path(start)) if (start := recipe.adapter.start_from) else None,
        device=describe_device(plan.device),
        judge={"model": judge.model, "host": host(judge)} if (judge := recipe.evaluate.judge) else None,
        miner=resolve_model(miner, recipe.model, run.console, run.request.offline) if miner else None,
        teacher=find_teacher(recipe, run.console, run.request.offline),
        rewards=hash_reward_files(recipe.variant.rewards),
    )


# A finished run


def open_finished(run: Path, console: Console, offline: bool, recipe: Recipe | None = None) -> RunContext:
    """Open a trained run or a release, to use its model; `recipe` replaces the run's own.

    Raises RecipeError if it is not a trained run, EnvironmentProblem if its base model is missing or was changed.
    """
    folder = read_run(run)
    folder.require_trained()
    served = read_served_recipe(run)
    pins, recipe = read_pins(run / LOCK), recipe or served or recipe_of_run(folder).recipe
    name_code(run, list_model_code(recipe), console)
    context = RunContext(folder, console, RunRequest(out=run, offline=offline, pins=pins))
    model_ref = locate_pinned(context, recipe.model, pins.model)
    shards = recipe.adapter.method in SHARDED and kept_quantization(read_model_config(model_ref, recipe.model)) is None
    rows = None if served else context.rows
    context.resolved = make_plan(recipe, model_ref, context.device, layout() if shards else ALONE, rows)
    return context


def read_served_recipe(folder: Path) -> Recipe | None:
    """Return the resolved recipe of a release; None for a run. Raises EnvironmentProblem if it is damaged."""
    if not is_stored(folder):
        return None
    try:
        recipe = Recipe.model_validate_json(read_text_file(folder / SERVED_RECIPE))
    except (OSError, ValueError) as error:
        what = "files of this release are missing, or from another version of llmtune"
        raise EnvironmentProblem.of(what, str(folder / SERVED_RECIPE), "Release its run again.") from error
    template = folder.absolute() / TEMPLATE
    model = recipe.model.model_copy(update={"chat_template": str(template)} if template.is_file() else {})
    return recipe.model_copy(update={"model": model})
