"""The matrix of promises: a cell per promise and place, from the marks of tests and `tests/promises.toml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.proof import Entry

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
Cells = dict[tuple[str, str], list[dict[str, Any]]]
"""(place, promise) -> what tests and reasons state about it."""


def promise_tables() -> tuple[str, list[str]]:
    """Return the generated part of the page, and its faults: empty cells, unknown ones and contradictions."""
    sys.path.insert(0, str(TESTS))
    from support.promise_tables import TABLES
    from support.proof import read_ledger

    recorded, counts = read_ledger()
    cells: dict[str, Cells] = defaultdict(lambda: defaultdict(list))
    for cell in _list_cells():
        cells[cell["table"]][cell["place"], cell["promise"]].append(cell)
    faults = [f"unknown table {name}" for name in cells.keys() - TABLES.keys()]
    lines = [*_count_table(counts)]
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


def _count_table(counts: dict[str, Any]) -> Iterator[str]:
    """Yield how many results there were of each state, as of the last run of the ledger."""
    kinds = {"all": [sum(numbers) for numbers in zip(*counts["counts"].values(), strict=True)], **counts["counts"]}
    yield f"After the last `make proof`, at {counts['commit']} ({counts['date'][:10]}):\n"
    yield "| | proven | stale | failed | never run |\n|---|---:|---:|---:|---:|"
    yield from (f"| {kind} | {' | '.join(f'{number:,}' for number in numbers)} |" for kind, numbers in kinds.items())
    yield ""


def _list_cells() -> list[dict[str, Any]]:
    paths = os.pathsep.join(filter(None, [str(TESTS), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "support.promises"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    cells: list[dict[str, Any]] = json.loads(done.stdout)
    return cells


def _table(
    title: str, places: list[str], promises: tuple[str, ...], cells: Cells, recorded: dict[str, Entry]
) -> Iterator[str]:
    notes = dict[str, int]()
    rows = list[str]()
    for place in places:
        columns = [_cell(cells.get((place, promise), []), notes, recorded) for promise in promises]
        rows.append(f"| {place} | {' | '.join(columns)} |")
    tests = {test for entries in cells.values() for entry in entries for test in entry["tests"]}
    seconds = sum(recorded[test].seconds for test in tests & recorded.keys())
    yield f"## {title}\n"
    yield f"{len(places) * len(promises)} cells, {len(tests)} tests, {seconds:,.0f} seconds.\n"
    yield f"| | {' | '.join(promises)} |"
    yield f"|---|{'---|' * len(promises)}"
    yield from rows
    yield ""
    yield from (f"{number}. {words}" for words, number in notes.items())
    yield ""


def _cell(entries: list[dict[str, Any]], notes: dict[str, int], recorded: dict[str, Entry]) -> str:
    """Return the words of one cell, the date of its oldest result, and the numbers of its notes."""
    if not entries:
        return ""
    results = [recorded.get(test) for entry in entries for test in entry["tests"]]
    outcomes = {result.outcome if result else "never run" for result in results}
    state = next((f"**{word}**" for word in ("failed", "never run", "skipped") if word in outcomes), "")
    date = min((f"({result.date[:10]})" for result in results if result and result.date), default="")
    words = " and ".join(dict.fromkeys(entry["outcome"] for entry in entries))
    numbers = sorted({notes.setdefault(entry["words"], len(notes) + 1) for entry in entries})
    return " ".join(filter(None, [words, ", ".join(map(str, numbers)), state or date]))
