"""The matrix of promises: a cell per promise and place, from the marks of tests and `tests/promises.toml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
Cells = dict[tuple[str, str], list[dict[str, Any]]]
"""(place, promise) -> what tests and reasons state about it."""


def promise_tables() -> tuple[str, list[str]]:
    """Return the generated part of the page, and its faults: empty cells, unknown ones and contradictions."""
    sys.path.insert(0, str(TESTS))
    from support.promise_tables import TABLES

    recorded = json.loads((ROOT / "docs/promises.json").read_text(encoding="utf-8"))
    cells: dict[str, Cells] = defaultdict(lambda: defaultdict(list))
    for cell in _list_cells():
        cells[cell["table"]][cell["place"], cell["promise"]].append(cell)
    faults = [f"unknown table {name}" for name in cells.keys() - TABLES.keys()]
    lines = list[str]()
    for name, (title, places, promises) in TABLES.items():
        wanted = {(place, promise) for place in places for promise in promises}
        faults += [
            f"{name}: nothing holds {promise!r} of {place!r}" for place, promise in sorted(wanted - {*cells[name]})
        ]
        faults += [
            f"{name}: no such cell: {place!r}, {promise!r}" for place, promise in sorted({*cells[name]} - wanted)
        ]
        faults += [
            f"{name}: {promise!r} of {place!r} is both promised and not promised"
            for (place, promise), entries in sorted(cells[name].items())
            if len({entry["outcome"] == "not promised" for entry in entries}) > 1
        ]
        lines += _table(title, places, promises, cells[name], recorded)
    return "\n".join(lines), faults


def _list_cells() -> list[dict[str, Any]]:
    paths = os.pathsep.join(filter(None, [str(TESTS), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "support.promises", "list"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    cells: list[dict[str, Any]] = json.loads(done.stdout)
    return cells


def _table(
    title: str, places: list[str], promises: tuple[str, ...], cells: Cells, recorded: dict[str, Any]
) -> Iterator[str]:
    notes = dict[str, int]()
    rows = list[str]()
    for place in places:
        columns = [_cell(cells.get((place, promise), []), notes, recorded) for promise in promises]
        rows.append(f"| {place} | {' | '.join(columns)} |")
    tests = {test for entries in cells.values() for entry in entries for test in entry["tests"]}
    results = [recorded[test] for test in sorted(tests & recorded.keys())]
    yield f"## {title}\n"
    if results:
        commits = ", ".join(sorted({f"{one['commit']} ({one['date']})" for one in results}))
        seconds = sum(one["seconds"] for one in results)
        yield f"{len(places) * len(promises)} cells, {len(results)} tests, {seconds:,.0f} seconds, at {commits}.\n"
    yield f"| | {' | '.join(promises)} |"
    yield f"|---|{'---|' * len(promises)}"
    yield from rows
    yield ""
    yield from (f"{number}. {words}" for words, number in notes.items())
    yield ""


def _cell(entries: list[dict[str, Any]], notes: dict[str, int], recorded: dict[str, Any]) -> str:
    """Return the words of one cell, with the numbers of its notes."""
    if not entries:
        return ""
    tests = [test for entry in entries for test in entry["tests"]]
    outcomes = {recorded[test]["outcome"] if test in recorded else "not run" for test in tests}
    state = next((word for word in ("failed", "not run", "skipped") if word in outcomes), "")
    words = " and ".join(dict.fromkeys(entry["outcome"] for entry in entries))
    numbers = sorted({notes.setdefault(entry["words"], len(notes) + 1) for entry in entries})
    return f"{words}{f' (**{state}**)' if state else ''} {', '.join(map(str, numbers))}"
