"""Files and folders that a user names: opened without waiting for a pipe or a device, read and walked up to a bound."""

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
"""Folders that are looked into: a home folder has more, a data set has less."""
MAX_TEXT_BYTES = 16 * 2**20
"""Templates, keys, configurations: all that is read whole and is no data."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class NotAFileError(OSError):
    """What is named is there, and is no regular file: a read from it might never end."""


def check_regular(path: Path) -> os.stat_result:
    """Return the `stat` of a regular file; raises OSError (NotAFileError) for everything else."""
    found = os.stat(path)
    for is_kind, name in _KINDS:
        if is_kind(found.st_mode):
            raise NotAFileError(errno.EINVAL, f"it is {name}, not a regular file", str(path))
    return found


class RegularFile(io.FileIO):
    """A file whose reads do not wait: some of /proc look regular and have nothing to read yet, which is their end."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes."""
        return super().read(size) or b""

    def readinto(self, buffer: Buffer, /) -> int:
        """Read into a buffer."""
        return super().readinto(buffer) or 0


def open_regular(path: Path) -> RegularFile:
    """Open a regular file for reading, unbuffered; raises OSError for anything that a read could hang on."""
    check_regular(path)
    return RegularFile(str(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes; raises OSError."""
    with open_regular(path) as file:
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
    """Yield the regular files below a folder; with `hidden` also those in folders whose names begin with a dot.

    With `follow` it goes into folders that are links, too, into each once. Raises OSError: a folder may not be read, or
    there are more than MAX_FOLDERS of them.
    """
    seen: set[tuple[int, int]] = set()
    below = [str(folder)]
    while below:
        name = below.pop()
        about = os.stat(name)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        if len(seen) > MAX_FOLDERS:
            raise OSError(errno.E2BIG, f"more than {MAX_FOLDERS:,} folders are in it", str(folder))
        with os.scandir(name) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=follow):
                    if hidden or not entry.name.startswith("."):
                        below.append(entry.path)
                elif entry.is_file():
                    yield Path(entry.path)


def match_files(pattern: str) -> list[Path]:
    """Return the regular files that a pattern of the shell names, sorted; `**` crosses folders.

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
    """Whether the parts of a path match those of a pattern; a star matches no leading dot."""
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
