"""Arrow columns made without `pyarrow.array`, whose first call imports pandas: half a second in every command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def text_column(texts: Sequence[str | None]) -> pa.Array:
    """Return texts as a column."""
    if texts.count(None) == len(texts):
        return pa.nulls(len(texts), pa.string())
    if None in texts:
        builder = pa.lib.StringBuilder()
        builder.append_values(texts)
        return builder.finish()
    joined = "".join(cast(Sequence[str], texts))
    sizes = map(len, cast(Sequence[str], texts) if joined.isascii() else [str(text).encode() for text in texts])
    borders = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([*sizes], out=borders[1:])
    column = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(borders), pa.py_buffer(joined.encode()))
    return column.cast(pa.string())


def number_column(numbers: npt.NDArray[Any]) -> pa.Array:
    """Return an array of numbers [N] as a column that shares its memory."""
    buffer = pa.py_buffer(np.ascontiguousarray(numbers))
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), [None, buffer])


def replace_column(source: Path, target: Path, name: str, texts: Iterable[str]) -> Iterator[str]:
    """Copy an Arrow file with other texts in one column, a batch at a time; yield the texts that were written."""
    remaining = iter(texts)
    with (
        pa.memory_map(str(source)) as content,
        pa.ipc.open_file(content) as reader,
        pa.OSFile(str(target), "wb") as file,
        pa.ipc.new_file(file, reader.schema) as writer,
    ):
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            changed = [*islice(remaining, batch.num_rows)]
            writer.write_batch(batch.set_column(batch.schema.get_field_index(name), name, text_column(changed)))
            yield from changed
