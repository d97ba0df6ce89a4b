"""The default run folder. Its name has a hash of the recipe and of the rows, so new rows make another folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.data.sources import SourceFile, hash_sources, list_sources
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.yaml_writer import written_path
from llmtune.store.atomic_files import hash_value
from llmtune.store.run_listing import RUNS, list_runs
from llmtune.store.run_lock import LOCK, Lock, read_lock

SHOWN_CHANGES = 3
KINDS = ("sha256", "xxh3_128", "commit", "etag")
"""Keys of a file's record in a lock; one of them identifies its content."""


def hash_run(loaded: LoadedRecipe) -> str:
    """Hash a recipe and the content of the rows that it trains and measures on.

    Like the recipe's fingerprint, it covers `data.corpus` only if negatives are mined in it. Raises the errors of
    `hash_sources`.
    """
    data = loaded.recipe.data
    read = data if data.negatives is not None else data.model_copy(update={"corpus": None})
    return hash_value([loaded.fingerprint, hash_sources(read, loaded.recipe.task)])


def default_folder(loaded: LoadedRecipe) -> Path:
    """Return the default run folder, `runs/<name>-<8 hex>`; raises the errors of `hash_sources`."""
    return RUNS / f"{loaded.recipe.name}-{hash_run(loaded)[:8]}"


def rowless_folder(loaded: LoadedRecipe) -> Path:
    """Return the folder for the error report of a recipe whose rows cannot be read."""
    return RUNS / f"{loaded.recipe.name}-{loaded.fingerprint[:8]}"


def explain_new(loaded: LoadedRecipe) -> str:
    """Return why a recipe's default folder is a new one: what changed since the newest run of the same name.

    Empty if there is no earlier run. Runs of exactly this recipe come first.
    """
    earlier = [
        (run.folder, read_lock(run.folder / LOCK))
        for run in list_runs()
        if run.name == loaded.recipe.name and (run.folder / LOCK).is_file()
    ]
    same_recipe = [one for one in earlier if one[1]["fingerprint"] == loaded.fingerprint]
    if not earlier:
        return ""
    folder, lock = (same_recipe or earlier)[0]
    if not same_recipe:
        return f"the recipe changed since {folder.name}: new folder"
    files = _group_files(list_sources(loaded.recipe.data, loaded.recipe.task)[1])
    changes = [*_list_changes(_group_records(lock, folder, files), files)]
    if not changes:
        return f"{folder.name} got its name from the recipe alone, without the rows: new folder"
    more = [f"{len(changes) - SHOWN_CHANGES} more"] if len(changes) > SHOWN_CHANGES else []
    return f"rows changed since {folder.name} ({', '.join(changes[:SHOWN_CHANGES] + more)}): new folder"


@dataclass
class Content:
    """The content of a data file, or of all files of a remote source."""

    hashes: set[str]
    lines: int | None
    """None for a binary or remote file."""


def _group_files(files: Sequence[SourceFile]) -> dict[str, Content]:
    """Return data files by their path, and remote sources by their name."""
    contents: dict[str, Content] = {}
    for file in files:
        contents.setdefault(str(file.path or file.source), Content(set(), file.lines)).hashes.add(file.hash)
    return contents


def _group_records(lock: Lock, run: Path, present: Collection[str]) -> dict[str, Content]:
    """Return the data files in a run's lock as `_group_files` does; a file moved along with its run has its new path.

    `present` are the paths of the files that the recipe names now.
    """
    contents: dict[str, Content] = {}
    for record in lock["data"].get("files", []):
        place = record["path"] or record["source"]
        if place not in present and record["path"] is not None and (before := lock.get("folder")):
            place = os.path.normpath(run.absolute() / os.path.relpath(place, before))
        content = contents.setdefault(place, Content(set(), record.get("lines")))
        content.hashes.update(str(record[kind]) for kind in KINDS if kind in record)  # type: ignore[literal-required]
    return contents


def _list_changes(before: Mapping[str, Content], after: Mapping[str, Content]) -> Iterator[str]:
    """Yield the files that are new, changed or gone since a run."""
    for place, content in after.items():
        if place not in before:
            yield f"{written_path(place)} is new"
        elif content.hashes != before[place].hashes:
            yield f"{written_path(place)} {_describe_change(before[place].lines, content.lines)}"
    yield from (f"{written_path(place)} is gone" for place in before if place not in after)


def _describe_change(before: int | None, after: int | None) -> str:
    if before is None or after is None or before == after:
        return "changed"
    lines = abs(after - before)
    return f"{'grew' if after > before else 'shrank'} by {lines:,} line{'s' if lines > 1 else ''}"
