"""A release file: what one run scored, row by row, small enough for git; no text of rows, and no paths."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llmtune.errors import RecipeError
from llmtune.evaluate.evaluation_file import restore_nan
from llmtune.evaluate.opened_runs import ScoredRun
from llmtune.evaluate.per_row_scores import unpack_measures
from llmtune.recipe.schema import Recipe
from llmtune.records import Difference, Evaluation, GateResult, Json
from llmtune.store.atomic_files import explained, read_json
from llmtune.store.run_folder import MANIFEST

VERSION = 1
FIX = "Make it again from its run: llmtune release RUN"


def _with_text(key: str) -> AfterValidator:
    def check(value: Json) -> Json:
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key} is not text")
        return value

    return AfterValidator(check)


class Release(TypedDict):
    """What the file holds."""

    release_version: int
    llmtune: str
    name: str
    date: str
    run: str
    """Name of the run folder."""
    lock: str
    """sha256 of llmtune.lock."""
    trained: str
    """Hash of the adapter or the weights."""
    recipe: Annotated[Json, _with_text("task")]
    """Resolved; of paths the last part."""
    verdict: Annotated[Json, _with_text("word")]
    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    signatures: dict[str, str]
    gates: list[GateResult]
    certificates: dict[str, Json]
    """What was merged, exported or served, with the numbers of its parity check."""
    rows: int
    measures: str
    """`measures.npz` of the tuned model, in base64: each row by its hash, and its part in each score."""


def read_release(path: Path) -> Release:
    """Read a release file; raises RecipeError where it is none, or of a later version."""
    with explained(path):
        content = read_json(path)
    if content is None:
        what = "not a release file" if path.exists() else "there is no such file"
        raise RecipeError.of(what, str(path), "Name a file that 'llmtune release RUN' wrote.")
    try:
        found = TypeAdapter(Release).validate_python(restore_nan(content))
    except ValidationError as error:
        raise RecipeError.of(f"not a release file ({_first_problem(error)})", str(path), FIX) from None
    if found["release_version"] > VERSION:
        what = f"a release of version {found['release_version']}, and this llmtune reads up to {VERSION}"
        raise RecipeError.of(what, str(path), "Update llmtune.")
    return found


def is_release(content: object) -> bool:
    """Whether the content of a JSON file is that of a release, of whatever version."""
    return isinstance(content, dict) and "release_version" in content


def _first_problem(error: ValidationError) -> str:
    first: Any = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def list_releases(folder: Path) -> list[tuple[Path, Release]]:
    """Return the releases in a folder, the oldest first; other files are left out.

    Raises RecipeError for one that is damaged, which may be the newest.
    """
    found = []
    for path in folder.glob("*.json"):
        if (content := read_json(path)) is None:
            raise RecipeError.of("damaged: it holds no JSON", str(path), "Put it back as the repository has it.")
        if is_release(content):
            found.append((path, read_release(path)))
    return sorted(found, key=lambda one: one[1]["date"])


def find_release(path: Path, name: str) -> Path:
    """Return the newest release of the recipe `name` in a folder of releases; any other path is itself.

    Raises RecipeError for a folder of releases that has none of that name.
    """
    if path.is_file() or (path / MANIFEST).exists() or not path.is_dir():
        return path
    found = [file for file, release in list_releases(path) if release["name"] == name]
    if not found:
        fix = f"Make the first, of a run without gates on the champion: llmtune release RUN --out {path}/first.json"
        raise RecipeError.of(f"neither a run nor a folder with a release of '{name}'", str(path), fix)
    return found[-1]


def open_release(path: Path, name: str) -> ScoredRun:
    """Open a release to be compared, under a name of its own.

    Raises:
        RecipeError: not a release file.
        EnvironmentProblem: its scores by row are damaged.
    """
    found = read_release(path)
    try:
        recipe = Recipe.model_validate_json(json.dumps(found["recipe"]))
        packed = base64.b64decode(found["measures"], validate=True)
    except ValidationError as error:
        raise RecipeError.of(
            f"its recipe does not fit this llmtune ({_first_problem(error)})", str(path), FIX
        ) from None
    except ValueError as error:
        raise RecipeError.of(f"damaged: {error}", str(path), FIX) from None
    scores = found["base"], found["tuned"], found["difference"]
    evaluation = Evaluation(*scores, (), found["rows"], found["signatures"])
    return ScoredRun(name, recipe, evaluation, unpack_measures(packed, path, FIX))
