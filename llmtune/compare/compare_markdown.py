"""A comparison as Markdown, for a README, a CI summary or a comment on a merge request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.compare.compare_view import make_view
from llmtune.report.report_markdown import code, plain, table


def to_markdown(made: Mapping[str, Any]) -> str:
    """Return what the comparison says, costs, scores and pairs; free text stands in code spans and stays text."""
    view = make_view(made)
    parts = [
        f"# {plain(view['name'])}, compared",
        " · ".join(f"{name} {code(value)}" for name, value in view["chips"]),
        "\n".join(f"- {plain(told)}" for told in (*view["told"], *view["notes"])),
        costs(view),
        scores(view),
        *map(pair, view["pairs"]),
        gates(view),
        f"Made by llmtune {plain(view['version'])}; `compare.html` beside this file has all of it, with pictures.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def costs(view: Mapping[str, Any]) -> str:
    """A row a cost, a column a run."""
    rows = [[row["title"], *(cell["text"] for cell in row["cells"])] for row in view["costs"]]
    return "## Costs\n\n" + table(["", *map(code, view["runs"])], rows)


def scores(view: Mapping[str, Any]) -> str:
    """A row for each metric of each run."""
    rows = [
        [code(row["metric"]), code(cell["name"]), cell["base"], cell["tuned"], cell["change"], cell["interval"]]
        for row in view["metrics"]
        for cell in row["cells"]
    ]
    return "## Scores\n\n" + table(["metric", "run", "base", "tuned", "gain over base", "95 % interval"], rows)


def pair(found: Mapping[str, Any]) -> str:
    """Two runs on the same rows."""
    rows = [
        [code(row["metric"]), row["change"], "too few rows" if row["few"] else row["interval"], row["p"], row["n"]]
        for row in found["rows"]
    ]
    head = f"## {plain(found['second'])} minus {plain(found['first'])}: {plain(found['word'])}"
    left = [f"{code(metric)} is left out: {plain(why)}." for metric, why in found["left_out"]]
    return "\n\n".join(
        [head, plain(found["reason"]), table(["metric", "difference", "95 % interval", "p", "rows"], rows), *left]
    )


def gates(view: Mapping[str, Any]) -> str:
    """What became of the gates of each run."""
    rows = [
        [code(name), code(gate["name"]), "✅ passed" if gate["passed"] else "❌ failed", code(gate["got"])]
        for name, gate in view["gates"]
    ]
    return "## Gates\n\n" + table(["run", "gate", "", "got"], rows) if rows else ""
