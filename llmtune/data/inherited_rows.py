"""Rows that a model learned before a run: those of the earlier runs that made its adapter or its base model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmtune.data.input_overlap import COMMON_ROWS, COMMON_SHARE
from llmtune.data.row_kind import hash_inputs
from llmtune.data.row_store import iterate_ids, iterate_rows, load_rows
from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.recipe.schema import Recipe
from llmtune.records import Rows
from llmtune.store.atomic_files import explained
from llmtune.store.run_folder import CERTIFICATE, MANIFEST, OWN_FOLDERS
from llmtune.store.run_lock import LOCK, read_lock

LEARNED, HASH_BYTES = "learned_inputs.bin", 16
"""In a release, in place of its rows: the sorted hashes of `hash_content`."""


@dataclass(frozen=True)
class Inheritance:
    """The earlier runs that a model comes from."""

    runs: tuple[Path, ...] = ()
    """Run folders with rows, the nearest first."""
    unknown: tuple[str, ...] = ()
    """Adapters and trained models without a run folder that has rows."""


def find_inheritance(recipe: Recipe) -> Inheritance:
    """Follow `adapter.start_from` and `model.name` of a recipe, and those of each run found, to all earlier runs."""
    candidates = recipe.model.candidates
    bases = (recipe.model.name,) if recipe.model.name else candidates if isinstance(candidates, tuple) else ()
    starts = _list_starts(recipe.adapter.start_from, bases)
    runs: list[Path] = []
    unknown: list[str] = []
    for start, is_trained in starts:
        run = find_run_of(start)
        if run is not None and run not in runs:
            runs.append(run)
            if (run / LEARNED).is_file():
                continue  # it lists the inputs of its own earlier runs too
            lock = read_lock(run / LOCK)
            adapter = lock.get("start_from")
            starts += _list_starts(adapter["folder"] if adapter else None, [lock["model"]["name"]])
        elif run is None and is_trained:
            unknown.append(start)
    return Inheritance(tuple(runs), tuple(dict.fromkeys(unknown)))


def _list_starts(adapter: str | None, bases: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the folders that training starts from, each with whether llmtune or PEFT certainly trained it."""
    folders = [base for base in bases if os.path.isabs(base)]
    trained = [(base, not os.path.isdir(base) or os.path.exists(os.path.join(base, CERTIFICATE))) for base in folders]
    return [*([(adapter, True)] if adapter else []), *trained]


def find_run_of(start: str) -> Path | None:
    """Return the run folder that a folder is, or is part of; None if its lock or its rows cannot be read."""
    place = Path(os.path.realpath(start))
    for folder in (place, *place.parents):
        inner = place.relative_to(folder).parts[:1]
        if (folder / MANIFEST).is_file() and {*inner} <= {*OWN_FOLDERS} and has_learned(folder):
            return folder
    return None


def has_learned(run: Path) -> bool:
    """Return whether it is known what a run or release learned; an earlier run never ends this one."""
    with suppress(LlmtuneError):
        if (run / LEARNED).is_file():
            return True
        read_lock(run / LOCK)
        load_rows(run / "data" / "rows")
        return True
    return False


def find_learned(rows: Rows, runs: Iterable[Path], split: str = "test") -> frozenset[str]:
    """Return the ids of a split's rows whose input is in training or validation rows of some runs or releases.

    An input of many different rows is the task itself and does not count, as in `find_shared_inputs`. Raises DataError
    or EnvironmentProblem if rows of a run are damaged.
    """
    learned = {one for run in runs for one in list_learned(run)}
    if not learned:
        return frozenset()
    pairs = zip(iterate_ids(rows, split), iterate_rows(rows, split), strict=True)
    return frozenset(name for name, (_, row) in pairs if learned.intersection(hash_inputs(row)))


def list_learned(run: Path) -> Collection[bytes]:
    """Return the hashes of the inputs that a run or release learned. Raises as `find_learned` does."""
    if not (run / LEARNED).is_file():
        return _list_inputs(load_rows(run / "data" / "rows"))
    with explained(run / LEARNED):
        content = (run / LEARNED).read_bytes()
    if len(content) % HASH_BYTES:
        raise EnvironmentProblem.of("damaged: it ends within a hash", str(run / LEARNED), "Release the run again.")
    return [content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES)]


def save_learned(run: Path, recipe: Recipe, folder: Path) -> None:
    """Write the hashes of all inputs that the model of a run learned, also in earlier runs, to the release `folder`."""
    runs = [run, *find_inheritance(recipe).runs]
    (folder / LEARNED).write_bytes(b"".join(sorted({one for each in runs for one in list_learned(each)})))


def _list_inputs(rows: Rows) -> Collection[bytes]:
    input_of_row = {
        name: hash_inputs(row)
        for split in ("train", "validation")
        for name, (_, row) in zip(iterate_ids(rows, split), iterate_rows(rows, split), strict=True)
    }
    counts = Counter(one for inputs in input_of_row.values() for one in inputs)
    most = max(COMMON_ROWS, COMMON_SHARE * len(input_of_row))
    return [one for one, number in counts.items() if number <= most]
