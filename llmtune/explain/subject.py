"""What is looked at: a model, or the base and the tuned model of a run, each opened in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe
    from llmtune.records import Task

Family = Literal["encoder", "decoder", "encoder-decoder"]
MODEL, BASE, TUNED = "model", "base", "tuned"


@dataclass(frozen=True)
class Subject:
    """A model to look at; its weights are read only when a side is opened."""

    name: str
    """As a person named it: a run folder, a model folder, a hub name, `builtin:NAME`."""
    family: Family
    config: Any
    """The model's configuration; of a run, that of its base."""
    processor: PreTrainedTokenizerBase
    sides: tuple[str, ...]
    """("base", "tuned") of a run, else ("model",)."""
    open_side: Callable[[str], AbstractContextManager[PreTrainedModel]]
    """Loads a side: eager attention, eval mode. Sides share weights: open them in the order of `sides`, each once, and
    be done with one before the next."""
    folder: Path
    """Where pictures go unless a person says otherwise."""
    recipe: Recipe | None = None
    """The settled recipe of a run."""
    task: Task | None = None
    """The task of a run, in the form that its model does."""
