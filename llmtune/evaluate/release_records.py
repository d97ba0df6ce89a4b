"""Records of releases: one run's scores by row in a file small enough for git; and the champion that a recipe names."""

from __future__ import annotations

import base64
import json
import os
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llmtune.errors import RecipeError
from llmtune.evaluate.evaluation_file import name_baselines, restore_nan
from llmtune.evaluate.opened_runs import ScoredRun
from llmtune.evaluate.per_row_scores import unpack_measures
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.records import Difference, Json
from llmtune.store.atomic_files import explained, read_json
from llmtune.store.control_scores import ControlScores, TeacherScores
from llmtune.store.release_store import (
    RECORD_FILE,
    RELEASES,
    find_opponent,
    is_stored,
    list_release_names,
    list_stored,
    read_history,
    resolve_release,
    split_address,
)
from llmtune.store.run_folder import MANIFEST
from llmtune.store.run_listing import find_run
from llmtune.store.score_records import Control, Evaluation, GateResult, SimpleBaseline

RELEASE_VERSION = 1
OPPONENTS = ("simple_baselines", "controls", "pictured", "control_run", "teacher")
"""Keys of a release that an evaluation has too, and that earlier versions of llmtune did not write."""
RELEASE_FIX = "Write it again from its run: llmtune release RUN"


def _with_text(key: str) -> AfterValidator:
    def check(value: Json) -> Json:
        if not isinstance(value.get(key), str):
            raise ValueError(f"{key} is not text")
        return value

    return AfterValidator(check)


class Release(TypedDict):
    """Contents of a release file."""

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
    """Resolved; paths are reduced to their last part."""
    verdict: Annotated[Json, _with_text("word")]
    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    signatures: dict[str, str]
    gates: list[GateResult]
    certificates: dict[str, Json]
    """The merged, exported or served model, with the numbers of its parity check."""
    rows: int
    simple_baselines: NotRequired[dict[str, SimpleBaseline]]
    controls: NotRequired[dict[str, Control]]
    pictured: NotRequired[int]
    control_run: NotRequired[ControlScores | None]
    teacher: NotRequired[TeacherScores | None]
    measures: str
    """`measures.npz` of the tuned model, in base64: each row's hash, and its contribution to each score."""


def read_release(path: Path) -> Release:
    """Read a release file; raises RecipeError if it is not one, or from a later version."""
    with explained(path):
        content = read_json(path)
    if content is None:
        what = "not a release file" if path.exists() else "file not found"
        raise RecipeError.of(what, str(path), "Name a release (llmtune release list) or the file of one.")
    try:
        release = TypeAdapter(Release).validate_python(restore_nan(name_baselines(content)))
    except ValidationError as error:
        raise RecipeError.of(f"not a release file ({_first_problem(error)})", str(path), RELEASE_FIX) from None
    if release["release_version"] > RELEASE_VERSION:
        what = f"release version {release['release_version']}, but this llmtune reads up to {RELEASE_VERSION}"
        raise RecipeError.of(what, str(path), "Update llmtune.")
    return release


def is_release(content: object) -> bool:
    """Whether a JSON file's content is a release, of any version."""
    return isinstance(content, dict) and "release_version" in content


def _first_problem(error: ValidationError) -> str:
    first: Any = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"


def list_releases(folder: Path) -> list[tuple[Path, Release]]:
    """Return the releases in a folder, oldest first, skipping other files.

    Raises RecipeError for a damaged one, which may be the newest.
    """
    releases = []
    for path in folder.glob("*.json"):
        if (content := read_json(path)) is None:
            raise RecipeError.of("damaged: not JSON", str(path), "Restore it from the repository.")
        if is_release(content):
            releases.append((path, read_release(path)))
    return sorted(releases, key=lambda one: one[1]["date"])


def list_all_releases(folder: Path) -> list[tuple[Path, Release]]:
    """Return the stored releases by name, the oldest first, if `folder` is the store; then its release files."""
    names = list_release_names() if folder == RELEASES else []
    return [*chain.from_iterable(map(_list_by_age, names)), *list_releases(folder)]


def _list_by_age(name: str) -> list[tuple[Path, Release]]:
    promoted = [line["after"] for line in read_history(name)]
    stored = [(one.folder / RECORD_FILE, read_release(one.folder / RECORD_FILE)) for one in list_stored(name)]

    def age(one: tuple[Path, Release]) -> tuple[str, int]:  # dates are exact to the minute
        digest = one[0].parent.name
        return one[1]["date"], promoted.index(digest) if digest in promoted else len(promoted)

    return sorted(stored, key=age)


def find_record(stated: str) -> Path:
    """Return the release file of `release:NAME[@HASH]`, `NAME[@HASH]`, a release's folder, or a file.

    Raises RecipeError as `resolve_release` does.
    """
    path, name = Path(stated), stated.partition("@")[0]
    if stated.startswith(RELEASE_PREFIX):
        return resolve_release(stated) / RECORD_FILE
    if not path.exists() and name in list_release_names():
        return resolve_release(f"{RELEASE_PREFIX}{stated}") / RECORD_FILE
    return path / RECORD_FILE if is_stored(path) else path


def find_release(path: Path, name: str) -> Path:
    """Return the newest release of the recipe `name` if `path` is a folder of releases, else `path`.

    Raises RecipeError for a folder of releases without that name.
    """
    if path.is_file() or (path / MANIFEST).exists() or not path.is_dir():
        return path
    matching = [file for file, release in list_releases(path) if release["name"] == name]
    if not matching:
        fix = f"Write one from a run without gates on the champion: llmtune release RUN --out {path}/first.json"
        fix = f"Write evaluate.champion: release:{name}." if name in list_release_names() else fix
        raise RecipeError.of(f"neither a run nor a folder with a release of '{name}'", str(path), fix)
    return matching[-1]


def locate_champion(recipe: Recipe, run: Path | None) -> Path | None:
    """Return the run folder or release file that `evaluate.champion` names, for the run in folder `run`.

    None without a champion, or if it is `release:NAME` with the recipe's own name, which has no release yet. `NAME`
    does not mean the run itself.

    Raises RecipeError as `find_release`, `find_run` and `find_opponent` do.
    """
    champion = recipe.evaluate.champion
    if champion is None:
        return None
    if os.path.isabs(champion):
        return find_release(Path(champion), recipe.name)
    if not champion.startswith(RELEASE_PREFIX):
        return find_run(Path(champion), other_than=run).absolute()
    folder = find_opponent(champion, run)
    if folder is None and split_address(champion)[0] != recipe.name:  # no run of this recipe will make that release
        folder = resolve_release(champion)
    return folder.absolute() / RECORD_FILE if folder else None


def open_release(path: Path, name: str) -> ScoredRun:
    """Open a release for comparison under a unique name.

    Raises:
        RecipeError: not a release file.
        EnvironmentProblem: its row scores are damaged.
    """
    release = read_release(path)
    try:
        recipe = Recipe.model_validate_json(json.dumps(release["recipe"]))
        packed = base64.b64decode(release["measures"], validate=True)
    except ValidationError as error:
        raise RecipeError.of(
            f"its recipe does not fit this llmtune ({_first_problem(error)})", str(path), RELEASE_FIX
        ) from None
    except ValueError as error:
        raise RecipeError.of(f"damaged: {error}", str(path), RELEASE_FIX) from None
    return ScoredRun(name, recipe, released_evaluation(release), unpack_measures(packed, path, RELEASE_FIX))


def released_evaluation(release: Release) -> Evaluation:
    """Return the scores in a release as an evaluation."""
    scores = release["base"], release["tuned"], release["difference"]
    opponents: Json = {name: one for name, one in release.items() if name in OPPONENTS}
    return Evaluation(*scores, (), release["rows"], release["signatures"], **opponents)
