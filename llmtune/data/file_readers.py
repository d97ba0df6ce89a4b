"""Reads files into raw rows: JSON Lines, CSV, Parquet and text piece by piece, JSON at once; plain or compressed.

A raw row is a pair of origin and value. The origin is `file:line`, `file:row N (line M)` after cells with line breaks,
or `file:row N` in formats without lines. The value is the columns as a dict, or a `RowError` with the reason. Damage
that makes the rest of a file unreadable is raised as a DataError.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from llmtune.data.arrow_rows import check_column_names, read_parquet
from llmtune.data.byte_streams import (
    MAX_GROWTH,
    PEEKED_BYTES,
    ByteStream,
    GrowthError,
    OtherEncodingError,
    Transcoded,
    open_bytes,
    refuse_other_files,
    refuse_wide,
    wide_mark,
)
from llmtune.data.encoding_guess import guess_encoding
from llmtune.data.excel_sheets import read_sheet
from llmtune.data.message_fields import is_message
from llmtune.data.object_store import RemoteFile, is_damage, reached
from llmtune.data.rejected_rows import RawRow, RowError, json_kind
from llmtune.data.table_header import DELIMITERS, LOOKED_AT, refuse_title, split_lines
from llmtune.errors import DataError, write_origin
from llmtune.records import Advance

MAX_ROW_BYTES = 8 * 2**20
"""A longer line or field is a mistake in the file (missing line ends, an unclosed quote), not a row."""
TEXT_PIECE = 2**16
"""Length in characters above which a text file is cut into several rows, at the next blank line."""

MAX_JSON_BYTES = 2**30
SEARCHED_BYTES = 2**18
ROW_COLUMNS = frozenset(
    {"messages", "conversations", "conversation", "tools", "functions", "history", "prompt", "completion"}
)
"""Columns that may contain a list of objects: an object with one of these is a row, not a wrapper around rows."""
CONVERSATION_COLUMNS = frozenset({"messages", "conversations", "conversation"})
"""The columns among these whose items are messages; a list of other objects contains rows."""
NOT_UTF8 = "not UTF-8"
OTHER_ENCODING = "State its encoding in the source, such as `encoding: cp1252`, or save the file as UTF-8."
_JSON = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t|])"?\s*', re.IGNORECASE)
"""Written before the header for Excel."""
_QUOTED = re.compile(r'"[^"]*"')


class JsonLine(NamedTuple):
    """A line that is not parsed yet, so another core can do it."""

    line: bytes
    offset: int

    def may_contain(self, text: bytes) -> bool:
        """Whether a part of the line, or a letter written as an escape sequence, may be this ASCII text."""
        return text in self.line or b"\\u" in self.line

    def parse(self) -> dict[str, object] | RowError:
        """Return the row, or the error."""
        try:
            value = json.loads(self.line.decode())
        except UnicodeDecodeError as error:
            return not_utf8(self.line[error.start], self.offset + error.start)
        except json.JSONDecodeError as error:
            return RowError("not valid JSON", f"{error.msg} at column {error.pos + 1}")  # colno: 1 at the end
        except RecursionError:
            return RowError("not valid JSON", "nested too deeply")
        except ValueError as error:  # integers of more than 4,300 digits
            return RowError("not valid JSON", str(error))
        if isinstance(value, dict):
            return value
        hint = "; if the file is one JSON list, set `format: json`" if isinstance(value, list) else ""
        return RowError("not a JSON object", f"the line is {json_kind(value)}{hint}")


LazyRow = tuple[str, dict[str, object] | RowError | JsonLine]


def parse_lines(rows: Iterable[LazyRow]) -> Iterator[RawRow]:
    """Yield rows, with lines of JSON parsed."""
    for origin, value in rows:
        yield origin, value.parse() if isinstance(value, JsonLine) else value


def read_lazily(
    path: Path | RemoteFile,
    name: str,
    container: str,
    advance: Advance = lambda count: None,
    encoding: str | None = None,
    sheet: str | None = None,
) -> Iterator[LazyRow]:
    """Yield the rows of a file; their origins begin with `name`, and lines of JSON are not parsed.

    `encoding` is that of its text, if not UTF-8; `sheet` is that of a workbook, if not the first.
    Raises DataError if the file becomes unreadable at some point.
    """
    with data_errors(name), reached(path.url) if isinstance(path, RemoteFile) else nullcontext():
        if container == "parquet":
            yield from read_parquet(path, name, advance)
            return
        if container == "excel":
            with open_bytes(path, advance) as stream:
                yield from read_sheet(stream, name, sheet)
            return
        try:
            yield from _read_text_file(path, name, container, advance, encoding)
        except UnicodeError:  # with a stated encoding; otherwise bad bytes are errors of their rows
            if encoding is not None and (guess := guess_encoding(path)) not in (None, encoding):
                raise OtherEncodingError(guess, encoding) from None
            raise


def _read_text_file(
    path: Path | RemoteFile, name: str, container: str, advance: Advance, encoding: str | None
) -> Iterator[LazyRow]:
    with open_bytes(path, advance) as stream:
        encoding = encoding or wide_mark(stream.peek(PEEKED_BYTES))  # the mark states it
        if encoding is not None:
            stream = io.BufferedReader(Transcoded(stream, encoding))
        refuse_other_files(stream, name)
        if encoding is None:
            refuse_wide(stream, name)
        yield from READERS[container](stream, name)


def read_delimiter(path: Path | RemoteFile) -> str:
    """Return the delimiter of a CSV file in any encoding, by its first line."""
    with open_bytes(path) as stream:
        line = stream.readline(PEEKED_BYTES).replace(b"\0", b"")
    return _find_delimiter(line.decode(errors="replace"))


def mentions(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether a pattern is at the start or end of a file: in its first rows, or in the schema of a Parquet file."""
    with open_bytes(path) as stream, path.open("rb") as raw:
        raw.seek(max(0, path.stat().st_size - SEARCHED_BYTES))
        ends = stream.read(SEARCHED_BYTES) + raw.read()
    return pattern.search(ends.replace(b"\0", b"")) is not None  # also in wide encodings


@contextmanager
def data_errors(name: str) -> Iterator[None]:
    """Turn the libraries' errors on a damaged or unreadable file into a DataError that names the file."""
    try:
        yield
    except PermissionError as error:
        what = "the file cannot be read (permission denied)"
        raise DataError.of(what, name, "Make it readable for your user.") from error
    except MemoryError as error:
        what = "its rows need more memory than is available"
        raise DataError.of(what, name, "Split the file, or remove the column that makes its rows large.") from error
    except GrowthError as error:
        what = f"it unpacks to more than {MAX_GROWTH} times its size"
        raise DataError.of(what, name, "Unpack it by hand, if that is intended.") from error
    except OtherEncodingError as error:
        raise DataError.of(error.what, name, error.fix) from error
    except UnicodeError as error:
        raise DataError.of(f"the file is not in the stated encoding: {error}", name, "Correct `encoding:`.") from error
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
            raise DataError.of(
                what, f"{name}:{number}", "One row per line is expected. For a JSON document set `format: json`."
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield write_origin(name, line=number), JsonLine(line, offset)
        offset += len(line)


def not_utf8(byte: int, offset: int) -> RowError:
    """Return an error with the byte that is not UTF-8 and its offset in the (decompressed) file."""
    return RowError(NOT_UTF8, f"byte 0x{byte:02x} at offset {offset}")


def _read_json_document(stream: ByteStream, name: str) -> Iterator[LazyRow]:
    """Read a JSON file: a list of rows, an object that contains one, or objects one after the other."""
    if _looks_like_lines(stream.peek(1)):
        yield from _read_lines(stream, name)
        return
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        what = f"a JSON document of more than {MAX_JSON_BYTES >> 20} MiB, which is read at once"
        raise DataError.of(what, name, "Write it as JSON Lines, one row per line: these are read one by one.")
    for number, row in enumerate(_json_rows(data, name), 1):
        is_row = isinstance(row, dict)
        yield (
            write_origin(name, row=number),
            row if is_row else RowError("not a JSON object", f"the row is {json_kind(row)}"),
        )


def _json_rows(data: bytes, name: str) -> list[Any]:
    """Return the rows of a JSON document. Raises DataError at the first mistake, with its line."""
    try:
        values = _json_values(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, what = data.count(b"\n", 0, error.start) + 1, str(not_utf8(data[error.start], error.start))
    except json.JSONDecodeError as error:
        line, what = error.lineno, error.msg
    except RecursionError:
        line, what = 1, "nested too deeply"
    except ValueError as error:  # integers of more than 4,300 digits
        line, what = 1, str(error)
    else:
        if len(values) == 1 and isinstance(values[0], list):
            return values[0]
        held = _lists_of_rows(values[0]) if values and isinstance(values[0], dict) else {}
        if len(held) > 1:
            names = " and ".join(map(repr, held))
            raise DataError.of(f"two lists of rows, {names}", name, "Keep one of them in the file.")
        return [*next(iter(held.values())), *values[1:]] if held else values
    fix = "Fix the file, or use JSON Lines: there a mistake loses only its row."
    raise DataError.of(f"not valid JSON: {what}", f"{name}:{line}", fix)


def _json_values(text: str) -> list[Any]:
    """Return the consecutive values in a text. Raises ValueError, also for more than one list."""
    values: list[Any] = []
    at = 0
    while (at := _SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # matches everywhere
        if values and isinstance(values[0], list):
            raise json.JSONDecodeError("text after the end of the list", text, at)
        value, at = _JSON.raw_decode(text, at)
        values.append(value)
    return values


def _lists_of_rows(document: Mapping[str, object]) -> dict[str, list[object]]:
    """Return an object's lists of rows by key; empty if the object is a row itself."""
    held = {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
        if key not in ROW_COLUMNS or (key in CONVERSATION_COLUMNS and not is_message(value[0]))
    }
    return {} if ROW_COLUMNS & (document.keys() - held.keys()) else held


def _looks_like_lines(start: bytes) -> bool:
    """Whether a .json file actually contains JSON Lines, as many do; a mistake then costs one line, not the rest."""
    line, _, rest = start.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    return not rest.isspace() and rest != b"" and isinstance(JsonLine(line, 0).parse(), dict)


def _read_csv(stream: ByteStream, name: str) -> Iterator[RawRow]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_ROW_BYTES)
    first = [*islice(iter(lambda: text.readline(MAX_ROW_BYTES), ""), LOOKED_AT)]
    stated = _SEPARATOR_LINE.fullmatch(first[0]) if first else None
    skipped = 1 if stated else 0
    refuse_title(split_lines(first[skipped:]), f"{name}:{1 + skipped}")
    delimiter = stated[1] if stated else _find_delimiter(first[0] if first else "")
    lines = csv.reader(_short_lines(first[skipped:], text, name), delimiter=delimiter, strict=True)
    try:
        header = _check_header(next(lines, []), name)
        line = lines.line_num + 1 + skipped
        for row, cells in enumerate(lines, 2):  # count as spreadsheets do: the header is row 1
            if cells:
                yield write_origin(name, line=line, row=row), _name_cells(cells, header)
            line = lines.line_num + 1 + skipped
    except csv.Error as error:
        fix = 'Quote cells that hold the delimiter, a line end or a quote, and double the quotes inside: "say ""hi""".'
        raise DataError.of(f"not valid CSV: {error}", f"{name}:{lines.line_num + skipped}", fix) from error


def _find_delimiter(header_line: str) -> str:
    """Return the most frequent delimiter outside quotes."""
    return max(DELIMITERS, key=_QUOTED.sub("", header_line).count)


def _short_lines(first: Sequence[str], rest: io.TextIOWrapper, name: str) -> Iterator[str]:
    """Yield lines, each a row or part of one. Raises DataError for a line without an end."""
    for number, line in enumerate(chain(first, iter(lambda: rest.readline(MAX_ROW_BYTES), "")), 1):
        if len(line) >= MAX_ROW_BYTES:
            what = f"a line of more than {MAX_ROW_BYTES >> 20} MiB"
            raise DataError.of(what, f"{name}:{number}", "Check that it is CSV with one row per line.")
        yield line


def _check_header(header: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in header]
    if any(_escaped_byte(cell) is not None for cell in header):
        raise DataError.of("the header is not UTF-8", f"{name}:1", OTHER_ENCODING)
    check_column_names(header, f"{name}:1")
    return header


def _name_cells(cells: list[str], header: list[str]) -> dict[str, object] | RowError:
    if len(cells) != len(header):
        return RowError("wrong number of columns", f"{len(cells)} cells, the header has {len(header)}")
    if cells[-1].strip() == header[-1] and [cell.strip("\ufeff ") for cell in cells] == header:
        return RowError("repeats the header", "Files were joined with their headers")
    for cell in cells:
        if (bad := _escaped_byte(cell)) is not None:
            return RowError(NOT_UTF8, f"byte 0x{ord(cell[bad]) - 0xDC00:02x} in a cell")
    return dict(zip(header, cells, strict=True))


def _read_text(stream: ByteStream, name: str) -> Iterator[RawRow]:
    """Read a document. Cut a long one into pieces of at least TEXT_PIECE characters, at blank lines or any line end.

    Cutting starts at the beginning. A file that grows at its end keeps all pieces but the last.
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
            yield write_origin(name, line=first), {"text": "".join(piece)}
            piece, size, first = [], 0, number
    if piece and (first == 1 or not "".join(piece).isspace()):
        yield write_origin(name, line=first), {"text": "".join(piece)}


def _escaped_byte(text: str) -> int | None:
    """Return the position of a byte in `text` that was not UTF-8 when decoded with `surrogateescape`."""
    if text.isascii():
        return None
    return next((index for index, char in enumerate(text) if "\udc80" <= char <= "\udcff"), None)


READERS: Mapping[str, Callable[[ByteStream, str], Iterator[LazyRow]]] = {
    "jsonl": _read_lines,
    "json": _read_json_document,
    "csv": _read_csv,
    "text": _read_text,
}
