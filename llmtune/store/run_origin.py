"""Tells this user's run folders from those of others, whose recipes may run code and send keys.

`.origin` in a run folder has a code of recipe.yaml, made with a secret in llmtune's cache (RFC 2104).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from llmtune.recipe.schema import Recipe
from llmtune.recipe.user_files import read_bytes
from llmtune.store.atomic_files import find_cache, write_text

SECRET, ORIGIN = "origin.key", ".origin"
"""A file of the cache, and one of each run folder."""


def save_recipe(run: Path, text: str, *, mark: bool = True) -> None:
    """Write recipe.yaml to a run folder; with `mark` mark the folder as this user's."""
    write_text(run / "recipe.yaml", text)
    if mark:
        mark_own(run)


def mark_own(run: Path) -> None:
    """Mark a run folder as this user's, as long as its recipe.yaml does not change."""
    if (code := _code(run)) is not None:
        write_text(run / ORIGIN, code)


def is_own(run: Path) -> bool:
    """Return whether this user's llmtune wrote the recipe.yaml of a run folder, or `verify --trust` marked it."""
    try:
        code, stored_code = _code(run), read_bytes(run / ORIGIN, 1024)
    except OSError:
        return False
    return code is not None and hmac.compare_digest(code.encode(), stored_code)


def _code(run: Path) -> str | None:
    secret = _secret()
    return hmac.new(secret, read_bytes(run / "recipe.yaml"), hashlib.sha256).hexdigest() if secret else None


def _secret() -> bytes | None:
    """Return the secret, made at the first call; None if the cache cannot be written."""
    file = find_cache() / SECRET
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent) as draft, suppress(FileExistsError):
                draft.write(secrets.token_bytes(32))
                draft.flush()
                os.link(draft.name, file)  # never shows a part of it; another process may be first
        return read_bytes(file, 1024) or None
    except OSError:
        return None


def list_model_code(recipe: Recipe) -> Iterator[str]:
    """Yield what a run's model may execute."""
    if recipe.model.trust_remote_code:
        yield f"the code of {recipe.model.name} (model.trust_remote_code)"
    if not recipe.model.use_safetensors:
        yield f"the pickled weights of {recipe.model.name} (model.use_safetensors: false)"


def list_evaluation_code(recipe: Recipe) -> Iterator[str]:
    """Yield what the evaluation of a run may execute."""
    yield from (f"{stated} (evaluate.metrics)" for stated in recipe.evaluate.own_metrics.values())
    files = [one.task for one in recipe.evaluate.benchmarks if one.task.endswith((".yaml", ".yml"))]
    yield from (f"the functions that {file} names (evaluate.benchmarks)" for file in files)


def name_code(run: Path, code: Iterator[str], console: Console) -> None:
    """Print what a run folder executes, unless it is this user's."""
    names = [] if is_own(run) else [*code]
    if names:
        fix = f"If you trust it: llmtune verify {run} --trust"
        what = f"{run} was not made by you on this machine, and runs {', '.join(names)}. {fix}"
        console.print(what, style="yellow", highlight=False, markup=False)
