"""Rows on disk in Arrow files: all good rows until it is decided which to keep, then the prepared rows by split."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import TypedDict

from llmtune.data.arrow_columns import number_column, text_column
from llmtune.data.row_hash import BATCH_BYTES, BATCH_ROWS, HashedRow
from llmtune.errors import DataError, EnvironmentProblem, first_line, system_problem
from llmtune.records import Json, Row, Rows
from llmtune.store.atomic_files import read_json, write_json
from llmtune.store.json_shapes import Count, Counts, read_record

AGAIN = "Run the recipe again to recreate missing or damaged files."
RECORD = "rows.json"
MINED, ANSWERED = "mined", "answered"
"""Folders of the rows with mined negatives, or with a teacher's answers, next to the prepared rows."""
PICTURES = '"images":[{'
"""Part of each row with pictures. Inside a text, quotes are escaped with backslashes."""
RECORDED = (
    *("counts", "rows_in", "dropped", "content_hash", "columns", "columns_hash", "filled", "corpus_hash"),
    "class_changes",
)
SCHEMA = pa.schema({"id": pa.string(), "origin": pa.string(), "row": pa.string(), "columns": pa.string()})
GROUP = pa.field("group", pa.uint64())
"""Hash of the row's `data.split_by` value; only if the recipe names such a column."""
U64 = npt.NDArray[np.uint64]


class RowsRecord(TypedDict):
    """The contents of rows.json; earlier versions stored no columns."""

    files: dict[str, str]
    counts: Counts
    rows_in: Count
    dropped: Counts
    content_hash: str
    columns: NotRequired[list[str]]
    columns_hash: NotRequired[str]
    class_changes: NotRequired[list[Json]]


class RowWriter:
    """Writes the file of one split; the common record is written last."""

    def __init__(self, path: Path, grouped: bool = False) -> None:
        self._schema = SCHEMA.append(GROUP) if grouped else SCHEMA
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._batches: list[pa.RecordBatch] = []
        self._digest = hashlib.sha256()
        self._kept = hashlib.sha256()
        self._keeps = False

    def add(self, batch: pa.RecordBatch, content_R2: U64, group_R: U64) -> None:
        """Write rows from the spool, with hashes of their contents and of their groups."""
        ids = text_column([f"{high:016x}{low:016x}" for high, low in content_R2.tolist()])
        groups = [number_column(group_R)] if GROUP in self._schema else []
        if groups:
            self._kept.update(group_R.tobytes())
            self._keeps = True
        self._batches.append(pa.record_batch([ids, *batch.columns, *groups], schema=self._schema))
        for row in batch.column("row").to_pylist():
            self._digest.update(row.encode() + b"\n")  # JSON text has no line end
        for kept in batch.column("columns").to_pylist():
            if kept is not None:
                self._kept.update(kept.encode() + b"\n")
                self._keeps = True
        rows, size = sum(one.num_rows for one in self._batches), sum(one.nbytes for one in self._batches)
        if rows >= BATCH_ROWS or size >= BATCH_BYTES:
            self._flush()

    @property
    def columns_hash(self) -> str:
        """Hash of the columns and groups stored with the rows; empty without both."""
        return self._kept.hexdigest() if self._keeps else ""

    def _flush(self) -> None:
        for batch in pa.Table.from_batches(self._batches, self._schema).combine_chunks().to_batches():
            self._writer.write_batch(batch)
        self._batches = []

    def close(self) -> str:
        """Return the hash over the rows."""
        self._flush()
        self._writer.close()
        self._file.close()
        return self._digest.hexdigest()


def save_rows(rows: Rows) -> None:
    """Write the record of `rows` into its folder; file names are relative, so the folder can be moved."""
    files = {split: path.name for split, path in rows.files.items()}
    write_json(rows.folder / RECORD, {"files": files, **{name: getattr(rows, name) for name in RECORDED}})


def rows_folder(run: Path) -> Path:
    """Return the folder of a run's rows: with mined negatives or a teacher's answers if there are any."""
    folders = (run / "data" / name for name in (MINED, ANSWERED))
    return next((one for one in folders if (one / RECORD).exists()), run / "data" / "rows")


def load_rows(folder: Path) -> Rows:
    """Read the output of `prepare_rows` from `folder`, which may have been moved.

    Raises:
        DataError: `folder` has no prepared rows, or files are missing.
        EnvironmentProblem: The record is damaged.
    """
    record = read_record(folder / RECORD, RowsRecord, fix=AGAIN)
    missing = [name for name in (record or {}).get("files", {}).values() if not (folder / name).is_file()]
    if record is None or missing:
        what = f"{missing[0]} is missing" if missing else "no prepared rows here"
        raise DataError.of(what, str(folder), AGAIN)
    files = {split: folder / name for split, name in record["files"].items()}
    recorded = {name: record[name] for name in RECORDED if name in record}
    lists = {name: tuple(recorded.get(name, ())) for name in ("columns", "class_changes")}
    return Rows(folder=folder, files=files, **{**recorded, **lists})


@contextmanager
def open_arrow(path: Path) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """Open an Arrow file of a run. Raises EnvironmentProblem if it is damaged, even if that shows later."""
    try:
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_file(source)
    except (pa.ArrowInvalid, OSError) as error:
        if system_problem(error):
            raise
        raise EnvironmentProblem.of(f"damaged: {first_line(error)}", str(path), AGAIN) from error


def pick_rows(rows: Rows, split: str, indexes: Sequence[int], folder: Path) -> Rows:
    """Write the rows of a split at `indexes`, in that order, into `folder`; return them as rows of that split."""
    return gather_rows(rows, {split: indexes}, folder, split)


def gather_rows(rows: Rows, indexes: Mapping[str, Sequence[int]], folder: Path, split: str) -> Rows:
    """Write rows of several splits into `folder`; return them in that order as one `split`, with their corpus."""
    target, parts = folder / f"{split}.rows.arrow", []
    for name, numbers in indexes.items():
        if len(numbers):
            with pa.memory_map(str(rows.files[name])) as source:
                parts.append(
                    pa.ipc.open_file(source).read_all().take(number_column(np.asarray(numbers, dtype=np.int64)))
                )
    picked = pa.concat_tables(parts)
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, picked.schema) as writer:
        writer.write_table(picked)
    digest = hashlib.sha256("\n".join(picked.column("row").to_pylist()).encode()).hexdigest()
    return replace(rows, files={split: target}, counts={split: len(picked)}, dropped={}, content_hash=digest)


def iterate_batches(rows: Rows, split: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the rows of a split in batches, each with the number of its first row."""
    if split not in rows.files:
        return
    first = 0
    with open_arrow(rows.files[split]) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield first, batch
            first += batch.num_rows


def iterate_rows(rows: Rows, split: str) -> Iterator[tuple[str, Row]]:
    """Yield (origin, row) of a split in order; nothing for an empty split."""
    for origin, text in iterate_texts(rows, split):
        yield origin, json.loads(text)


def iterate_ids(rows: Rows, split: str) -> Iterator[str]:
    """Yield each row's id: 32 hex digits that depend only on its content."""
    for _, batch in iterate_batches(rows, split):
        yield from batch.column("id").to_pylist()


def iterate_groups(rows: Rows, split: str) -> Iterator[int]:
    """Yield each row's group, equal for rows with the same `data.split_by` value; nothing without `split_by`."""
    for _, batch in iterate_batches(rows, split):
        if GROUP in batch.schema:
            yield from batch.column("group").to_pylist()


def iterate_texts(rows: Rows, split: str) -> Iterator[tuple[str, str]]:
    """Yield (origin, row as JSON) of a split in order; nothing for an empty split."""
    for _, batch in iterate_batches(rows, split):
        yield from zip(batch.column("origin").to_pylist(), batch.column("row").to_pylist(), strict=True)


def has_pictures(rows: Rows) -> bool:
    """Whether a row has a picture."""
    batches = (batch for split in rows.files for _, batch in iterate_batches(rows, split))
    return any(pc.any(pc.match_substring(batch.column("row"), PICTURES)).as_py() for batch in batches)


def iterate_columns(rows: Rows, split: str) -> Iterator[dict[str, object]]:
    """Yield each row's values in the columns that were kept, in order; mostly empty."""
    for _, batch in iterate_batches(rows, split):
        there = "columns" in batch.schema.names  # rows from earlier versions have none
        for text in batch.column("columns").to_pylist() if there else [None] * batch.num_rows:
            yield json.loads(text) if text else {}


def iterate_full_rows(rows: Rows, split: str) -> Iterator[tuple[str, Row]]:
    """Yield (origin, row with its kept columns) of a split in order."""
    both = zip(iterate_rows(rows, split), iterate_columns(rows, split), strict=True)
    yield from ((origin, {**columns, **row}) for (origin, row), columns in both)


def read_rows(rows: Rows, split: str, indexes: Sequence[int], *, full: bool = False) -> list[Row]:
    """Return the rows of a split at `indexes`, in that order, without reading others; `full` with kept columns."""
    if not len(indexes):
        return []
    firsts, batches = zip(*iterate_batches(rows, split), strict=True)
    places = np.asarray(indexes, dtype=np.int64)
    count = firsts[-1] + batches[-1].num_rows
    if places.min() < 0 or places.max() >= count:
        raise IndexError(f"{split} has {count} rows")
    numbers = np.searchsorted(firsts, places, side="right") - 1
    found = [(batches[number], place - firsts[number]) for number, place in zip(numbers, places.tolist(), strict=True)]
    read = [json.loads(batch.column("row")[place].as_py()) for batch, place in found]
    kept = (json.loads(batch.column("columns")[place].as_py() or "{}") for batch, place in found)
    return [{**columns, **row} for columns, row in zip(kept, read, strict=True)] if full else read


# The spool: good rows in complete shards, from which a killed preparation resumes


SHARD_BATCHES = 64
"""Batches per shard; at 1,024 rows each, they take some seconds."""
STATE = "state.json"
TEXTS = pa.schema({"origin": pa.string(), "row": pa.string(), "columns": pa.string()})
NUMBERS = np.dtype(
    [("content", "u8", 2), ("text", "u8"), ("group", "u8"), ("source", "i4"), ("split", "i1")], align=False
)


@dataclass(frozen=True)
class Index:
    """Numbers of all good rows, in reading order. Legend: N rows."""

    content: U64
    """[N, 2] content hash in two halves; equal for equal rows, and used as their sort order."""
    text: U64
    """[N] hash of the row's exact bytes: the order of equal rows must not depend on the order of files."""
    group: U64
    """[N] hash of the value that decides the split: the content, or the `split_by` value."""
    source: npt.NDArray[np.int32]
    """[N] number of the source in the recipe."""
    split: npt.NDArray[np.int8]
    """[N] index into SPLITS given by the source, or -1 if the split is decided by hash."""

    def __len__(self) -> int:
        return len(self.source)


class Spool(AbstractContextManager["Spool"]):
    """All good rows, written once; after `end` they can be read any number of times.

    `state.json` lists the complete shards, and the caller's note at the end of the last one.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        """Resume an earlier process's spool of the same `inputs` in `folder`, or start an empty one."""
        self.folder = folder
        state = read_json(folder / STATE)
        if not isinstance(state, dict) or state.get("inputs") != inputs:
            self.remove()
            folder.mkdir(parents=True)
            state = {"inputs": inputs, "shards": [], "ended": False, "noted": {}}
        self._state: Json = state
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._rows: list[HashedRow] = []
        self._bytes = 0
        self._numbers: list[npt.NDArray[np.void]] = []

    def __len__(self) -> int:
        """The number of rows in complete shards."""
        return sum(self._state["shards"])

    @property
    def ended(self) -> bool:
        """Whether the spool contains all rows."""
        return bool(self._state["ended"])

    @property
    def noted(self) -> Json:
        """The note saved with the last complete shard."""
        noted: Json = self._state["noted"]
        return noted

    def add(self, row: HashedRow, note: Callable[[], Json]) -> None:
        """Append a row. When that completes a shard, `note()` is saved with it."""
        self._rows.append(row)
        self._bytes += len(row.row)
        if len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()
            if len(self._numbers) == SHARD_BATCHES:
                self._save(note())

    def end(self, note: Callable[[], Json]) -> None:
        """Mark the spool as complete, so it can be read."""
        self._flush()
        self._state["ended"] = True
        self._save(note())

    def __exit__(self, *error: object) -> None:
        """Abandon an incomplete shard."""
        if self._writer is not None:
            self._file.close()

    def remove(self) -> None:
        """Delete the spool."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: int, ending: str) -> Path:
        return self.folder / f"{shard:06}.{ending}"

    def _flush(self) -> None:
        if not (rows := self._rows):
            return
        if self._writer is None:
            self._file = self._path(len(self._state["shards"]), "arrow").open("wb")
            self._writer = pa.ipc.new_stream(self._file, TEXTS)
        texts: list[list[str | None]] = [
            [row.origin for row in rows],
            [row.row for row in rows],
            [row.columns for row in rows],
        ]
        self._writer.write_batch(pa.record_batch([text_column(part) for part in texts], schema=TEXTS))
        numbers = np.empty(len(rows), dtype=NUMBERS)
        numbers["content"] = np.frombuffer(b"".join(row.content for row in rows), dtype=">u8").reshape(-1, 2)
        for name in ("text", "group", "source", "split"):
            numbers[name] = [getattr(row, name) for row in rows]
        self._numbers.append(numbers)
        self._rows, self._bytes = [], 0

    def _save(self, note: Json) -> None:
        """Turn the data written since the last shard into the next shard."""
        if self._writer is not None:
            self._writer.close()
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            numbers = np.concatenate(self._numbers)
            with self._path(len(self._state["shards"]), "npy").open("wb") as file:
                np.save(file, numbers)
                file.flush()
                os.fsync(file.fileno())
            self._state["shards"].append(len(numbers))
            self._writer, self._numbers = None, []
        self._state["noted"] = note
        write_json(self.folder / STATE, self._state)

    def index(self) -> Index:
        """Return the numbers of all rows."""
        count = len(self)
        index = Index(
            content=np.empty((count, 2), np.uint64),
            text=np.empty(count, np.uint64),
            group=np.empty(count, np.uint64),
            source=np.empty(count, np.int32),
            split=np.empty(count, np.int8),
        )
        first = 0
        for shard, rows in enumerate(self._state["shards"]):
            numbers = np.load(self._path(shard, "npy"))
            for name in NUMBERS.names or ():
                getattr(index, name)[first : first + rows] = numbers[name]
            first += rows
        return index

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the rows in batches, each with the number of its first row."""
        first = 0
        for shard in range(len(self._state["shards"])):
            with pa.OSFile(str(self._path(shard, "arrow")), "rb") as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    yield first, batch
                    first += batch.num_rows

    @property
    def size(self) -> int:
        """Bytes of the texts on disk."""
        return sum(self._path(shard, "arrow").stat().st_size for shard in range(len(self._state["shards"])))
