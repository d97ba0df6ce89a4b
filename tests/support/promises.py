"""The matrix of promises: which test holds which cell, and what the last run of all of them showed.

python -m support.promises list    print each cell with its tests, as JSON
python -m support.promises run     run the tests of all cells, or of those that pytest's arguments select; record them
"""

import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent.parent
RECORD = TESTS.parent / "docs" / "promises.json"
REASONS = TESTS / "promises.toml"
MARK = "promise"


@dataclass(frozen=True)
class Cell:
    """One promise at one place: held by tests, or by the reason why it is not made."""

    table: str
    place: str
    promise: str
    outcome: str
    """`equal`, `refused` or `not promised`."""
    words: str
    """Equal to what and within what; or the reason."""
    tests: list[str] = field(default_factory=list)


def read_reasons() -> list[Cell]:
    """The cells that are not promised. A place or promise may be a list."""
    cells = []
    for entry in tomllib.loads(REASONS.read_text()).get("not_promised", []):
        places, promises = (one if isinstance(one, list) else [one] for one in (entry["place"], entry["promise"]))
        cells += [
            Cell(entry["table"], place, promise, "not promised", entry["reason"])
            for place in places
            for promise in promises
        ]
    return cells


def read_marks(item: pytest.Item) -> Iterator[Cell]:
    """The cells that one test holds. Its place is the parameter named after the table, or as its mark says."""
    from support.task_cases import place_of  # imports transformers, which pytest wants to be the first to do

    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers(MARK):
        table, promise = mark.args
        words = dict(mark.kwargs)
        place = words.pop("place", None) or parameters[words.pop("by", table)]
        ((outcome, text),) = words.items()
        assert outcome in ("equal", "refused"), f"{item.nodeid}: {outcome}"
        for one in place if isinstance(place, tuple) else (place,):
            one = place_of(one) if table == "task" else str(one)
            yield Cell(table, one, promise, outcome, text, [item.nodeid])


class Collector:
    """Collects the cells of all tests; with `record` also their outcomes and seconds."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.results: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.cells += [cell for item in items for cell in read_marks(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        one = self.results.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        one["seconds"] += report.duration
        if report.outcome != "passed":
            one["outcome"] = report.outcome


def marked_files() -> list[str]:
    """The test files that hold a cell: importing the others would take a minute."""
    return [str(path) for path in sorted(TESTS.rglob("test_*.py")) if f"mark.{MARK}(" in path.read_text()]


def collect(arguments: Sequence[str]) -> Collector:
    """Run pytest on all tests that hold a cell."""
    collector = Collector()
    code = pytest.main(["-q", "-m", MARK, *arguments, *marked_files()], plugins=[collector])
    assert code not in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR), code
    if code == pytest.ExitCode.INTERRUPTED and not collector.results:
        raise SystemExit("interrupted, or a module could not be collected")  # what ran before Ctrl-C is recorded
    return collector


def record(arguments: Sequence[str]) -> int:
    """Run the tests and add their outcomes to the record, each with its commit and date."""
    git = ["git", "-C", str(TESTS), "rev-parse", "--short=8", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    started, collector = time.time(), collect(arguments)
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for test, result in collector.results.items():
        seconds = round(result["seconds"], 1)
        known[test] = {**result, "seconds": seconds, "commit": commit, "date": date.today().isoformat()}
    known = {test: known[test] for test in sorted(known)}
    RECORD.write_text(json.dumps(known, indent=1) + "\n")
    failed = [test for test, result in collector.results.items() if result["outcome"] == "failed"]
    print(f"{len(collector.results)} tests in {time.time() - started:.0f} s, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "run":
        sys.exit(record(rest))
    stdout, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps([vars(cell) for cell in [*collect(["--collect-only"]).cells, *read_reasons()]]), file=stdout)
