"""Reads and walks files and folders named by the user; never blocks on pipes or devices, and limits size and number."""

from __future__ import annotations

import errno
import fnmatch
import glob
import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from typing_extensions import Buffer

MAX_FOLDERS = 20_000
"""Maximum folders to walk: a home folder has more, a data set fewer."""
MAX_TEXT_BYTES = 16 * 2**20
"""Maximum size of files read at once: templates, keys, configurations, but not data."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class NotAFileError(OSError):
    """The path exists but is not a regular file; reading it might never end."""


def check_regular(path: Path) -> os.stat_result:
    """Return the `stat` of a regular file; raises OSError (NotAFileError) for everything else."""
    status = os.stat(path)
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise NotAFileError(errno.EINVAL, f"it is {name}, not a regular file", str(path))
    return status


class RegularFile(io.FileIO):
    """A file with non-blocking reads. Some files in /proc look regular but have no data yet; that counts as the end."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes, or none if reading would block."""
        return super().read(size) or b""

    def readinto(self, buffer: Buffer, /) -> int:
        """Read into a buffer, 0 bytes if reading would block."""
        return super().readinto(buffer) or 0


def open_regular(path: Path) -> RegularFile:
    """Open a regular file for unbuffered reading; raises OSError for anything else, which could block."""
    check_regular(path)
    return RegularFile(str(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES, last: int | None = None) -> bytes:
    """Read a regular file of at most `limit` bytes, or its `last` bytes; raises OSError."""
    with open_regular(path) as file:
        if last is not None:
            file.seek(max(0, os.fstat(file.fileno()).st_size - last))
        parts: list[bytes] = []
        size = 0
        while part := file.read(2**20):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
        return b"".join(parts)


def read_text_file(path: Path, limit: int = MAX_TEXT_BYTES, errors: str = "strict") -> str:
    """Read a regular file of at most `limit` bytes as UTF-8; raises OSError and UnicodeDecodeError."""
    return read_bytes(path, limit).decode("utf-8", errors)


def walk_files(folder: Path, *, hidden: bool = False, follow: bool = False) -> Iterator[Path]:
    """Yield the regular files below a folder; with `hidden` also from folders whose names begin with a dot.

    With `follow` it follows links to folders and visits each folder once. Raises OSError for an unreadable folder, or
    for more than MAX_FOLDERS folders.
    """
    seen: set[tuple[int, int]] = set()
    below = [str(folder)]
    while below:
        name = below.pop()
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if len(seen) > MAX_FOLDERS:
            raise OSError(errno.E2BIG, f"it contains more than {MAX_FOLDERS:,} folders", str(folder))
        with os.scandir(name) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=follow):
                    if hidden or not entry.name.startswith("."):
                        below.append(entry.path)
                elif entry.is_file():
                    yield Path(entry.path)


def match_files(pattern: str) -> list[Path]:
    """Return the regular files that match a shell pattern, sorted; `**` matches any number of folders.

    Raises OSError as `walk_files` does.
    """
    parts = Path(pattern).parts
    first = parts.index("**") if "**" in parts else len(parts)
    heads = [Path(name) for name in glob.iglob(str(Path(*parts[:first])))]
    rest = parts[first:]
    if not rest:
        return sorted(path for path in heads if path.is_file())
    hidden = any(part.startswith(".") for part in rest)
    files = (path for head in heads if head.is_dir() for path in walk_files(head, hidden=hidden, follow=True))
    depth = len(heads[0].parts) if heads else 0
    return sorted({path for path in files if _match_parts(path.parts[depth:], rest)})


def _match_parts(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match a pattern; a star does not match a leading dot."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    hidden = names[0].startswith(".")
    if pattern[0] == "**":
        return _match_parts(names, pattern[1:]) or (not hidden and _match_parts(names[1:], pattern))
    return (
        hidden == pattern[0].startswith(".")
        and fnmatch.fnmatchcase(names[0], pattern[0])
        and _match_parts(names[1:], pattern[1:])
    )
