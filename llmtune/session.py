"""A run at work: its options, folder and models (RunContext, Models); a finished run opened again (open_finished)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.data_init import sample_rows
from llmtune.adapter.injection import adapter_settings, describe_adapter, inject
from llmtune.adapter.load import find_adapter
from llmtune.adapter.saving import load_adapter
from llmtune.data.preparation import rows_inputs
from llmtune.data.row_store import load_rows
from llmtune.data.sources import SourceFile, hash_sources, list_sources
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.suite_registry import check_variant
from llmtune.model.config import find_class, read_model_config
from llmtune.model.device import describe_device, loading_device, pick_device, release_memory
from llmtune.model.loading import load_model
from llmtune.model.memory_plan import context_length, resolve_checkpointing
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.adapter_section import DATA_STARTS
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import Recipe
from llmtune.recipe.training_rule import choose_training, few_steps, with_choices, with_length
from llmtune.records import ALONE, AdaptedModel, Examples, Layout, ModelRef, Rows, SelectedModel
from llmtune.report.render_terminal import spinner
from llmtune.store.atomic_files import hash_folder, hash_value
from llmtune.store.processes import layout, once, world_size
from llmtune.store.run_folder import RunFolder, Step, read_run, recipe_of_run
from llmtune.store.run_lock import (
    LOCK,
    Pins,
    SourceRecord,
    check_pin,
    read_pins,
    write_lock,
)
from llmtune.tasks.base import AnyTask
from llmtune.tasks.class_labels import AS_NUMBERS
from llmtune.tasks.registry import choose_variant, get_task
from llmtune.train.distributed import join_processes
from llmtune.train.loop import train
from llmtune.train.row_losses import list_hardest
from llmtune.train.sharding import share_model

T = TypeVar("T")


@dataclass
class RunContext:
    """One invocation at work: the recipe, its folder, where to talk, and which steps were skipped."""

    recipe: Recipe
    folder: RunFolder
    console: Console
    offline: bool
    pins: Pins | None = None
    """What a lock holds still: the one named with --lock, else the run's own of an earlier start."""
    held: bool = False
    """Whether the lock was named with --lock: then it also says which of the candidates is taken."""
    findings: Mapping[str, object] = field(default_factory=dict)
    """What another run found out, and this one keeps."""
    base: Path | None = None
    """The evaluation of another run, where what the base model said may be known from."""
    layout: Layout = ALONE
    """The processes that train."""
    skipped: dict[str, bool] = field(default_factory=dict)
    variant: AnyTask | None = None
    processors: dict[Path, PreTrainedTokenizerBase] = field(default_factory=dict)
    """Those that have been read, by the folder of their model."""

    @property
    def task(self) -> AnyTask:
        """The task's functions, in the variant that the model can do once that is known."""
        return self.variant or get_task(self.recipe.task)

    def choose_variant(self, model_ref: ModelRef) -> AnyTask:
        """Return the variant of the task that a model can do; raises RecipeError where there is none."""
        variant = choose_variant(self.recipe, read_model_config(model_ref, self.recipe.model), model_ref.name)
        check_variant(self.recipe, variant, model_ref.name)
        return variant

    def infer_labels(self, model_ref: ModelRef, rows: Rows) -> None:
        """Choose the variant of the task that this model does, and infer what the rows decide, such as class names.

        Raises RecipeError or DataError where model, rows and recipe do not go together.
        """
        self.variant = self.choose_variant(model_ref)
        self.recipe = self.variant.infer_labels(self.recipe, rows, read_model_config(model_ref, self.recipe.model))

    def resolve_training(self, loaded: LoadedRecipe, model_ref: ModelRef, rows: Rows) -> LoadedRecipe:
        """Choose what the recipe leaves open of epochs, rate and batch, and say so; return a recipe that states it."""
        stated, found = loaded.recipe.classify, self.recipe.classify
        if found is not None and found.kind == "regression" and (stated is None or stated.kind == "auto"):
            self.console.print(AS_NUMBERS, highlight=False)
        config = read_model_config(model_ref, self.recipe.model).get_text_config()
        count = rows.counts.get("train", 0)
        choices = choose_training(self.recipe, count, getattr(config, "hidden_size", None), self.task.trains_head)
        loaded = with_choices(loaded, choices)
        reach = context_length(config)
        if self.recipe.model.candidates and reach is not None and reach < self.recipe.data.max_length:
            loaded = with_length(loaded, reach, model_ref.name)
            self.console.print(f"data.max_length: {reach} (chosen: the context of {model_ref.name})", highlight=False)
        self.recipe = self.recipe.model_copy(update={"train": loaded.recipe.train, "data": loaded.recipe.data})
        for key, choice in choices.items():
            self.console.print(f"train.{key}: {choice.value:g} (chosen: {choice.why})", highlight=False)
        if warning := few_steps(self.recipe, count):
            self.console.print(warning, style="yellow", highlight=False)
        return loaded

    @cached_property
    def device(self) -> str:
        """cuda, mps or cpu."""
        return pick_device()

    @property
    def rows_inputs(self) -> str:
        """The hash of what rows depend on; raises EnvironmentProblem where a named lock holds other data."""
        recipe = self.recipe
        if self.held and self.pins is not None:
            check_pin("the data's content", self.pins.data_hash, hash_sources(recipe.data, recipe.task))
        return rows_inputs(recipe)

    @property
    def trained_hash(self) -> str:
        """The hash of what was trained, file by file."""
        return hash_folder(self.folder.path / trained_name(self.recipe))

    def read_processor(self, model_ref: ModelRef) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer as the recipe wants it, read once for all steps; it is not to be changed."""
        if model_ref.path not in self.processors:
            self.processors[model_ref.path] = load_processor(
                model_ref, self.recipe.model, self.recipe.data.system_prompt
            )
        return self.processors[model_ref.path]

    @contextmanager
    def step(self, name: str, inputs: str, outputs: Sequence[str] = (), *, always: bool = False) -> Iterator[Step]:
        """Announce a step, and run it unless nothing changed; see `RunFolder.step`."""
        begin = partial(self.begin, name)
        with self.folder.step(name, inputs, outputs, always=always, on_begin=begin) as step:
            yield step

    def once(self, work: Callable[[], T]) -> T:
        """Do `work` in rank 0 alone; all processes get what it returns, and the manifest as it is then."""
        value, manifest, skipped = once(lambda: (work(), self.folder.manifest, self.skipped))
        self.folder.manifest, self.skipped = manifest, skipped
        return value

    def begin(self, step: str, skipped: bool = False) -> None:
        """Say which step comes now, and whether it is skipped."""
        self.skipped[step] = skipped
        self.console.print(f"[bold cyan]{step}[/]{' [dim]unchanged, skipped[/]' if skipped else ''}")

    def resolve_checkpointing(self, model_ref: ModelRef, longest: int) -> None:
        """Decide `gradient_checkpointing: auto`, and keep the decision for as long as it is asked.

        It stays what it was when the run goes on where there is more memory, or less: one run, one way.
        """
        recipe = self.recipe
        if recipe.train.gradient_checkpointing != "auto":
            return
        inputs = hash_value([model_ref.content_hash, longest, adapter_settings(recipe), recipe.train.optim])
        known = self.folder.findings.get("gradient_checkpointing")
        if known is None or known["inputs"] != inputs:
            on = resolve_checkpointing(model_ref, recipe, self.task, longest, self.device, self.layout)
            self.folder.findings["gradient_checkpointing"] = known = {"inputs": inputs, "on": on}
        if known["on"]:
            self.console.print(
                "train.gradient_checkpointing: auto computes activations again in the backward pass: the longest row "
                f"({longest:,} tokens) does not fit into the memory of {self.device} otherwise.",
                highlight=False,
            )

    @property
    def resolved_recipe(self) -> Recipe:
        """The recipe with what `resolve_checkpointing` decided."""
        known = self.folder.findings.get("gradient_checkpointing")
        if self.recipe.train.gradient_checkpointing != "auto" or known is None:
            return self.recipe
        decided = self.recipe.train.model_copy(update={"gradient_checkpointing": known["on"]})
        return self.recipe.model_copy(update={"train": decided})

    def make_adapted(self, model_ref: ModelRef, processor: PreTrainedTokenizerBase, examples: Examples) -> AdaptedModel:
        """Load the model and put the adapter in, seeded; from here on the recipe is the resolved one.

        `examples` are what a start is found from, where the recipe wants one that is. Where each process is to have a
        part of the model, the first one alone makes it, in main memory.
        """
        self.recipe = self.resolved_recipe
        if not self.shards:
            return self._make_adapted(model_ref, processor, examples, self.recipe, self.device)
        join_processes(self.device)
        find_class(model_ref, self.recipe, self.task)  # code of its own has to be there before a model of it comes
        device, recipe = loading_device(self.recipe, self.device)
        return share_model(partial(self._make_adapted, model_ref, processor, examples, recipe, device))

    @property
    def shards(self) -> bool:
        """Whether each process has a part of the model while it trains."""
        return world_size() > 1 and layout().sharded

    def _make_adapted(
        self, model_ref: ModelRef, processor: PreTrainedTokenizerBase, examples: Examples, recipe: Recipe, device: str
    ) -> AdaptedModel:
        with spinner(self.console, "loading the model"):
            selected = load_model(model_ref, recipe, self.task, processor, device=device, training=True)
        sample = None
        if recipe.adapter.init_lora_weights in DATA_STARTS:
            sample = sample_rows(examples, self.task, selected, recipe)
        return inject(selected, recipe, self.console, sample)

    def train_here(self, model_ref: ModelRef, examples: Examples, adapt_inputs: str, inputs: str) -> None:
        """Adapt and train, as two steps; all processes together."""
        with self.step("adapt", adapt_inputs, always=True) as step:
            adapted = self.make_adapted(model_ref, self.read_processor(model_ref), examples)
            step.facts.update(describe_adapter(adapted))
        with self.step("train", inputs, [trained_name(self.recipe)], always=True) as step:
            trained = train(
                adapted,
                examples,
                self.task,
                self.recipe,
                self.folder.path,
                self.console,
                budget=self.folder.findings["micro_batch_tokens"],
                on_budget=self.folder.note_budget,
                inputs=inputs,
                sharded=self.shards,
            )
            rows = load_rows(self.folder.path / "data" / "rows")
            hardest = self.once(lambda: list_hardest(self.folder.path, rows, examples, self.task))
            step.facts.update(trained.as_facts(), hardest_rows=hardest)
            step.facts.update(processes=world_size(), strategy="fsdp" if self.shards else "ddp")
        del adapted
        release_memory()  # evaluation loads its own model


@dataclass
class Models:
    """Base and tuned model of a run, each loaded from disk as its user would load it; adapters share their base."""

    context: RunContext
    model_ref: ModelRef
    processor: PreTrainedTokenizerBase
    packs: bool | None = None
    """Whether the model that was loaded last reads rows that stand end to end; None before there is one."""

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """The model that training started from, on the same quantised weights if it was quantised."""
        yield self._selected.model
        if self.context.recipe.adapter.method == "full":
            del self.__dict__["_selected"]  # one set of full weights in memory at a time

    @contextmanager
    def before(self) -> Iterator[torch.nn.Module]:
        """The base; where the task compares with what training started from, with the adapter of `start_from` on it."""
        start = self.context.recipe.adapter.start_from
        if start is None or not self.context.task.needs_reference_model(self.context.recipe):
            with self.base() as model:
                yield model
        else:
            adapter = find_adapter(Path(start))
            known = self.context.folder.findings.get("start_from")
            if known is not None and known != hash_folder(adapter):
                what = "the adapter that training started from is another one now: there is nothing to compare with"
                raise EnvironmentProblem.of(what, str(adapter), "Put it back, or run the recipe again.")
            yield load_adapter(self._load(self.model_ref), adapter).model

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """The model with the adapter (or the tuned weights) read back from the run folder."""
        yield self.adapted.model

    @property
    def adapted(self) -> AdaptedModel:
        """The tuned model, read back."""
        trained = self.context.folder.path / trained_name(self.context.recipe)
        if self.context.recipe.adapter.method == "full":
            selected = self._load(replace(self.model_ref, path=trained))
            if selected.new_weights:
                what = "the head in these weights is for other classes than the rows have now"
                raise EnvironmentProblem.of(what, str(trained), "Run the recipe again: it trains anew.")
            return load_adapter(selected, trained)
        return load_adapter(self._selected, trained)

    @cached_property
    def _selected(self) -> SelectedModel:
        return self._load(self.model_ref)

    def _load(self, model_ref: ModelRef) -> SelectedModel:
        context = self.context
        selected = load_model(
            model_ref, context.recipe, context.task, self.processor, device=context.device, training=False
        )
        self.packs = selected.packs
        return selected


def open_finished(
    run: Path, console: Console, offline: bool, recipe: Recipe | None = None
) -> tuple[RunContext, ModelRef]:
    """Open a run that was trained, to use its model; `recipe` stands in for the run's own.

    Raises:
        RecipeError: not a run folder, or not trained yet.
        EnvironmentProblem: its base model is gone or was changed.
    """
    folder = read_run(run)
    folder.require_trained()
    pins = read_pins(run / LOCK)
    context = RunContext(recipe or recipe_of_run(folder).recipe, folder, console, offline, pins, held=True)
    model_ref = locate_pinned(context, pins.model)
    context.infer_labels(model_ref, load_rows(run / "data" / "rows"))
    return context, model_ref


def locate_pinned(context: RunContext, name: str) -> ModelRef:
    """Find a model, at the commit that a lock holds if there is one.

    Raises:
        EnvironmentProblem: not found; or, with --lock, its content is not what the lock holds.
    """
    model, pins = context.recipe.model, context.pins
    if pins is None or pins.model != name:
        return resolve_model(name, model, context.console, context.offline)
    if pins.revision:
        model = model.model_copy(update={"revision": pins.revision})
    model_ref = resolve_model(name, model, context.console, context.offline)
    if context.held:
        check_pin("the model's content", pins.model_hash, model_ref.content_hash)
    return model_ref


def lock_run(context: RunContext, model_ref: ModelRef, fingerprint: str) -> None:
    """Write llmtune.lock: all that training starts from, file by file."""
    recipe = context.recipe
    data_hash, files = list_sources(recipe.data, recipe.task)
    start = recipe.adapter.start_from
    write_lock(
        context.folder.path,
        Pins(model_ref.name, model_ref.revision, model_ref.content_hash, data_hash),
        fingerprint=fingerprint,
        template_hash=hash_value(context.read_processor(model_ref).chat_template),
        seed=recipe.seed,
        threads=torch.get_num_threads(),
        model=model_ref.path,
        sources=[_source_record(file) for file in files],
        start_from=find_adapter(Path(start)) if start else None,
        device=describe_device(context.device),
    )


def _source_record(file: SourceFile) -> SourceRecord:
    record = SourceRecord(source=file.source, path=str(file.path) if file.path else None)
    record[file.kind] = file.hash
    return record


def trained_name(recipe: Recipe) -> str:
    """The subfolder of a run that holds what was trained."""
    return "weights" if recipe.adapter.method == "full" else "adapter"
