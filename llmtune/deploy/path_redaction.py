"""What a run's files say of the disk they were made on, taken out before others read them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llmtune.errors import EnvironmentProblem, Problem
from llmtune.report.redaction import redact, redact_all

TEXTS = {".json", ".yaml", ".md", ".lock", ".jinja", ".txt", ""}
"""Endings of files that people read; the last one is that of an Ollama Modelfile."""
FOLDERS = ("folder",)
"""Keys of a lock that hold nothing but a place."""


def hide_places(value: Any) -> Any:
    """Return a JSON-able value with absolute paths cut to their last part, and secrets removed."""
    return redact_all(_hide(value))


def _hide(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hide(item) for key, item in value.items() if key not in FOLDERS}
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_place(value) else value


def is_place(text: str) -> bool:
    """Whether a text is the absolute path of a file or folder, or one below a home."""
    return os.path.isabs(text) or text.startswith("~")


def recipe_to_share(recipe: Path) -> str:
    """Return a resolved recipe without the places of its files and the comments that say where its values stood."""
    content = YAML(typ="safe").load(recipe.read_text("utf-8"))
    writer = YAML(typ="safe")
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    writer.dump(hide_places(content), text)
    head = "# What this model was made with. Paths are cut to their last part: put your own rows in their place.\n"
    return redact(head + text.getvalue())


def refuse_places(folder: Path, private: Iterable[Path]) -> None:
    """Raise EnvironmentProblem if a file that people read still names one of the `private` places."""
    names = sorted({str(place) for place in private if len(place.parts) > 2})
    problems = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in TEXTS:
            continue
        text = path.read_text("utf-8", errors="replace")
        problems += [
            Problem(f"names a place on this machine: {name}", path.name, "Take it out of the model or its template.")
            for name in names
            if name in text
        ]
    EnvironmentProblem.collect(problems)
