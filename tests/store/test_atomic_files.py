"""Test atomic writes, locks and hashes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtune.errors import EnvironmentProblem
from llmtune.store.atomic_files import (
    explained,
    hash_file,
    hash_folder,
    hash_lines,
    hash_value,
    read_json,
    read_once,
    staged,
    write_json,
)


def test_a_staged_folder_replaces_the_old_one_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with staged(target) as folder:
        (folder / "rows").write_text("first")
    with pytest.raises(ZeroDivisionError), staged(target) as folder:
        (folder / "rows").write_text(str(1 / 0))
    assert (target / "rows").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with staged(target) as folder:
        (folder / "rows").write_text("third")
    assert (target / "rows").read_text() == "third"


def test_two_processes_do_not_stage_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    path = f"pathlib.Path({str(target)!r})"
    code = f"import pathlib\nfrom llmtune.store.atomic_files import staged\nwith staged({path}): pass"
    with staged(target) as folder:
        (folder / "file").write_text("mine")
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"another llmtune process is using this folder: process {os.getpid()}" in other.stderr
    assert (target / "file").read_text() == "mine"
    with staged(target):
        pass
    assert not list(target.iterdir())


def test_values_not_allowed_in_json_become_null_or_text_and_a_damaged_file_reads_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(
        path, {"loss": float("nan"), "path": Path("a"), "pair": (1.5, float("inf")), "rest": [1, "x", None, True]}
    )
    kept = {"loss": None, "path": "a", "pair": [1.5, None], "rest": [1, "x", None, True]}
    assert read_json(path) == kept
    path.write_text(path.read_text()[:-3])
    assert read_json(path) is None


def test_the_hash_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = hash_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = hash_folder(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, hash_folder(tmp_path)}) == 3


def test_the_order_of_keys_does_not_change_a_hash() -> None:
    assert hash_value({"a": 1, "b": 2}) == hash_value({"b": 2, "a": 1})
    assert hash_value({"a": 1}) != hash_value({"a": 2})


def test_a_refused_permission_is_explained(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="--out"), explained(tmp_path):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x"))


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path, reads = tmp_path / "rows.jsonl", []

    def read(file: Path) -> int:
        reads.append(file)
        return file.stat().st_size

    path.write_text("one\n")
    assert [read_once(path, read), read_once(path, read)] == [4, 4]
    assert len(reads) == 1
    path.write_text("longer\n")
    assert read_once(path, read) == 7
    status = path.stat()
    time.sleep(0.02)  # longer than the clock of file times ticks
    path.write_text("LONGER\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    read_once(path, read)
    assert len(reads) == 3, "the same size and time of change, but other content"


@pytest.mark.parametrize(
    ("content", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"a\r\n\nb\n", 3), (b"PAR1\0\n", None)]
)
def test_lines_are_counted_in_text_only(tmp_path: Path, content: bytes, lines: int | None) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    assert hash_lines(path) == (hash_file(path), lines)


@pytest.mark.parametrize("name", ["folder", ".folder.new", ".folder.old"])
def test_staging_changes_nothing_behind_a_link(name: str, tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    (outside / "file").write_text("kept")
    (tmp_path / name).symlink_to(outside)
    with pytest.raises(EnvironmentProblem, match=f"a link to {outside}"), staged(tmp_path / "folder") as folder:
        (folder / "new").touch()
    assert (tmp_path / name).is_symlink()
    assert [path.name for path in outside.iterdir()] == ["file"]
