"""Models of today as data: what they are, what they may be used for, and the shapes that a memory plan needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.task_facts import TASK_FACTS

KINDS: Mapping[str, tuple[str, ...]] = {
    "chat": ("decoder",),
    "completion": ("decoder",),
    "preference": ("decoder",),
    "translate": ("decoder", "encoder-decoder"),
    "summarize": ("decoder", "encoder-decoder"),
    "qa": ("encoder", "decoder", "encoder-decoder"),
    "classify": ("encoder", "decoder"),
    "token-classify": ("encoder",),
    "speech": ("speech",),
}
"""By task, the kinds of models that do it."""


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
    model_type: str
    config: Mapping[str, Any]
    """Sizes under the names of the model's own configuration."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it can be tuned for."""
        return tuple(task for task, kinds in KINDS.items() if self.kind in kinds)

    def write_config(self, folder: Path) -> None:
        """Write its configuration as transformers reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {"model_type": self.model_type, "max_position_embeddings": self.context, **self.config}
        (folder / "config.json").write_text(json.dumps(values), "utf-8")

    def hindrance(self, task: str | None, licences: Sequence[str], language: str | None) -> str | None:
        """Return why it is none for a task, licences and a language; None where it may be."""
        if task is not None and task not in self.tasks:
            return f"a model of the kind {self.kind} cannot do task {task}"
        if licences and self.licence not in licences:
            return f"its licence is {self.licence}"
        if language is not None and not {language, "multilingual"} & set(self.languages):
            return f"its languages are {', '.join(self.languages)}"
        return None


@cache
def read_catalogue() -> dict[str, CatalogueModel]:
    """Return the models that llmtune knows, by name."""
    text = (resources.files("llmtune.model") / "catalogue.yaml").read_text("utf-8")
    entries = YAML(typ="safe").load(text)
    return {
        name: CatalogueModel(**{**entry, "name": name, "languages": tuple(entry["languages"])})
        for name, entry in entries.items()
    }


def find_model(name: str) -> CatalogueModel:
    """Return a model by its name, or the end of it. Raises RecipeError where there is none, or more than one."""
    known = read_catalogue()
    found = [one for one in known if one.lower() == name.lower()] or [
        one for one in known if one.lower().rpartition("/")[2] == name.lower()
    ]
    if len(found) != 1:
        fix = f"{nearest(name, list(known))} `llmtune models list` shows all; any other model can be named in a recipe."
        raise RecipeError.of(f"the catalogue has no model {name!r}", "llmtune models", fix.strip())
    return known[found[0]]


def select_models(
    task: str | None = None, licences: Sequence[str] = (), language: str | None = None
) -> tuple[list[CatalogueModel], dict[str, str]]:
    """Return the models that may be used, and by name why others may not. Raises RecipeError for what nobody has."""
    known = read_catalogue().values()
    if task is not None and task not in TASK_FACTS:
        fix = f"{nearest(task, list(TASK_FACTS))} Tasks: {', '.join(TASK_FACTS)}.".strip()
        raise RecipeError.of(f"there is no task '{task}'", "--task", fix)
    spoken = sorted({one for model in known for one in model.languages})
    if language is not None and language not in spoken:
        fix = f"{nearest(language, spoken)} Languages: {', '.join(spoken)}.".strip()
        raise RecipeError.of(f"no model of the catalogue names the language '{language}'", "--language", fix)
    licensed = sorted({model.licence for model in known})
    for licence in licences:
        if licence not in licensed:
            fix = f"{nearest(licence, licensed)} Licences: {', '.join(licensed)}.".strip()
            raise RecipeError.of(f"no model of the catalogue has the licence '{licence}'", "--licence", fix)
    reasons = {model.name: model.hindrance(task, licences, language) for model in known}
    return [model for model in known if reasons[model.name] is None], {
        name: why for name, why in reasons.items() if why
    }
