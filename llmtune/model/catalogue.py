"""The catalogue of current models as data: kind, licence, and the shapes that a memory plan needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class CatalogueModel:
    """One model of the catalogue."""

    name: str
    family: str
    kind: str
    """decoder, encoder, encoder-decoder or speech."""
    licence: str
    languages: tuple[str, ...]
    context: int
    parameters: int
    model_type: str
    config: Mapping[str, Any]
    """Sizes, named as in the model's own configuration; one section per part of a model that also sees."""
    source: str | None = None
    """Address of the document with the sizes; None: the model's config.json on the hub."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks that the model can be tuned for."""
        return tuple(task for task, facts in TASK_FACTS.items() if self.kind in facts.models)

    def write_config(self, folder: Path) -> ModelRef:
        """Write its configuration for transformers; return a reference without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        context, text = {"max_position_embeddings": self.context}, self.config.get("text_config")
        sizes = {**context, **self.config} if text is None else {**self.config, "text_config": {**context, **text}}
        (folder / "config.json").write_text(json.dumps({"model_type": self.model_type, **sizes}), "utf-8")
        return ModelRef(self.name, folder, None, "")

    def hindrance(self, query: ModelQuery) -> str | None:
        """Return why the model does not match a query; None if it does."""
        if query.task is not None and query.task not in self.tasks:
            return f"a model of the kind {self.kind} cannot do task {query.task}"
        if (reason := refuse_licence(self.licence, query.licences)) is not None:
            return reason
        if query.families and self.family.lower() not in {name.lower() for name in query.families}:
            return f"its family is {self.family}"
        if query.max_parameters is not None and self.parameters > query.max_parameters:
            return f"it has {self.parameters / 1e9:.2f} G parameters"
        if query.language is not None and not {query.language, "multilingual"} & set(self.languages):
            return f"its languages are {', '.join(self.languages)}"
        return None


@dataclass(frozen=True)
class ModelQuery:
    """A search of the catalogue."""

    task: str | None = None
    licences: Sequence[str] = ()
    language: str | None = None
    families: Sequence[str] = ()
    max_parameters: float | None = None


def refuse_licence(licence: str | None, allowed: Sequence[str]) -> str | None:
    """Return why a model with this licence may not be used if only `allowed` ones may."""
    if not allowed or (licence or "").lower() in {name.lower() for name in allowed}:
        return None
    return f"its licence is {licence}" if licence else "its licence is unknown"


@cache
def read_catalogue() -> dict[str, CatalogueModel]:
    """Return the models in the catalogue, by name."""
    text = (resources.files("llmtune.model") / "catalogue.yaml").read_text("utf-8")
    entries = YAML(typ="safe").load(text)
    return {
        name: CatalogueModel(**{**entry, "name": name, "languages": tuple(entry["languages"])})
        for name, entry in entries.items()
    }


def find_catalogue_model(name: str) -> CatalogueModel:
    """Return a model by its name or the end of it. Raises RecipeError if none or several match."""
    catalogue = read_catalogue()
    matches = [one for one in catalogue if one.lower() == name.lower()] or [
        one for one in catalogue if one.lower().rpartition("/")[2] == name.lower()
    ]
    if len(matches) != 1:
        hint = nearest(name, list(catalogue))
        fix = f"{hint} `llmtune models list` shows all; any other model can be named in a recipe."
        raise RecipeError.of(f"the catalogue has no model {name!r}", "llmtune models", fix.strip())
    return catalogue[matches[0]]


def select_models(query: ModelQuery) -> tuple[list[CatalogueModel], dict[str, str]]:
    """Return the matching models, and the reasons against the others by name. Raises RecipeError for unknown values."""
    catalogue = read_catalogue().values()
    if query.task is not None and query.task not in TASK_FACTS:
        fix = f"{nearest(query.task, list(TASK_FACTS))} Tasks: {', '.join(TASK_FACTS)}.".strip()
        raise RecipeError.of(f"unknown task '{query.task}'", "--task", fix)
    languages = () if query.language is None else (query.language,)
    for noun, wanted, there in (
        ("language", languages, {one for model in catalogue for one in model.languages}),
        ("licence", query.licences, {model.licence for model in catalogue}),
        ("family", query.families, {model.family for model in catalogue}),
    ):
        for one in wanted:
            if one.lower() not in {name.lower() for name in there}:
                fix = f"{nearest(one, sorted(there))} The catalogue has: {', '.join(sorted(there))}.".strip()
                raise RecipeError.of(f"no model in the catalogue has the {noun} '{one}'", f"--{noun}", fix)
    reasons = {model.name: model.hindrance(query) for model in catalogue}
    return [model for model in catalogue if reasons[model.name] is None], {
        name: why for name, why in reasons.items() if why
    }


def candidate_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of a recipe's candidates: its list, or the catalogue's matches for its query.

    The search ignores licences: a forbidden one is dropped later, with the reason. Raises RecipeError if nothing
    matches.
    """
    wanted = recipe.model.candidates
    if wanted is None or isinstance(wanted, tuple):
        return wanted or ()
    query = ModelQuery(recipe.task, (), wanted.language, wanted.family, wanted.max_parameters)
    try:
        models, _ = select_models(query)
    except RecipeError as error:
        raise RecipeError(*(replace(one, where="model.candidates") for one in error.problems)) from None
    if not models:
        fix = f"See `llmtune models list --task {recipe.task}`, and relax the query."
        raise RecipeError.of("no model in the catalogue matches the query", "model.candidates", fix)
    return tuple(model.name for model in models)
