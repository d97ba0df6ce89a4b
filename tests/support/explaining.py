"""`llmtune explain` as a user calls it: commands, their JSON output, their errors, and their pages."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner, Result

from llmtune.cli.app import app
from llmtune.explain.explainer import Target, open_target
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from support.rows import write_jsonl
from support.runs import write_recipe

ANSWERED = [
    {
        "messages": [
            {"role": "user", "content": f"Which colour has number {i}?"},
            {"role": "assistant", "content": "blue"},
        ]
    }
    for i in range(40)
]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def open_quietly(folder: Path) -> Target:
    return open_target(str(folder), quiet(), offline=True)


def explain(command: str, *arguments: object, columns: int = 140) -> Result:
    words = ["explain", command, *map(str, arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": str(columns)})


def values_of(result: Result) -> dict[str, Any]:
    """Return the output of a command with --json."""
    assert result.exit_code == 0, (result.stderr, result.exception)
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def expect(result: Result, code: int, *words: str) -> None:
    """Check the exit code and the text on stderr, which must not have a traceback."""
    shown = " ".join(result.stderr.split())
    assert result.exit_code == code, (result.exit_code, shown, result.exception)
    assert "Traceback" not in shown
    for word in words:
        assert word in shown, shown


def page_data(path: Path) -> dict[str, Any]:
    """Return the JSON that a page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def train(folder: Path, model: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    """Run a recipe on rows; returns the run folder."""
    recipe = write_recipe(folder / "tiny.yaml", model, write_jsonl(folder / "rows.jsonl", rows), **sections)
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=folder / "run"), quiet())
    return folder / "run"
