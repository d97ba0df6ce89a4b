"""One invocation at work: what was asked for, in which folder, and the model's place; shared by all who open a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from llmtune.adapter import find_adapter
from llmtune.data import list_sources
from llmtune.evaluate.eval_suites import check_form
from llmtune.model import load_processor, locate, pick_device
from llmtune.model.config import read_model_config
from llmtune.model.device import describe_device
from llmtune.recipe import Recipe
from llmtune.records import ModelPlace, Rows, Task
from llmtune.store.atomic_files import hash_value
from llmtune.store.run_folder import RunFolder
from llmtune.store.run_lock import Pins, check_pin, write_lock
from llmtune.tasks import choose_form, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
class Work:
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
    form: Task | None = None
    processors: dict[Path, PreTrainedTokenizerBase] = field(default_factory=dict)
    """Those that have been read, by the folder of their model."""

    @property
    def task(self) -> Task:
        """The task's functions, in the form that the model can do once that is known."""
        return self.form or get_task(self.recipe.task)

    def choose_form(self, place: ModelPlace) -> Task:
        """Return the form of the task that a model can do; raises RecipeError where there is none."""
        form = choose_form(self.recipe, read_model_config(place, self.recipe.model), place.name)
        check_form(self.recipe, form, place.name)
        return form

    def settle(self, place: ModelPlace, rows: Rows) -> None:
        """Take the form of the task that this model does, and what of the recipe the rows decide, such as class names.

        Raises RecipeError or DataError where model, rows and recipe do not go together.
        """
        config = read_model_config(place, self.recipe.model)
        self.form = choose_form(self.recipe, config, place.name)
        check_form(self.recipe, self.form, place.name)
        self.recipe = self.form.settle(self.recipe, rows, config)

    @cached_property
    def device(self) -> str:
        """cuda, mps or cpu."""
        return pick_device()

    def read_processor(self, place: ModelPlace) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer as the recipe wants it, read once for all steps; it is not to be changed."""
        if place.path not in self.processors:
            self.processors[place.path] = load_processor(place, self.recipe.model)
        return self.processors[place.path]

    def skip(self, step: str, inputs: str) -> bool:
        """Whether `step` need not run; says so."""
        skipped = self.folder.is_valid(step, inputs)
        self.begin(step, skipped)
        return skipped

    def begin(self, step: str, skipped: bool = False) -> None:
        """Say which step comes now, and whether it is skipped."""
        self.skipped[step] = skipped
        self.console.print(f"[bold cyan]{step}[/]{' [dim]unchanged, skipped[/]' if skipped else ''}")


def locate_pinned(work: Work, name: str) -> ModelPlace:
    """Find a model, at the commit that a lock holds if there is one.

    Raises:
        EnvironmentProblem: not found; or, with --lock, its content is not what the lock holds.
    """
    model, pins = work.recipe.model, work.pins
    if pins is None or pins.model != name:
        return locate(name, model, work.console, work.offline)
    if pins.revision:
        model = model.model_copy(update={"revision": pins.revision})
    place = locate(name, model, work.console, work.offline)
    if work.held:
        check_pin("the model's content", pins.model_hash, place.content_hash)
    return place


def lock_run(work: Work, place: ModelPlace, fingerprint: str) -> None:
    """Write llmtune.lock: all that training starts from, file by file."""
    recipe = work.recipe
    data_hash, files = list_sources(recipe.data, recipe.task)
    start = recipe.adapter.start_from
    write_lock(
        work.folder.path,
        Pins(place.name, place.revision, place.content_hash, data_hash),
        fingerprint=fingerprint,
        template_hash=hash_value(work.read_processor(place).chat_template),
        seed=recipe.seed,
        threads=torch.get_num_threads(),
        model=place.path,
        sources=[{"source": file.source, "path": file.path, file.kind: file.hash} for file in files],
        start_from=find_adapter(Path(start)) if start else None,
        device=describe_device(work.device),
    )


def trained_name(recipe: Recipe) -> str:
    """The subfolder of a run that holds what was trained."""
    return "weights" if recipe.adapter.method == "full" else "adapter"
