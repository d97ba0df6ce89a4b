"""The model that `llmtune init` proposes, by task, memory, language and network, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.model.builtin_models import PACKAGED
from llmtune.model.cached_models import find_local_model
from llmtune.model.catalogue import ModelQuery, read_catalogue
from llmtune.recipe.model_kind import PROPOSED_MODELS
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.store.atomic_files import read_json
from llmtune.store.process_environment import offline_switches
from llmtune.store.run_lock import package_versions

PACKAGED_LANGUAGE = "en"
"""All packaged models know English."""
FREE = ("apache-2.0", "mit")
"""Licences of proposed models."""


def propose_model(
    task: str, memory_bytes: float, *, on_gpu: bool, pictures: bool = False, language: str | None = None
) -> tuple[str, str]:
    """Return a model that knows the language and can train in `memory_bytes`, and why.

    It is the packaged one, which knows English, where the network is off, or without a GPU if it is installed; else
    one of the hub.
    """
    proposed = PROPOSED_MODELS["image-text" if pictures else TASK_FACTS[task].models[0]]
    name = [model for least, model in proposed.hub if memory_bytes >= least][-1]
    speaks = "" if language in (None, PACKAGED_LANGUAGE) else f"the rows seem to be in {language!r}"
    query = ModelQuery(task, FREE, language)
    if speaks and (known := read_catalogue().get(name)) and known.hindrance(query):
        fits = [one for one in read_catalogue().values() if one.kind == known.kind and not one.hindrance(query)]
        fits = [one for one in fits if one.parameters >= known.parameters]
        name = min(fits, key=lambda one: (one.parameters, one.name)).name if fits else name
    if not proposed.packaged:
        return name, speaks
    packaged = PACKAGED[proposed.packaged.removeprefix("builtin:")]
    is_installed = bool(package_versions([packaged.distribution])[packaged.distribution])
    install = "" if is_installed else packaged.install
    is_offline = offline_switches() and not find_local_model(name)
    if is_offline or (not on_gpu and is_installed and not speaks):
        knows = f"{speaks}, and this model knows English; {name} on the hub knows {language!r}" if speaks else ""
        return proposed.packaged, "; ".join(filter(None, (knows, install)))
    apart = f"without a network: {proposed.packaged}{', which knows English' if speaks else ''}"
    return name, "; ".join(filter(None, (speaks, apart, install))) if speaks or not on_gpu else ""


def look_up_config(model: str) -> Mapping[str, Any]:
    """Return the configuration of a model in a folder, the hub's cache or the catalogue; empty if unknown."""
    folder = find_local_model(model)
    config = read_json(folder / "config.json") if folder else None
    listed = read_catalogue().get(model) if config is None else None
    return config if isinstance(config, dict) else listed.config if listed else {}
