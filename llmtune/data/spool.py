"""Good rows on disk while it is decided which are kept: whole shards, so that a preparation that was killed goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmtune.data.row_store import BATCH_BYTES, BATCH_ROWS, U64
from llmtune.records import Json
from llmtune.store.atomic_files import read_json, write_json

SHARD_BATCHES = 64
"""Of 1,024 rows that is some seconds of work."""
STATE = "state.json"
TEXTS = pa.schema({"origin": pa.string(), "row": pa.string(), "columns": pa.string()})
NUMBERS = np.dtype(
    [("content", "u8", 2), ("text", "u8"), ("group", "u8"), ("source", "i4"), ("split", "i1")], align=False
)


@dataclass(frozen=True)
class Index:
    """Numbers of all good rows, in the order in which they were read. Legend: N rows."""

    content: U64
    """[N, 2] content hash, two halves; equal for equal rows; it also puts rows in order."""
    text: U64
    """[N] hash of the row to the last byte: which of equal rows comes first must not depend on the order of files."""
    group: U64
    """[N] hash of what decides the split: of the content, or of the `split_by` value."""
    source: npt.NDArray[np.int32]
    """[N] number of the source among all of the recipe's."""
    split: npt.NDArray[np.int8]
    """[N] index into SPLITS as its source says, or -1 where the split decides."""

    def __len__(self) -> int:
        return len(self.source)


class HashedRow(NamedTuple):
    """A good row as it was read; see `Index` for the numbers and `Rows` for the texts."""

    origin: str
    row: str
    columns: str | None
    content: bytes
    text: int
    group: int
    source: int
    split: int
    filled: int = 0
    """Keys that Arrow had filled in, and that were dropped."""


class Spool(AbstractContextManager["Spool"]):
    """All good rows, written once; ended, they are read any number of times.

    `state.json` says which shards are whole, and what the caller noted when the last of them was.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        """Open what an earlier process left in `folder` of the same `inputs`, or begin anew."""
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
        """Rows in whole shards."""
        return sum(self._state["shards"])

    @property
    def ended(self) -> bool:
        """Whether all rows are in it."""
        return bool(self._state["ended"])

    @property
    def noted(self) -> Json:
        """What was noted with the last whole shard."""
        noted: Json = self._state["noted"]
        return noted

    def add(self, row: HashedRow, note: Callable[[], Json]) -> None:
        """Put one row behind the others; if that makes a shard whole, `note` gives what is noted with it."""
        self._rows.append(row)
        self._bytes += len(row.row)
        if len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()
            if len(self._numbers) == SHARD_BATCHES:
                self._save(note())

    def end(self, note: Callable[[], Json]) -> None:
        """Note that all rows are there; they can be read now."""
        self._flush()
        self._state["ended"] = True
        self._save(note())

    def __exit__(self, *error: object) -> None:
        """Let go of a shard that is not whole."""
        if self._writer is not None:
            self._file.close()

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, shard: int, ending: str) -> Path:
        return self.folder / f"{shard:06}.{ending}"

    def _flush(self) -> None:
        rows = self._rows
        if not rows:
            return
        if self._writer is None:
            self._file = self._path(len(self._state["shards"]), "arrow").open("wb")
            self._writer = pa.ipc.new_stream(self._file, TEXTS)
        texts = [[row.origin for row in rows], [row.row for row in rows], [row.columns for row in rows]]
        self._writer.write_batch(pa.record_batch([pa.array(part, pa.string()) for part in texts], schema=TEXTS))
        numbers = np.empty(len(rows), dtype=NUMBERS)
        numbers["content"] = np.frombuffer(b"".join(row.content for row in rows), dtype=">u8").reshape(-1, 2)
        for name in ("text", "group", "source", "split"):
            numbers[name] = [getattr(row, name) for row in rows]
        self._numbers.append(numbers)
        self._rows, self._bytes = [], 0

    def _save(self, note: Json) -> None:
        """Make what was written since the last shard the next one."""
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
        """Yield the rows, each batch with the number of its first row."""
        first = 0
        for shard in range(len(self._state["shards"])):
            with pa.OSFile(str(self._path(shard, "arrow")), "rb") as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    yield first, batch
                    first += batch.num_rows

    @property
    def size(self) -> int:
        """Bytes of its texts on disk."""
        return sum(self._path(shard, "arrow").stat().st_size for shard in range(len(self._state["shards"])))
