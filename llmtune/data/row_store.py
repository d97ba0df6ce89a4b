"""Good rows on their way: their text on disk, and in memory the few numbers a row by which they are kept or dropped."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

BATCH_ROWS = 1024
BATCH_BYTES = 2**22
"""A batch ends at whichever comes first: rows can be long."""

SCHEMA = pa.schema({"origin": pa.string(), "row": pa.string(), "columns": pa.string()})

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Index:
    """Numbers of all good rows, in the order in which they were read. Legend: N rows."""

    content: U64
    """[N, 2] content hash, two halves; equal for equal rows; it also puts rows in order."""
    text: U64
    """[N] hash of the row to the last byte: which of equal rows comes first must not depend on the order of files."""
    group: U64
    """[N] hash of what decides the side: of the content, or of the `split_by` value."""
    source: npt.NDArray[np.int32]
    """[N] number of the source among all of the recipe's."""
    side: npt.NDArray[np.int8]
    """[N] index into SIDES as its source says, or -1 where the split decides."""

    def __len__(self) -> int:
        return len(self.source)


class Spool(AbstractContextManager["Spool"]):
    """Writes rows to `path` and their numbers to memory; closed, it reads them again from the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._origins: list[str] = []
        self._rows: list[str] = []
        self._columns: list[str | None] = []
        self._bytes = 0
        self._content = bytearray()
        self._text = array("Q")
        self._group = array("Q")
        self._source = array("i")
        self._side = array("b")

    def add(
        self,
        origin: str,
        row: str,
        content: bytes,
        text: int,
        group: int,
        source: int,
        side: int,
        columns: str | None = None,
    ) -> None:
        """Put one row behind the others; see `Index` for the numbers and `Rows` for the texts."""
        self._origins.append(origin)
        self._rows.append(row)
        self._columns.append(columns)
        self._bytes += len(row)
        self._content += content
        self._text.append(text)
        self._group.append(group)
        self._source.append(source)
        self._side.append(side)
        if len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            arrays = [pa.array(part, pa.string()) for part in (self._origins, self._rows, self._columns)]
            self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._origins, self._rows, self._columns, self._bytes = [], [], [], 0

    def close(self) -> None:
        """End the file; rows can be read now."""
        self._flush()
        self._writer.close()
        self._file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def index(self) -> Index:
        """Return the numbers of all rows."""
        return Index(
            content=np.frombuffer(bytes(self._content), dtype=np.dtype(">u8")).astype(np.uint64).reshape(-1, 2),
            text=np.array(self._text, dtype=np.uint64),
            group=np.array(self._group, dtype=np.uint64),
            source=np.array(self._source, dtype=np.int32),
            side=np.array(self._side, dtype=np.int8),
        )

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the rows, each batch with the number of its first row."""
        first = 0
        with pa.OSFile(str(self.path), "rb") as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                yield first, batch
                first += batch.num_rows
