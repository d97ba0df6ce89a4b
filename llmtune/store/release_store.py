"""Releases by content hash in `releases/NAME/HASH/`, and the pointer to the current one.

releases/NAME/HASH/          a release: immutable, and complete for serving
releases/NAME/current        the HASH in production; replaced by one rename
releases/NAME/history.jsonl  a line per promotion and rollback, written before the pointer
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, RecipeError, nearest
from llmtune.recipe.section import RELEASE_ADDRESS, RELEASE_PREFIX
from llmtune.store.atomic_files import (
    exclusive,
    explained,
    hash_file,
    read_json,
    read_json_lines,
    refuse_links,
    staged,
    write_text,
)
from llmtune.store.json_shapes import find_misfit
from llmtune.store.run_lock import LOCK

RELEASES = Path("releases")
"""In the working folder, like `runs`."""
RECORD_FILE = "release.json"
CURRENT, HISTORY = "current", "history.jsonl"
SERVED_RECIPE, TEMPLATE = "serving.json", "chat_template.jinja"
"""In a release: the recipe with everything resolved that a run infers from its rows, and the user's own template."""
HISTORY_BYTES = 2**20
RELEASE_HASH = re.compile(r"[0-9a-f]{8}")
IGNORED = """\
# Weights stay out of git. Records, pointers and histories of releases go in.
.*
!.gitignore
/*/*/*
!/*/*/release.json*
"""


class Promotion(TypedDict):
    """A line of a release's history."""

    date: str
    action: Literal["promote", "rollback"]
    before: str | None
    """Hash of the release that served before; None for the first."""
    after: str
    """Hash of the release that serves from then on."""


@dataclass(frozen=True)
class StoredRelease:
    """A release in the store."""

    name: str
    hash: str
    folder: Path
    current: bool
    """Whether it is in production."""

    @property
    def address(self) -> str:
        """Its full address, `release:NAME@HASH`."""
        return release_address(self.folder)


def release_address(folder: Path) -> str:
    """Return the full address of a release's folder, `release:NAME@HASH`."""
    return f"{RELEASE_PREFIX}{folder.parent.name}@{folder.name}"


def split_address(address: str) -> tuple[str, str | None]:
    """Return name and hash of `release:NAME[@HASH]`; raises RecipeError for another form."""
    parts = RELEASE_ADDRESS.fullmatch(address)
    if parts is None:
        fix = "Write release:NAME for the current release, or release:NAME@HASH with the 8 digits of an older one."
        raise RecipeError.of("not the address of a release", address, fix)
    return parts["name"], parts["hash"]


def resolve_release(address: str) -> Path:
    """Return the folder of `release:NAME` (the current one) or `release:NAME@HASH`.

    Raises RecipeError, naming the candidates, if the release does not exist.
    """
    name, digest = split_address(address)
    stored = list_stored(name)
    chosen = [one for one in stored if (one.current if digest is None else one.hash == digest)]
    if chosen:
        return chosen[0].folder
    if digest is None and (current := read_current(name)):
        fix = "Restore the folder, or release its run again: llmtune release RUN."
        hashes = ", ".join(one.hash for one in stored)
        fix += f" Or go back to one of {hashes}: llmtune release rollback {name} --to HASH" if stored else ""
        raise RecipeError.of(f"the current release {current} is gone", str(RELEASES / name / current), fix)
    if stored:
        what = f"{name} has no release {digest}" if digest else f"no release of {name} is current"
        fix = f"Name one of: {', '.join(one.address for one in stored)}."
        raise RecipeError.of(what, address, fix)
    names = list_release_names()
    fix = f"Releases here: {', '.join(names)}." if names else "Make one: llmtune release RUN."
    raise RecipeError.of(f"no release named {name} in {RELEASES}", address, fix + nearest(name, names))


def list_release_names() -> list[str]:
    """Return the names that have releases, sorted."""
    folders = [path.parent for path in RELEASES.glob(f"*/*/{RECORD_FILE}")]
    return sorted({folder.parent.name for folder in folders if is_stored(folder)})


def list_stored(name: str) -> list[StoredRelease]:
    """Return the releases of a name, sorted by hash."""
    current = read_current(name)
    folders = sorted(path.parent for path in (RELEASES / name).glob(f"*/{RECORD_FILE}"))
    return [StoredRelease(name, one.name, one, one.name == current) for one in folders if is_stored(one)]


def is_stored(folder: Path) -> bool:
    """Return whether a folder is a release in a store."""
    return RELEASE_HASH.fullmatch(folder.name) is not None and (folder / RECORD_FILE).is_file()


def read_current(name: str) -> str | None:
    """Return the hash of the current release; None if nothing was promoted yet.

    Raises EnvironmentProblem if the pointer was not written by llmtune.
    """
    path = RELEASES / name / CURRENT
    with explained(path):
        if not path.is_file():
            return None
        text = path.read_text("utf-8", errors="replace").strip()
    if RELEASE_HASH.fullmatch(text) is None:
        fix = f"Write the 8 digits of a release into it, or promote one: llmtune release rollback {name} --to HASH"
        raise EnvironmentProblem.of(f"damaged: {text[:20]!r} is not the hash of a release", str(path), fix)
    return text


def read_history(name: str) -> list[Promotion]:
    """Return the promotions and rollbacks of a name, the oldest first, without damaged lines: about the last 8,000."""
    lines = read_json_lines(RELEASES / name / HISTORY, HISTORY_BYTES)
    return [Promotion(**line) for line in lines if find_misfit(line, Promotion) is None]  # type: ignore[typeddict-item]


def find_opponent(address: str, run: Path | None) -> Path | None:
    """Return the folder of the release that a run is compared with; None as long as its name has no release.

    A run that is itself the current release is compared with the release that it replaced.

    Raises RecipeError as `resolve_release` does.
    """
    name, digest = split_address(address)
    if digest is None and read_current(name) is None and not list_stored(name):
        return None
    folder = resolve_release(address)
    if digest is None and run is not None and is_release_of(folder, run):
        before = replaced_by(name, folder.name)
        return resolve_release(f"{RELEASE_PREFIX}{name}@{before}") if before else None
    return folder


def check_store(champion: str | None, recipe: Path) -> None:
    """Refuse a champion without a release in the working folder, if the recipe's folder has releases of its name."""
    if champion is None or not champion.startswith(RELEASE_PREFIX):
        return
    name, folder = split_address(champion)[0], recipe.absolute().parent
    if list_stored(name) or read_current(name) or not any((folder / RELEASES / name).glob(f"*/{RECORD_FILE}")):
        return
    what = f"the working folder has no release of {name}, but the recipe's folder has: {folder / RELEASES / name}"
    raise RecipeError.of(what, f"evaluate.champion: {champion}", f"Enter the command there: cd {folder}")


def is_release_of(folder: Path, run: Path) -> bool:
    """Return whether a release has the weights that a run trained, by their hashes."""
    record, lock = read_json(folder / RECORD_FILE), read_json(run / LOCK)
    if not (isinstance(record, dict) and isinstance(lock, dict) and lock.get("trained")):
        return False
    trained = {f"{name}/{file}": sha256 for name, files in lock["trained"].items() for file, sha256 in files.items()}
    return bool(trained.items() <= record.get("files", {}).items())


def find_source(folder: Path) -> Path:
    """Return the run folder that a release was made from, which has its rows; a folder that is no release itself.

    Raises EnvironmentProblem if that run is gone, or was trained again.
    """
    if not is_stored(folder):
        return folder
    record = read_json(folder / RECORD_FILE) or {}
    stated = (read_json(folder / "run.json") or {}).get("findings", {}).get("released_from", "")
    near = folder.absolute().parents[2] / "runs" / str(record.get("run"))  # the project may have been moved
    for run in (Path(stated), near):
        if run.name and is_release_of(folder, run):
            return run
    what = f"a release has no rows, and the run that it was made from is gone: {stated or record.get('run')}"
    fix = "Restore that run folder. Or name the export in the recipe before `release`, as in deploy: [merged, release]."
    raise EnvironmentProblem.of(what, str(folder), fix)


def replaced_by(name: str, digest: str) -> str | None:
    """Return the hash of the release that the last promotion of `digest` replaced; None if it was the first."""
    before = [one["before"] for one in read_history(name) if one["action"] == "promote" and one["after"] == digest]
    return next((one for one in reversed(before) if one != digest), None)


def promote(
    name: str,
    digest: str,
    write: Callable[[Path], None],
    replaces: str | Literal[False] | None = False,
    on_stored: Callable[[], None] = lambda: None,
) -> Path:
    """Store a release, make it the current one, and return its folder.

    A kill at any point leaves the earlier release current; the same call then completes.

    Args:
        name: the recipe's name.
        digest: hash of the files that serve.
        write: fills an empty folder with the release; not called if the release is stored already.
        replaces: hash of the release that must be the current one (None: no release yet); False accepts any.
        on_stored: called before the release becomes the current one.

    Raises:
        RecipeError: another release was promoted in the meantime.
        EnvironmentProblem: the folder cannot be written, or another process is releasing under this name.
    """
    folder = RELEASES / name / digest
    with changing(name):
        current = read_current(name)
        if replaces is not False and current not in (replaces, digest):
            what = f"{name} is at {current} now, but the gates compared with {replaces or 'no release'}"
            fix = "Run the recipe again: it compares with the current release."
            raise RecipeError.of(what, str(RELEASES / name), fix)
        if not is_complete(folder):
            with staged(folder) as empty:
                write(empty)
                sync_folder(empty)
        on_stored()
        _move_pointer(name, "promote", current, digest)
    return folder


def is_withdrawn(name: str, digest: str) -> bool:
    """Return whether a release was rolled back from, and not promoted again since."""
    lines = [one for one in read_history(name) if digest in (one["before"], one["after"])]
    return bool(lines) and lines[-1]["action"] == "rollback" and lines[-1]["before"] == digest


def rollback(name: str, to: str | None = None) -> tuple[str, str]:
    """Make the release before the current one current, or the release `to`; return the hashes before and after.

    `to` is a hash or an address.

    Raises:
        RecipeError: no such release, or no release before the current one.
        EnvironmentProblem: its files are gone or changed, or the pointer cannot be written.
    """
    current = resolve_release(RELEASE_PREFIX + name).name if to is None else read_current(name)
    to = to and to.removeprefix(RELEASE_PREFIX).removeprefix(f"{name}@")
    target = to or replaced_by(name, current or "")
    others = [one.address for one in list_stored(name) if one.hash != current]
    if target is None:
        fix = f"Name one with --to: {', '.join(others)}." if others else "Promote another one: llmtune release RUN."
        raise RecipeError.of(f"no release was current before {current}", name, fix)
    folder = resolve_release(f"{RELEASE_PREFIX}{name}@{target}")
    if not is_complete(folder):
        fix = "Restore the folder from a copy, or release its run again."
        raise EnvironmentProblem.of("files of this release are missing or changed", str(folder), fix)
    with changing(name):
        current = read_current(name)
        _move_pointer(name, "rollback", current, target)
    return current or "", target


@contextmanager
def changing(name: str) -> Iterator[None]:
    """Lock the releases of a name against other processes; create their folder, and the rules for git."""
    folder = RELEASES / name
    refuse_links(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (RELEASES / ".gitignore").exists():
            write_text(RELEASES / ".gitignore", IGNORED)
        with exclusive(folder / ".lock", folder, fix="Wait for it, then enter the same command again."):
            yield


def _move_pointer(name: str, action: Literal["promote", "rollback"], before: str | None, after: str) -> None:
    """Add a line to the history, then replace the pointer: the moment at which the release serves."""
    if before == after:
        return
    line = Promotion(date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), action=action, before=before, after=after)
    path = RELEASES / name / HISTORY
    with path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        begin = "" if file.read() in (b"", b"\n") else "\n"  # a killed process may have written half a line
        file.write(f"{begin}{json.dumps(line)}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    write_text(RELEASES / name / CURRENT, after + "\n")


def is_complete(folder: Path) -> bool:
    """Return whether the files of a release have the content that was stored."""
    record = read_json(folder / RECORD_FILE)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict):
        return False
    return all((folder / name).is_file() and hash_file(folder / name) == sha256 for name, sha256 in files.items())


def sync_folder(folder: Path) -> None:
    """Sync the files of a folder to disk: a power cut must not leave a current release without content."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
