"""Files as byte streams: decompress, convert to UTF-8, and refuse devices, bombs and archives."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, cast

import pyarrow as pa
from typing_extensions import Buffer

from llmtune.data.object_store import RemoteFile
from llmtune.errors import DataError
from llmtune.recipe.user_files import open_regular
from llmtune.records import Advance

MAX_GROWTH = 200
"""Largest allowed ratio of decompressed to compressed size. Text shrinks to a tenth, a bomb to a thousandth."""
PROBED_BYTES = 2**20
GROWN_BYTES = 4 * 2**20
"""Smaller outputs are never checked for growth."""
OTHER_FILES = {
    b"PAR1": ("Parquet", "Set `format: parquet`."),
    b"PK\x03\x04": ("a zip archive", "Unpack it."),
    b"7z\xbc\xaf": ("a 7z archive", "Unpack it."),
    b"Rar!": ("a rar archive", "Unpack it."),
    b"BZh": ("packed with bzip2", "Unpack it, or pack it with gzip or zstd."),
    b"\xfd7zX": ("packed with xz", "Unpack it, or pack it with gzip or zstd."),
    b"SQLi": ("an SQLite database", "Write its rows as JSON lines."),
    b"ARRO": ("an Arrow file", "Write it as Parquet."),
    b"%PDF": ("a PDF", "Extract its text."),
}
TAR = slice(257, 262)
"""Offset of a tar archive's magic number: `ustar`."""

GUESSED_BYTES = 2**20
"""How many bytes of a file the encoding guess reads."""
WESTERN_SIGNS = "€‚„…†‡‰‹‘’“”•–—™›\xa0¡¢£§©ª«®°±²³´µ·º»¼½¾¿×÷"
WIDE = ("utf-16", "utf_16", "utf16", "utf-32", "utf_32", "utf32")
WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is a prefix of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

ByteStream: TypeAlias = "io.BufferedReader[io.RawIOBase]"


class GrowthError(Exception):
    """A compressed file decompresses to far more than text does."""


class _CountedFile(io.RawIOBase):
    """A file that reports how far it has been read."""

    def __init__(self, path: Path | RemoteFile, advance: Advance) -> None:
        self._file = path.open() if isinstance(path, RemoteFile) else open_regular(path)
        self._advance = advance
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        count = self._file.readinto(buffer) or 0
        self._advance(count)
        self.count += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def skip_bom(stream: ByteStream) -> None:
    """Skip the byte order mark of UTF-8; some programs write it before other encodings too."""
    if stream.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))


class Transcoded(io.RawIOBase):
    """Converts a stream in another encoding to UTF-8."""

    def __init__(self, stream: ByteStream, encoding: str) -> None:
        if not encoding.lower().startswith(WIDE):
            skip_bom(stream)
        pieces = iter(lambda: stream.read(2**16), b"")
        self._pieces = codecs.iterencode(codecs.iterdecode(pieces, encoding), "utf-8")
        self._rest = b""

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        """Read into a buffer."""
        self._rest = self._rest or next(self._pieces, b"")
        view = memoryview(buffer)
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class _Unpacked(io.RawIOBase):
    """A decompressed stream, up to a size limit."""

    def __init__(self, raw: ByteStream, kind: str, packed: _CountedFile) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind)
        self._packed = packed
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        count = int(self._stream.readinto(buffer))
        self._count += count
        if self._count > GROWN_BYTES and self._count > MAX_GROWTH * self._packed.count:
            raise GrowthError
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def open_bytes(path: Path | RemoteFile, advance: Advance = lambda count: None) -> Iterator[ByteStream]:
    """Open a file for reading bytes; gzip and zstandard are detected by their first bytes and decompressed.

    Raises OSError if the path is not a regular file.
    """
    packed = _CountedFile(path, advance)
    with io.BufferedReader(cast(io.RawIOBase, packed), 2**18) as raw:
        kind = next((kind for magic, kind in MAGIC.items() if raw.peek(4).startswith(magic)), None)
        if kind is None:
            yield raw
            return
        _refuse_bomb(path, kind)
        with io.BufferedReader(cast(io.RawIOBase, _Unpacked(raw, kind, packed)), 2**18) as stream:
            yield stream


def _refuse_bomb(path: Path | RemoteFile, kind: str) -> None:
    """Decompress the start of a file before its rows take time; the rest is counted while it is read."""
    packed = _CountedFile(path, lambda count: None)
    is_cut = suppress(OSError)  # reported once its rows have been read
    with io.BufferedReader(cast(io.RawIOBase, packed), 2**16) as raw, is_cut, _Unpacked(raw, kind, packed) as stream:
        while packed.count < PROBED_BYTES and stream.read(2**20):
            pass


def refuse_other_files(stream: ByteStream, name: str) -> None:
    """Raise DataError for an archive, a database or UTF-16 text, whatever the file's name suggests."""
    start = stream.peek(TAR.stop)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError.of("the file is UTF-16", name, "Add `encoding: utf-16` to the source, or save it as UTF-8.")
    kind, fix = next((about for magic, about in OTHER_FILES.items() if start.startswith(magic)), (None, None))
    if start[TAR] == b"ustar":
        kind, fix = "a tar archive", "Unpack it."
    if kind is not None:
        raise DataError.of(f"the file is {kind}, whatever its name says", name, fix)


def guess_encoding(path: Path | RemoteFile) -> str | None:
    """Return the encoding of a file's byte order mark, or `cp1252` if the file is not UTF-8 and looks Western European.

    Excel writes "Unicode text" as UTF-16 with a mark, and CSV files as cp1252 without one.
    """
    with open_bytes(path) as stream:
        skip_bom(stream)
        start = stream.read(GUESSED_BYTES)
    if marked := next((name for mark, name in WIDE_MARKS.items() if start.startswith(mark)), None):
        return marked
    try:
        start.decode()
    except UnicodeDecodeError as error:
        if error.end >= len(start) - 3 and len(start) == GUESSED_BYTES:
            return None  # the last character is cut in two
    else:
        return None
    try:
        signs = [sign for sign in start.decode("cp1252") if not sign.isascii()]
    except UnicodeDecodeError:
        return None
    rare = sum(not (sign.isalpha() or sign in WESTERN_SIGNS) for sign in signs)
    words = len(signs) < len(start) / 3  # more of them suggest another alphabet
    return "cp1252" if signs and words and rare <= len(signs) / 10 else None
