"""Lists and runs tests for the ledger of proof, in a process of its own.

python -m support.recorder list FILE TEST_FILE ...   write the slow tests and those of promises, with their kinds
python -m support.recorder run PLAN                  run the tests of a plan, and write their results into its journal
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from support.executed import Tracer, pack


def now() -> str:
    """Return the time of a result, in minutes."""
    return datetime.now(UTC).isoformat(timespec="minutes").removesuffix("+00:00")


def write_list(path: str, files: Iterable[str]) -> int:
    """Write the tests of these files that belong into the ledger, with their kinds."""

    class Lister:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            Path(path).write_text(json.dumps([(item.nodeid, kind(item)) for item in session.items]))

    marked = ["-m", "(slow or promise) and not gpu", "--collect-only", "-qq"]
    return int(pytest.main([*marked, *files], plugins=[Lister()]))


def kind(item: pytest.Item) -> str:
    if item.nodeid.startswith("tests/torture/"):
        return "torture"
    return "promise" if item.get_closest_marker("promise") else "slow"


class Recorder:
    """Runs chosen tests in the given order while there is time; writes each result with the code that it executed."""

    def __init__(self, plan: dict[str, Any], folder: Path) -> None:
        self.until, self.parent, self.seconds = plan["until"], plan["parent"], dict(plan["tests"])
        self.journal, self.tracer = Path(plan["journal"]), Tracer(folder)
        self.executed: dict[str, set[str]] = defaultdict(set)
        """By test, fixture that tests share, and call of a function that such a fixture returns."""
        self.reports: list[pytest.TestReport] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.seconds]

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """Record what is executed under a name, also if it was before; it counts for the test or fixture around it."""
        around = self.tracer.switch(name)
        try:
            yield
        finally:
            self.tracer.switch(around)
            self.executed[name] |= self.tracer.read(name)
            self.executed[around] |= self.executed[name]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request) -> Iterator[None]:
        """Record what tests share apart from the test that is the first to need it."""
        name = f"{fixturedef.baseid}::{fixturedef.argname}"
        if fixturedef.scope == "function":
            return (yield)
        with self.record(name):
            made = yield
        if inspect.isroutine(made) or hasattr(made, "cache_info"):
            made, (_, key, _) = self.remember(made, name), fixturedef.cached_result
            fixturedef.cached_result = made, key, None
        return made

    def remember(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a function that a fixture returns, as it may keep what it makes for further tests."""

        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> Any:
            with self.record(f"{name} {args} {kwargs}"):
                return function(*args, **kwargs)

        return call

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        late = time.time() + self.seconds[item.nodeid] > self.until or os.getppid() != self.parent
        if not late:
            self.item, self.reports = item, []
            self.write(test=item.nodeid, outcome="started", date=now())
            self.tracer.switch(item.nodeid)
        return True if late else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tracer.switch("")
        fixtures = {name: name.rpartition("::") for name in self.executed if " " not in name}
        shared = [n for n, (base, _, f) in fixtures.items() if nodeid.startswith(base) and f in self.item.fixturenames]
        executed = self.tracer.read(nodeid).union(self.executed.pop(nodeid, ()), *map(self.executed.get, shared))
        bad = [report for report in self.reports if report.outcome != "passed" and not hasattr(report, "wasxfail")]
        self.write(
            test=nodeid,
            outcome="failed" if any(report.failed for report in bad) else "skipped" if bad else "passed",
            seconds=round(sum(report.duration for report in self.reports), 1),
            date=now(),
            code=pack(executed),
            why="\n".join(str(report.longrepr)[-4000:] for report in bad if report.failed),
        )

    def write(self, **line: object) -> None:
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_plan(plan: Path) -> int:
    """Run the tests of a plan."""
    del os.environ["PYTHONPATH"]  # it was for this module; tests start processes without it
    chosen = json.loads(plan.read_text())
    files = dict.fromkeys(test.partition("::")[0] for test in chosen["tests"])
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(chosen, Path(folder))
        return int(pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[recorder]))


if __name__ == "__main__":
    what, path, *rest = sys.argv[1:]
    sys.exit(write_list(path, rest) if what == "list" else run_plan(Path(path)))
