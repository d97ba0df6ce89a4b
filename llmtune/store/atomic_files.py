"""Atomic file writes (write to a temporary name, then rename), JSON, locks and hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from safetensors import SafetensorError

from llmtune.errors import EnvironmentProblem, Problem, system_errno, system_problem

MODEL_ENDINGS = (".json", ".safetensors", ".model", ".txt", ".jinja", ".bin", ".py", ".tiktoken")
T = TypeVar("T")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
NO_PLACE = {errno.ENOTDIR, errno.ENOENT, errno.EEXIST}
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF}
"""Errors of file systems without locks, such as some network file systems."""
BUSY_FIX = "Wait for it, or choose another folder with --out."
UNFINISHED = (".*.tmp", ".*.new", ".*.old", ".keys-*", ".tmp-*", ".removed-*")
"""What killed processes leave; the last two are from earlier versions."""
MAX_JSON_BYTES = 2**30
BLOCK_BYTES = 2**20
MAX_JSON_DEPTH = 100
"""Far more than llmtune's own files need, and far below Python's recursion limit."""


def find_cache() -> Path:
    """Return `$LLMTUNE_CACHE`, or `llmtune` in `$XDG_CACHE_HOME`, or `~/.cache/llmtune`."""
    if folder := os.environ.get("LLMTUNE_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtune"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` at the end, or is removed on an error.

    Readers see either the old or the new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` atomically and sync it to disk; characters invalid in UTF-8 are replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """Write `value`, converted by `plain`, as strict JSON."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: object) -> Any:
    """Convert a nested value to JSON types: records by their fields, NaN and infinities to None, paths to strings.

    Records with a method `to_json` are written by it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if is_dataclass(value) and hasattr(value, "to_json"):
        return plain(value.to_json())
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> Any:
    """Read a JSON file written by llmtune; None if it is missing or damaged."""
    from llmtune.recipe.user_files import NotAFileError, read_text_file  # late: imports the schema, slow for --help

    try:
        content = json.loads(read_text_file(path, MAX_JSON_BYTES))
    except (FileNotFoundError, NotADirectoryError, NotAFileError, ValueError, RecursionError):
        return None
    return None if _too_deep(content) else content


def _too_deep(content: object) -> bool:
    """Return whether a JSON value is nested more than MAX_JSON_DEPTH deep."""
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return False
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def read_json_lines(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Read the objects of a JSON lines file written by llmtune, or of its `last` bytes; empty if it is missing.

    Skips damaged lines. Raises EnvironmentProblem if it cannot be read.
    """
    from llmtune.recipe.user_files import read_bytes

    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    with explained(path):
        content = read_bytes(path, MAX_JSON_BYTES, last)
    for text in content.decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and not _too_deep(line):
            lines.append(line)
    return lines


def refuse_links(*paths: Path) -> None:
    """Raise EnvironmentProblem that names the paths that are links: their targets belong to somebody else."""
    fix = "Remove the link, or move its target into its place."
    EnvironmentProblem.collect(Problem(describe_link(path), str(path), fix) for path in paths if path.is_symlink())


def describe_link(path: Path) -> str:
    """Return why a link and its target stay as they are."""
    return f"a link to {os.readlink(path)}, and llmtune changes nothing outside its own folders"


def refuse_links_out(folder: Path) -> None:
    """Raise EnvironmentProblem that names the links at any depth of a folder that lead out of it."""
    inside = os.path.realpath(folder) + os.sep
    refuse_links(*(path for path in folder.rglob("*") if not os.path.realpath(path).startswith(inside)))


@contextmanager
def exclusive(path: Path, place: Path, fix: str = BUSY_FIX) -> Iterator[None]:
    """Lock a file or folder, and with it `place`, against other processes; no-op on file systems without locks.

    Raises EnvironmentProblem, naming the process that has the lock, and for a link.
    """
    refuse_links(path)
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EWOULDBLOCK, *NO_LOCKS}:
                raise
            if error.errno == errno.EWOULDBLOCK:
                what = f"another llmtune process is using this folder{_holder(handle)}"
                raise EnvironmentProblem.of(what, str(place), fix) from None
        yield
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """Return the name of the process that has the same file open; empty if the system does not show it."""
    import psutil  # late: slow for --help

    file_status = os.fstat(handle)
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                if process.pid != os.getpid() and os.path.samestat(link.stat(), file_status):
                    started = time.strftime("%H:%M:%S", time.localtime(process.create_time()))
                    return f": process {process.pid}, started at {started} ({shlex.join(process.cmdline())})"
    return ""


@contextmanager
def staged(folder: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write to; it replaces `folder` at the end, or is removed on an error.

    With `durable`, all files are on the disk before that. Raises EnvironmentProblem if another process is staging the
    same folder, or a name that is needed is a link.
    """
    temporary = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    refuse_links(folder, temporary, old)
    temporary.mkdir(parents=True, exist_ok=True)
    with exclusive(temporary, folder):
        try:
            for leftover in temporary.iterdir():
                remove(leftover)
            yield temporary
            for path in (*sorted(temporary.rglob("*")), temporary) if durable else ():
                _flush(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        if durable:
            _flush(folder.parent)


def _flush(path: Path) -> None:
    """Force a file or a folder's entries onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in `folder`."""
    for leftover in [path for pattern in UNFINISHED for path in folder.glob(pattern)]:
        with suppress(OSError):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    from llmtune.recipe.user_files import open_regular

    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_lines(path: Path) -> tuple[str, int | None]:
    """Return the sha256 of a file in hex and its number of lines, which is None for a binary file."""
    from llmtune.recipe.user_files import open_regular

    digest, lines, last = hashlib.sha256(), 0, b"\n"
    with open_regular(path) as file:
        is_binary = b"\0" in file.read(BLOCK_BYTES)
        file.seek(0)
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            lines += 0 if is_binary else block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), None if is_binary else lines + (last != b"\n")


def read_once(path: Path, read: Callable[[Path], T]) -> T:
    """Return `read(path)`; this process reads the file again only after its size or one of its times changed."""
    status = os.stat(path)
    times = status.st_mtime_ns, status.st_ctime_ns
    key = read, os.path.abspath(path), status.st_dev, status.st_ino, status.st_size, *times
    if key not in _read:
        _read[key] = read(path)
    return _read[key]  # type: ignore[no-any-return]


_read: dict[tuple[object, ...], Any] = {}


def hash_recording(path: Path) -> str:
    """Return the xxh3_128 of a file in hex; faster than sha256 for many large recordings."""
    from llmtune.recipe.user_files import open_regular

    with open_regular(path) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def list_folder(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file below `folder`, by relative name, sorted; empty if it is missing."""
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def hash_folder(folder: Path) -> str:
    """Return the sha256 over the names and contents of all files below `folder`; empty if it is missing."""
    return hash_listing(list_folder(folder)) if folder.is_dir() else ""


def hash_path(path: Path) -> str:
    """Return the sha256 of a file, or of all files in a folder; empty if it is missing."""
    return hash_file(path) if path.is_file() else hash_folder(path)


def hash_listing(files: Mapping[str, str]) -> str:
    """Return the sha256 of a folder from the hashes of its files."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in files.items()).encode()).hexdigest()


def list_model(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a model folder that affects its computation, by name, sorted.

    Files of the hub's cache that are named by their sha256 are not read.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in MODEL_ENDINGS)
    hashes: dict[str, str] = {}
    for path in files:
        blob = path.resolve()
        is_named_by_hash = path.is_symlink() and blob.parent.name == "blobs" and len(blob.name) == 64
        hashes[path.name] = blob.name if is_named_by_hash else hash_file(path)
    return hashes


def hash_value(value: object) -> str:
    """Return the sha256 of a JSON-able value in hex, independent of the order of keys."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert system errors (such as a full disk or missing permission) to an EnvironmentProblem with a fix."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        problem = system_problem(error, str(path))
        if isinstance(error, OSError) and error.errno in NO_PLACE:
            what = f"cannot be read or written: {error.strerror}"
            problem = Problem(what, str(error.filename or path), "Choose another folder with --out.")
        if problem is None:
            raise
        if system_errno(error) in NO_SPACE:
            existing = next(candidate for candidate in (path, *path.parents) if candidate.exists())
            problem = replace(problem, what=f"{problem.what}: {shutil.disk_usage(existing).free / 1e6:.0f} MB free")
        raise EnvironmentProblem(problem) from error
