"""`prepare --write-test`: the test rows of a recipe as a JSON Lines file, which stay the same when the data grows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from llmtune.data.audio import AUDIO_COLUMNS, find_recording
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_store import iterate_texts
from llmtune.data.sources import Detected, resolve_inputs
from llmtune.errors import DataError
from llmtune.recipe.data_section import Source
from llmtune.recipe.schema import Recipe
from llmtune.recipe.yaml_writer import source_line
from llmtune.records import Rows
from llmtune.store.atomic_files import explained, write_text

KEPT_KEYS = {"path", "config", "split", "revision", "encoding", "weight", "limit"}
"""Keys of a source that say where its rows come from; all others say what the rows are, and hold for the file too."""
OPTION = "--write-test"


def write_test_rows(recipe: Recipe, rows: Rows, file: Path, beside: Path) -> str:
    """Write the test rows as their sources have them, and return the line by which a recipe in `beside` names them.

    Raises:
        DataError: there are no test rows, or they come from sources that are read in different ways.
        EnvironmentProblem: the file cannot be written.
    """
    origins = {origin for origin, _ in iterate_texts(rows, "test")}
    lines: list[str] = []
    settings: dict[str, Source] = {}
    for detected in resolve_inputs(recipe.data, recipe.task):
        found = [
            json.dumps(locate_recording(value, detected, file), ensure_ascii=False, default=str)
            for origin, value in detected.input.raw_rows()
            if origin in origins and not isinstance(value, RowError)
        ]
        if found:
            source = Source(
                path=str(file), **detected.input.source.model_dump(exclude=KEPT_KEYS, exclude_defaults=True)
            )
            source = source if source.format == detected.row_format.name else source.model_copy(update={"format": None})
            settings.setdefault(source_line("test", source), source)
            lines += found
    if not lines:
        raise DataError.of("there are no test rows to write", "data.test", "Give it a share, such as data.test: 0.2.")
    if len(settings) > 1:
        what = f"the test rows come from sources that are read in {len(settings)} ways: {'; '.join(settings)}"
        raise DataError.of(what, OPTION, "Write a test file for each of these sources by hand, and list them.")
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(f"{line}\n" for line in lines))
    (source,) = settings.values()
    stated = source.model_dump(exclude_defaults=True).keys() - {"path"}
    path = os.path.relpath(file, beside)
    return source_line("test", source, path=path) if stated else f"test: {path}"


def locate_recording(value: Mapping[str, object], detected: Detected, file: Path) -> Mapping[str, object]:
    """Return a row whose recording, if it names one, is found from the folder of `file`."""
    folder = detected.input.folder
    for column in AUDIO_COLUMNS:
        ours = detected.columns.get(column, column)
        name = find_recording(value.get(ours))
        if folder is not None and name is not None and (folder / name).is_file():
            return {**value, ours: os.path.relpath(folder / name, file.absolute().parent)}
    return value
