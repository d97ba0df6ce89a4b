"""The matrix of promises: which test holds which cell of docs/promises.md.

python -m support.promises    print each cell with its tests, as JSON
"""

import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
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
    """Collects the cells of all tests."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.cells += [cell for item in items for cell in read_marks(item)]


def collect() -> list[Cell]:
    """Collect the cells of the test files that hold one: importing the others would take a minute."""
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if f"mark.{MARK}(" in path.read_text()]
    collector = Collector()
    code = pytest.main(["-q", "-m", MARK, "--collect-only", *files], plugins=[collector])
    assert code == pytest.ExitCode.OK, code
    return collector.cells


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps([vars(cell) for cell in [*collect(), *read_reasons()]]), file=stdout)
