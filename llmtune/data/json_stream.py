"""The rows of a JSON file, one after the other, without holding the file in memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from itertools import islice

from llmtune.data.message_roles import is_message

CHUNK = 2**20
ROW_COLUMNS = frozenset(
    {"messages", "conversations", "conversation", "tools", "functions", "history", "prompt", "completion"}
)
"""Columns of a row that may hold a list of objects: an object with one of these is a row, not a holder of rows."""
CONVERSATIONS = frozenset({"messages", "conversations", "conversation"})
"""Of these, the ones whose items are messages; a list of other objects holds rows."""

_SPACE = re.compile(r"[ \t\r\n]*")
_NEAR_THE_END = 16
"""A syntax error this close to the end of what was read may be a value that goes on; longer than `-Infinity`."""


class JsonSyntaxError(Exception):
    """Text that is not JSON: `line` is where, the message is what."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _Window:
    """The part of a JSON text that is in memory, and the offset up to which it was taken."""

    def __init__(self, stream: io.BufferedReader[io.RawIOBase], limit: int) -> None:
        self._stream = stream
        self.limit = limit
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self.bytes_read = 0
        self._line = 1
        self._ended = False
        self._text = ""
        self._offset = 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._offset)
            self._offset = match.end() if match else self._offset
            if self._offset < len(self._text):
                return self._text[self._offset]
            if not self._read():
                return ""

    def take(self, expected: str) -> str:
        """Step over one of the characters `expected` and return it."""
        actual = self.peek()
        if not actual or actual not in expected:
            shown = repr(actual) if actual else "the end of the file"
            raise self.error(f"{' or '.join(expected)} expected, not {shown}", self._offset)
        self._offset += 1
        return actual

    def value(self) -> object:
        """Parse the next value, reading on until it is whole."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._offset)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_THE_END
                if not (cut and self._read()):
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error), self._offset) from error
            else:
                if end < len(self._text) or not self._read():  # a number at the end may go on
                    self._offset = end
                    return value
            if len(self._text) - self._offset > self.limit:
                raise self.error(f"a value of more than {self.limit >> 20} MiB", self._offset)

    def _read(self) -> bool:
        """Read on and let go of what was taken; the step doubles with what is held, so that long values stay linear."""
        if self._ended:
            return False
        self._line += self._text.count("\n", 0, self._offset)
        self._text = self._text[self._offset :]
        self._offset = 0
        data = self._stream.read(max(CHUNK, len(self._text)))
        self._ended = not data
        try:
            self._text += self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(data)
            offset = self.bytes_read - pending + error.start
            raise self.error(f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset}", 0) from error
        self.bytes_read += len(data)
        return not self._ended

    def error(self, message: str, offset: int | None = None) -> JsonSyntaxError:
        """Return an error that names the line of an offset in the window (or of the current one)."""
        end = self._offset if offset is None else offset
        return JsonSyntaxError(message, self._line + self._text.count("\n", 0, end))


def read_json_items(stream: io.BufferedReader[io.RawIOBase], limit: int) -> Iterator[object]:
    """Yield the rows of a JSON text: the items of a list, of the list in an object, or objects that follow one another.

    Args:
        stream: UTF-8; read forward only, so it may be compressed.
        limit: Bytes that one row may take.

    Raises:
        JsonSyntaxError: At the first mistake; rows before it have been yielded.
    """
    window = _Window(stream, limit)
    if not window.peek():
        return
    if window.peek() == "[":
        yield from _items(window)
        if window.peek():
            raise window.error("text behind the end of the list")
        return
    yield from _object(window)
    while window.peek():
        yield window.value()


def _items(window: _Window) -> Iterator[object]:
    window.take("[")
    if window.peek() == "]":
        window.take("]")
        return
    while True:
        yield window.value()
        if window.take(",]") == "]":
            return


def _bounded(window: _Window, first: list[object], items: Iterator[object]) -> list[object]:
    """Return a list that is one value of a row; raises JsonSyntaxError where it is too large."""
    begin, values = window.bytes_read, first
    for item in items:
        values.append(item)
        if window.bytes_read - begin > window.limit + CHUNK:
            raise window.error(f"a value of more than {window.limit >> 20} MiB")
    return values


def _object(window: _Window) -> Iterator[object]:
    """Yield the rows in the only list of objects that the first object holds, or else the object itself."""
    fields: dict[str, object] = {}
    rows_in: str | None = None
    window.take("{")
    while window.peek() != "}":
        if window.peek() != '"':
            window.take('"')
        key = str(window.value())
        window.take(":")
        holder = key not in ROW_COLUMNS or key in CONVERSATIONS
        if window.peek() == "[" and holder and not ROW_COLUMNS & fields.keys():
            items = _items(window)
            first = list(islice(items, 1))
            is_row = key in CONVERSATIONS and (not first or is_message(first[0]))
            if is_row or not first or not isinstance(first[0], dict):
                fields[key] = _bounded(window, first, items)
            elif rows_in is not None:
                raise window.error(f"two lists of rows, {rows_in!r} and {key!r}; keep one")
            else:
                rows_in = key
                yield from first
                yield from items
        else:
            fields[key] = window.value()
        if window.peek() != "}":
            window.take(",")
    window.take("}")
    if rows_in is None:
        yield fields
