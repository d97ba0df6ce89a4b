"""Files as byte streams: decompress, convert to UTF-8, and refuse devices, bombs and archives."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, cast

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

WIDE = ("utf-16", "utf_16", "utf16", "utf-32", "utf_32", "utf32")
ZERO_BYTES, ZERO_SHARE = 4, 0.02
"""In UTF-16, one half of each character has so many times the zero bytes of the other half, and so many of all."""
PEEKED_BYTES = 4096
UTF8 = "UTF-8"
MULTIBYTE = ("big5", "cp932", "cp949", "cp950", "euc_", "gb", "johab", "shift_jis")
SEVERAL = 8
"""So many bytes are no chance: beyond ASCII and valid in UTF-8, or zero in one half of each two bytes."""
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


class OtherEncodingError(Exception):
    """A file is in another encoding than stated, and its bytes can be read in both."""

    def __init__(self, encoding: str, stated: str) -> None:
        self.what = f"the file is {encoding}, and its source states {stated}"
        self.fix = f"Set `encoding: {encoding}`." if encoding != UTF8 else f"Remove `encoding: {stated}`."
        super().__init__(self.what)


def _refuse_utf8(pieces: Iterator[bytes], stated: str) -> Iterator[bytes]:
    """Yield the pieces of a file; raise OtherEncodingError once they turn out to be UTF-8."""
    name = codecs.lookup(stated).name
    is_wide, least = name.startswith(WIDE), SEVERAL if name.startswith(MULTIBYTE) else 1
    decoder, is_utf8, signs = codecs.getincrementaldecoder("utf-8")(), not name.startswith("utf-8"), 0
    for piece in pieces:
        if is_utf8:
            with suppress(UnicodeDecodeError):
                signs += len(piece) - len(decoder.decode(piece))  # a character takes several bytes
                is_utf8 = not (is_wide and b"\0" in piece)
                if is_utf8 and (is_wide or signs >= SEVERAL):
                    raise OtherEncodingError(UTF8, stated)
                yield piece
                continue
            is_utf8 = False
        yield piece
    if is_utf8 and signs >= least and not is_wide:
        raise OtherEncodingError(UTF8, stated)


class Transcoded(io.RawIOBase):
    """Converts a stream in another encoding to UTF-8.

    Reading raises OtherEncodingError if the bytes show that the file is UTF-8, UTF-16 or UTF-32 and not as stated:
    decoding could succeed, with other characters.
    """

    def __init__(self, stream: ByteStream, encoding: str) -> None:
        start, stated = stream.peek(PEEKED_BYTES)[:PEEKED_BYTES], codecs.lookup(encoding).name
        wide = wide_mark(start) or byte_order(start)
        if wide and not (stated.startswith(wide) or (wide_mark(start) and wide.startswith(stated[:6]))):
            raise OtherEncodingError(wide, encoding)
        if not wide:
            skip_bom(stream)
        pieces = _refuse_utf8(iter(lambda: stream.read(2**16), b""), encoding)
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
        import pyarrow as pa

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


def wide_mark(start: bytes) -> str | None:
    """Return the encoding of a byte order mark of UTF-16 or UTF-32 at the start of a file; None without one."""
    return next((name for mark, name in WIDE_MARKS.items() if start.startswith(mark)), None)


def refuse_wide(stream: ByteStream, name: str) -> None:
    """Raise DataError for UTF-16 text without a byte order mark or a stated encoding."""
    if encoding := byte_order(stream.peek(PEEKED_BYTES)[:PEEKED_BYTES]):
        raise DataError.of(
            f"the file is {encoding.upper()[:6]}", name, f"Set `encoding: {encoding}`, or save it as UTF-8."
        )


def byte_order(start: bytes, fewest: int = SEVERAL) -> str | None:
    """Return the kind of UTF-16 without a mark, by the `fewest` ASCII characters; None for other encodings.

    Their zero byte comes second, or first.
    """
    first, second = start[0::2].count(0), start[1::2].count(0)
    if max(fewest, ZERO_SHARE * len(start)) > max(first, second):
        return None
    if start.isascii() and first + second < len(start) / 4:  # in ASCII, every second byte would be zero
        return None
    name = "utf-16-le" if second > ZERO_BYTES * first else "utf-16-be" if first > ZERO_BYTES * second else None
    with suppress(UnicodeDecodeError):
        return name if name and codecs.getincrementaldecoder(name)().decode(start) else None
    return None


def refuse_other_files(stream: ByteStream, name: str) -> None:
    """Raise DataError for an archive or a database, whatever the file's name suggests."""
    start = stream.peek(TAR.stop)
    kind, fix = next((entry for magic, entry in OTHER_FILES.items() if start.startswith(magic)), (None, None))
    if start[TAR] == b"ustar":
        kind, fix = "a tar archive", "Unpack it."
    if kind is not None:
        raise DataError.of(f"the file is {kind}, whatever its name says", name, fix)
