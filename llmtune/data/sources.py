"""Resolves the recipe's data sources to files, and detects the format of each."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal, TypeVar

from llmtune.data import hub_datasets as hub
from llmtune.data.column_mapping import has_columns, infer_columns, rename, unused_keys
from llmtune.data.encoding_guess import guess_encoding
from llmtune.data.file_readers import NOT_UTF8, JsonLine, LazyRow, mentions, parse_lines, read_lazily
from llmtune.data.object_store import RemoteFile, find_objects, is_remote
from llmtune.data.pictures import IMAGES, PICTURE_KEY, SIGNS
from llmtune.data.rejected_rows import RawRow, RowError
from llmtune.data.row_formats import FORMATS, RowFormat, detect_format, list_media, map_columns, reads_rows
from llmtune.data.row_kind import MESSAGES, kind_of_task
from llmtune.errors import STEERING, DataError, Problem, nearest, visible
from llmtune.recipe.builtin import recipes_folder
from llmtune.recipe.data_section import DATA_ENDINGS, DataSection, Source, data_ending
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.user_files import match_files, walk_files
from llmtune.recipe.yaml_writer import source_line, written_path
from llmtune.records import Advance
from llmtune.store.atomic_files import hash_lines, hash_recording, read_once

IN_FOLDERS = tuple(ending for ending in DATA_ENDINGS if ending != ".md")
"""File patterns taken from a folder: its README is no data."""
CONTAINERS = ("jsonl", "json", "csv", "parquet", "excel", "text")
SPREADSHEETS = (".xls", ".xlsb", ".ods", ".numbers")
METADATA = "metadata"
"""Stem of the metadata file of a folder of recordings; other files there are no rows."""
FileT = TypeVar("FileT", Path, RemoteFile)
MAX_FILES = 20_000
LOOKED_AT = 20
"""How many good rows decide a file's format."""
LOOKED_THROUGH = 1000
"""How many rows may be read to find them."""


@dataclass(frozen=True)
class Input:
    """A file (or hub data set) to read, and its split."""

    source: Source
    number: int
    """The source's number in the recipe."""
    split: str | None
    """None if the split is decided by hash."""
    name: str
    """Its name in origins and messages."""
    path: Path | RemoteFile | None
    """None for a hub data set."""
    container: str

    def raw_rows(self) -> Iterator[RawRow]:
        """Read it from the start."""
        return parse_lines(self.lazy_rows(lambda count: None))

    def lazy_rows(self, advance: Advance) -> Iterator[LazyRow]:
        """Read it from the start, with lines of JSON unparsed; `advance` gets the number of bytes read."""
        if self.path is None:
            return iter(hub.read_hub(self.name.removeprefix(hub.HUB), self.source))
        return read_lazily(self.path, self.name, self.container, advance, self.source.encoding, self.source.config)

    @property
    def size(self) -> int:
        """Bytes of the file, for the progress bar."""
        if isinstance(self.path, RemoteFile):
            return self.path.size
        return self.path.stat().st_size if self.path else 0

    @property
    def folder(self) -> Path | None:
        """Base of the file names in its rows."""
        return self.path.parent if isinstance(self.path, Path) else None


@dataclass(frozen=True)
class Detected:
    """An input with the format of its rows."""

    input: Input
    row_format: RowFormat
    columns: Mapping[str, str]
    """The column mapping, from the recipe and usual aliases."""
    roles: Mapping[str, Sequence[str]]
    """The recipe's role mapping: our roles, and their names in the rows."""
    unused: tuple[str, ...]
    """Columns and message keys of the first rows that are not used."""


def local_input(path: Path) -> Input:
    """Return the input for a file outside any recipe. Raises DataError for an unknown ending."""
    source = Source(path=str(path))
    return Input(source, 0, None, written_path(str(path)), path, _container(path, source, "--input"))


def resolve_inputs(data: DataSection, task: str, *, local_only: bool = False) -> list[Detected]:
    """Find the files of every source and inspect their first rows; `local_only` skips the rows of remote ones.

    Raises:
        DataError: All problems of all files: missing, empty, unreadable, unknown or mixed format.
    """
    detected: list[Detected] = []
    problems: list[Problem] = []
    for number, (key, place, source) in enumerate(data.named_sources()):
        if local_only and (hub.dataset_name(source) is not None or is_remote(source.path)):
            continue
        split = None if place == "train" else place
        try:
            inputs = _inputs_of(source, number, split, key)
            of_source = [_detect(one, data, task, problems) for one in inputs if place != "corpus"]
        except DataError as error:
            problems += error.problems
            continue
        detected += (good := [one for one in of_source if one])
        kinds = {one.row_format.name: one.input.name for one in reversed(good)}
        if len(kinds) > 1:
            listing = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
            problems.append(Problem(f"mixed formats: {listing}", key, "Make each a separate source."))
    if data.columns and not problems and not any(data.columns.items() <= one.columns.items() for one in detected):
        names = ", ".join(repr(theirs) for theirs in data.columns.values())
        problems.append(Problem(f"no file has {names}", "data.columns", "Correct the names, or remove the key."))
    DataError.collect(problems)
    return detected


def open_sources(sources: Sequence[Source], key: str) -> list[Input]:
    """Return the inputs of sources whose rows have no format, such as passages. Raises DataError."""
    return [one for number, source in enumerate(sources) for one in _inputs_of(source, number, None, key)]


def _inputs_of(source: Source, number: int, split: str | None, key: str) -> list[Input]:
    if hub.dataset_name(source) is not None:
        return [Input(source, number, split, source.path, None, "hub")]
    if is_remote(source.path):
        return [
            Input(source, number, split, file.url, file, _container(PurePosixPath(file.url), source, key))
            for file in _find_remote(source, key)
        ]
    return [
        Input(source, number, split, written_path(str(path)), path, _container(path, source, key))
        for path in find_files(source, key)
    ]


def _detect(one: Input, data: DataSection, task: str, problems: list[Problem]) -> Detected | None:
    """Detect a file's row format from its first good rows; add problems to `problems`."""
    source = one.source
    rows: list[dict[str, object]] = []
    first_bad: str | None = None
    try:
        for origin, value in islice(one.raw_rows(), LOOKED_THROUGH):
            if isinstance(value, RowError):
                first_bad = first_bad or f"{origin}: {value.reason} ({value.detail})"
            else:
                rows.append(value)
                if len(rows) == LOOKED_AT:
                    break
        if not rows:
            if first_bad is None:
                what, fix = "the file is empty: no rows", "Give a file with rows, or remove it from the recipe."
                raise DataError.of(what, one.name, fix)
            hint = encoding_hint(one) if NOT_UTF8 in first_bad else None
            what = f"none of the first rows can be read; {first_bad}"
            raise DataError(Problem(what, one.name), *([hint] if hint else []))
        forced = source.format if source.format in FORMATS else None
        columns = source.columns or shared_columns(data, rows)
        row_format = detect_format(rows, task, columns, forced, one.name, lambda: _suggest(one, rows, task))
    except DataError as error:
        problems += error.problems
        return None
    columns = map_columns(row_format, rows, task, columns)
    unused = tuple(name for row in rows for name in unused_keys(row, row_format.columns, columns))
    return Detected(one, row_format, columns, dict[str, Sequence[str]](data.roles.items()), unused)


def shared_columns(data: DataSection, rows: Sequence[Mapping[str, object]]) -> Mapping[str, str]:
    """Return `data.columns` if the file has one of them; other files are read by their own names."""
    return data.columns if any(has_columns(row, theirs) for theirs in data.columns.values() for row in rows) else {}


def _suggest(one: Input, rows: Sequence[Mapping[str, object]], task: str) -> str | None:
    """Return a line of the recipe that reads the file, tested on its first rows; None if none is found."""
    columns = infer_columns(rows, TASK_FACTS[task].columns, kind_of_task(task).aliases)
    reads = columns and reads_rows(rows, task, columns, one.folder)
    return source_line(one.split or "train", one.source, columns=columns) if reads else None


def encoding_hint(one: Input) -> Problem | None:
    """Return the recipe line for a file that is not UTF-8; None if its encoding cannot be guessed."""
    encoding = None if one.path is None or one.source.encoding else guess_encoding(one.path)
    if encoding is None:
        return None
    line = source_line(one.split or "train", one.source, encoding=encoding)
    return Problem(f"the file looks like {encoding}, not UTF-8", one.name, f"State it: {line}")


def _find_remote(source: Source, key: str) -> list[RemoteFile]:
    """Return the files that a URL names; for a folder, only its data files."""
    files = find_objects(source.path)
    data_files = [file for file in files if data_ending(PurePosixPath(file.url)) in IN_FOLDERS]
    return _check_count(files if len(files) == 1 else data_files or files, key, source.path)


def find_files(source: Source, key: str) -> list[Path]:
    """Return the files that a source names, sorted.

    Raises:
        DataError: No file is found.
    """
    if source.path.startswith("builtin:"):
        path = _builtin_path(source.path.removeprefix("builtin:"), key)
        return _files_in(path, key) if path.is_dir() else [path]
    path = Path(source.path)
    if path.is_dir():
        return _files_in(path, key)
    if os.path.lexists(path):
        return _check_count([path], key, source.path)
    if glob.has_magic(source.path):
        with _walked(key, source.path):
            matches = match_files(source.path)
        if not matches:
            raise DataError.of(f"no file matches {source.path}", key, "Check the pattern; `**` crosses folders.")
        return _check_count(matches, key, source.path)
    raise DataError.of(f"file not found: {source.path}", key, _missing_hint(path))


def _builtin_path(name: str, key: str) -> Path:
    folder = recipes_folder() / "data"
    files = [*folder.glob("*.jsonl*"), *(path.parent for path in folder.glob("*/metadata.csv"))]
    files_by_name = {path.name.split(".")[0]: path for path in sorted(files)}
    if name not in files_by_name:
        fix = f"llmtune comes with: {', '.join(files_by_name) or 'none'}.{nearest(name, list(files_by_name))}"
        raise DataError.of(f"builtin:{name} not found", key, fix)
    return files_by_name[name]


def _files_in(folder: Path, key: str) -> list[Path]:
    with _walked(key, str(folder)):
        names = sorted(walk_files(folder))
    hidden = (".", "_", "~$")  # Excel keeps a file of the last name while a workbook is open
    names = [path for path in names if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)]
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        fix = "Write it as Parquet (`dataset.to_parquet(...)`) and give that file."
        raise DataError.of("a data set written by save_to_disk, which cannot be read", f"{key}: {folder}", fix)
    data_files = [path for path in names if data_ending(path) in IN_FOLDERS]
    data_files = [path for path in data_files if path.name.split(".")[0] == METADATA] or data_files
    if not data_files:
        what = f"the folder contains no data file ({len(names)} others)" if names else "the folder is empty"
        raise DataError.of(what, f"{key}: {folder}", f"Data files end in {', '.join(IN_FOLDERS)}, compressed or not.")
    return _check_count(data_files, key, str(folder))


@contextmanager
def _walked(key: str, source: str) -> Iterator[None]:
    """Turn errors of a folder search into a DataError."""
    try:
        yield
    except PermissionError as error:
        raise DataError.of("the folder cannot be read (permission denied)", f"{key}: {error.filename}") from error
    except OSError as error:
        fix = "Name the folder, or the files, that contain the rows."
        raise DataError.of(error.strerror or str(error), f"{key}: {source}", fix) from error


def _check_count(files: list[FileT], key: str, source: str) -> list[FileT]:
    """Refuse implausibly many files, and names with control characters or invalid UTF-8. Raises DataError."""
    if len(files) > MAX_FILES:
        fix = "Name the folder, or the files, that contain the rows."
        raise DataError.of(f"it contains {len(files):,} data files", f"{key}: {source}", fix)
    DataError.collect(
        Problem(
            "the name of this file contains control characters, or is not UTF-8",
            f"{key}: {visible(name)}",
            "Rename it.",
        )
        for name in (file.url if isinstance(file, RemoteFile) else str(file) for file in files)
        if STEERING.search(name)
    )
    return files


def _missing_hint(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    if (script := parent / f"make_{path.name.split('.')[0].replace('-', '_')}.py").is_file():
        return f"A script makes it: python {written_path(str(script))}"
    names = sorted(entry.name for entry in parent.iterdir()) if os.access(parent, os.R_OK) else []
    return f"Looked in {parent}.{nearest(path.name, names)}"


def _container(path: PurePath, source: Source, key: str) -> str:
    """Return how to read a file: by `format` if that names a file type, else by its ending."""
    ending = DATA_ENDINGS.get(data_ending(path))
    if source.format in CONTAINERS and not (source.format == "text" and ending not in (None, "text")):
        return source.format
    if ending is None:
        fix = f"Set `format:` to one of {', '.join(CONTAINERS)}; known endings are {', '.join(DATA_ENDINGS)}."
        fix = "Save it as CSV UTF-8, or as .xlsx." if data_ending(path) in SPREADSHEETS else fix
        raise DataError.of(f"the ending {data_ending(path)!r} does not show the file type", f"{key}: {path}", fix)
    return ending


@dataclass(frozen=True)
class SourceFile:
    """A file (or a commit of a hub data set) that rows come from, and its hash."""

    source: str
    """The recipe's name for it: a path, a pattern, `builtin:NAME` or `hub:NAME`."""
    name: str
    path: Path | None
    """None if it is not on this machine."""
    kind: Literal["sha256", "xxh3_128", "commit", "etag"]
    """sha256; xxh3_128 for a recording; the commit for a hub data set; etag and size for a URL."""
    hash: str
    lines: int | None = None
    """Lines of a text file on this machine."""

    @property
    def record(self) -> dict[str, str | int | None]:
        """Return its record for the lock."""
        path = None if self.path is None else str(self.path)
        lines = {} if self.lines is None else {"lines": self.lines}
        return {"source": self.source, "path": path, self.kind: self.hash, **lines}


def hash_sources(data: DataSection, task: str) -> str:
    """Hash everything that `prepare_rows` reads: sha256 over the sources, file names, file bytes, and hub commits.

    This includes the recordings and pictures that the rows name.

    Raises:
        DataError: A source cannot be read.
        EnvironmentProblem: The commit of a hub data set cannot be determined.
    """
    return list_sources(data, task)[0]


def list_sources(data: DataSection, task: str) -> tuple[str, list[SourceFile]]:
    """Return the hash of all sources, and each of their files. Raises the errors of `hash_sources`."""
    digest = hashlib.sha256()
    if shared := {name: value for name in ("columns", "roles") if (value := getattr(data, name))}:
        digest.update(json.dumps(shared, sort_keys=True).encode())
    problems: list[Problem] = []
    listed: list[SourceFile] = []
    for key, place, source in data.named_sources():
        settings = source.model_dump(mode="json", exclude={"path"})
        digest.update(json.dumps([None if place == "train" else place, settings], sort_keys=True).encode())
        try:
            for file in _hash_source(source, data, key, task):
                digest.update(f"{file.name} {file.hash}\n".encode())
                listed.append(file)
        except DataError as error:
            problems += error.problems
        except OSError as error:
            problems.append(Problem(f"it cannot be read ({error.strerror})", f"{key}: {source.path}"))
    DataError.collect(problems)
    return digest.hexdigest(), listed


def _hash_source(source: Source, data: DataSection, key: str, task: str) -> Iterator[SourceFile]:
    name = hub.dataset_name(source)
    if name is not None:
        yield SourceFile(source.path, name, None, "commit", hub.resolve_commit(name, source.revision))
        return
    for file in _find_remote(source, key) if is_remote(source.path) else ():
        tagged = f"{file.etag}-{file.size}" if file.etag else file.hash()
        yield SourceFile(source.path, file.url, None, "etag" if file.etag else "sha256", tagged)
    for one in () if is_remote(source.path) else _inputs_of(source, 0, None, key):
        assert isinstance(one.path, Path)
        digest, lines = read_once(one.path, hash_lines)
        yield SourceFile(source.path, one.path.name, one.path, "sha256", digest, lines)
        shows = kind_of_task(task) is MESSAGES and (one.container == "excel" or mentions(one.path, SIGNS))
        if (TASK_FACTS[task].takes_audio or shows) and (detected := _detect(one, data, task, [])):
            yield from _hash_media(detected, one.path, task)


def _hash_media(detected: Detected, path: Path, task: str) -> Iterator[SourceFile]:
    """Yield each recording or picture that a file's rows name. Missing or bad ones are reported when they are read."""
    source, files = detected.input.source, set[Path]()
    rows = detected.input.lazy_rows(lambda count: None)
    if kind_of_task(task) is MESSAGES and not any(name in detected.columns for name in IMAGES):
        rows = (row for row in rows if not isinstance(row[1], JsonLine) or row[1].may_contain(PICTURE_KEY))
    for _, value in parse_lines(rows):
        row = {} if isinstance(value, RowError) else rename(value, detected.columns, detected.roles)
        for file in list_media(row, detected.row_format, task, path.parent):
            if file not in files and file.is_file():
                files.add(file)
                name = os.path.relpath(file, path.parent) if file.is_relative_to(path.parent) else str(file)
                yield SourceFile(source.path, name, file, "xxh3_128", read_once(file, hash_recording))
