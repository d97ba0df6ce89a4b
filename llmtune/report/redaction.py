"""Take paths of this machine, and secrets with them, out of what is published."""

from __future__ import annotations

import os
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from llmtune.errors import EnvironmentProblem, Problem
from llmtune.recipe.secrets import redact, redact_all
from llmtune.store.run_lock import read_resolved

# Paths of this machine


TEXT_SUFFIXES = {".json", ".yaml", ".md", ".lock", ".jinja", ".txt", ""}
"""Endings of files that people read; the last one is that of an Ollama Modelfile."""
PATH_KEYS = ("folder",)
"""Keys of a lock that hold nothing but a path."""


def hide_paths(value: object) -> object:
    """Return a JSON-able value with absolute paths cut to their last part, and secrets removed."""
    return redact_all(_cut_paths(value))


def _cut_paths(value: object) -> object:
    if isinstance(value, dict):
        return {key: _cut_paths(item) for key, item in value.items() if key not in PATH_KEYS}
    if isinstance(value, list | tuple):
        return [_cut_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_local_path(value) else value


def is_local_path(text: str) -> bool:
    """Whether a text is the absolute path of a file or folder, or one below a home."""
    return os.path.isabs(text) or text.startswith("~")


def recipe_to_share(recipe: Path) -> str:
    """Return a resolved recipe without its paths, and without the comments that name where its values stood."""
    writer = YAML(typ="safe")
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    writer.dump(hide_paths(read_resolved(recipe)), text)
    head = "# What this model was made with. Paths are cut to their last part: put your own rows in their place.\n"
    return redact(head + text.getvalue())


def refuse_paths(folder: Path, private: Iterable[Path]) -> None:
    """Raise EnvironmentProblem if a file that people read still names one of the `private` paths."""
    names = sorted({str(path) for path in private if len(path.parts) > 2})
    texts = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in TEXT_SUFFIXES]
    EnvironmentProblem.collect(
        Problem(f"names a place on this machine: {name}", path.name, "Take it out of the model or its template.")
        for path in texts
        for name in names
        if name in path.read_text("utf-8", errors="replace")
    )
