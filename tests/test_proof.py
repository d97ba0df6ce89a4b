"""`make proof`: a result is proven while no function that its test executed has changed; nothing is lost or overrun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import proof
from support.executed import ROOT, Code, unpack
from support.proof import Entry, Ledger, read_ledger, write_ledger

PROJECT = {
    "llmtune/__init__.py": "",
    "llmtune/limits.py": "FIRST = 2\nLIMIT = FIRST + 1\nOTHER = 5\n",
    "llmtune/numbers.py": """
from llmtune.limits import LIMIT, OTHER

def count(value):
    '''Count.'''
    return min(value, LIMIT)

def unused():
    return OTHER

class Box:
    size = 4

    def open(self):
        return self.size

if __name__ == "__main__":
    print(Box().open())
""",
    "tests/test_slow.py": """
import functools, pathlib, subprocess, sys, time
import pytest
from llmtune.numbers import count

pytestmark = pytest.mark.slow

@pytest.fixture(scope="module")
def counted():
    return count(7)

@pytest.mark.parametrize("place", [1, 2])
def test_fixture(counted, place):
    assert counted == 3

@pytest.fixture(scope="module")
def made():
    return functools.cache(count)

@pytest.mark.parametrize("place", [1, 2])
def test_made(made, place):
    assert made(9) == 3

def test_child():
    assert subprocess.check_output([sys.executable, "-m", "llmtune.numbers"]) == b"4\\n"

def test_nothing():
    pass

@pytest.mark.parametrize("number", range(4))
def test_waits(number):
    time.sleep(0.5)

def test_fails():
    assert not pathlib.Path("failing").exists()
""",
    "pytest.ini": "[pytest]\nmarkers =\n  slow\n  promise\n  gpu\naddopts = --import-mode=importlib\n",
    "benchmarks/same.py": "RUNS, STATIC = {}, ()\n",
    "docs/page.md": "",
}
SHARED = {"fixture", "made"}
CHANGES = {
    "a comment and a docstring": ("numbers.py", ("'''Count.'''", "'''Return a number.'''  # new"), set()),
    "a function that no test executes": ("numbers.py", ("return OTHER", "return OTHER + 1"), set()),
    "a value that such a function reads": ("limits.py", ("OTHER = 5", "OTHER = 6"), set()),
    "a function that only the first test executes": (
        "numbers.py",
        ("min(value, LIMIT)", "min(LIMIT, value)"),
        SHARED,
    ),
    "a value that a value of another module is made of": (
        "limits.py",
        ("FIRST = 2", "FIRST = 1 + 1"),
        SHARED,
    ),
    "a function that a child executes": ("numbers.py", ("return self.size", "return self.size + 0"), {"child"}),
    "a field of its class": ("numbers.py", ("size = 4", "size = 2 + 2"), {"child"}),
}


def start(project: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), str(project)])
    kept = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("COVERAGE_")}
    environment = {**kept, "PROOF_ROOT": str(project), "PYTHONPATH": paths, **variables}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # for speed
    command = [sys.executable, "-m", "support.proof", *arguments]
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results_of(project: Path) -> Ledger:
    ledger, _ = read_ledger(project / "docs/proof.json")
    return {name.partition("::")[2]: entry for name, entry in ledger.items() if "::" in name}


def make(folder: Path) -> Path:
    for name, text in PROJECT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make(tmp_path_factory.mktemp("proven"))
    said, _ = start(project, "run", "--minutes", "5").communicate()
    assert {entry.outcome for entry in results_of(project).values()} == {"passed"}, said
    return project


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_is_stale_once_a_function_that_it_executed_has_changed(
    change: str, proven: Path, tmp_path: Path
) -> None:
    file, (before, after), wanted = CHANGES[change]
    project = shutil.copytree(proven, tmp_path / "project")
    path = project / "llmtune" / file
    path.write_text(path.read_text().replace(before, after))
    code = Code(project)
    states = {name: entry.find_state(code) for name, entry in results_of(project).items()}
    stale = {name.removeprefix("test_").partition("[")[0] for name, state in states.items() if state == "stale"}
    assert stale == wanted
    assert {state for name, state in states.items()} <= {"proven", "stale"}


def test_a_change_of_the_test_itself_makes_its_result_stale(proven: Path, tmp_path: Path) -> None:
    project = shutil.copytree(proven, tmp_path / "project")
    path = project / "tests/test_slow.py"
    path.write_text(path.read_text().replace("    pass\n", "    assert True\n"))
    code = Code(project)
    assert [name for name, entry in results_of(project).items() if entry.find_state(code) == "stale"] == [
        "test_nothing"
    ]


def test_two_runs_of_one_ledger_keep_the_results_of_both(tmp_path: Path) -> None:
    code, path = Code(make(tmp_path)), tmp_path / "ledger"
    first, second = (
        proof.Proof({"a": Entry("a", "slow"), "b": Entry("b", "slow")}, code, 0, path, tmp_path) for _ in "ab"
    )
    for run, test in ((first, "a"), (second, "b"), (first, "")):
        if test:
            run.record({"test": test, "outcome": "passed", "date": proof.now()})
        run.save()
    assert [entry.outcome for entry in read_ledger(path)[0].values()] == ["passed", "passed"]


@pytest.mark.slow
def test_a_run_killed_three_times_keeps_its_results_and_completes(tmp_path: Path) -> None:
    project, done = make(tmp_path), []
    for _ in range(3):
        process = start(project, "run", "--minutes", "5", "--only", "waits")
        limit, before = time.monotonic() + 60, count_passed(project)
        while count_passed(project) == before and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done.append(count_passed(project))
    assert done[0] < done[1] <= 4, "each run must go on from the one before"
    said, _ = start(project, "run", "--minutes", "5", "--only", "waits").communicate()
    assert [entry.outcome for name, entry in results_of(project).items() if "waits" in name] == ["passed"] * 4, said


def count_passed(project: Path) -> int:
    """Count results in the ledger and in the journals of killed runs."""
    journals = "".join(path.read_text() for path in project.glob("build/proof/*.jsonl"))
    ledger = sum(entry.outcome == "passed" for entry in results_of(project).values())
    return ledger + journals.count('"passed"')


def test_nothing_starts_that_does_not_fit_and_what_overruns_the_minutes_is_killed(tmp_path: Path) -> None:
    entries = [Entry("tests/long.py::test", "slow", "passed", 60), Entry("tests/short.py::test", "slow", "passed", 1)]
    ledger = {entry.test: entry for entry in entries}
    run = proof.Proof(ledger, Code(make(tmp_path)), time.time() + 60, tmp_path / "ledger", tmp_path)
    assert [entry.test for entry in run.choose()] == ["tests/short.py::test"]
    run.until = time.time()
    sleeping = proof.start(["sleep", "600"])
    assert run.wait(sleeping) is None
    assert sleeping.returncode == -signal.SIGKILL
    journal = tmp_path / "journal"
    journal.write_text('{"test": "tests/short.py::test", "outcome": "started", "date": "2026-12-01T12:00"}\n')
    run.absorb(journal, "killed")
    assert ledger["tests/short.py::test"].outcome == "passed"
    assert run.choose() == [], "next time it needs all the seconds after which it was killed"


def test_a_test_that_ends_its_process_has_failed(tmp_path: Path) -> None:
    ledger = {"a": Entry("a", "slow")}
    run = proof.Proof(ledger, Code(make(tmp_path)), 0, tmp_path / "ledger", tmp_path)
    (tmp_path / "journal").write_text('{"test": "a", "outcome": "started", "date": "2026-12-01T12:00"}\n')
    run.absorb(tmp_path / "journal", "exit code -11")
    assert read_ledger(tmp_path / "ledger")[0]["a"].outcome == "failed"


def test_a_failure_fails_the_run_and_with_ci_set_nothing_is_written(proven: Path, tmp_path: Path) -> None:
    project = shutil.copytree(proven, tmp_path / "project")
    (project / "failing").touch()
    before = hash_tree(project)
    said, _ = (process := start(project, "run", "--minutes", "5", "--only", "fails", CI="true")).communicate()
    assert process.returncode == 1
    assert "failed: tests/test_slow.py::test_fails" in said
    assert hash_tree(project) == before


def hash_tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path): path.read_bytes() for path in files}


def test_the_check_fails_on_a_failed_result_and_counts_the_old_and_the_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, old = Code(make(tmp_path)), "2026-01-01"
    ledger = {"a": Entry("a", "slow", "passed", date=old, hash="other"), "b": Entry("b", "slow")}
    ledger["c"] = Entry("c", "slow", "passed", date=old, hash=code.hash(""))
    assert proof.check(ledger, code) == 0
    assert "1 results stale for more than 14 days, 1 never run" in capsys.readouterr().out
    ledger["d"] = Entry("d", "slow", "failed", date=old, commit="abc")
    assert proof.check(ledger, code) == 1
    assert "failed at abc (2026-01-01): d" in capsys.readouterr().err


def test_the_later_result_counts_when_ledgers_merge_also_in_git(tmp_path: Path) -> None:
    def write(path: Path, day: str, **outcomes: str) -> None:
        entries = {test: Entry(test, "slow", outcome[:-1], date=outcome[-1]) for test, outcome in outcomes.items()}
        write_ledger(entries, {"date": day, "counts": {}}, path)

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    ledger, theirs = tmp_path / "docs" / "proof.json", tmp_path / "theirs.json"
    ledger.parent.mkdir()
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    git("init", "-b", "main")
    for branch, day, outcomes in (
        ("main", "1", {"a": "passed1", "b": "passed1"}),
        ("theirs", "3", {"a": "failed2", "b": "failed3", "c": "skipped4"}),
        ("ours", "2", {"a": "passed3", "b": "passed2"}),
    ):
        git(*(["checkout", "-b", branch, "main"] if branch != "main" else ["add", ".gitattributes"]))
        write(ledger, day, **outcomes)
        git("add", "docs")
        git("commit", "-m", branch)
    write(theirs, "3", a="failed2", b="failed3", c="skipped4")
    wanted = {"a": "passed", "b": "failed", "c": "skipped"}
    git("merge", "theirs")
    results, counts = read_ledger(ledger)
    assert {name: entry.outcome for name, entry in results.items()} == wanted
    assert counts["date"] == "3"
    git("reset", "--hard", "HEAD~1")
    proof.merge(theirs, ledger)
    assert {name: entry.outcome for name, entry in read_ledger(ledger)[0].items()} == wanted


def test_the_never_run_come_first_then_the_oldest_and_the_shortest_of_one_day(tmp_path: Path) -> None:
    code = Code(make(tmp_path))
    same = code.hash("")
    entries = [
        Entry("new", "slow", "passed", 5, "2026-12-03", hash=same),
        Entry("stale", "slow", "passed", 5, "2026-12-02T10:00", hash="other"),
        Entry("short", "slow", "passed", 1, "2026-12-02T11:00", hash="other"),
        Entry("failed", "slow", "failed", 1, "2026-12-01", hash="other"),
        Entry("never", "slow"),
    ]
    run = proof.Proof({entry.test: entry for entry in entries}, code, 0, tmp_path, tmp_path)
    assert [entry.test for entry in sorted(entries, key=run.order)] == ["never", "failed", "short", "stale", "new"]
    assert [*unpack("")] == []
