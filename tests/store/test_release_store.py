"""The store of releases: one pointer, replaced by one rename; a kill at any point leaves the old release current."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.store.atomic_files import hash_file, write_json
from llmtune.store.release_store import (
    CURRENT,
    HISTORY,
    RELEASES,
    list_release_names,
    list_stored,
    promote,
    read_history,
    resolve_release,
    rollback,
)

FIRST, SECOND, THIRD = "11111111", "22222222", "33333333"


def fill(text: str) -> Callable[[Path], None]:
    """Return a function that writes a release with these weights."""

    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text(text)
        write_json(folder / "release.json", {"files": {"adapter/weights": hash_file(folder / "adapter" / "weights")}})

    return write


def serving(address: str = "release:tickets") -> str:
    """Return the weights at an address."""
    return (resolve_release(address) / "adapter" / "weights").read_text()


def test_the_newest_promotion_serves_and_older_releases_stay_addressable(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))
    promote("tickets", SECOND, fill("two"))
    assert (serving(), serving(f"release:tickets@{FIRST}")) == ("two", "one")
    assert [(one.hash, one.current) for one in list_stored("tickets")] == [(FIRST, False), (SECOND, True)]
    assert list_release_names() == ["tickets"]
    assert [(one["before"], one["after"]) for one in read_history("tickets")] == [(None, FIRST), (FIRST, SECOND)]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("release:ticket", "Did you mean 'tickets'?"),
        ("release:tickets@99999999", f"Name one of: release:tickets@{FIRST}."),
        ("release:tickets@zz", "8 digits"),
        ("release:../tickets", "not the address of a release"),
        ("release:", "not the address of a release"),
    ],
)
def test_a_release_that_does_not_exist_is_an_error_with_candidates(here: Path, address: str, message: str) -> None:
    promote("tickets", FIRST, fill("one"))
    with pytest.raises(RecipeError) as refused:
        resolve_release(address)
    assert message in str(refused.value)


def test_without_any_release_the_error_says_how_to_make_one(here: Path) -> None:
    with pytest.raises(RecipeError, match="llmtune release RUN"):
        resolve_release("release:tickets")


def test_rollbacks_go_back_promotion_by_promotion_and_never_to_a_withdrawn_release(here: Path) -> None:
    for digest in (FIRST, SECOND, THIRD):
        promote("tickets", digest, fill(digest))
    assert rollback("tickets") == (THIRD, SECOND)
    assert rollback("tickets") == (SECOND, FIRST)
    with pytest.raises(RecipeError, match="no release was current before 11111111") as refused:
        rollback("tickets")
    assert f"release:tickets@{THIRD}" in str(refused.value)
    assert rollback("tickets", f"release:tickets@{THIRD}") == (FIRST, THIRD)
    assert serving() == THIRD
    assert rollback("tickets", FIRST) == (THIRD, FIRST)


def test_a_release_promoted_again_is_not_copied_again(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))
    promote("tickets", SECOND, fill("two"))
    promote("tickets", FIRST, fill("not written"))
    assert serving() == "one"
    assert promote("tickets", FIRST, fill("not written")) == resolve_release("release:tickets")
    assert len(read_history("tickets")) == 3


def test_a_release_whose_files_are_gone_is_not_rolled_back_to_and_is_stored_again_when_promoted(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))
    promote("tickets", SECOND, fill("two"))
    (resolve_release(f"release:tickets@{FIRST}") / "adapter" / "weights").unlink()  # as after a git clone
    with pytest.raises(EnvironmentProblem, match="missing or changed"):
        rollback("tickets")
    assert serving() == "two"
    promote("tickets", FIRST, fill("one"))
    assert serving() == "one"


def test_a_promotion_is_refused_if_another_release_became_current_since_the_gates(here: Path) -> None:
    promote("tickets", FIRST, fill("one"), replaces=None)
    promote("tickets", SECOND, fill("two"), replaces=FIRST)
    with pytest.raises(RecipeError, match="tickets is at 22222222 now, but the gates compared with 11111111"):
        promote("tickets", THIRD, fill("three"), replaces=FIRST)
    assert serving() == "two"
    promote("tickets", SECOND, fill("two"), replaces=FIRST)  # the same command again


def test_an_edited_pointer_is_an_error_and_a_damaged_line_of_history_is_skipped(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))
    history = here / "releases" / "tickets" / HISTORY
    history.write_text(history.read_text() + '{"before": ')
    promote("tickets", SECOND, fill("two"))
    assert rollback("tickets") == (SECOND, FIRST)
    (here / "releases" / "tickets" / CURRENT).write_text("../../etc")
    with pytest.raises(EnvironmentProblem, match="is not the hash of a release"):
        resolve_release("release:tickets")


def test_git_gets_records_pointers_and_histories_but_no_weights(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "releases"], check=True)
    listed = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.split()
    names = [".gitignore", f"tickets/{FIRST}/release.json", "tickets/current", "tickets/history.jsonl"]
    assert listed == [f"releases/{name}" for name in names]


STAGES = {
    "before the copy": ("pathlib.Path", "mkdir"),
    "in the copy": ("os", "fsync"),
    "before the folder's rename": ("pathlib.Path", "rename"),
    "before the history": ("json", "dumps"),
    "before the pointer": ("llmtune.store.release_store", "write_text"),
    "before the pointer's rename": ("pathlib.Path", "replace"),
}
KILLED = """
import importlib, os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from store.test_release_store import fill
from llmtune.store import release_store
place, _, name = {function!r}.rpartition(".")
module, _, kind = place.rpartition(".")
owner = Path if kind == "Path" else importlib.import_module(place)
setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
{call}
"""


def kill_at(stage: str, call: str) -> None:
    """Run a call in a process that is killed when it reaches a stage."""
    owner, name = STAGES[stage]
    code = KILLED.format(path=[str(Path(__file__).parents[1])], function=f"{owner}.{name}", call=call)
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize("stage", STAGES)
def test_a_release_killed_at_any_stage_leaves_the_old_one_and_the_same_call_completes(here: Path, stage: str) -> None:
    promote("tickets", FIRST, fill("one"))
    kill_at(stage, f"release_store.promote('tickets', {SECOND!r}, fill('two'))")
    assert serving() == "one"
    promote("tickets", SECOND, fill("two"))
    assert serving() == "two"
    assert rollback("tickets") == (SECOND, FIRST)
    assert not [path for path in (here / "releases" / "tickets").iterdir() if path.name.endswith((".new", ".old"))]


@pytest.mark.parametrize("stage", [stage for stage in STAGES if "copy" not in stage and "folder" not in stage])
def test_a_rollback_killed_at_any_stage_leaves_the_newer_one_and_the_same_call_completes(
    here: Path, stage: str
) -> None:
    promote("tickets", FIRST, fill("one"))
    promote("tickets", SECOND, fill("two"))
    kill_at(stage, "release_store.rollback('tickets')")
    assert serving() == "two"
    assert rollback("tickets") == (SECOND, FIRST)
    assert serving() == "one"


def test_a_second_process_that_releases_under_the_same_name_is_refused(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))

    def release_inside(folder: Path) -> None:
        fill("two")(folder)
        with pytest.raises(EnvironmentProblem, match="another llmtune process"):
            promote("tickets", THIRD, fill("three"))
        promote("invoices", THIRD, fill("three"))  # other names are free

    promote("tickets", SECOND, release_inside)
    assert (serving(), serving("release:invoices")) == ("two", "three")


def test_a_full_disk_leaves_the_old_release(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promote("tickets", FIRST, fill("one"))

    def fill_up(folder: Path) -> None:
        fill("two")(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem, match="disk"):
        promote("tickets", SECOND, fill_up)
    assert serving() == "one"
    assert [one.hash for one in list_stored("tickets")] == [FIRST]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_an_error_with_its_path(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))
    (here / "releases" / "tickets").chmod(0o500)
    try:
        with pytest.raises(LlmtuneError, match="releases/tickets"):
            promote("tickets", SECOND, fill("two"))
    finally:
        (here / "releases" / "tickets").chmod(0o700)
    assert serving() == "one"


def test_the_history_is_one_json_object_a_line(here: Path) -> None:
    promote("tickets", FIRST, fill("one"))
    lines = (here / "releases" / "tickets" / HISTORY).read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["promote"]


def test_of_an_endless_history_the_last_lines_are_read(here: Path) -> None:
    line = {"date": "2026-01-01T00:00:00Z", "action": "promote", "before": None, "after": "aaaaaaaa"}
    history = RELEASES / "tiny" / HISTORY
    history.parent.mkdir(parents=True)
    with history.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for _ in range(50_000))
        file.write(json.dumps(line | {"after": "bbbbbbbb"}) + "\n")
    read = read_history("tiny")
    assert 5000 < len(read) < 20_000
    assert read[-1]["after"] == "bbbbbbbb"
