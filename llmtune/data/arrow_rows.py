"""Rows from Arrow: from Parquet files, and from data sets on the hub.

A struct column has the same keys in every row: the union of all rows' keys. A call of `add` gets `city: null`
because a call of `weather` has a city. Arrow does not mark those nulls, so every null key inside a column is removed.
Null columns and nulls in lists are kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.byte_streams import GROWN_BYTES, MAX_GROWTH, GrowthError
from llmtune.data.object_store import RemoteFile
from llmtune.data.rejected_rows import RawRow, RowError
from llmtune.errors import DataError, first_line, write_origin
from llmtune.recipe.user_files import check_regular
from llmtune.records import Advance

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_COLUMNS = 2000
PARQUET_ROWS = 512
PARQUET_BYTES = 2**27
"""A longer batch is converted row by row."""

FILE_KEYS = {"bytes", "path"}
"""Keys of a picture or recording of the datasets library, which writes null for one of them."""


class ArrowRow(dict[str, object]):
    """A row without the keys that Arrow filled in; `filled` counts them."""

    filled: int = 0


def drop_filled(row: Mapping[str, object], features: Mapping[str, object] | None = None) -> ArrowRow:
    """Return the row without the null keys inside its columns.

    `features` come from the datasets library. Its type `Json` keeps rows as their author wrote them.
    """
    kept = ArrowRow()
    for column, value in row.items():
        kept[column], filled = _drop(value, (features or {}).get(column))
        kept.filled += filled
    return kept


def _drop(value: object, feature: Any) -> tuple[object, int]:
    """Return a value without the null keys of its structs, and the number of removed keys."""
    if not isinstance(value, dict | list) or type(feature).__name__ == "Json":
        return value, 0
    if isinstance(value, list):
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
        parts = [_drop(one, inner) for one in value]
        return [one for one, _ in parts], sum(filled for _, filled in parts)
    of_key = feature if isinstance(feature, Mapping) else {}
    kept = {key: _drop(one, of_key.get(key)) for key, one in value.items() if one is not None}
    nulls = 0 if value.keys() == FILE_KEYS else len(value) - len(kept)
    filled = nulls + sum(inner for _, inner in kept.values())
    return {key: one for key, (one, _) in kept.items()}, filled


def read_parquet(path: Path | RemoteFile, name: str, advance: Advance) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file with their origins.

    Raises DataError if it cannot be read, GrowthError for a decompression bomb.
    """
    import pyarrow as pa  # late: most files are no Parquet files

    try:
        yield from _iterate_parquet(path, name, advance)
    except pa.ArrowException as error:
        if isinstance(error, MemoryError):
            raise
        raise DataError.of(f"not a readable Parquet file: {first_line(error)}", name) from error


def _iterate_parquet(path: Path | RemoteFile, name: str, advance: Advance) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    size = path.size if isinstance(path, RemoteFile) else check_regular(path).st_size
    with pq.ParquetFile(path.open() if isinstance(path, RemoteFile) else path) as file:
        check_column_names(file.schema_arrow.names, name)
        classes = _class_names(file.schema_arrow.metadata or {})
        total, number, grown = file.metadata.num_rows, 0, 0
        for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
            advance(size * batch.num_rows // total)
            grown += batch.nbytes
            if grown > GROWN_BYTES and grown > MAX_GROWTH * size:
                raise GrowthError
            whole = None if batch.nbytes > PARQUET_BYTES else _values(batch)
            for index in range(batch.num_rows):
                number += 1
                value = whole[index] if isinstance(whole, list) else _values(batch.slice(index, 1))
                value = value[0] if isinstance(value, list) else value
                if isinstance(value, dict):
                    value |= {
                        name: decode_class_ids(names, value[name]) for name, names in classes.items() if name in value
                    }
                    value = drop_filled(value)
                yield write_origin(name, row=number), value


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the class names of integer columns, from the metadata that the datasets library writes."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
        whole = {column: feature for column, feature in features if isinstance(feature, dict)}
        inner = {column: feature.get("feature", feature) for column, feature in whole.items()}
        labels = {column: one for column, one in inner.items() if isinstance(one, dict) and one.get("names")}
        return {column: list(one["names"]) for column, one in labels.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):  # another program's, or none
        return {}


def decode_class_ids(names: Sequence[str], value: object) -> object:
    """Return the name of a class, or of each class in a list. Numbers outside the classes, such as -1, give None."""
    if isinstance(value, list):
        return [decode_class_ids(names, one) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Return how many rows to read at a time: one stored text may be the value of all rows of a column."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=1)
    return max(4, min(PARQUET_ROWS, 2 * PARQUET_BYTES // max(largest, 1)))


def _values(batch: pa.RecordBatch) -> list[dict[str, object]] | RowError:
    """Convert a batch to Python rows, or return the error: times out of range, unknown zones, text not in UTF-8."""
    import pyarrow as pa

    try:
        rows: list[dict[str, object]] = batch.to_pylist()
    except (ValueError, OverflowError, LookupError, ImportError, pa.ArrowException) as error:
        if batch.num_columns > 1:
            each = (_values(batch.select([name])) for name in batch.schema.names)
            return next(one for one in each if isinstance(one, RowError))
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value that cannot be read"
        return RowError(reason, f"column {batch.schema.names[0]!r}: {first_line(error)}")
    return rows


def check_column_names(names: Sequence[str], where: str) -> None:
    """Raise DataError for too many columns, or for two columns with the same name."""
    if len(names) > MAX_COLUMNS:
        what = f"{len(names):,} columns: rows have up to {MAX_COLUMNS:,}"
        raise DataError.of(what, where, "Keep the columns that the task reads.")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError.of(f"two columns with the name {twice[0]!r}", where, "Rename one of them.")
