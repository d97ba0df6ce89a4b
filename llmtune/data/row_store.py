"""Prepared rows on disk: one Arrow file a split, written and read again here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NotRequired

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import TypedDict

from llmtune.errors import DataError, EnvironmentProblem, first_line, system_problem
from llmtune.records import Row, Rows
from llmtune.store.atomic_files import write_json
from llmtune.store.json_shapes import Count, Counts, read_record

BATCH_ROWS = 1024
BATCH_BYTES = 2**22
"""A batch ends at whichever comes first: rows can be long."""
AGAIN = "Run the recipe again: what is missing or damaged is made again."
RECORD = "rows.json"
RECORDED = ("counts", "rows_in", "dropped", "content_hash", "columns", "columns_hash", "filled")
SCHEMA = pa.schema({"id": pa.string(), "origin": pa.string(), "row": pa.string(), "columns": pa.string()})
GROUP = pa.field("group", pa.uint64())
"""Hash of the row's `data.split_by` value; only where the recipe names such a column."""
U64 = npt.NDArray[np.uint64]


class RowsRecord(TypedDict):
    """What rows.json holds; earlier versions kept no columns."""

    files: dict[str, str]
    counts: Counts
    rows_in: Count
    dropped: Counts
    content_hash: str
    columns: NotRequired[list[str]]
    columns_hash: NotRequired[str]


class RowWriter:
    """Writes the file of one split; the record of all of them is written last."""

    def __init__(self, path: Path, grouped: bool = False) -> None:
        self._schema = SCHEMA.append(GROUP) if grouped else SCHEMA
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._batches: list[pa.RecordBatch] = []
        self._digest = hashlib.sha256()
        self._columns = hashlib.sha256()
        self._has_columns = False

    def add(self, batch: pa.RecordBatch, content_R2: U64, group_R: U64) -> None:
        """Write rows as the spool has them, with their content hashes and those of what decides their split."""
        ids = pa.array([f"{high:016x}{low:016x}" for high, low in content_R2.tolist()])
        groups = [pa.array(group_R)] if GROUP in self._schema else []
        self._batches.append(pa.record_batch([ids, *batch.columns, *groups], schema=self._schema))
        for row in batch.column("row").to_pylist():
            self._digest.update(row.encode() + b"\n")  # no line end stands in JSON text
        for kept in batch.column("columns").to_pylist():
            if kept is not None:
                self._columns.update(kept.encode() + b"\n")
                self._has_columns = True
        rows, size = sum(one.num_rows for one in self._batches), sum(one.nbytes for one in self._batches)
        if rows >= BATCH_ROWS or size >= BATCH_BYTES:
            self._flush()

    @property
    def columns_hash(self) -> str:
        """Hash over `columns`; empty where no row has any."""
        return self._columns.hexdigest() if self._has_columns else ""

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
    """Write the record of `rows` into its folder; file names are relative, so that the folder can be moved."""
    files = {split: path.name for split, path in rows.files.items()}
    write_json(rows.folder / RECORD, {"files": files, **{name: getattr(rows, name) for name in RECORDED}})


def load_rows(folder: Path) -> Rows:
    """Read what `prepare_rows` left in `folder`, wherever the folder stands now.

    Raises:
        DataError: Rows were never prepared there, or files are missing.
        EnvironmentProblem: The record is damaged.
    """
    record = read_record(folder / RECORD, RowsRecord, fix=AGAIN)
    missing = [name for name in (record or {}).get("files", {}).values() if not (folder / name).is_file()]
    if record is None or missing:
        what = f"{missing[0]} is missing" if missing else "there are no prepared rows"
        raise DataError.of(what, str(folder), AGAIN)
    files = {split: folder / name for split, name in record["files"].items()}
    recorded = {name: record[name] for name in RECORDED if name in record}
    return Rows(folder=folder, files=files, **{**recorded, "columns": tuple(record.get("columns", ()))})


@contextmanager
def open_arrow(path: Path) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """Open an Arrow file of a run; raises EnvironmentProblem where it is damaged, also while it is read."""
    try:
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_file(source)
    except (pa.ArrowInvalid, OSError) as error:
        if system_problem(error):
            raise
        raise EnvironmentProblem.of(f"damaged: {first_line(error)}", str(path), AGAIN) from error


def pick_rows(rows: Rows, split: str, indexes: Sequence[int], folder: Path) -> Rows:
    """Write the rows of a split at `indexes`, in that order, into `folder` and return them, as rows of that split."""
    target = folder / f"{split}.rows.arrow"
    with pa.memory_map(str(rows.files[split])) as source, pa.OSFile(str(target), "wb") as file:
        picked = pa.ipc.open_file(source).read_all().take(pa.array(indexes, type=pa.int64()))
        with pa.ipc.new_file(file, picked.schema) as writer:
            writer.write_table(picked)
    digest = hashlib.sha256("\n".join(picked.column("row").to_pylist()).encode()).hexdigest()
    return Rows(folder, {split: target}, {split: len(picked)}, len(picked), {}, digest, rows.columns)


def iterate_batches(rows: Rows, split: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the rows of a split as they stand in its file, each batch with the number of its first row."""
    if split not in rows.files:
        return
    first = 0
    with open_arrow(rows.files[split]) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield first, batch
            first += batch.num_rows


def iterate_rows(rows: Rows, split: str) -> Iterator[tuple[str, Row]]:
    """Yield (origin, row) of a split in order; nothing for a split that has no rows."""
    for origin, text in iterate_texts(rows, split):
        yield origin, json.loads(text)


def iterate_ids(rows: Rows, split: str) -> Iterator[str]:
    """Yield what each row of a split is known by: 32 hex digits of its content, wherever it stands."""
    for _, batch in iterate_batches(rows, split):
        yield from batch.column("id").to_pylist()


def iterate_groups(rows: Rows, split: str) -> Iterator[int]:
    """Yield by row of a split what is equal for rows of one `data.split_by` value; nothing without `split_by`."""
    for _, batch in iterate_batches(rows, split):
        if GROUP in batch.schema:
            yield from batch.column("group").to_pylist()


def iterate_texts(rows: Rows, split: str) -> Iterator[tuple[str, str]]:
    """Yield (origin, row as JSON) of a split in order; nothing for a split that has no rows."""
    for _, batch in iterate_batches(rows, split):
        yield from zip(batch.column("origin").to_pylist(), batch.column("row").to_pylist(), strict=True)


def iterate_columns(rows: Rows, split: str) -> Iterator[dict[str, object]]:
    """Yield by row of a split, in order, what its source says in the columns that were kept; mostly nothing."""
    for _, batch in iterate_batches(rows, split):
        there = "columns" in batch.schema.names  # rows that an earlier version prepared have none
        for text in batch.column("columns").to_pylist() if there else [None] * batch.num_rows:
            yield json.loads(text) if text else {}


def read_rows(rows: Rows, split: str, indexes: Sequence[int]) -> list[Row]:
    """Return the rows of a split at `indexes`, in that order; nothing else is read."""
    if not len(indexes):
        return []
    firsts, batches = zip(*iterate_batches(rows, split), strict=True)
    places = np.asarray(indexes, dtype=np.int64)
    count = firsts[-1] + batches[-1].num_rows
    if places.min() < 0 or places.max() >= count:
        raise IndexError(f"{split} has {count} rows")
    numbers = np.searchsorted(firsts, places, side="right") - 1
    texts = (
        batches[number].column("row")[place - firsts[number]].as_py()
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True)
    )
    return [json.loads(text) for text in texts]
