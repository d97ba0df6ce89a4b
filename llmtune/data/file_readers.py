"""Bytes in, raw rows out: JSON lines, JSON, CSV, Parquet and text, plain or compressed, a piece at a time.

A raw row is a pair: its origin (`file:line`, `file:row N (line M)` behind cells with line breaks, or `file:row N` where
lines mean nothing) and either the columns as a dict
or a `RowError` with the reason why there are none. What makes the rest of a file unreadable is raised as a DataError.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llmtune.data.arrow_rows import drop_filled
from llmtune.data.byte_streams import (
    GROWN_BYTES,
    MAX_GROWTH,
    Advance,
    ByteStream,
    GrowthError,
    Transcoded,
    open_bytes,
    refuse_other_files,
)
from llmtune.data.json_stream import JsonSyntaxError, read_json_items
from llmtune.data.object_store import RemoteFile, is_damage, reached
from llmtune.data.rejected_rows import RowError, describe
from llmtune.errors import DataError, first_line
from llmtune.recipe.user_files import check_regular

MAX_ROW_BYTES = 8 * 2**20
"""A line or field above this is a mistake in the file (no line ends, a quote that is never closed), not a row."""
MAX_COLUMNS = 2000
TEXT_PIECE = 2**16
"""Characters above which a text file is cut into several rows, at the next blank line."""

PARQUET_ROWS = 512
PARQUET_BYTES = 2**27
"""A batch of more is turned into rows one by one."""
UNREADABLE_VALUES = (ValueError, OverflowError, LookupError, ImportError, pa.ArrowException)
NOT_UTF8 = "not UTF-8"
OTHER_ENCODING = "State its encoding in the source, such as `encoding: cp1252`, or save the file as UTF-8."
RawRow = tuple[str, dict[str, object] | RowError]


class JsonLine(NamedTuple):
    """A line that is not parsed yet: that can be done on another core."""

    line: bytes
    offset: int

    def parse(self) -> dict[str, object] | RowError:
        """Return the row, or why there is none."""
        try:
            value = json.loads(self.line.decode())
        except UnicodeDecodeError as error:
            return not_utf8(self.line[error.start], self.offset + error.start)
        except json.JSONDecodeError as error:
            return RowError("not valid JSON", f"{error.msg} at column {error.colno}")
        except RecursionError:
            return RowError("not valid JSON", "nested too deeply")
        except ValueError as error:  # integers of more than 4,300 digits
            return RowError("not valid JSON", str(error))
        if isinstance(value, dict):
            return value
        hint = "; if the file is one JSON list, set `format: json`" if isinstance(value, list) else ""
        return RowError("not a JSON object", f"the line is {describe(value)}{hint}")


LazyRow = tuple[str, dict[str, object] | RowError | JsonLine]


def read_file(
    path: Path, name: str, container: str, advance: Advance = lambda count: None, encoding: str | None = None
) -> Iterator[RawRow]:
    """Yield the raw rows of a file, whose origins begin with `name`; `encoding` is that of its text, if not UTF-8.

    Raises:
        DataError: The file cannot be opened, or cannot be read on from some place.
    """
    for origin, value in read_lazily(path, name, container, advance, encoding):
        yield origin, value.parse() if isinstance(value, JsonLine) else value


def read_lazily(
    path: Path | RemoteFile,
    name: str,
    container: str,
    advance: Advance = lambda count: None,
    encoding: str | None = None,
) -> Iterator[LazyRow]:
    """Yield the rows as `read_file` does, lines of JSON as they stand."""
    with explained(name), reached(path.url) if isinstance(path, RemoteFile) else nullcontext():
        if container == "parquet":
            yield from _read_parquet(path, name, advance)
            return
        with open_bytes(path, advance) as stream:
            if encoding is not None:
                stream = io.BufferedReader(Transcoded(stream, encoding))
            refuse_other_files(stream, name)
            yield from READERS[container](stream, name)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what the libraries raise on a damaged or unreadable file into a DataError that names it."""
    try:
        yield
    except PermissionError as error:
        what = "the file may not be read (permission denied)"
        raise DataError.of(what, name, "Give yourself the right to read it.") from error
    except MemoryError as error:
        what = "its rows need more memory than there is"
        raise DataError.of(what, name, "Cut the file into smaller ones, or take out what makes a row large.") from error
    except GrowthError as error:
        what = f"it unpacks to more than {MAX_GROWTH} times its size"
        raise DataError.of(what, name, "Unpack it by hand, if that is meant.") from error
    except pa.ArrowException as error:
        raise DataError.of(f"not a readable Parquet file: {first_line(error)}", name) from error
    except JsonSyntaxError as error:
        fix = "Fix the file; a JSON file cannot be read on behind a mistake, JSON lines can."
        raise DataError.of(f"not valid JSON: {error}", f"{name}:{error.line}", fix) from error
    except UnicodeError as error:  # of an encoding that the recipe states; else bad bytes are errors of their rows
        raise DataError.of(
            f"the file is not in the encoding that is stated: {error}", name, "Correct `encoding:`."
        ) from error
    except OSError as error:
        if is_damage(error):
            what = f"the compressed file is damaged or cut short ({error})"
            raise DataError.of(what, name, "Fetch or compress it again.") from error
        raise DataError.of(f"the file cannot be read ({error.strerror or error})", name) from error


def _read_lines(stream: ByteStream, name: str) -> Iterator[LazyRow]:
    offset = number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES:
            what = f"a line of more than {MAX_ROW_BYTES >> 20} MiB"
            raise DataError.of(what, f"{name}:{number}", "One row a line is expected; is it JSON? Set `format: json`.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield f"{name}:{number}", JsonLine(line, offset)
        offset += len(line)


def not_utf8(byte: int, offset: int) -> RowError:
    """Say which byte is not UTF-8, and where it stands in the (unpacked) file."""
    return RowError(NOT_UTF8, f"byte 0x{byte:02x} at offset {offset}")


def _read_json(stream: ByteStream, name: str) -> Iterator[LazyRow]:
    """Read a JSON file: a list of rows, an object that holds one, or objects one after the other."""
    if _looks_like_lines(stream.peek(1)):
        yield from _read_lines(stream, name)
        return
    for number, value in enumerate(read_json_items(stream, MAX_ROW_BYTES), 1):
        if isinstance(value, dict):
            yield f"{name}:row {number}", value
        else:
            yield f"{name}:row {number}", RowError("not a JSON object", f"the row is {describe(value)}")


def _looks_like_lines(start: bytes) -> bool:
    """Whether a file whose name says JSON holds JSON lines, as many do: then a mistake costs a line, not the rest."""
    line, _, rest = start.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    return not rest.isspace() and rest != b"" and isinstance(JsonLine(line, 0).parse(), dict)


def _read_csv(stream: ByteStream, name: str) -> Iterator[RawRow]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header_line = text.readline(MAX_ROW_BYTES)
    delimiter = max(",;\t", key=header_line.count)
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = csv.reader(_short_lines(header_line, text, name), delimiter=delimiter, strict=True)
    try:
        header = _check_header(next(lines, []), name)
        line = lines.line_num + 1
        for row, cells in enumerate(lines, 2):  # as spreadsheets count them: the header is row 1
            if cells:
                place = f"{line}" if row == line else f"row {row} (line {line})"
                yield f"{name}:{place}", _name_cells(cells, header)
            line = lines.line_num + 1
    except csv.Error as error:
        fix = 'Quote cells that hold the delimiter, a line end or a quote, and double the quotes inside: "say ""hi""".'
        raise DataError.of(f"not valid CSV: {error}", f"{name}:{lines.line_num}", fix) from error


def _short_lines(first: str, rest: io.TextIOWrapper, name: str) -> Iterator[str]:
    """Yield lines, which hold a row or a part of one; raises DataError for one without an end."""
    line, number = first, 1
    while line:
        if len(line) >= MAX_ROW_BYTES:
            what = f"a line of more than {MAX_ROW_BYTES >> 20} MiB"
            raise DataError.of(what, f"{name}:{number}", "Is it CSV, with a row a line?")
        yield line
        line = rest.readline(MAX_ROW_BYTES)
        number += 1


def _check_header(header: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in header]
    if any(_escaped_byte(cell) is not None for cell in header):
        raise DataError.of("the header is not UTF-8", f"{name}:1", OTHER_ENCODING)
    _check_columns(header, f"{name}:1")
    return header


def _check_columns(names: list[str], where: str) -> None:
    if len(names) > MAX_COLUMNS:
        what = f"{len(names):,} columns: rows have up to {MAX_COLUMNS:,}"
        raise DataError.of(what, where, "Keep the columns that the task reads.")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError.of(f"two columns with the name {twice[0]!r}", where, "Rename one of them.")


def _name_cells(cells: list[str], header: list[str]) -> dict[str, object] | RowError:
    if len(cells) != len(header):
        return RowError("wrong number of columns", f"{len(cells)} cells, the header has {len(header)}")
    for cell in cells:
        if (bad := _escaped_byte(cell)) is not None:
            return RowError(NOT_UTF8, f"byte 0x{ord(cell[bad]) - 0xDC00:02x} in a cell")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path | RemoteFile, name: str, advance: Advance) -> Iterator[RawRow]:
    size = path.size if isinstance(path, RemoteFile) else check_regular(path).st_size
    with pq.ParquetFile(path.open() if isinstance(path, RemoteFile) else path) as file:
        _check_columns(file.schema_arrow.names, name)
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
                        name: name_classes(names, value[name]) for name, names in classes.items() if name in value
                    }
                    value = drop_filled(value)
                yield f"{name}:row {number}", value


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of the classes that a column has as numbers, as the datasets library notes them in a file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
        whole = {column: feature for column, feature in features if isinstance(feature, dict)}
        inner = {column: feature.get("feature", feature) for column, feature in whole.items()}
        labels = {column: one for column, one in inner.items() if isinstance(one, dict) and one.get("names")}
        return {column: list(one["names"]) for column, one in labels.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):  # another program's, or none
        return {}


def name_classes(names: Sequence[str], value: object) -> object:
    """Return the name of a class, or of each in a list; what is no class, such as -1, is none."""
    if isinstance(value, list):
        return [name_classes(names, one) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Return how many rows to read at a time: a text that stands in a column once may be the value of all its rows."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=1)
    return max(4, min(PARQUET_ROWS, 2 * PARQUET_BYTES // max(largest, 1)))


def _values(batch: pa.RecordBatch) -> list[dict[str, object]] | RowError:
    """Return rows as Python has them, or why it cannot: times out of range, unknown zones, text that is not UTF-8."""
    try:
        rows: list[dict[str, object]] = batch.to_pylist()
    except UNREADABLE_VALUES as error:
        if batch.num_columns > 1:
            each = (_values(batch.select([name])) for name in batch.schema.names)
            return next(one for one in each if isinstance(one, RowError))
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value that cannot be read"
        return RowError(reason, f"column {batch.schema.names[0]!r}: {first_line(error)}")
    return rows


def _read_text(stream: ByteStream, name: str) -> Iterator[RawRow]:
    """Read a document; a long one in pieces of TEXT_PIECE characters and more, cut at blank lines (or at any line end).

    Pieces are cut from the start, so that a file that grows at its end keeps all pieces but the last.
    """
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    piece: list[str] = []
    size = offset = 0
    number = first = 1
    while line := lines.readline(TEXT_PIECE):
        if (bad := _escaped_byte(line)) is not None:
            position = offset + len(line[:bad].encode())
            what = not_utf8(ord(line[bad]) - 0xDC00, position)
            raise DataError.of(f"{what.reason}: {what.detail}", f"{name}:{number}", OTHER_ENCODING)
        offset += len(line.encode())
        piece.append(line)
        size += len(line)
        number += line.endswith("\n")
        if (size >= TEXT_PIECE and line.isspace()) or size >= 2 * TEXT_PIECE:
            yield f"{name}:{first}", {"text": "".join(piece)}
            piece, size, first = [], 0, number
    if piece and (first == 1 or not "".join(piece).isspace()):
        yield f"{name}:{first}", {"text": "".join(piece)}


def _escaped_byte(text: str) -> int | None:
    """Where `text` holds a byte that was not UTF-8 when it was decoded with `surrogateescape`."""
    if text.isascii():
        return None
    return next((index for index, char in enumerate(text) if "\udc80" <= char <= "\udcff"), None)


READERS: Mapping[str, Callable[[ByteStream, str], Iterator[LazyRow]]] = {
    "jsonl": _read_lines,
    "json": _read_json,
    "csv": _read_csv,
    "text": _read_text,
}
