"""A run in progress: its plan, its folder (RunContext) and its models; `open_finished` opens a finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.data_init import sample_rows
from llmtune.adapter.injection import adapter_settings, inject
from llmtune.adapter.load import find_adapter
from llmtune.adapter.saving import load_adapter
from llmtune.data.examples import load_examples
from llmtune.data.preparation import rows_inputs
from llmtune.data.row_store import load_rows, rows_folder
from llmtune.data.sources import hash_sources, list_sources
from llmtune.display.console import phase, spinner
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.cache_keys import base_inputs, simple_inputs
from llmtune.evaluate.champion import face_champion
from llmtune.evaluate.champion_answers import ChampionModel, ask_champion, ask_classes
from llmtune.evaluate.eval_inputs import EvalContext, calibration_inputs, make_inputs
from llmtune.evaluate.evaluator import ModelLoaders, Scored
from llmtune.evaluate.label_check import check_labels
from llmtune.evaluate.results import SIMPLE, TUNED, load_base
from llmtune.evaluate.scoring import ScoreRequest, score_run
from llmtune.evaluate.simple_baseline import score_simple_baseline
from llmtune.evaluate.suites.judge_client import host
from llmtune.evaluate.suites.label_errors import save_suspects
from llmtune.evaluate.suites.suite_registry import check_variant
from llmtune.model.config import find_class, keeps_float32, read_model_config, why_headless
from llmtune.model.device import describe_device, loading_device, pick_device
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.quantized_base import kept_quantization
from llmtune.model.resolve import resolve_model
from llmtune.recipe.adapter_section import DATA_STARTS
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.user_files import read_text_file
from llmtune.records import ALONE, AdaptedModel, Examples, Layout, ModelRef, Row, Rows, SelectedModel
from llmtune.store.atomic_files import hash_folder, hash_value
from llmtune.store.processes import layout, once, world_size
from llmtune.store.release_store import SERVED_RECIPE, TEMPLATE, find_source, is_stored
from llmtune.store.run_folder import RunFolder, StepRun, read_run, recipe_of_run, trained_name
from llmtune.store.run_lock import LOCK, Pins, SourceRecord, check_pin, own_pins, read_pins, write_lock
from llmtune.store.run_origin import list_model_code, name_code
from llmtune.store.run_request import RunRequest
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import choose_variant
from llmtune.train.distributed import join_processes
from llmtune.train.sharding import Made, shard_model, share_model

T = TypeVar("T")
SHARDED = ("full", "lora", "qlora")
"""Methods whose finished runs are opened sharded under `--strategy fsdp`; others are opened completely."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run: made once, as soon as its rows and its model are known, and never changed."""

    recipe: Recipe
    """The recipe with all open settings resolved: class names, epochs, rate and batch, length, checkpointing."""
    task: AnyTask
    model_ref: ModelRef
    device: str
    layout: Layout = ALONE
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Hash of the inputs of each step; the evaluation also depends on the trained weights."""
    loaded: list[PreTrainedTokenizerBase] = field(default_factory=list, compare=False)
    """The processor, once it is loaded; a draft and its plan share it."""

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, configured by the recipe; all steps share it, so do not change it."""
        if not self.loaded:
            self.loaded.append(load_processor(self.model_ref, self.recipe.model, self.recipe.data.system_prompt))
        return self.loaded[0]


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


def find_variant(recipe: Recipe, model_ref: ModelRef) -> AnyTask:
    """Return the variant of the task that a model supports; raises RecipeError if it supports none."""
    variant = choose_variant(recipe, read_model_config(model_ref, recipe.model), model_ref.name)
    check_variant(recipe, variant, model_ref.name)
    return variant


def rows_hash(context: RunContext, recipe: Recipe) -> str:
    """Hash the inputs of the rows; raises EnvironmentProblem if the request's lock names other data."""
    if context.request.pins is not None:
        check_pin("the data's content", context.request.pins.data_hash, hash_sources(recipe.data, recipe.task))
    return rows_inputs(recipe)


def evaluation_hash(context: RunContext) -> str:
    """Hash the inputs of the scores, including the trained weights."""
    return hash_value([context.plan.inputs["evaluate"], hash_folder(context.trained_folder)])


def make_adapted(context: RunContext) -> AdaptedModel:
    """Load the model and add the adapter, seeded.

    If the model is to be sharded, only the first process loads it, into main memory.
    """
    return _make(context, partial(_make_adapted, context), training=True)


def _make(context: RunContext, make: Callable[[Recipe, str], Made], *, training: bool) -> Made:
    """Make a model with a recipe on a device: in the first process for all, if the model is to be sharded."""
    plan = context.plan
    if not context.shards:
        return make(plan.recipe, plan.device)
    join_processes(plan.device)
    # Import remote code before receiving a model that uses it.
    _, config = find_class(plan.model_ref, plan.recipe, plan.task)
    device, recipe = loading_device(plan.recipe, plan.device)
    exact = keeps_float32(plan.recipe, plan.task, config) and (training or plan.task.model_kind.predicts_in_float32)
    return share_model(partial(make, plan.recipe if exact else recipe, device))


def _make_adapted(context: RunContext, recipe: Recipe, device: str) -> AdaptedModel:
    plan, sample = context.plan, None
    with spinner(context.console, "loading the model"):
        about = plan.model_ref, recipe, plan.task, plan.processor
        selected = load_model(*about, device=device, training=True, masters=not context.shards)
    if recipe.adapter.init_lora_weights in DATA_STARTS:
        sample = sample_rows(context.examples, plan.task, selected, recipe)
    return inject(selected, recipe, context.console, sample)


@dataclass
class Models:
    """Base and tuned model of a run, each loaded from disk as its user would load it.

    Adapters share their base, unless the models are sharded.
    """

    context: RunContext
    packs: bool | None = None
    """Whether the model loaded last accepts packed rows; None before the first load."""

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """The base model, on the same quantised weights if it was quantised."""
        yield self._selected.model
        if self.context.plan.recipe.adapter.method == "full" or self.context.shards:
            del self.__dict__["_selected"]  # one set of full weights in memory at a time

    @contextmanager
    def before(self) -> Iterator[torch.nn.Module]:
        """The base; with the `start_from` adapter if the task compares with the initial state of training."""
        plan = self.context.plan
        start = plan.recipe.adapter.start_from
        if start is None or not plan.task.needs_reference_model(plan.recipe):
            with self.base() as model:
                yield model
        else:
            adapter = find_adapter(Path(start))
            known = self.context.folder.findings.get("start_from")
            if known is not None and known != hash_folder(adapter):
                what = "The adapter in adapter.start_from changed since training, so the base cannot be restored"
                raise EnvironmentProblem.of(what, str(adapter), "Put it back, or run the recipe again.")
            yield self._shard(partial(self._attach, plan.model_ref, adapter)).model

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """The model with the adapter (or the tuned weights) read back from the run folder."""
        yield self.adapted.model

    @property
    def adapted(self) -> AdaptedModel:
        """The tuned model, read back from the run folder."""
        trained, plan = self.context.trained_folder, self.context.plan
        if plan.recipe.adapter.method == "full":
            return self._shard(partial(self._attach, replace(plan.model_ref, path=trained), trained))
        if self.context.shards:  # modules cannot be added to a sharded model
            return self._shard(partial(self._attach, plan.model_ref, trained))
        return load_adapter(self._selected, trained)

    @property
    def loaders(self) -> ModelLoaders:
        """The loaders of both models for the evaluation."""
        return ModelLoaders(self.before, self.tuned, lambda: self.packs)

    @cached_property
    def _selected(self) -> SelectedModel:
        return self._shard(partial(self._load, self.context.plan.model_ref))

    def _load(self, model_ref: ModelRef, recipe: Recipe, device: str) -> SelectedModel:
        return load_model(
            model_ref, recipe, self.context.plan.task, self.context.plan.processor, device=device, training=False
        )

    def _attach(self, model_ref: ModelRef, trained: Path, recipe: Recipe, device: str) -> AdaptedModel:
        """Load a model with the adapter or the tuned weights in `trained`."""
        selected = self._load(model_ref, recipe, device)
        if recipe.adapter.method == "full" and selected.new_weights:
            what = "the head in these weights has other classes than the rows have now"
            raise EnvironmentProblem.of(what, str(trained), "Run the recipe again to train a new head.")
        return load_adapter(selected, trained)

    def _shard(self, make: Callable[[Recipe, str], Made]) -> Made:
        """Make a model, each process its shard if the run is sharded."""
        made = _make(self.context, make, training=False)
        self.packs = made.packs if isinstance(made, SelectedModel) else made.selected.packs
        if self.context.shards:
            shard_model(made.model, torch.device(pick_device()))
        return made


def open_finished(run: Path, console: Console, offline: bool, recipe: Recipe | None = None) -> RunContext:
    """Open a trained run or a release, to use its model; `recipe` replaces the run's own.

    Raises:
        RecipeError: not a run folder, or not trained yet.
        EnvironmentProblem: its base model is missing or was changed.
    """
    folder = read_run(run)
    folder.require_trained()
    served = read_served_recipe(run)
    pins, recipe = read_pins(run / LOCK), recipe or served or recipe_of_run(folder).recipe
    name_code(run, list_model_code(recipe), console)
    context = RunContext(folder, console, RunRequest(run, offline=offline, pins=pins))
    model_ref = locate_pinned(context, recipe.model, pins.model)
    task = find_variant(recipe, model_ref)
    config = read_model_config(model_ref, recipe.model)
    recipe = recipe if served else task.infer_labels(recipe, context.rows, config)
    shards = recipe.adapter.method in SHARDED and kept_quantization(config) is None
    context.resolved = Plan(recipe, task, model_ref, context.device, layout() if shards else ALONE)
    return context


def read_served_recipe(folder: Path) -> Recipe | None:
    """Return the resolved recipe of a release; None for a run, which infers it from its rows.

    Raises EnvironmentProblem if it is damaged.
    """
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


def load_champion(context: RunContext, run: Path) -> ChampionModel:
    """Open a champion's run, to answer rows of this run with its model."""
    champion = open_finished(run, context.console, context.request.offline)
    plan = champion.plan
    return ChampionModel(plan.recipe, plan.task, plan.processor, plan.device, Models(champion).loaders)


def ask_champion_classes(context: RunContext, run: Path, rows: Sequence[Row]) -> list[list[str]]:
    """Return the classes that a champion's model answers, before training."""
    return ask_classes(partial(load_champion, context), context.console, context.plan.recipe.renames, run, rows)


def check_new_labels(context: RunContext) -> None:
    """Compare new labels with the champion's predictions, in all processes (`llmtune.evaluate.label_check`)."""
    recipe = recipe_of_run(context.folder).recipe
    check_labels(partial(load_champion, context), recipe, context.folder, context.rows, context.console)


def locate_pinned(context: RunContext, model: ModelSection, name: str) -> ModelRef:
    """Find a model at the commit in a lock: that of the request, else the run's own.

    Raises:
        EnvironmentProblem: the model is not found, or its content differs from the request's lock.
    """
    required, console, offline = context.request.pins, context.console, context.request.offline
    pins = required or (None if context.request.fresh else own_pins(context.folder.path))
    if pins is None or pins.model != name:
        return resolve_model(name, model, console, offline)
    if pins.revision:
        model = model.model_copy(update={"revision": pins.revision})
    model_ref = resolve_model(name, model, console, offline)
    if required is not None:
        check_pin("the model's content", pins.model_hash, model_ref.content_hash)
    return model_ref


def score_models(context: RunContext, folder: Path | None, base_folder: Path | None) -> Scored:
    """Evaluate both models in all processes; rank 0 writes to `folder`. `base_folder` may have earlier base answers."""
    plan, rows, examples = context.plan, context.rows, context.examples
    recipe, task, processor = plan.recipe, plan.task, plan.processor
    join_processes(plan.device)
    inputs = make_inputs(rows, examples, task, processor, recipe) if examples.counts.get("test") else None
    validation = calibration_inputs(rows, examples, task, processor, recipe, inputs)
    eval_context = EvalContext(recipe, task, processor, inputs, plan.device, context.console, folder, validation)
    base = base_inputs(recipe, adapter_settings(recipe), plan.model_ref, rows, examples, plan.device)
    simple = load_base(base_folder, simple_inputs(recipe, rows, examples), SIMPLE)
    ask = partial(ask_champion, partial(load_champion, context), eval_context, rows, context.folder.path)
    request = ScoreRequest(
        Models(context).loaders,
        eval_context,
        rows,
        headless=why_headless(plan.model_ref, recipe, task),
        base=load_base(base_folder, base),
        tuned=load_base(base_folder, base + hash_folder(context.trained_folder), TUNED),
        score_simply=partial(score_simple_baseline, eval_context, rows, examples, simple),
        challenge=partial(face_champion, context.folder, rows, ask),
        trained=context.trained_folder,
    )
    return score_run(request)


def find_suspects(context: RunContext, folder: Path | None) -> None:
    """Look for labels that are likely wrong, if the recipe asks for them, in all processes; rank 0 has a folder."""
    plan, console = context.plan, context.console
    eval_context = EvalContext(plan.recipe, plan.task, plan.processor, None, plan.device, console, folder)
    save_suspects(Models(context).tuned, eval_context, context.rows, context.examples)


def lock_run(context: RunContext) -> None:
    """Write llmtune.lock with all inputs of training, file by file."""
    plan, recipe, model_ref = context.plan, context.plan.recipe, context.plan.model_ref
    miner = recipe.data.negatives and recipe.data.negatives.model
    data_hash, files = list_sources(recipe.data, recipe.task)
    write_lock(
        context.folder.path,
        Pins(model_ref.name, model_ref.revision, model_ref.content_hash, data_hash),
        fingerprint=context.folder.manifest["fingerprint"],
        template_hash=hash_value(plan.processor.chat_template),
        seed=recipe.seed,
        threads=torch.get_num_threads(),
        model=model_ref.path,
        sources=cast(list[SourceRecord], [one.record for one in files]),
        start_from=find_adapter(Path(start)) if (start := recipe.adapter.start_from) else None,
        device=describe_device(plan.device),
        judge={"model": judge.model, "host": host(judge)} if (judge := recipe.evaluate.judge) else None,
        miner=resolve_model(miner, recipe.model, context.console, context.request.offline) if miner else None,
    )
