"""The user's cache folder: what was converted once is kept there, whole or not at all."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.errors import EnvironmentProblem
from llmtune.store.atomic_files import find_cache as find_cache


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`; if it does not exist, let `build` fill a new folder beside it and rename that.

    A second process waits for the first. Raises EnvironmentProblem where the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                _build(folder, build)
    except OSError as error:
        raise EnvironmentProblem.of(
            f"the cache folder cannot be written: {error.strerror or error}",
            str(folder.parent),
            "Free or allow space there, or set LLMTUNE_CACHE to another folder.",
        ) from error
    return folder


def share_file(path: Path, like: Path) -> None:
    """Give `path` the permissions of `like`: safetensors writes files that their owner alone can read."""
    path.chmod(like.stat().st_mode)


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    for left in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        build(part)
        part.chmod(0o755)  # mkdtemp's is for its owner alone
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
