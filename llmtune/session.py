"""A run: what was asked for, its folder, its model (RunContext); and a finished run opened again (open_finished)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from llmtune.adapter import find_adapter, load_adapter
from llmtune.data import list_sources, load_rows
from llmtune.data.sources import SourceFile
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.eval_suites import check_variant
from llmtune.model import load_model, load_processor, pick_device, resolve_model
from llmtune.model.config import read_model_config
from llmtune.model.device import describe_device
from llmtune.recipe import Recipe
from llmtune.records import AdaptedModel, ModelRef, Rows, SelectedModel
from llmtune.store.atomic_files import hash_folder, hash_value
from llmtune.store.run_folder import RunFolder, Step, read_run, recipe_of_run
from llmtune.store.run_lock import LOCK, Pins, SourceRecord, check_pin, read_pins, write_lock
from llmtune.tasks import AnyTask, choose_variant, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: never part of a recipe."""

    out: Path | None = None
    resume: bool = False
    fresh: bool = False
    lock: Path | None = None
    offline: bool = False
    dry_run: bool = False
    until: str = "run"
    """The last step to run: prepare, select, adapt, train, evaluate, or run for all and deploy."""
    pins: Pins | None = None
    """What to hold still instead of what `lock` says."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """What another run of the same recipe found out and this one is to keep, such as its micro-batch budget."""
    base: Path | None = None
    """The evaluation of another run: what the base model said there counts here where it was asked the same."""


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
    settled: Mapping[str, Any] = field(default_factory=dict)
    """What another run found out, and this one keeps."""
    base: Path | None = None
    """The evaluation of another run, where what the base model said may be known from."""
    skipped: dict[str, bool] = field(default_factory=dict)
    variant: AnyTask | None = None
    processors: dict[Path, PreTrainedTokenizerBase] = field(default_factory=dict)
    """Those that have been read, by the folder of their model."""

    @property
    def task(self) -> AnyTask:
        """The task's functions, in the variant that the model can do once that is known."""
        return self.variant or get_task(self.recipe.task)

    def choose_variant(self, place: ModelRef) -> AnyTask:
        """Return the variant of the task that a model can do; raises RecipeError where there is none."""
        variant = choose_variant(self.recipe, read_model_config(place, self.recipe.model), place.name)
        check_variant(self.recipe, variant, place.name)
        return variant

    def infer_labels(self, place: ModelRef, rows: Rows) -> None:
        """Choose the variant of the task that this model does, and infer what the rows decide, such as class names.

        Raises RecipeError or DataError where model, rows and recipe do not go together.
        """
        config = read_model_config(place, self.recipe.model)
        self.variant = choose_variant(self.recipe, config, place.name)
        check_variant(self.recipe, self.variant, place.name)
        self.recipe = self.variant.infer_labels(self.recipe, rows, config)

    @cached_property
    def device(self) -> str:
        """cuda, mps or cpu."""
        return pick_device()

    def read_processor(self, place: ModelRef) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer as the recipe wants it, read once for all steps; it is not to be changed."""
        if place.path not in self.processors:
            self.processors[place.path] = load_processor(place, self.recipe.model)
        return self.processors[place.path]

    @contextmanager
    def step(self, name: str, inputs: str, outputs: Sequence[str] = (), *, always: bool = False) -> Iterator[Step]:
        """Announce a step, and run it unless nothing changed; see `RunFolder.step`."""
        begin = partial(self.begin, name)
        with self.folder.step(name, inputs, outputs, always=always, on_begin=begin) as step:
            yield step

    def begin(self, step: str, skipped: bool = False) -> None:
        """Say which step comes now, and whether it is skipped."""
        self.skipped[step] = skipped
        self.console.print(f"[bold cyan]{step}[/]{' [dim]unchanged, skipped[/]' if skipped else ''}")


@dataclass
class Models:
    """Base and tuned model of a run, each loaded from disk as its user would load it; adapters share their base."""

    context: RunContext
    place: ModelRef
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
            place = find_adapter(Path(start))
            known = self.context.folder.findings.get("start_from")
            if known is not None and known != hash_folder(place):
                what = "the adapter that training started from is another one now: there is nothing to compare with"
                raise EnvironmentProblem.of(what, str(place), "Put it back, or run the recipe again.")
            yield load_adapter(self._load(self.place), place).model

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """The model with the adapter (or the tuned weights) read back from the run folder."""
        yield self.adapted.model

    @property
    def adapted(self) -> AdaptedModel:
        """The tuned model, read back."""
        trained = self.context.folder.path / trained_name(self.context.recipe)
        if self.context.recipe.adapter.method == "full":
            selected = self._load(replace(self.place, path=trained))
            if selected.new_weights:
                what = "the head in these weights is for other classes than the rows have now"
                raise EnvironmentProblem.of(what, str(trained), "Run the recipe again: it trains anew.")
            return load_adapter(selected, trained)
        return load_adapter(self._selected, trained)

    @cached_property
    def _selected(self) -> SelectedModel:
        return self._load(self.place)

    def _load(self, place: ModelRef) -> SelectedModel:
        context = self.context
        selected = load_model(
            place, context.recipe, context.task, self.processor, device=context.device, training=False
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
    place = locate_pinned(context, pins.model)
    context.infer_labels(place, load_rows(run / "data" / "rows"))
    return context, place


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
    place = resolve_model(name, model, context.console, context.offline)
    if context.held:
        check_pin("the model's content", pins.model_hash, place.content_hash)
    return place


def lock_run(context: RunContext, place: ModelRef, fingerprint: str) -> None:
    """Write llmtune.lock: all that training starts from, file by file."""
    recipe = context.recipe
    data_hash, files = list_sources(recipe.data, recipe.task)
    start = recipe.adapter.start_from
    write_lock(
        context.folder.path,
        Pins(place.name, place.revision, place.content_hash, data_hash),
        fingerprint=fingerprint,
        template_hash=hash_value(context.read_processor(place).chat_template),
        seed=recipe.seed,
        threads=torch.get_num_threads(),
        model=place.path,
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
