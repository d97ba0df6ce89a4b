"""What `llmtune explain` looks at, opened: the base and tuned model of a run, or a model by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console

from llmtune.errors import LlmtuneError
from llmtune.model import load_processor, pick_device, resolve_model
from llmtune.model.config import is_encoder, read_model_config
from llmtune.model.loading import load_plain
from llmtune.recipe import ModelSection, Recipe
from llmtune.session import Models, open_finished
from llmtune.store.run_folder import MANIFEST, read_run, recipe_of_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.tasks import AnyTask


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
    task: AnyTask | None = None
    """The task of a run, in the form that its model does."""


def open_subject(name: str, console: Console, *, offline: bool = False, trust_remote_code: bool = False) -> Subject:
    """Open a run folder, or a model: a folder, a hub name, `builtin:NAME`. Weights are not read yet.

    Numbers are float32 whatever the recipe says, so that what is shown does not depend on rounding; attention is eager,
    so that its weights can be seen.

    Raises:
        RecipeError: neither a run nor a model; a run that was not trained.
        EnvironmentProblem: the model is gone, was changed or is not whole.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return _open_run(path, console, offline)
    settings = ModelSection(name=name, trust_remote_code=trust_remote_code)
    with _told_of(name):
        place = resolve_model(name, settings, console, offline)
    config, device = read_model_config(place, settings), pick_device()

    @contextmanager
    def open_side(side: str) -> Iterator[PreTrainedModel]:
        assert side == MODEL
        yield load_plain(place, config, settings, dtype=torch.float32, device=device)

    return Subject(
        name=name,
        family=family_of(config),
        config=config,
        processor=load_processor(place, settings),
        sides=(MODEL,),
        open_side=open_side,
        folder=Path("explain") / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or MODEL),
    )


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Let what is wrong with a model be said of the name that a person gave: there is no recipe."""
    try:
        yield
    except LlmtuneError as error:
        told = []
        for problem in error.problems:
            fix = (problem.fix or "").replace("set model.trust_remote_code: true", "give --trust-remote-code")
            fix = fix.replace(", or set model.use_safetensors: false if you trust where they come from", "")
            told.append(
                replace(problem, where=name if problem.where == "model.name" else problem.where, fix=fix or None)
            )
        raise type(error)(*told) from error


def _open_run(path: Path, console: Console, offline: bool) -> Subject:
    stated = recipe_of_run(read_run(path)).recipe
    context, place = open_finished(path, console, offline, recipe=_for_looking(stated))
    models = Models(context, place, load_processor(place, context.recipe.model))

    @contextmanager
    def open_side(side: str) -> Iterator[PreTrainedModel]:
        with {BASE: models.base, TUNED: models.tuned}[side]() as model:
            yield model

    config = read_model_config(place, context.recipe.model)
    return Subject(
        name=str(path),
        family=family_of(config),
        config=config,
        processor=models.processor,
        sides=(BASE, TUNED),
        open_side=open_side,
        folder=path / "explain",
        recipe=context.recipe,
        task=context.task,
    )


def _for_looking(recipe: Recipe) -> Recipe:
    model = recipe.model.model_copy(update={"attn_implementation": "eager", "dtype": "float32"})
    data = recipe.data.model_copy(update={"packing": False})
    return recipe.model_copy(update={"model": model, "data": data})


def family_of(config: Any) -> Family:
    """Say whether a model reads in both directions, only what came before, or both in two halves."""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    return "encoder" if is_encoder(config) or config.model_type in {"wav2vec2", "hubert"} else "decoder"
