"""A run that was trained, opened again: base and tuned model read back, talked to, merged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmtune.adapter import load_adapter
from llmtune.data import load_rows, read_rows
from llmtune.deploy.chat import ChatSession
from llmtune.deploy.merge import merge_model
from llmtune.model import load_model, load_processor
from llmtune.recipe import Recipe
from llmtune.records import AdaptedModel, ModelPlace, SelectedModel
from llmtune.run.folder import read_run, recipe_of_run
from llmtune.run.lock import LOCK, read_pins
from llmtune.work import Work, locate_pinned, trained_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CERTIFIED_ROWS = 8
"""Test rows that a merged model is asked beside the fixed prompts."""


@dataclass
class Models:
    """Base and tuned model of a run, each loaded from disk as its user would load it; adapters share their base."""

    work: Work
    place: ModelPlace
    processor: PreTrainedTokenizerBase

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """The model that training started from, on the same quantised weights if it was quantised."""
        yield self._selected.model
        if self.work.recipe.adapter.method == "full":
            del self.__dict__["_selected"]  # one set of full weights in memory at a time

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """The model with the adapter (or the tuned weights) read back from the run folder."""
        yield self.adapted.model

    @property
    def adapted(self) -> AdaptedModel:
        """The tuned model, read back."""
        trained = self.work.folder.path / trained_name(self.work.recipe)
        if self.work.recipe.adapter.method == "full":
            selected = self._load(replace(self.place, path=trained))
            return load_adapter(selected, trained)
        return load_adapter(self._selected, trained)

    @cached_property
    def _selected(self) -> SelectedModel:
        return self._load(self.place)

    def _load(self, place: ModelPlace) -> SelectedModel:
        work = self.work
        return load_model(place, work.recipe, work.task, self.processor, device=work.device, training=False)


def merge_run(
    run: Path, *, out: Path | None, onto: str | None, dtype: str, offline: bool, console: Console
) -> dict[str, Any]:
    """Merge the adapter of a finished run; returns the certificate.

    Raises:
        GateFailed: the merged model differs from what was trained by more than the limits.
    """
    work, place = open_finished(run, console, offline)
    return merge(work, place, out or run / "merged", onto=onto, dtype=dtype)


def merge(work: Work, place: ModelPlace, out: Path, *, onto: str | None, dtype: str) -> dict[str, Any]:
    """Merge; without `onto`, into the weights that the adapter was trained on, where the two agree best."""
    if onto is None:
        onto = "dequantized" if work.recipe.adapter.method == "qlora" else "original"
    processor = load_processor(place, work.recipe.model)
    adapted = Models(work, place, processor).adapted
    rows = load_rows(work.folder.path / "data" / "rows")
    asked = read_rows(rows, "test", range(min(CERTIFIED_ROWS, rows.counts["test"])))
    return merge_model(adapted, work.recipe, work.task, out, work.console, onto=onto, dtype=dtype, rows=asked)


def open_finished(run: Path, console: Console, offline: bool, recipe: Recipe | None = None) -> tuple[Work, ModelPlace]:
    """Open a run that was trained, to use its model; `recipe` stands in for the run's own.

    Raises:
        RecipeError: not a run folder, or not trained yet.
        EnvironmentProblem: its base model is gone or was changed.
    """
    folder = read_run(run)
    folder.require_trained()
    pins = read_pins(run / LOCK)
    work = Work(recipe or recipe_of_run(folder).recipe, folder, console, offline, pins, held=True)
    place = locate_pinned(work, pins.model)
    work.settle(place, load_rows(run / "data" / "rows"))
    return work, place


def open_session(
    run: Path, console: Console, *, base: bool = False, max_new_tokens: int | None = None, offline: bool = False
) -> ChatSession:
    """Load the model of a finished run to talk to it."""
    work, place = open_finished(run, console, offline)
    recipe = work.recipe
    if max_new_tokens is not None:
        longer = recipe.generation.model_copy(update={"max_new_tokens": max_new_tokens})
        recipe = recipe.model_copy(update={"generation": longer})
    processor = load_processor(place, recipe.model)
    models = Models(work, place, processor)
    with models.base() if base else models.tuned() as model:
        return ChatSession(model, processor, recipe, work.task, console)
