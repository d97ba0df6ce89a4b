"""Step 1, first half: from the recipe's sources to checked, deduplicated, split rows in one Arrow file a side.

Near duplicates are looked for if `deduplicate: near` asks for it, on one side and across sides; equal rows across sides
are dropped whatever it says.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.data.deduplication import KEPT, drop_equal, drop_near
from llmtune.data.ingest import Account, read_inputs, show_progress
from llmtune.data.row_hash import spoken_text
from llmtune.data.row_store import BATCH_BYTES, BATCH_ROWS, Index, Spool
from llmtune.data.sources import hash_sources, resolve_inputs
from llmtune.data.splits import TRAIN, assign_sides, count_copies, drop_shared_groups
from llmtune.errors import DataError, Problem
from llmtune.recipe import DataSection, Recipe
from llmtune.records import SIDES, Row, Rows
from llmtune.store.atomic_files import explained, hash_value, read_json, write_json

RECORD = "rows.json"
BAD_ROWS = "bad_rows.jsonl"
SCHEMA = pa.schema({"id": pa.string(), "origin": pa.string(), "row": pa.string(), "columns": pa.string()})


def prepare_rows(recipe: Recipe, folder: Path, console: Console) -> Rows:
    """Read, check, deduplicate and split the recipe's data into `folder`.

    What is kept depends on the rows, not on the order of files. Memory grows by some 50 bytes a row (600 with
    `deduplicate: near`), whatever the rows' length. Sides keep the order of the sources.

    Args:
        recipe: Its `data`, `task` and the columns that `evaluate` names are used; paths are absolute.
        folder: Gets `SIDE.rows.arrow` and `rows.json`. If rows are bad, `bad_rows.jsonl` beside it lists all of them.
        console: Shows progress, bad rows and what was left out.

    Raises:
        DataError: Missing or unreadable files, unknown formats, too many bad rows, a side without rows: all at once.
        EnvironmentProblem: The folder cannot be written, or the hub not be reached.
    """
    data, task = recipe.data, recipe.task
    found = resolve_inputs(data, task)
    if unused := [name for name in found.unused if name not in recipe.evaluate.columns]:
        console.print(f"not used: {escape(', '.join(unused))}", style="dim")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)  # it must not outlive the files that it describes
        with Spool(folder / ".spool.arrow") as spool:
            bad, columns = folder.parent / BAD_ROWS, recipe.evaluate.columns
            account = read_inputs(found.inputs, data, task, spool, bad, console, columns)
            spool.close()
            index = spool.index()
            side_N, reason_N, notes = _decide(index, data, spool, console)
            copies_N = count_copies(index, side_N, _weights(data))
            reason_N[(reason_N == KEPT) & (copies_N == 0)] = "left out by weight"
            copies_N[reason_N != KEPT] = 0
            _check_sides(data, side_N, copies_N, reason_N)
            rows = _write(folder, spool, index, side_N, copies_N, account, reason_N, tuple(columns))
    _tell(rows, account, notes, console)
    return rows


def _decide(
    index: Index, data: DataSection, spool: Spool, console: Console
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.object_], list[str]]:
    """Give each row its side and, if it is dropped, the reason."""
    shares = {side: share for side in SIDES[1:] if isinstance(share := getattr(data, side), float | int)}
    side_N, notes = assign_sides(index, shares.get("validation", 0.0), shares.get("test", 0.0))
    reason_N = drop_equal(index, side_N, data.deduplicate)
    if data.split_by is not None:
        drop_shared_groups(index, side_N, reason_N, data.split_by)
    if data.deduplicate == "near":
        with show_progress(console) as progress:
            total = 2 * spool.path.stat().st_size
            bar = progress.add_task("look for near duplicates", total=total)

            def texts() -> Iterator[tuple[int, list[str]]]:
                for first, batch in spool.batches():
                    progress.advance(bar, batch.nbytes)
                    yield first, [spoken_text(json.loads(row)) for row in batch.column("row").to_pylist()]

            drop_near(index, side_N, reason_N, texts)
    return side_N, reason_N, notes


def _weights(data: DataSection) -> list[float]:
    return [
        source.weight
        for side in SIDES
        for source in (getattr(data, side) if isinstance(getattr(data, side), tuple) else ())
    ]


def _check_sides(
    data: DataSection,
    side_N: npt.NDArray[np.int8],
    copies_N: npt.NDArray[np.int64],
    reason_N: npt.NDArray[np.object_],
) -> None:
    """Refuse a side that was asked for and has no row left."""
    problems = []
    for side, name in enumerate(SIDES):
        asked = side == TRAIN or isinstance(getattr(data, name), tuple) or getattr(data, name) > 0
        if asked and not copies_N[side_N == side].any():
            lost = Counter(reason_N[side_N == side].tolist())
            why = ", ".join(f"{count} {reason}" for reason, count in lost.most_common()) or "none was read"
            fix = "Give more rows, or set `deduplicate: exact` if rows that look alike are meant."
            problems.append(Problem(f"no row is left for {name}: {why}", f"data.{name}", fix))
    DataError.collect(problems)


def _write(
    folder: Path,
    spool: Spool,
    index: Index,
    side_N: npt.NDArray[np.int8],
    copies_N: npt.NDArray[np.int64],
    account: Account,
    reason_N: npt.NDArray[np.object_],
    columns: tuple[str, ...],
) -> Rows:
    counts = {name: int(copies_N[side_N == side].sum()) for side, name in enumerate(SIDES)}
    files = {name: folder / f"{name}.rows.arrow" for name in SIDES if counts[name]}
    writers = {name: _SideWriter(path) for name, path in files.items()}
    for first, batch in spool.batches():
        here = slice(first, first + batch.num_rows)
        for side, name in enumerate(SIDES):
            taken = np.repeat(np.arange(batch.num_rows), np.where(side_N[here] == side, copies_N[here], 0))
            if len(taken):
                writers[name].add(batch.take(pa.array(taken)), index.content[here][taken])
    digest = hashlib.sha256()
    for name in SIDES:
        if name in writers:
            digest.update(f"{name} {writers[name].close()}\n".encode())
        else:
            (folder / f"{name}.rows.arrow").unlink(missing_ok=True)
    dropped = Counter(account.bad)
    dropped.update(reason for reason in reason_N.tolist() if reason != KEPT)
    told = writers["test"].columns_hash if "test" in writers else ""
    left_out = dict(sorted(dropped.items()))
    rows = Rows(folder, files, counts, account.rows_in, left_out, digest.hexdigest(), columns, told)
    save_rows(rows)
    return rows


class _SideWriter:
    """Writes one side's file under another name, and gives it its own at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = pa.OSFile(str(self._partial), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._pieces: list[pa.RecordBatch] = []
        self._digest = hashlib.sha256()
        self._columns = hashlib.sha256()
        self._told = False

    def add(self, batch: pa.RecordBatch, content_R2: npt.NDArray[np.uint64]) -> None:
        ids = pa.array([f"{high:016x}{low:016x}" for high, low in content_R2.tolist()])
        self._pieces.append(pa.record_batch([ids, *batch.columns], schema=SCHEMA))
        for row in batch.column("row").to_pylist():
            self._digest.update(row.encode() + b"\n")  # no line end stands in JSON text
        for kept in batch.column("columns").to_pylist():
            if kept is not None:
                self._columns.update(kept.encode() + b"\n")
                self._told = True
        if sum(p.num_rows for p in self._pieces) >= BATCH_ROWS or sum(p.nbytes for p in self._pieces) >= BATCH_BYTES:
            self._flush()

    @property
    def columns_hash(self) -> str:
        """Hash over `columns`; empty where no row has any."""
        return self._columns.hexdigest() if self._told else ""

    def _flush(self) -> None:
        for batch in pa.Table.from_batches(self._pieces, SCHEMA).combine_chunks().to_batches():
            self._writer.write_batch(batch)
        self._pieces = []

    def close(self) -> str:
        """Return the hash over the rows."""
        self._flush()
        self._writer.close()
        self._file.close()
        self._partial.replace(self._path)
        return self._digest.hexdigest()


def _tell(rows: Rows, account: Account, notes: Sequence[str], console: Console) -> None:
    kept = ", ".join(f"{name} {count:,}" for name, count in rows.counts.items() if count)
    console.print(f"{rows.rows_in:,} rows read; {kept}")
    for reason, count in rows.dropped.items():
        console.print(f"  {count:,} left out: {escape(reason)}")
    for problem in account.problems():
        console.print(f"  {escape(str(problem))}", style="yellow", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"  {escape(note)}")


def save_rows(rows: Rows) -> None:
    """Write the record of `rows` into its folder; file names are relative, so that the folder can be moved."""
    record = {
        "files": {side: path.name for side, path in rows.files.items()},
        "counts": rows.counts,
        "rows_in": rows.rows_in,
        "dropped": rows.dropped,
        "content_hash": rows.content_hash,
        "columns": list(rows.columns),
        "columns_hash": rows.columns_hash,
    }
    write_json(rows.folder / RECORD, record)


def load_rows(folder: Path) -> Rows:
    """Read what `prepare_rows` left in `folder`, wherever the folder stands now.

    Raises:
        DataError: Rows were never prepared there, or files are missing.
    """
    record = read_json(folder / RECORD)
    missing = [name for name in (record or {}).get("files", {}).values() if not (folder / name).is_file()]
    if not isinstance(record, Mapping) or missing:
        what = f"{missing[0]} is missing" if missing else "there are no prepared rows"
        raise DataError.of(what, str(folder), "Run the recipe again: what is missing is made again.")
    return Rows(
        folder=folder,
        files={side: folder / name for side, name in record["files"].items()},
        counts=dict(record["counts"]),
        rows_in=record["rows_in"],
        dropped=dict(record["dropped"]),
        content_hash=record["content_hash"],
        columns=tuple(record.get("columns", ())),
        columns_hash=record.get("columns_hash", ""),
    )


def iterate_rows(rows: Rows, side: str) -> Iterator[tuple[str, Row]]:
    """Yield (origin, row) of a side in order; nothing for a side that has no rows."""
    for origin, text in iterate_texts(rows, side):
        yield origin, json.loads(text)


def iterate_ids(rows: Rows, side: str) -> Iterator[str]:
    """Yield what each row of a side is known by: 32 hex digits of its content, wherever it stands."""
    for batch in _batches(rows, side):
        yield from batch.column("id").to_pylist()


def iterate_texts(rows: Rows, side: str) -> Iterator[tuple[str, str]]:
    """Yield (origin, row as JSON) of a side in order; nothing for a side that has no rows."""
    for batch in _batches(rows, side):
        yield from zip(batch.column("origin").to_pylist(), batch.column("row").to_pylist(), strict=True)


def iterate_columns(rows: Rows, side: str) -> Iterator[dict[str, Any]]:
    """Yield by row of a side, in order, what its source says in the columns that were kept; mostly nothing."""
    for batch in _batches(rows, side):
        there = "columns" in batch.schema.names  # rows that an earlier version prepared have none
        for text in batch.column("columns").to_pylist() if there else [None] * batch.num_rows:
            yield json.loads(text) if text else {}


def _batches(rows: Rows, side: str) -> Iterator[pa.RecordBatch]:
    if side not in rows.files:
        return
    with pa.memory_map(str(rows.files[side])) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def read_rows(rows: Rows, side: str, indexes: Sequence[int]) -> list[Row]:
    """Return the rows of a side at `indexes`, in that order; nothing else is read."""
    if not len(indexes):
        return []
    with pa.memory_map(str(rows.files[side])) as source:
        reader = pa.ipc.open_file(source)
        batches: list[pa.RecordBatch] = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        begins = np.cumsum([0, *(batch.num_rows for batch in batches)])
        wanted = np.asarray(indexes, dtype=np.int64)
        if wanted.min() < 0 or wanted.max() >= begins[-1]:
            raise IndexError(f"{side} has {begins[-1]} rows")
        found: list[Any] = []
        for index, number in zip(wanted, np.searchsorted(begins, wanted, side="right") - 1, strict=True):
            found.append(json.loads(batches[number].column("row")[int(index - begins[number])].as_py()))
    return found


def rows_inputs(recipe: Recipe) -> str:
    """Hash what rows depend on: the data section, the files behind it, and the task."""
    settings = recipe.data.model_dump(mode="json", exclude={"max_length", "on_overlong", "packing", "train_on"})
    if recipe.evaluate.columns:  # kept beside the rows
        settings["slices"] = tuple(recipe.evaluate.columns)
    return hash_value([__version__, recipe.task, settings, hash_sources(recipe.data, recipe.task)])
